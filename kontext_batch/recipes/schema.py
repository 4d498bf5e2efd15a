"""What a recipe and a brand file may hold: read it as the reference of the language (RECIPES.md says the why).

A document is what the author wrote, checked piece by piece; what needs more than one piece to be seen (names, axes,
cycles) is `scope`'s. Unknown keys are errors; keys that begin with `x-` are the author's own and are dropped.
"""

from __future__ import annotations

import zoneinfo
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from kontext_batch.recipes.cron import parse_cron
from kontext_batch.recipes.fields import (
    Bytes,
    Color,
    DottedName,
    FileName,
    Int,
    Margin,
    Name,
    Number,
    Picture,
    Pictures,
    Prompt,
    SizeText,
    Str,
    Text,
    TextTemplate,
    ValueKey,
    Values,
)
from kontext_batch.recipes.references import nearest

Format = Literal["jpeg", "png", "webp", "avif"]
EXTENSIONS: Mapping[str, str] = {"jpeg": "jpg", "png": "png", "webp": "webp", "avif": "avif"}
"""`${ext}` of each format."""
Anchor = Literal[
    "top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right",
]  # fmt: skip
MAX_CANDIDATES = 64


class Model(BaseModel):
    """Base of all parts: frozen, no unknown keys, `x-` keys dropped."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_own_keys(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, dict):
            return data
        if isinstance(info.context, dict):  # the loader asks which keys were possible here, for "did you mean"
            info.context[id(data)] = cls.keys()
        return {key: value for key, value in data.items() if not str(key).startswith("x-")}

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """The keys that an author may write here."""
        return tuple(field.alias or name for name, field in cls.model_fields.items())


# ------------------------------------------------------------------------------------------------------ brand files


class Channel(Model):
    """Where pictures go and what that place asks for."""

    size: SizeText
    fit: Literal["pad", "crop"] = "pad"
    background: Color = "#FFFFFF"
    format: Format = "png"
    quality: Annotated[Int, Field(ge=1, le=100)] | None = None
    max_bytes: Bytes | None = None
    max_upscale: Annotated[Number, Field(ge=1)] | None = None


class BrandDocument(Model):
    """One file for all recipes: colours, logos and channels. Everything in it is data."""

    kind: Literal["brand"]
    name: Str = ""
    colors: dict[Name, Color] = {}
    logos: dict[Name, FileName] = {}
    channels: dict[ValueKey, Channel] = {}


# ----------------------------------------------------------------------------------------------------------- inputs

ColumnType = Literal["text", "hex", "decimal", "int"]
OnMissing = Literal["skip", "fail"]


class TableInput(Model):
    """An axis with one value for each row of a table that has its files."""

    table: FileName
    """CSV or XLSX."""
    key: Str
    """The column that names a row; no two rows may share a value."""
    files: dict[Name, FileName | Annotated[tuple[FileName, ...], Field(min_length=1)]] = {}
    """Patterns with `*`, `**` and `?`; a list takes several files, a plain pattern exactly one."""
    where: dict[Str, Values] = {}
    """Only rows whose columns have (one of) these values."""
    columns: dict[Str, ColumnType] = {}
    on_missing: OnMissing = "fail"


class GlobInput(Model):
    """An axis with one value for each file; its key is the file's name without extension."""

    glob: FileName
    on_missing: OnMissing = "fail"
    """What a file that is no readable picture does."""


def _input_tag(data: Any) -> str:
    return "<glob>" if isinstance(data, GlobInput) or (isinstance(data, dict) and "glob" in data) else "<table>"


Input = Annotated[
    Annotated[TableInput, Tag("<table>")] | Annotated[GlobInput, Tag("<glob>")], Discriminator(_input_tag)
]


class TextColumn(Model):
    """A value that follows two axes: the column is chosen by another axis."""

    table: Name
    """The input axis whose table holds the texts."""
    column: Prompt
    """`name_${locale}`."""


# ----------------------------------------------------------------------------------------------------------- matrix

Fields = dict[Name, TextTemplate]


def _no_repeats(values: tuple[str, ...]) -> tuple[str, ...]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"'{value}' is there twice")
    return values


def _axis_tag(data: Any) -> str:
    return "<map>" if isinstance(data, dict) else "<list>"


def _no_fields(fields: dict[str, str] | None) -> dict[str, str]:
    """`en:` alone is a value without fields."""
    return fields or {}


_AxisList = Annotated[tuple[ValueKey, ...], Field(min_length=1), AfterValidator(_no_repeats)]
_AxisMap = Annotated[dict[ValueKey, Annotated[Fields | None, AfterValidator(_no_fields)]], Field(min_length=1)]
AxisValues = Annotated[
    Annotated[_AxisList, Tag("<list>")] | Annotated[_AxisMap, Tag("<map>")],
    Discriminator(_axis_tag),
]


class Matrix(Model):
    """The variants: every other key is an axis, a list of values or a mapping of values to their fields."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, AxisValues] = Field(init=False)

    exclude: tuple[Annotated[dict[DottedName, Values], Field(min_length=1)], ...] = ()
    include: tuple[Annotated[dict[DottedName, TextTemplate], Field(min_length=1)], ...] = ()

    @property
    def axes(self) -> Mapping[str, tuple[str, ...] | Mapping[str, Mapping[str, str]]]:
        """Axis name -> its values, in the order of the recipe."""
        return cast("Mapping[str, Any]", self.__pydantic_extra__ or {})


# ------------------------------------------------------------------------------------------------------------ steps


class Not(Model):
    """`{not: en}`."""

    not_: Values = Field(alias="not")


def _condition_tag(data: Any) -> str:
    return "<not>" if isinstance(data, (dict, Not)) else "<is>"


Condition = Annotated[Annotated[Values, Tag("<is>")] | Annotated[Not, Tag("<not>")], Discriminator(_condition_tag)]


class Adapter(Model):
    """A LoRA of the settings' registry."""

    name: Name
    scale: Annotated[Number, Field(ge=-10, le=10)] = 1.0


Seed = Literal["derive"] | Annotated[Int, Field(ge=0, le=2**32 - 1)]
Fit = Literal["pad", "crop", "recompose"]


class SamplingDefaults(Model):
    """What steps that use a model share; each may be written in a step, or once under `defaults`."""

    model: Name | None = None
    steps: Annotated[Int, Field(ge=1, le=1000)] | None = None
    guidance: Annotated[Number, Field(ge=0, le=100)] | None = None
    negative_prompt: Prompt | None = None
    true_cfg_scale: Annotated[Number, Field(ge=1, le=100)] | None = None
    adapters: tuple[Adapter, ...] | None = None


class EditDefaults(SamplingDefaults):
    """Under `defaults.edit`."""

    reference_layout: Literal["index", "offset"] | None = None
    fit: Fit | None = None
    background: TextTemplate | None = None
    handoff: Literal["pixels", "latents"] | None = None


class StepBase(Model):
    """What every step may say."""

    if_: dict[DottedName, Condition] = Field(default={}, alias="if")
    """The step exists only where every axis or column named has (one of) these values."""
    on: tuple[Name, ...] | None = None
    """The axes that the author expects; checked against those that are inferred."""


class SamplingStep(StepBase, SamplingDefaults):
    """A step that a model computes."""

    prompt: Prompt
    frame: TextTemplate = "keep"
    seed: Seed | None = None
    candidates: Annotated[Int, Field(ge=1, le=MAX_CANDIDATES)] = 1
    pick: Literal["first", "all"] = "first"
    """Which candidates the steps that read this one get."""


class EditStep(SamplingStep, EditDefaults):
    """A picture changed by a prompt."""

    op: Literal["edit"]
    image: Picture
    """The canvas."""
    references: tuple[Picture, ...] = ()
    """Further pictures that only condition."""


class GenerateStep(SamplingStep):
    """A picture from text alone."""

    op: Literal["generate"]


class Overlay(Model):
    """A picture laid over the result."""

    logo: TextTemplate
    anchor: Anchor = "bottom-right"
    margin: Margin = "3%"
    scale: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Width of the logo as a part of the result's width; left out, its own pixels, made smaller only to fit."""


class FinishStep(StepBase):
    """Exact pixels, sRGB, a file format and a byte limit; `channel` gives what is not said here."""

    op: Literal["finish"]
    image: Picture
    channel: TextTemplate | None = None
    size: TextTemplate | None = None
    """`1920x1080`, or `source`: the size of the picture that the chain began with."""
    fit: Literal["pad", "crop"] | None = None
    background: TextTemplate | None = None
    format: Format | None = None
    quality: Annotated[Int, Field(ge=1, le=100)] | None = None
    max_bytes: Bytes | None = None
    max_upscale: Annotated[Number, Field(ge=1)] | None = None
    overlay: tuple[Overlay, ...] = ()


class ContactSheetStep(StepBase):
    """Many pictures on one sheet: its axes are those of `on`, the others are laid out in cells."""

    op: Literal["contact_sheet"]
    images: Pictures
    on: tuple[Name, ...] = ()
    columns: Annotated[Int, Field(ge=1, le=50)] = 4
    cell: SizeText = "512x512"
    label: TextTemplate | None = None
    """Under each cell; may name the axes of the pictures, and `${candidate}`: which of its step's it is, from 1."""
    background: TextTemplate | None = None
    format: Format = "jpeg"
    quality: Annotated[Int, Field(ge=1, le=100)] | None = None


_OPERATIONS: dict[str, type[StepBase]] = {
    "edit": EditStep,
    "generate": GenerateStep,
    "finish": FinishStep,
    "contact_sheet": ContactSheetStep,
}


UNKNOWN_OPERATION = "unknown_operation"
"""pydantic's type of this fault: it is found in the step, and told at the value of `op`."""


def _step_tag(data: Any) -> str:
    op = data.get("op") if isinstance(data, dict) else getattr(data, "op", None)
    return f"<{op}>" if isinstance(op, str) and op in _OPERATIONS else "<edit>"


def _known_operation(data: Any) -> Any:
    if isinstance(data, dict):
        if "op" not in data:
            raise ValueError(f"'op' is missing; write one of {', '.join(_OPERATIONS)}")
        if not isinstance(data["op"], str) or data["op"] not in _OPERATIONS:
            said = f"unknown operation '{data['op']}'{nearest(str(data['op']), _OPERATIONS)} ({', '.join(_OPERATIONS)})"
            raise PydanticCustomError(UNKNOWN_OPERATION, "{said}", {"said": said})
    return data


AnyStep = EditStep | GenerateStep | FinishStep | ContactSheetStep
Step = Annotated[
    Annotated[EditStep, Tag("<edit>")]
    | Annotated[GenerateStep, Tag("<generate>")]
    | Annotated[FinishStep, Tag("<finish>")]
    | Annotated[ContactSheetStep, Tag("<contact_sheet>")],
    Discriminator(_step_tag),
    BeforeValidator(_known_operation),
]


# --------------------------------------------------------------------------------------------------------- the rest


class FinishDefaults(Model):
    """Under `defaults.finish`."""

    fit: Literal["pad", "crop"] | None = None
    background: TextTemplate | None = None
    format: Format | None = None
    quality: Annotated[Int, Field(ge=1, le=100)] | None = None
    max_bytes: Bytes | None = None
    max_upscale: Annotated[Number, Field(ge=1)] | None = None


class Defaults(Model):
    """What steps take when they do not say it themselves."""

    edit: EditDefaults = EditDefaults()
    generate: SamplingDefaults = SamplingDefaults()
    finish: FinishDefaults = FinishDefaults()
    seed: Seed = "derive"


class Output(Model):
    """What is delivered, and where to."""

    from_: Picture = Field(alias="from")
    to: Annotated[FileName, Field(min_length=1)]
    if_exists: Literal["version", "skip", "fail", "replace"] = "version"


class Budget(Model):
    """Above it a plan is refused."""

    gpu_minutes: Annotated[Number, Field(ge=0)] | None = None
    outputs: Annotated[Int, Field(ge=0)] | None = None


class Schedule(Model):
    """When the recipe runs by itself."""

    cron: Str
    tz: Str = "UTC"
    stop_at: Annotated[str, Field(strict=True, pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")] | None = None
    """Local time at which the run is stopped; what it has finished is kept."""
    catch_up: Literal["last", "all", "none"] = "last"
    """What becomes of times at which nothing was there to fire."""
    overlap: Literal["skip", "queue", "cancel"] = "skip"
    """What becomes of a time at which the run before is still open."""
    only: Literal["changed"] | None = None
    """No run when every step is done already."""

    @field_validator("cron")
    @classmethod
    def _five_fields(cls, value: str) -> str:
        parse_cron(value)
        return value

    @field_validator("tz")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        zones = zoneinfo.available_timezones()
        if value not in zones:
            raise ValueError(f"unknown time zone '{value}'{nearest(value, zones)}")
        return value


class RecipeDocument(Model):
    """A recipe file."""

    version: Literal[1]
    name: Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    owner: Str = ""
    import_: tuple[FileName, ...] = Field(default=(), alias="import")
    inputs: dict[Name, Input] = {}
    texts: dict[Name, TextColumn] = {}
    vars: dict[Name, TextTemplate] = {}
    matrix: Matrix = Matrix()
    defaults: Defaults = Defaults()
    steps: Annotated[dict[Name, Step], Field(min_length=1, max_length=100)]
    outputs: Annotated[tuple[Output, ...], Field(min_length=1)]
    budget: Budget | None = None
    schedule: Schedule | None = None


__all__ = ["AnyStep", "BrandDocument", "RecipeDocument", "Text"]
