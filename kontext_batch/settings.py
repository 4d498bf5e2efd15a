"""Settings of a process: read once at the entry point, from the environment and one optional file.

Each field can be set as `KONTEXT_BATCH_<NAME>`, or in a YAML file named by `KONTEXT_BATCH_CONFIG` (else
`kontext-batch.yaml` in the working folder, when there is one). The environment wins. Functions receive values, never
the settings object.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from platformdirs import user_config_path
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as UnreadableVariable

from kontext_batch.errors import SettingsError
from kontext_batch.planning.events import EventName

CONFIG_VARIABLE = "KONTEXT_BATCH_CONFIG"
DEFAULT_CONFIG = Path("kontext-batch.yaml")


class InboxBudget(BaseModel):
    """What the `budget` of a dropped recipe must give, and may not exceed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpu_minutes: NonNegativeFloat | None = None
    outputs: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if self.gpu_minutes is None and self.outputs is None:
            raise ValueError("a limit is needed: gpu_minutes, outputs or both")
        return self


class Inbox(BaseModel):
    """A place that people drop recipes into, and what those may do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefix: str = Field(min_length=1)
    """`s3://bucket/inbox/acme/` or a folder; recipes may read what lies in it."""
    owner: str = Field(min_length=1)
    """Which `owner` recipes that come by it must name."""
    budget: InboxBudget
    read: tuple[str, ...] = ()
    """Prefixes that its recipes may read besides; those of `read_prefixes` are not among them."""
    write: tuple[str, ...] = Field(min_length=1)
    """Prefixes that its recipes may deliver to."""


class WebhookSettings(BaseModel):
    """Where events are sent. Its secret is named, never written here."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """What it is called in the database, logs and metrics."""
    url: str
    """http or https; without user and password."""
    secret_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Variable that holds the secret."""
    secret_file: Path | None = None
    """File that holds the secrets, one a line: all of them sign."""
    events: tuple[EventName, ...] = Field(default=("run.finished",), min_length=1)
    owners: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Only of runs of these owners; left out, of all."""

    @field_validator("url")
    @classmethod
    def _url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError("this is no URL") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ValueError("https://HOST/PATH is expected, or http://")
        if parts.username is not None or parts.password is not None or parts.fragment:
            raise ValueError("a URL without user, password and #fragment is expected")
        if not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError("blanks and other letters than ASCII are written in %XX")
        return url

    @model_validator(mode="after")
    def _one_secret(self) -> WebhookSettings:
        if (self.secret_env is None) == (self.secret_file is None):
            raise ValueError("one of secret_env and secret_file is expected")
        return self


class Settings(BaseSettings):
    """All settings, with the embedded default's values."""

    model_config = SettingsConfigDict(
        env_prefix="KONTEXT_BATCH_", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    database_url: str | None = None
    """SQLAlchemy URL; left out, a SQLite file in the workspace."""
    objects: str | None = None
    """URI prefix of the artifacts (`s3://bucket/prefix` or a folder); left out, a folder in the workspace."""
    read_prefixes: tuple[str, ...] = ()
    """URI prefixes that recipes may read, besides the folder that a recipe lies in."""
    write_prefixes: tuple[str, ...] = ()
    """URI prefixes that recipes may deliver to, besides the folder that a recipe lies in."""
    s3_endpoint: str | None = None
    """URL of an S3 server other than AWS."""
    s3_region: str | None = None
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float8"] = "auto"
    """Of the transformer and the text encoders; `auto` is bfloat16 on cuda, else float32. `float8` is bfloat16 with the
    linears of the blocks in fp8: quicker on cards that have it, and not exact."""
    batch_invariant: bool = True
    """A picture is the same, bit for bit, whatever is sampled beside it; takes about 1 % of the time."""
    compile: bool = False
    """What runs between linears and attention is compiled by torch.compile, which rounds otherwise in the last bits."""
    cuda_graphs: bool = False
    """On cuda, small passes of unchanged images are launched whole: the same bits, and less waiting for the CPU."""
    step_tolerance: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Approximate: denoise steps are left out while the foreseen error stays below; 0.05 is typical, 0 exact."""
    context_every: PositiveInt = 1
    """Approximate: a picture's context is computed at every so many denoise steps; 1 is exact."""
    batch_rows: PositiveInt = 8
    """Most images sampled at once; bounds the memory of a step."""
    lease_seconds: float = Field(default=60.0, ge=30.0)
    """How long a worker may be silent before its steps go to another. A SQLite writer was seen to wait 3.5 s."""
    broker_url: str | None = None
    """URL of the broker that rings workers (`redis://...`, `amqp://...`); left out, workers look by themselves."""
    queue_prefix: str = Field(default="kontext", pattern=r"^[A-Za-z0-9_.-]{1,60}$")
    """Of the names of the broker's queues: installations that share a broker have different ones."""
    grace_seconds: float = Field(default=60.0, ge=0)
    """How long a worker that is told to end may take to finish what it has in hand."""
    batch_seconds: PositiveFloat = 1800.0
    """How long a Celery worker may take, after a turn is over, to finish what it has in hand; then it is replaced."""
    cache_limit: PositiveInt = 20 * 10**9
    """Bytes of artifacts to keep in a workspace. Above it, the end of a run and `gc` remove what can be computed again,
    oldest first."""
    keep_intermediates_days: NonNegativeFloat | None = None
    """Days after which pictures and latents that no recipe delivers go, when nobody wanted them meanwhile; left out,
    they stay until there are too many. Delivered ones are kept."""
    max_pixels: PositiveInt = 100_000_000
    """Most pixels of a source picture."""
    max_input_bytes: PositiveInt = 200 * 10**6
    """Most bytes of a source picture."""
    max_steps: PositiveInt = 1_000_000
    """Most step instances of one recipe."""
    run_cap: PositiveInt | None = None
    """Most steps of one run that are leased at once, over all workers; left out, any number."""
    owner_cap: PositiveInt | None = None
    """Most steps of all runs of one owner that are leased at once."""
    backlog_limit: PositiveInt = 1000
    """Pictures of a run that wait to be finished or delivered, above which no more are computed for it."""
    failure_limit: NonNegativeInt | None = None
    """Failed steps above which a run is paused; left out, any number."""
    failure_share: float | None = Field(default=None, ge=0.0, le=1.0)
    """The same as a part of the run's steps: 0.1 is one in ten."""
    tokens_file: Path | None = None
    """YAML file: sha256 of a token -> name. Who gives a token in `KONTEXT_BATCH_TOKEN` acts under that name."""
    models_file: Path = Field(default_factory=lambda: user_config_path("kontext-batch") / "models.json")
    """Where `models add` keeps the registry."""
    content_filter: str | None = None
    """Command that reads an image on standard input and exits 0 when it may be delivered."""
    mark: bool = True
    """Whether picture files say that and by which step they were made (XMP). Not part of a step's identity: what is
    there stays as it is."""
    sidecars: bool = True
    """Whether a `NAME.lineage.json` is delivered beside each picture."""
    prompts_in_files: bool = False
    """Whether prompts are told in sidecars and signed manifests."""
    c2pa_certificates: Path | None = None
    """PEM file: the certificate that signs what is delivered, then its issuers; left out, nothing is signed."""
    c2pa_private_key: Path | None = None
    """PEM file with its key, not encrypted."""
    c2pa_algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] | None = None
    """Left out, the usual one of the key: es256 to es512 by its curve, ps256, ed25519."""
    c2pa_timestamp_url: str | None = Field(default=None, pattern=r"^https?://[^\s]+$")
    """RFC 3161 server that is asked with each signature; left out, signatures end with their certificate."""
    gpu_seconds_per_image: PositiveFloat | None = None
    """Estimate for lanes without past timings; left out, such lanes count as unknown."""
    webhooks: tuple[WebhookSettings, ...] = ()
    """Where the ends of runs are told."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Where workers and beats serve /metrics, /healthz and /readyz; left out, nowhere; 0: any free port."""
    metrics_host: str = "127.0.0.1"
    """Address that it is served at."""
    stalled_seconds: PositiveFloat = 600.0
    """A process that works and comes no further for so long is not healthy."""
    log_format: Literal["text", "json"] = "text"
    """Of what is logged to standard error; `--log-json` is `json`."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """What is logged, from this level up; `--verbose` is `info`."""

    @field_validator("content_filter")
    @classmethod
    def _is_a_command(cls, command: str | None) -> str | None:
        if command is not None and not command.strip():
            raise ValueError("is blank, and a blank command allows everything; leave it out where there is no filter")
        return command

    @field_validator("webhooks")
    @classmethod
    def _names_differ(cls, webhooks: tuple[WebhookSettings, ...]) -> tuple[WebhookSettings, ...]:
        names = [each.name for each in webhooks]
        if len(set(names)) < len(names):
            raise ValueError("two webhooks have the same name")
        return webhooks

    @model_validator(mode="after")
    def _whole_signer(self) -> Self:
        if (self.c2pa_certificates is None) != (self.c2pa_private_key is None):
            raise ValueError("c2pa_certificates and c2pa_private_key belong together: set both or neither")
        if self.c2pa_timestamp_url is not None and self.c2pa_certificates is None:
            raise ValueError("c2pa_timestamp_url is of a signer: set c2pa_certificates and c2pa_private_key too")
        return self

    inboxes: tuple[Inbox, ...] = ()
    """Places that `workers beat` watches."""
    inbox_queue: str | None = None
    """URL of the SQS queue that the inboxes' buckets tell of new objects; without it, listing finds them too."""
    inbox_settle_seconds: NonNegativeFloat = 2.0
    """How long a file of a folder must stay as it is before it is read; a bucket shows no half files."""
    max_bundle_bytes: PositiveInt = 100 * 10**6
    """Largest `.zip` that is taken from an inbox."""
    max_unpacked_bytes: PositiveInt = 500 * 10**6
    """Most bytes that one `.zip` unpacks to."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment before the file, whose values come as arguments."""
        return env_settings, init_settings


def load_settings() -> Settings:
    """Read file and environment. Raises `SettingsError` that names the setting and where it came from."""
    named = os.environ.get(CONFIG_VARIABLE)
    path = Path(named) if named else DEFAULT_CONFIG
    values: dict[str, Any] = {}
    if named or path.is_file():
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise SettingsError(f"{path}: not readable as YAML settings ({error})") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise SettingsError(f"{path}: a mapping of settings is expected")
        values = loaded or {}
    try:
        return Settings(**values)
    except UnreadableVariable as error:  # of a setting that is a list, before anything is validated
        named_field = re.search(r'field "(\w+)"', str(error))
        prefix = Settings.model_config["env_prefix"]
        variable = f"{prefix}{named_field[1].upper()}" if named_field else f"a variable {prefix}..."
        example = '[{"name": ...}]' if variable.endswith("WEBHOOKS") else '["s3://acme-pim/"]'
        raise SettingsError(f"{variable}: a JSON list is expected, such as {example}") from error
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        )
        raise SettingsError(f"settings ({path} and the environment): {faults}") from error
