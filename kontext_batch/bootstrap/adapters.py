"""Which store, queue, bell and filter the settings choose."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kontext_batch.errors import SettingsError
from kontext_batch.planning.inbox import Place
from kontext_batch.ports import ObjectEvents, WakeUps
from kontext_batch.settings import Settings
from kontext_batch.storage.router import StoreRouter, open_store
from kontext_batch.storage.uris import file_path, file_uri

if TYPE_CHECKING:
    from kontext_batch.provenance.c2pa import C2paSigner
    from kontext_batch.storage.events import SqsEvents


class NoWakeUps:
    """`ports.WakeUps` of the embedded default: the loop in this process looks by itself."""

    def wake(self, lanes: Mapping[str, int]) -> None:
        """Nobody to ring."""

    def close(self) -> None:
        """Nothing to give back."""


@dataclass(frozen=True, slots=True)
class CommandFilter:
    """`ports.ContentFilter` by a command that reads the image on standard input and exits 0 to allow it."""

    command: str
    timeout: float = 120.0
    """Seconds."""

    def allows(self, data: bytes) -> bool:
        """Raises `SettingsError` when the command cannot be run: nothing is delivered unseen."""
        try:
            done = subprocess.run(["sh", "-c", self.command], input=data, capture_output=True, timeout=self.timeout)
        except subprocess.TimeoutExpired as error:
            raise SettingsError(f"content_filter: no answer within {self.timeout:g} seconds") from error
        except (OSError, ValueError) as error:
            raise SettingsError(f"content_filter: {error}") from error
        if done.returncode in (126, 127):
            raise SettingsError(f"content_filter: {done.stderr.decode(errors='replace').strip()}")
        if done.returncode < 0:
            raise SettingsError(f"content_filter: ended by signal {-done.returncode}")
        return done.returncode == 0

    def allows_grey(self) -> bool:
        """Try it with a picture that nobody can object to. Raises what `allows` raises."""
        from PIL import Image

        picture = io.BytesIO()
        Image.new("RGB", (512, 512), "grey").save(picture, "PNG")
        return self.allows(picture.getvalue())


def store_of(settings: Settings, readable: Iterable[str], writable: Iterable[str]) -> StoreRouter:
    return open_store(readable, writable, s3_endpoint=settings.s3_endpoint, s3_region=settings.s3_region)


def honours_conditional_writes(settings: Settings, place: str) -> bool:
    """Whether the server of an `s3:` place honours `If-None-Match`, tried there. Raises what `write` raises."""
    from kontext_batch.storage.s3 import S3Store, make_client  # here, as boto3 is in `open_store`

    client = make_client(endpoint=settings.s3_endpoint, region=settings.s3_region)
    return S3Store(client, (), [place]).supports_conditional_writes(place)


def events_of(settings: Settings) -> ObjectEvents | None:
    """Raises `SettingsError` for a setting that is no URL of a queue."""
    return None if settings.inbox_queue is None else _queue(settings.inbox_queue, settings)


def check_queue(settings: Settings, url: str) -> None:
    """Ask the queue at `url`, and take nothing out of it. Raises `SettingsError`, `InfrastructureError`."""
    _queue(url, settings).check()


def _queue(url: str, settings: Settings) -> SqsEvents:
    from kontext_batch.storage.events import SqsEvents  # here, as boto3 is in `open_store`

    return SqsEvents(url, region=settings.s3_region)


def wake_ups_of(settings: Settings) -> WakeUps:
    if settings.broker_url is None:
        return NoWakeUps()
    # Here, because Celery takes a while to import, and most people have no broker.
    from kontext_batch.messaging.app import make_app
    from kontext_batch.messaging.wake_ups import CeleryWakeUps

    app = make_app(settings.broker_url, queue_prefix=settings.queue_prefix)
    return CeleryWakeUps(app, batch_rows=settings.batch_rows)


def signer_of(settings: Settings) -> C2paSigner | None:
    """Raises `SettingsError` for one that cannot sign."""
    if settings.c2pa_certificates is None or settings.c2pa_private_key is None:
        return None
    from kontext_batch.provenance.c2pa import C2paSigner, Credentials

    credentials = Credentials.read(settings.c2pa_certificates, settings.c2pa_private_key)
    return C2paSigner(credentials, settings.c2pa_algorithm, settings.c2pa_timestamp_url)


def inbox_places(settings: Settings) -> tuple[Place, ...]:
    """The inboxes of the settings. Raises `SettingsError` for one that could feed itself or another."""
    places = tuple(
        Place(
            prefix=_folder_uri(each.prefix),
            owner=each.owner,
            budget=each.budget.model_dump(exclude_none=True),
            readable=(_folder_uri(each.prefix), *map(prefix_uri, each.read)),
            writable=tuple(map(prefix_uri, each.write)),
        )
        for each in settings.inboxes
    )
    for number, place in enumerate(places):
        for other in places[:number]:
            if _overlap(place.prefix, other.prefix):
                raise SettingsError(f"inboxes: {place.prefix} and {other.prefix} lie in one another")
        for written in (uri for other in places for uri in other.writable):
            if _overlap(place.prefix, written):
                raise SettingsError(f"inboxes: recipes may not write where recipes are dropped ({written})")
    return places


def _folder_uri(prefix: str) -> str:
    """Spelt as a store lists what lies in it."""
    uri = prefix_uri(prefix)
    return (file_uri(file_path(uri)) if uri.startswith("file:") else uri).rstrip("/") + "/"


def _overlap(one: str, other: str) -> bool:
    one, other = one.rstrip("/") + "/", other.rstrip("/") + "/"
    return one.startswith(other) or other.startswith(one)


def prefix_uri(prefix: str) -> str:
    """A prefix of the settings as a URI: a folder may be written as a path."""
    return prefix if "://" in prefix else file_uri(Path(prefix).expanduser().resolve())
