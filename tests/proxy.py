"""A TCP proxy in front of a server that can be made slow, deaf or treacherous while clients are connected."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from enum import Enum

CHUNK = 1 << 14


def _answer(status: str, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>{status}</Message></Error>"
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close"
    return f"{head}\r\n\r\n{body}".encode()


BUSY = _answer("503 Slow Down", "SlowDown")
FULL = _answer("507 Insufficient Storage", "InsufficientStorage")


class Mood(Enum):
    """What becomes of what is sent while it lasts."""

    FAITHFUL = "passed on"
    SLOW = "passed on, each piece a quarter of a second late"
    BUSY = "answered with 503 Slow Down"
    FULL = "what is to be written is answered with 507 Insufficient Storage, the rest passed on"
    CUT = "the connection is cut after the first bytes of a request"


class Proxy:
    """Listens on a port of its own. `mood` may be changed at any time, for connections that are open too."""

    def __init__(self, target_port: int) -> None:
        self.mood = Mood.FAITHFUL
        self.met: dict[Mood, int] = dict.fromkeys(Mood, 0)
        """How many pieces of requests met which mood: a fault that nobody met proves nothing."""
        self._target = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as server:
            threading.Thread(target=self._back, args=(server, client), daemon=True).start()
            while piece := client.recv(CHUNK):
                mood = self.mood
                self.met[mood] += 1
                if mood is Mood.BUSY:
                    client.sendall(BUSY)
                    return
                if mood is Mood.FULL and piece.startswith(b"PUT "):
                    client.sendall(FULL)
                    return
                if mood is Mood.CUT:
                    server.sendall(piece[: len(piece) // 2])
                    return
                if mood is Mood.SLOW:
                    time.sleep(0.25)
                server.sendall(piece)

    def _back(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while piece := server.recv(CHUNK):
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
