"""The server's side of the protocol, a process between the clients and the engine."""
