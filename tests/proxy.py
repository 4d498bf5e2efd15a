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
    CUT = "the connection is cut in the middle of what is to be written, the rest passed on"


class Proxy:
    """Listens on a port of its own. `mood` may be changed at any time, for connections that are open too."""

    def __init__(self, target_port: int) -> None:
        self.mood = Mood.FAITHFUL
        self.met: dict[Mood, int] = dict.fromkeys(Mood, 0)
        """How many pieces of requests, of CUT how many uploads, met which mood: what nobody met proves nothing."""
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
            uploading = False
            while piece := client.recv(CHUNK):
                mood = self.mood
                if mood is Mood.CUT:
                    # The body may come with the head or, after the server's "100 Continue", in pieces of its own.
                    body = piece.partition(b"\r\n\r\n")[2] if piece.startswith(b"PUT ") else piece if uploading else b""
                    if body:
                        self.met[mood] += 1
                        server.sendall(piece[: len(piece) - max(1, len(body) // 2)])
                        return
                    uploading = piece.startswith(b"PUT ")
                    server.sendall(piece)
                    continue
                self.met[mood] += 1
                if mood is Mood.BUSY:
                    client.sendall(BUSY)
                    return
                if mood is Mood.FULL and piece.startswith(b"PUT "):
                    client.sendall(FULL)
                    return
                if mood is Mood.SLOW:
                    time.sleep(0.25)
                server.sendall(piece)

    def _back(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while piece := server.recv(CHUNK):
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
