"""What `doctor` looks at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kontext_batch.errors import InfrastructureError, KontextBatchError, SettingsError
from kontext_batch.observability.masking import mask

if TYPE_CHECKING:
    from kontext_batch.settings import Settings
    from kontext_batch.storage.router import StoreRouter

LEAST_FREE = 10**9
"""Bytes that a workspace should have left."""
LAST_DAYS = 30
"""Of a certificate, in which it is warned of."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `doctor`."""

    name: str
    ok: bool
    found: str
    advice: str = ""
    """What to do when it is not ok, or warned of."""
    warned: bool = False
    """It works, within limits that somebody should know of."""


def all_checks(workspace: Path, *, named: bool = True) -> Iterator[Check]:
    """Settings first; what needs something that failed is left out.

    `named`: somebody asked for this workspace, so that it must be there. The usual one is made by the first run.
    """
    from kontext_batch.bootstrap import DATABASE
    from kontext_batch.settings import load_settings

    try:
        settings = load_settings()
    except KontextBatchError as error:
        yield Check("settings", False, mask(str(error)), "mend the file or the variable that it names")
        return
    yield Check("settings", True, "sound")
    unmade = not named and not os.path.lexists(workspace)
    workspace = workspace.resolve()
    found = workspace.is_dir()
    usable = found and os.access(workspace, os.W_OK | os.X_OK)
    yield Check(
        "workspace",
        usable or unmade,
        "not made yet; `run FILE` makes it"
        if unmade
        else f"{workspace}" + ("" if usable else " may not be written to" if found else " is not there"),
        "name one with --workspace DIR; `run FILE` makes it",
    )
    if found:
        free = shutil.disk_usage(workspace).free
        yield Check("space", free >= LEAST_FREE, f"{free // 10**6} MB free", "make room, or run `gc`")
    if usable or settings.database_url is not None:
        yield _database(settings.database_url or f"sqlite:///{workspace / DATABASE}")
    if usable or settings.objects is not None:
        yield from _store(settings, workspace)
    if settings.database_url is not None:
        yield _shared(settings)
    if settings.broker_url is not None:
        yield _broker(settings.broker_url)
    yield from _inboxes(settings)
    if settings.inbox_queue is not None:
        yield _queue(settings, settings.inbox_queue)
    if settings.content_filter is not None:
        yield _filter(settings.content_filter)
    if settings.c2pa_certificates is not None:
        yield _signer(settings)
    if settings.tokens_file is not None:
        yield _tokens(settings.tokens_file)
    yield from _webhooks(settings)
    if settings.metrics_port:
        yield _metrics_port(settings.metrics_host, settings.metrics_port)
    yield from _models(settings.models_file)
    device = _device(settings)
    yield device
    if device.ok:
        yield from _memory(settings)


def _database(url: str) -> Check:
    from kontext_batch.lineage import migrate

    try:
        migrate.check(url)
    except InfrastructureError as error:
        return Check("database", False, str(error), "see that the server runs and that database_url names it")
    except KontextBatchError as error:
        return Check("database", False, str(error), "run `kontext-batch db upgrade`")
    return Check("database", True, "at this version's revision")


def _write_to(settings: Settings, place: str) -> StoreRouter:
    """Put something there and take it away; returns the store. Raises its errors."""
    from kontext_batch.bootstrap.adapters import store_of

    store = store_of(settings, [place], [place])
    probe = f"{place.rstrip('/')}/.doctor-{os.getpid()}.txt"  # hidden: nobody takes it for a recipe
    store.write(probe, b"doctor\n", media_type="text/plain")
    store.delete(probe)
    return store


def _store(settings: Settings, workspace: Path) -> Iterator[Check]:
    from kontext_batch.bootstrap import prefix_uri
    from kontext_batch.storage.uris import file_uri

    place = prefix_uri(settings.objects) if settings.objects else file_uri(workspace)
    try:
        _write_to(settings, place)
    except KontextBatchError as error:
        yield Check("store", False, mask(str(error)), "see that the place is there and may be written to")
        return
    yield Check("store", True, f"{place} can be written to")
    if place.startswith("s3:"):
        yield _conditional_writes(settings, place)


def _conditional_writes(settings: Settings, place: str) -> Check:
    """Pictures of steps are safe without: they are named by their bytes. What is delivered is not."""
    from kontext_batch.bootstrap.adapters import honours_conditional_writes

    name = "conditional writes"
    try:
        if honours_conditional_writes(settings, place):
            return Check(name, True, "the server honours If-None-Match")
    except KontextBatchError as error:
        return Check(name, False, mask(str(error)), "see that the server takes a put with If-None-Match")
    return Check(
        name,
        True,
        "the server ignores If-None-Match: of two deliveries to one new path at the same moment one is lost, "
        "whatever if_exists says",
        "let no two runs deliver to the same path at once, or take a server that honours it",
        warned=True,
    )


def _shared(settings: Settings) -> Check:
    """A database of one's own is for several processes, which have to find each other's pictures."""
    name, advice = "shared store", "set objects to a place that every process of this database sees, such as s3://..."
    if settings.objects is None:
        return Check(name, False, "database_url is set and objects is not: pictures lie in each workspace", advice)
    return Check(name, True, "database and objects are both set")


def _broker(url: str) -> Check:
    from kontext_batch.messaging.app import check_broker

    try:
        return Check("broker", True, f"{check_broker(url)} answers")
    except KontextBatchError as error:
        return Check("broker", False, str(error), "see that the server runs and that broker_url names it")


def _inboxes(settings: Settings) -> Iterator[Check]:
    from kontext_batch.bootstrap import inbox_places

    try:
        places = inbox_places(settings)
    except KontextBatchError as error:
        yield Check("inboxes", False, str(error), "mend the setting inboxes")
        return
    for place in places:
        try:
            next(_write_to(settings, place.prefix).list(place.prefix), None)
        except KontextBatchError as error:
            advice = "answers are written there: let it be written to"
            yield Check(f"inbox of {place.owner}", False, mask(str(error)), advice)
        else:
            yield Check(f"inbox of {place.owner}", True, f"{place.prefix} can be read and written to")


def _queue(settings: Settings, url: str) -> Check:
    from kontext_batch.bootstrap.adapters import check_queue

    name = "inbox queue"
    advice = "see that it is there and that these credentials may receive from it; beats only list now"
    try:
        check_queue(settings, url)
    except SettingsError as error:
        return Check(name, False, mask(str(error)), "set inbox_queue to the URL that SQS shows for the queue")
    except KontextBatchError as error:
        return Check(name, False, mask(str(error)), advice)
    return Check(name, True, f"{mask(url)} answers")


def _filter(command: str) -> Check:
    """The command itself is not told: it may hold a key."""
    from kontext_batch.bootstrap.adapters import CommandFilter

    name = "content filter"
    advice = "try the command by hand: `COMMAND <picture.png; echo $?` says 0 for what is allowed"
    try:
        allowed = CommandFilter(command).allows_grey()
    except KontextBatchError as error:
        return Check(name, False, mask(str(error)), f"nothing is delivered until it runs; {advice}")
    if allowed:
        return Check(name, True, "allows a plain grey picture")
    return Check(name, True, "runs, and does not allow a plain grey picture", advice, warned=True)


def _signer(settings: Settings) -> Check:
    """Sign a small picture with it."""
    from datetime import UTC, datetime, timedelta

    from kontext_batch.bootstrap.adapters import signer_of

    name = "c2pa signer"
    advice = "nothing is delivered until it signs; mend the file or setting that it names, or leave the signer out"
    try:
        signer = signer_of(settings)
        assert signer is not None
        signer.try_out()
    except KontextBatchError as error:
        return Check(name, False, mask(str(error)), advice)
    expires = signer.credentials.expires
    found = f"'{signer.credentials.subject}' signs until {expires:%Y-%m-%d}"
    soon = expires - datetime.now(UTC) < timedelta(days=LAST_DAYS)
    return Check(name, True, found, "renew the certificate: what is signed after that day is not valid", warned=soon)


def _tokens(file: Path) -> Check:
    from kontext_batch.cli.acting import read_tokens

    name, advice = "tokens", "write a line `SHA256: NAME` for each token, in a file that whoever runs commands may read"
    try:
        names, faulty = read_tokens(file)
    except KontextBatchError as error:
        return Check(name, False, str(error), advice)
    if faulty:
        lines = ", ".join(map(str, faulty))
        return Check(name, False, f"{file}: no sha256 with a name in line {lines}", advice)
    return Check(name, True, f"{file} names {len(names)}")


def _webhooks(settings: Settings) -> Iterator[Check]:
    from urllib.parse import urlsplit

    from kontext_batch.webhooks import Target

    for hook in settings.webhooks:
        advice = "put the secret where the setting says; `kontext-batch webhooks test` sends one event"
        try:
            secrets = Target(hook.url, hook.secret_env, hook.secret_file).secrets()
        except KontextBatchError as error:
            yield Check(f"webhook {hook.name}", False, str(error), advice)
            continue
        parts = urlsplit(hook.url)
        number = "1 secret" if len(secrets) == 1 else f"{len(secrets)} secrets"
        yield Check(f"webhook {hook.name}", True, f"{parts.scheme}://{parts.hostname}, signed with {number}")


def _metrics_port(host: str, port: int) -> Check:
    """Free, or taken by a process of ours."""
    from http.client import HTTPConnection, HTTPException

    from kontext_batch.observability.health import Pulse, Readiness
    from kontext_batch.observability.server import serve_metrics

    try:
        serve_metrics(host=host, port=port, pulse=Pulse(1.0), readiness=Readiness({})).close()
        return Check("metrics", True, f"{host}:{port} is free")
    except KontextBatchError as error:
        taken = str(error)
    connection = HTTPConnection(host, port, timeout=2.0)
    try:
        connection.request("GET", "/healthz")
        ours = b"healthy" in connection.getresponse().read(1000)
    except (OSError, HTTPException):
        ours = False
    finally:
        connection.close()
    if ours:
        return Check("metrics", True, f"a worker or beat serves them at {host}:{port}")
    return Check("metrics", False, taken, "set metrics_port to a free one")


def _models(file: Path) -> Iterator[Check]:
    from kontext_batch.registry import Registry, signature

    try:
        registry = Registry.read(file)
    except KontextBatchError as error:
        yield Check("models", False, str(error), f"mend or remove {file}, then `models add` again")
        return
    entries = [("model", *each) for each in registry.models.items()]
    for kind, name, entry in [*entries, *(("adapter", *each) for each in registry.adapters.items())]:
        there = entry.path.exists()
        ok = there and signature(entry.path) == entry.signature
        found = "unchanged" if ok else "the files changed" if there else f"{entry.path} is gone"
        yield Check(
            f"{kind} {name}", ok, found, f"`kontext-batch {kind}s add {name} {entry.path}` takes them as they are"
        )


def _device(settings: Settings) -> Check:
    from kontext_batch.editor import chosen_device

    try:
        chosen = chosen_device(settings.device, compiled=settings.compile)
    except KontextBatchError as error:
        advice = "set device to auto, or to one that is here, and compile only where there is a compiler"
        return Check("device", False, str(error), advice)
    return Check("device", True, f"{chosen} (the setting is {settings.device}), computing in {_mode(settings)}")


def _mode(settings: Settings) -> str:
    from kontext_batch.editor import numeric_mode

    return numeric_mode(
        settings.device,
        settings.dtype,
        step_tolerance=settings.step_tolerance,
        context_every=settings.context_every,
        compiled=settings.compile,
    )


def _memory(settings: Settings) -> Iterator[Check]:
    """Whether each registered model fits on the device; what is wrong with its files is told elsewhere."""
    from kontext_batch.editor import needed_memory
    from kontext_batch.registry import Registry

    mode = _mode(settings)
    try:
        models = Registry.read(settings.models_file).models
    except KontextBatchError:
        return
    for name, entry in models.items():
        try:
            plan = needed_memory(entry.path, device=settings.device, mode=mode, rows=settings.batch_rows)
        except KontextBatchError:
            continue
        needed = f"{_size(plan.weights)} of weights and {_size(plan.row)} for each picture, of {_size(plan.memory)}"
        if not plan.rows:
            advice = (
                "take a device with more memory, or dtype bfloat16 or, where the card has it, float8; here it may fail"
            )
            yield Check(f"memory of {name}", True, f"{needed}: it does not fit", advice, warned=True)
            continue
        rows = f"{plan.rows} of batch_rows {settings.batch_rows} fit"
        if plan.offload_texts:
            found = f"{needed}: {rows}, with the text encoders on the CPU"
            yield Check(f"memory of {name}", True, found, "each new prompt takes seconds there", warned=True)
        else:
            yield Check(f"memory of {name}", True, f"{needed}: {rows}")


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 10**9 else f"{number / 1e6:.0f} MB"
