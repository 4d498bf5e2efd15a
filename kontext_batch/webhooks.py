"""Events to the webhooks of the settings: signed, over HTTP, to nowhere else.

Signed as Standard Webhooks 1.0 has it: `webhook-signature: v1,BASE64` of HMAC-SHA256 over `id.timestamp.body`, one for
each secret, so that a secret can be changed without a gap. No redirect is followed, nothing of the answer is read but
its status, and one call takes no longer than its time limit, however slowly the other side drips.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from kontext_batch.errors import InfrastructureError, ObjectNotFound, SettingsError
from kontext_batch.observability.masking import hide

TIMEOUT = 10.0
"""Seconds that one call may take, from connecting to the answer's status."""
MAX_SECRET_BYTES = 4096
SHORTEST_SECRET = 16
"""Bytes; Standard Webhooks asks for 24."""
PREFIX = "whsec_"
USER_AGENT = "kontext-batch"
GONE = 410
"""The receiver wants nothing any more."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where one webhook lies and where its secrets are kept: one of a variable and a file."""

    url: str
    secret_env: str | None = None
    secret_file: Path | None = None

    def secrets(self) -> tuple[bytes, ...]:
        """The keys, read anew each time: one a line, of which all sign. Raises `SettingsError`."""
        if self.secret_env is not None:
            text, place = os.environ.get(self.secret_env, ""), f"the variable {self.secret_env}"
        else:
            assert self.secret_file is not None, "the settings see to it"
            place = f"{self.secret_file}"
            try:
                with self.secret_file.open("rb") as file:
                    text = file.read(MAX_SECRET_BYTES).decode("ascii")
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError(f"the secret {place} cannot be read ({_reason(error)})") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise SettingsError(f"{place} holds no secret")
        hide(*lines)
        return tuple(_key(line, place) for line in lines)


@dataclass(frozen=True, slots=True)
class HttpPost:
    """`ports.Post` over HTTP."""

    targets: Mapping[str, Target]
    timeout: float = TIMEOUT
    clock: Callable[[], float] = field(default=time.time)
    """Of the signature: seconds since the epoch."""

    def post(self, webhook: str, event_id: str, body: bytes) -> None:
        """Send one event. Raises as `ports.Post` says."""
        target = self.targets[webhook]
        timestamp = int(self.clock())
        try:
            secrets = target.secrets()
        except SettingsError as error:  # an operator will mend it; the event waits
            raise InfrastructureError(str(error)) from error
        headers = {
            "content-type": "application/json",
            "user-agent": USER_AGENT,
            "webhook-id": event_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(secrets, event_id, timestamp, body),
        }
        status = _status(target.url, body, headers, self.timeout)
        if status == GONE:
            raise ObjectNotFound("HTTP 410: the receiver wants no more events")
        if not 200 <= status < 300:
            redirected = ": redirects are not followed" if 300 <= status < 400 else ""
            raise InfrastructureError(f"HTTP {status}{redirected}")


def signature(secrets: Sequence[bytes], event_id: str, timestamp: int, body: bytes) -> str:
    """The header's value: one signature for each secret, with blanks between them."""
    signed = f"{event_id}.{timestamp}.".encode() + body
    digests = (hmac.new(secret, signed, hashlib.sha256).digest() for secret in secrets)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def _key(line: str, place: str) -> bytes:
    """`whsec_BASE64` decoded, anything else as it stands."""
    try:
        key = base64.b64decode(line.removeprefix(PREFIX), validate=True) if line.startswith(PREFIX) else line.encode()
    except binascii.Error as error:
        raise SettingsError(f"{place}: after {PREFIX} a secret is base64") from error
    if len(key) < SHORTEST_SECRET:
        raise SettingsError(f"{place}: a secret has at least {SHORTEST_SECRET} bytes")
    return key


def _status(url: str, body: bytes, headers: Mapping[str, str], timeout: float) -> int:
    """Status of the answer. Raises `InfrastructureError` without the URL, whose path may be a secret of its own."""
    parts = urlsplit(url)
    host, secure = parts.hostname, parts.scheme == "https"
    assert host is not None, "the settings see to it"
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(host, parts.port)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    late = threading.Event()
    try:
        with socket.create_connection((host, connection.port), timeout) as plain, _ended_after(timeout, plain, late):
            connection.sock = _secured(plain, host) if secure else plain
            connection.request("POST", target, body=body, headers=dict(headers))
            return connection.getresponse().status
    except (OSError, http.client.HTTPException, UnicodeError) as error:  # the last: a host that cannot be a name
        what = f"no answer within {timeout:g} s" if late.is_set() or isinstance(error, TimeoutError) else _reason(error)
        raise InfrastructureError(what) from error
    finally:
        connection.close()


def _secured(plain: socket.socket, host: str) -> socket.socket:
    """With the certificate and the name in it checked, as the system's authorities have it."""
    return ssl.create_default_context().wrap_socket(plain, server_hostname=host)


@contextlib.contextmanager
def _ended_after(seconds: float, connected: socket.socket, late: threading.Event) -> Iterator[None]:
    """End the connection when what is within takes longer: whoever waits on it wakes up, in a TLS handshake too.

    The socket's own time limit is one for each read, and begins anew with each byte.
    """
    with connected.dup() as same:  # TLS takes the first one over

        def end() -> None:
            late.set()
            with contextlib.suppress(OSError):
                same.shutdown(socket.SHUT_RDWR)

        watch = threading.Timer(seconds, end)
        watch.daemon = True
        watch.start()
        try:
            yield
        finally:
            watch.cancel()
            watch.join()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
