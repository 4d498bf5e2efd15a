"""`/metrics`, `/healthz` and `/readyz` of a process, served by threads of it.

Without TLS or passwords: it is bound to this machine unless the settings say otherwise.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import REGISTRY, make_wsgi_app

from kontext_batch.errors import SettingsError
from kontext_batch.observability.health import Pulse, Readiness

log = structlog.get_logger(__name__)

READ_SECONDS = 10.0
"""How long a caller may take over its request."""
Start = Callable[..., Any]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that hung up is no news."""


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = READ_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Each scrape is no news."""


class Served:
    """A server at work; close it at the end."""

    def __init__(self, server: WSGIServer) -> None:
        self._server = server
        self._thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(*, host: str, port: int, pulse: Pulse, readiness: Readiness) -> Served:
    """Serve this process's numbers and health from now on; port 0 takes a free one, which is logged.

    Each process serves its own: of a pool, it is the child that works that calls this. Raises `SettingsError` when the
    port is taken or the address is not of this machine.
    """
    kind = _Server6 if ":" in host else _Server
    try:
        server = kind((host, port), _Handler)
    except (OSError, OverflowError) as error:
        raise SettingsError(f"metrics cannot be served at {host}:{port} ({error}); choose another port") from error
    server.set_app(_app(pulse, readiness))
    served = Served(server)
    log.info("metrics served", host=host, port=served.port)
    return served


def _app(pulse: Pulse, readiness: Readiness) -> Callable[[dict[str, Any], Start], Iterable[bytes]]:
    metrics = make_wsgi_app(REGISTRY)

    def app(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _answer(start, "405 Method Not Allowed", {"error": "only GET"})
        path = environ["PATH_INFO"]
        if path == "/metrics":
            page: Iterable[bytes] = metrics(environ, start)
            return page
        if path == "/healthz":
            silent = pulse.stalled()
            if silent is None:
                return _answer(start, "200 OK", {"healthy": True})
            return _answer(start, "503 Service Unavailable", {"healthy": False, "silent_seconds": round(silent, 1)})
        if path == "/readyz":
            faults = readiness.faults()
            status = "503 Service Unavailable" if faults else "200 OK"
            return _answer(start, status, {"ready": not faults, "faults": dict(faults)})
        return _answer(start, "404 Not Found", {"error": "there is /metrics, /healthz and /readyz"})

    return app


def _answer(start: Start, status: str, value: dict[str, Any]) -> list[bytes]:
    body = json.dumps(value).encode() + b"\n"
    start(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
