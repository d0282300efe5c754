"""The server's side of the protocol: a process of its own between clients and the engine."""
