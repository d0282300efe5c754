"""Opens and closes the sockets of a client connection, for both clients."""

import struct
from collections.abc import Sequence
from typing import Any

import zmq

from euryale.client import protocol

MAX_REPLY_BYTES = 64 << 20
# A client that is this many messages behind stops reading, and the server drops it for its missing heartbeats.
RECEIVE_HIGH_WATER = 100_000
SEND_HIGH_WATER = 1_000
RECONNECT_MS = 100


def open_sockets(context: zmq.Context[Any], address: str) -> tuple[zmq.Socket[Any], zmq.Socket[Any]]:
    """Returns a DEALER connected to ``address`` and its monitor; asyncio sockets if the context is a zmq.asyncio one.

    Raises ValueError for an invalid address.
    """
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.setsockopt(zmq.SNDHWM, SEND_HIGH_WATER)
    dealer.setsockopt(zmq.RCVHWM, RECEIVE_HIGH_WATER)
    dealer.setsockopt(zmq.MAXMSGSIZE, MAX_REPLY_BYTES)
    dealer.setsockopt(zmq.HEARTBEAT_IVL, protocol.HEARTBEAT_INTERVAL_MS)
    dealer.setsockopt(zmq.HEARTBEAT_TIMEOUT, protocol.HEARTBEAT_TIMEOUT_MS)
    dealer.setsockopt(zmq.HEARTBEAT_TTL, protocol.HEARTBEAT_TIMEOUT_MS)
    dealer.setsockopt(zmq.HANDSHAKE_IVL, protocol.HANDSHAKE_INTERVAL_MS)
    dealer.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    if address.startswith("tcp://["):
        dealer.setsockopt(zmq.IPV6, 1)
    # IMMEDIATE, or no reconnection, would discard what arrived before the connection broke.
    monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    monitor.linger = 0
    try:
        dealer.connect(address)
    except zmq.ZMQError as error:
        close_sockets(dealer, monitor)
        raise ValueError(f"cannot connect to {address!r}: {error}; use tcp://host:port or ipc://path") from None
    return dealer, monitor


def close_sockets(dealer: zmq.Socket[Any], monitor: zmq.Socket[Any]) -> None:
    """Closes both sockets at once and drops unsent messages."""
    dealer.disable_monitor()
    monitor.close(0)
    dealer.close(0)


def is_connected(frames: Sequence[bytes]) -> bool:
    """Decodes a monitor message: True for a finished handshake, False for a broken connection."""
    event, _ = struct.unpack("=hi", frames[0])
    return bool(event == zmq.EVENT_HANDSHAKE_SUCCEEDED)
