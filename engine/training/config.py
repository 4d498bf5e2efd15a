"""What a training is told: one YAML file, checked as a whole before anything is made.

A config names its kind: `autoencoder`, `flow` (transformer and text encoders; both from nothing, or on from a finished
model), `finetune` (a finished model's transformer alone) or `lora` (an adapter beside it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, ConfigDict, Field, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from engine.errors import ConfigError
from engine.training.adapter import TARGETS
from engine.training.instructions import SHARES
from engine.training.loop import LoopConfig

FLOWS = ("flow", "finetune", "lora")
ONLY_OF: dict[str, tuple[str, ...]] = {
    "base": FLOWS,
    "vae": ("autoencoder", "flow"),
    "freeze_encoder": ("autoencoder",),
    "pairs": FLOWS,
    "size": FLOWS,
    "context_dropout": FLOWS,
    "time_mean": FLOWS,
    "for_steps": FLOWS,
    "pixel_share": FLOWS,
    "huber": FLOWS,
    "shares": FLOWS,
    "preview_every": FLOWS,
    "device": FLOWS,
    "compile": FLOWS,
    "dtype": ("flow", "finetune"),
    "deepen": ("flow",),
    "rank": ("lora",),
    "targets": ("lora",),
}
"""Entries that not every kind has."""


def _named(path: Path) -> Path:
    if path == Path():
        raise ValueError("a path is expected")
    return path


Place = Annotated[Path, AfterValidator(_named)]
Share = Annotated[float, Field(ge=0, le=1e6)]
Side = Annotated[int, Field(ge=16, multiple_of=16)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TrainingConfig:
    """One training; paths are taken from the working directory."""

    kind: Literal["autoencoder", "flow", "finetune", "lora"]
    folder: Place
    """Checkpoints, metrics and what can be recomputed; a training goes on from what lies there."""
    loop: LoopConfig
    batch: PositiveInt = 32
    pool: Annotated[int, Field(ge=2)] = 9000
    """Pictures or pairs that are drawn, where no table of pairs is given."""
    pairs: Place | None = None
    """CSV with the columns before, after, instruction."""
    size: tuple[Side, Side] | None = None
    """Width and height of the pairs of a table; left out, the model's size nearest to square."""
    base: Place | None = None
    """The model to fine-tune or to go on from, in either layout."""
    deepen: Annotated[int, Field(ge=0, le=1000)] = 0
    """Single blocks that are added to `base`. They start as the identity, so nothing that it can do is lost."""
    vae: Place | None = None
    """Folder of a trained autoencoder, for a `flow` from nothing; for `autoencoder`, the one to go on from."""
    freeze_encoder: bool = False
    """Train the autoencoder's decoder alone, so that a flow trained on its latents stays right."""
    context_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of edits that are trained without their context image."""
    time_mean: Annotated[float, Field(ge=-10, le=10)] | None = None
    """Mean of the logit-normal times; left out, the one that the sampler's shift has for the target's size. A higher
    one gives more of the training to the first steps, which decide what is edited."""
    for_steps: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = ()
    """Numbers of denoise steps that the model is for: three quarters of the times are those of their schedules."""
    pixel_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the loss that counts an error of latents by what it does to pixels; the rest counts all alike."""
    huber: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Root of the squared error above which a pair counts by its root instead, so that pairs which cannot be guessed
    do not outweigh all others; left out, the squared error throughout."""
    shares: Mapping[str, Share] = Field(default_factory=dict)
    """Weights of the kinds of drawn edits, `SHARES` for those left out."""
    rank: PositiveInt = 8
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = TARGETS
    export: Place | None = None
    """Where the finished model, autoencoder or adapter (a safetensors file) is written."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the exported transformer; autoencoder and text encoders are always fp32."""
    threads: PositiveInt | None = None
    device: str = "auto"
    """`auto` is cuda, mps or cpu, in that order. The autoencoder of `kind: autoencoder` is trained on the CPU."""
    compile: bool = False
    """Compile the flow's blocks (torch.compile): minutes at first, quicker steps then. A CPU needs a C++ compiler."""
    preview_every: Annotated[int, Field(ge=0)] = 0
    """Steps between sheets of source, edit and target in `folder/previews`; 0 makes none."""

    def all_shares(self) -> dict[str, float]:
        """The weight of every kind of drawn edit."""
        return {**SHARES, **self.shares}

    @classmethod
    def read(cls, path: Path) -> Self:
        """From a YAML file. Raises `ConfigError`."""
        try:
            data = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: not readable as YAML ({error})") from error
        if not isinstance(data, Mapping):
            raise ConfigError(f"{path}: a mapping is expected")
        return cls.from_dict(data, where=str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "training config") -> Self:
        """Raises `ConfigError` with everything that is wrong with single entries, else with how they fit together."""
        given = {str(name): value for name, value in data.items()}
        try:
            config = cls(**given)
        except ValidationError as error:
            raise ConfigError("; ".join(f"{where}: {fault}" for fault in _faults(error))) from error
        if fault := config._contradiction(set(given)):
            raise ConfigError(f"{where}: {fault}")
        return config

    def _contradiction(self, given: set[str]) -> str | None:
        """Which of the entries `given` do not go together."""
        for name in sorted(given & ONLY_OF.keys()):
            if self.kind not in ONLY_OF[name]:
                return f"{name} means nothing to kind {self.kind}; it is of {', '.join(ONLY_OF[name])}"
        if self.kind in ("finetune", "lora") and self.base is None:
            return f"{self.kind} needs `base`, the model to start from"
        if self.kind == "flow" and (self.vae is None) == (self.base is None):
            return "flow needs `vae`, the folder of a trained autoencoder, or else `base`, a model to go on from"
        if self.deepen and self.base is None:
            return "deepen needs `base`, the model that it makes deeper"
        if self.freeze_encoder and self.vae is None:
            return "freeze_encoder needs `vae`, the autoencoder whose encoder stays"
        if self.pairs is not None and (drawn := sorted(given & {"pool", "shares"})):
            return f"{drawn[0]} is for drawn pairs, and `pairs` names a table"
        if self.size is not None and self.pairs is None:
            return "size is for the pictures of a table, and there is no `pairs`"
        if unknown := sorted(set(self.shares) - set(SHARES)):
            return f"shares: unknown {', '.join(unknown)}; known are {', '.join(SHARES)}"
        return None if any(self.all_shares().values()) else "shares: one kind of edit at least needs more than 0"


class _Loader(yaml.SafeLoader):
    """Refuses a repeated key, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"'{name}' stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _faults(error: ValidationError) -> list[str]:
    """What is wrong, one entry each, by its name."""
    found = []
    for fault in error.errors():
        place = ".".join(map(str, fault["loc"]))
        if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = fields(LoopConfig if place.startswith("loop.") else TrainingConfig)
            found.append(f"unknown {place}; known are {', '.join(sorted(each.name for each in known))}")
        elif fault["type"] in ("missing_argument", "missing_keyword_only_argument", "missing"):
            found.append(f"{place} is missing")
        else:
            shown = repr(fault["input"])
            found.append(f"{place} {shown if len(shown) <= 60 else shown[:57] + '...'}: {fault['msg'].lower()}")
    return found
