"""Settings of a process: read once at the entry point, from the environment and one optional file.

Each field can be set as `KONTEXT_BATCH_<NAME>`, or in a YAML file named by `KONTEXT_BATCH_CONFIG` (else
`kontext-batch.yaml` in the working folder, when there is one). The environment wins. Functions receive values, never
the settings object.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from platformdirs import user_config_path
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as UnreadableVariable

from kontext_batch.errors import SettingsError

CONFIG_VARIABLE = "KONTEXT_BATCH_CONFIG"
DEFAULT_CONFIG = Path("kontext-batch.yaml")


class Settings(BaseSettings):
    """All settings, with the embedded default's values."""

    model_config = SettingsConfigDict(env_prefix="KONTEXT_BATCH_", extra="forbid", frozen=True)

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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the transformer and the text encoders; `auto` is bfloat16 on cuda, else float32."""
    batch_rows: PositiveInt = 8
    """Most images sampled at once; bounds the memory of a step."""
    lease_seconds: float = Field(default=60.0, ge=30.0)
    """How long a worker may be silent before its steps go to another. A SQLite writer was seen to wait 3.5 s."""
    cache_limit: PositiveInt = 20 * 10**9
    """Bytes of artifacts to keep in a workspace. Above it, the end of a run and `gc` remove what can be computed again,
    oldest first."""
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
    gpu_seconds_per_image: PositiveFloat | None = None
    """Estimate for lanes without past timings; left out, such lanes count as unknown."""

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
        raise SettingsError(f'{variable}: a JSON list is expected, such as ["s3://acme-pim/"]') from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise SettingsError(f"settings ({path} and the environment): {faults}") from error
