"""A connection to the coordinator."""

from __future__ import annotations

import json
import select
import socket
import threading
from collections.abc import Mapping
from typing import Any


class Link:
    """Sends and receives JSON objects, one per line, over a socket. Any thread may send; one receives."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._lock = threading.Lock()
        self._buffer = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message.

        Raises:
            OSError: if the connection is broken.
        """
        with self._lock:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """Return the next message, or None if none arrives within `timeout` seconds.

        Raises:
            OSError: if the connection is broken.
        """
        while b"\n" not in self._buffer:
            if not select.select([self._connection], [], [], timeout)[0]:
                return None
            received = self._connection.recv(1 << 16)
            if not received:
                raise ConnectionResetError("the coordinator closed the connection")
            self._buffer += received
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message
