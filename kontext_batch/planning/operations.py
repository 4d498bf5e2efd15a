"""Parameters of each operation at one instance. `params` documents them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kontext_batch.planning.frames import (
    Origin,
    Shape,
    Size,
    box_data,
    fit_canvas,
    fit_reference,
    size_data,
    upscale,
)
from kontext_batch.planning.labels import as_ascii, can_be_drawn
from kontext_batch.planning.listing import ModelInfo
from kontext_batch.planning.making import Fault, Job, Making, Picture, Planner, Result
from kontext_batch.planning.nodes import Node
from kontext_batch.planning.params import (
    DEFAULT_BACKGROUND,
    DEFAULT_GUIDANCE,
    DEFAULT_QUALITY,
    DEFAULT_STEPS,
    seed_of,
)
from kontext_batch.planning.values import Value
from kontext_batch.recipes.fields import parse_color, parse_frame, parse_size
from kontext_batch.recipes.references import nearest
from kontext_batch.recipes.schema import Channel, ContactSheetStep, EditStep, FinishStep, GenerateStep
from kontext_batch.recipes.source import Path

EDIT_FORMAT = "png"
"""What the engine's pictures are kept as: without loss."""


def planner_for(making: Making, node: Node) -> Planner | None:
    """How instances of a step are made; None when the step as a whole cannot be (it has been told)."""
    step = node.step
    if isinstance(step, FinishStep):
        return _Finish(making, node, step)
    if isinstance(step, ContactSheetStep):
        return _ContactSheet(making, node, step)
    sampling = _Sampling(making, node, step)
    return sampling if sampling.model is not None else None


def _text(job: Job, field: str) -> tuple[str | None, Path]:
    """A text field of the step at the job's point, and where it is written."""
    text = job.node.texts.get(field)
    return (None, ("steps", job.node.name)) if text is None else (text(job.point), text.path)


def _color(job: Job) -> str | None:
    text, path = _text(job, "background")
    if text is None:
        return None
    try:
        return parse_color(text)
    except ValueError as error:
        raise Fault(path, str(error)) from None


class _Sampling:
    """Edits and generations."""

    def __init__(self, making: Making, node: Node, step: EditStep | GenerateStep) -> None:
        self.making, self.node, self.step = making, node, step
        self.defaults = getattr(making.recipe.document.defaults, step.op)
        self.at: Path = ("steps", node.name)
        self.model = self._model()
        self.adapters = self._adapters()
        seed = step.seed if step.seed is not None else making.recipe.document.defaults.seed
        self.seed: str | int = seed if seed == "derive" else int(seed)
        self.fixed = self._fixed()
        self.sizes: dict[tuple[Shape, Size | None, str, str], tuple[Mapping[str, Any], Mapping[str, Any], Shape]] = {}
        self.prompts: set[str] = set()

    def setting(self, name: str, default: Any) -> Any:
        """Of the step, else of the defaults of its operation, else built in."""
        for place in (self.step, self.defaults):
            value = getattr(place, name, None)
            if value is not None:
                return value
        return default

    def place(self, name: str) -> Path:
        """Where a setting is written."""
        if getattr(self.step, name, None) is not None:
            return (*self.at, name)
        return ("defaults", self.step.op, name) if getattr(self.defaults, name, None) is not None else self.at

    def _model(self) -> ModelInfo | None:
        models, name = self.making.world.models, self.setting("model", None)
        if name is None:
            known = f" (registered: {', '.join(sorted(models))})" if models else ""
            self.making.tell(self.at, f"no model: name one here or under defaults.{self.step.op}{known}")
            return None
        if name not in models:
            hint = nearest(name, models) or (f" (registered: {', '.join(sorted(models)) or 'none'})")
            self.making.tell(self.place("model"), f"unknown model '{name}'{hint}")
            return None
        return models[name]

    def _adapters(self) -> list[Mapping[str, Any]]:
        wanted = self.setting("adapters", ())
        known = self.making.world.adapters
        found: list[Mapping[str, Any]] = []
        for index, each in enumerate(wanted):
            path: Path = (*self.place("adapters"), index, "name")
            if each.name not in known:
                self.making.tell(path, f"unknown adapter '{each.name}'{nearest(each.name, known)}")
                continue
            found.append({"name": each.name, "scale": float(each.scale), "sha256": known[each.name].sha256})
        if wanted and self.model is not None and not self.model.adapters:
            self.making.tell(self.place("adapters"), f"model '{self.model.name}' takes no adapters")
        return found

    def _fixed(self) -> dict[str, Any]:
        """Parameters that all instances share; the objects are shared too."""
        if self.model is None:
            return {}
        return {
            "model": self.model.name,
            "model_sha256": self.model.sha256,
            "adapters": self.adapters,
            "true_cfg_scale": float(self.setting("true_cfg_scale", 1.0)),
            "steps": int(self.setting("steps", DEFAULT_STEPS)),
            "guidance": float(self.setting("guidance", DEFAULT_GUIDANCE)),
            "text_length": self.model.text_length,
            "numeric_mode": self.making.world.numeric_mode,
        }

    def __call__(self, job: Job) -> Result:
        assert self.model is not None
        prompt, _ = _text(job, "prompt")
        assert prompt is not None
        negative, path = _text(job, "negative_prompt")
        self.check_prompt(prompt)
        if negative is not None and self.fixed["true_cfg_scale"] == 1.0:
            self.making.tally(f"{'.'.join(map(str, path))} has no effect: true_cfg_scale is 1")
        take = self.making.world.takes.get((self.node.name, job.axes, job.candidate), 0)
        params = {
            **self.fixed,
            "prompt": prompt,
            "negative_prompt": negative,
            "seed": seed_of(self.seed, job.axes, job.candidate, take),
            "candidate": job.candidate,
            "take": take,
        }
        frame, written = self.frame(job)
        if isinstance(self.step, GenerateStep):
            return self.generate(params, frame, written)
        return self.edit(job, params, frame, written)

    def frame(self, job: Job) -> tuple[Size | None, str]:
        """The ratio that is wanted, and how it is written."""
        text, path = _text(job, "frame")
        try:
            return parse_frame(text or "keep"), text or "keep"
        except ValueError as error:
            raise Fault(path, str(error)) from None

    def generate(self, params: dict[str, Any], frame: Size | None, written: str) -> Result:
        assert self.model is not None
        fitted = fit_canvas(Shape(frame or (1, 1)), frame, "pad", self.model.native_area)
        params["target"] = size_data(fitted.target)
        self.note_frame(written, fitted.target)
        return Result(params, Shape(fitted.target), EDIT_FORMAT)

    def edit(self, job: Job, params: dict[str, Any], frame: Size | None, written: str) -> Result:
        assert self.model is not None
        image = job.pictures[0]
        shape = image.shape
        if shape is None:
            raise Fault(image.path, "the size of a contact sheet is known only when it is made; it cannot be edited")
        fit = self.setting("fit", "pad")
        background = _color(job) or DEFAULT_BACKGROUND
        known = self.sizes.get((shape, frame, fit, background))
        if known is None:
            fitted = fit_canvas(shape, frame, fit, self.model.native_area)
            canvas = {
                **size_data(fitted.canvas),
                "fit": fitted.fit,
                "background": background,
                "box": box_data(fitted.box),
            }
            known = self.sizes[shape, frame, fit, background] = (canvas, size_data(fitted.target), fitted.shape)
        params["canvas"], params["target"], result = known
        self.note_frame(written, result.size)
        references = job.pictures[1:]
        params["references"] = [self.reference(each, background) for each in references]
        # With one picture there is nothing to lay out: the setting must not change the key.
        params["reference_layout"] = self.setting("reference_layout", "offset") if references else "offset"
        params["handoff"] = self.handoff(image, params["canvas"])
        return Result(params, result, EDIT_FORMAT)

    def reference(self, picture: Picture, background: str) -> Mapping[str, Any]:
        assert self.model is not None
        if picture.shape is None:
            raise Fault(picture.path, "a contact sheet cannot be a reference")
        size, box = fit_reference(picture.shape.size, self.model.native_area)
        return {**size_data(size), "box": box_data(box), "background": background}

    def handoff(self, image: Picture, canvas: Mapping[str, Any]) -> str:
        """Latents, where the same model made the picture at the very size of the canvas and the recipe wants no pixels.

        A chain loses less that way: `benchmarks/multi_turn.py`. A recipe that asks for them is told where it gets none.
        """
        wanted = self.setting("handoff", None)
        if wanted == "pixels" or image.made is None or image.made.weights is None:
            return "pixels"
        assert self.model is not None
        assert image.shape is not None
        if image.shape.size != (canvas["width"], canvas["height"]):
            other = "size"
        elif image.made.weights != self.model.sha256:  # another autoencoder, perhaps
            other = "model"
        else:
            return "latents"
        if wanted is not None:
            self.making.tally(f"steps.{self.node.name}: another {other} than its parent's, so pixels are handed on")
        return "pixels"

    def note_frame(self, frame: str, target: Size) -> None:
        if frame != "keep":
            self.making.tally(f"steps.{self.node.name}: frame {frame} is made at {target[0]}x{target[1]}")

    def check_prompt(self, prompt: str) -> None:
        """Each distinct prompt once: is it longer than the encoder reads?"""
        count = self.making.world.count_tokens
        if count is None or self.model is None or prompt in self.prompts:
            return
        self.prompts.add(prompt)
        tokens = count(self.model.name, prompt)
        if tokens > self.model.text_length:
            shown = prompt if len(prompt) <= 60 else prompt[:57] + "..."
            limit = f"{self.model.name} reads {self.model.text_length}"
            self.making.tally(f"steps.{self.node.name}: a prompt of {tokens} tokens, {limit}: '{shown}'")


class _Finish:
    """Exact pixels."""

    def __init__(self, making: Making, node: Node, step: FinishStep) -> None:
        self.making, self.node, self.step = making, node, step
        self.defaults = making.recipe.document.defaults.finish
        self.at: Path = ("steps", node.name)

    def __call__(self, job: Job) -> Result:
        channel = self.channel(job)
        image = job.pictures[0]
        fit = self.setting("fit", channel, "pad")
        shape = image.shape
        size, box = self.size(job, channel, shape, image.path)
        written = _color(job) if self.step.background is not None else None
        background = written or (channel.background if channel else None) or _color(job) or DEFAULT_BACKGROUND
        format_ = self.setting("format", channel, "png")
        quality = self.setting("quality", channel, DEFAULT_QUALITY[format_])
        limit = self.setting("max_bytes", channel, None)
        params = {
            "box": box,
            "size": size_data(size),
            "fit": fit,
            "background": background,
            "format": format_,
            "quality": None if format_ == "png" or quality is None else int(quality),
            "max_bytes": None if limit is None else int(limit),
            "icc": "srgb",
            "overlay": [
                {"anchor": each.anchor, "margin": each.margin, "scale": each.scale} for each in self.step.overlay
            ],
        }
        self.check_upscale(shape, box, size, fit, channel)
        return Result(params, Shape(size), format_)

    def setting(self, name: str, channel: Channel | None, default: Any) -> Any:
        """Of the step, else of the channel, else of the defaults, else built in."""
        for place in (self.step, channel, self.defaults):
            value = getattr(place, name, None)
            if value is not None:
                return value
        return default

    def channel(self, job: Job) -> Channel | None:
        name, path = _text(job, "channel")
        if name is None:
            return None
        known = self.making.recipe.scope.channels
        if name in known:
            return known[name]
        raise Fault(path, f"unknown channel '{name}'{nearest(name, known)}")

    def size(
        self, job: Job, channel: Channel | None, shape: Shape | None, image: Path
    ) -> tuple[Size, Mapping[str, int] | None]:
        """Size of the result and the part of the picture to use."""
        text, path = _text(job, "size")
        wanted = text or (channel.size if channel else None)
        trim = None if shape is None else shape.trim
        if wanted == "source":
            origin = self.origin(shape, path)
            whole = shape is not None and origin.box == (0, 0, *shape.size)
            return origin.size, None if whole else dict(box_data(origin.box))
        box = None if trim is None else dict(box_data(trim))
        if wanted is None:
            if shape is None:
                raise Fault(image, "the size of a contact sheet is known only when it is made: say `size`")
            return (trim[2:] if trim is not None else shape.size), box
        try:
            return parse_size(wanted), box
        except ValueError as error:
            raise Fault(path, str(error)) from None

    def origin(self, shape: Shape | None, path: Path) -> Origin:
        if shape is None or shape.origin is None:
            raise Fault(path, "there is no way back to a source: the picture was generated, recomposed or cropped away")
        return shape.origin

    def check_upscale(
        self,
        shape: Shape | None,
        box: Mapping[str, int] | None,
        size: Size,
        fit: str,
        channel: Channel | None,
    ) -> None:
        if shape is None:
            return
        region = shape.size if box is None else (box["width"], box["height"])
        factor = upscale(region, size, fit)
        most = self.setting("max_upscale", channel, None)
        what = f"{region[0]}x{region[1]} to {size[0]}x{size[1]} enlarges {factor:.2f} times"
        if most is not None and factor > most:
            raise Fault(self.at, f"{what}, more than max_upscale {most:g}")
        if factor > 1:
            self.making.tally(f"steps.{self.node.name}: {what}")


class _ContactSheet:
    """Many pictures on one."""

    def __init__(self, making: Making, node: Node, step: ContactSheetStep) -> None:
        self.making, self.node, self.step = making, node, step
        self.numbers: dict[int, Value] = {}
        self.lossy = ""
        """The first label that cannot be drawn as it is."""

    def __call__(self, job: Job) -> Result:
        params = {
            "columns": int(self.step.columns),
            "cell": size_data(parse_size(self.step.cell)),
            "labels": self.labels(job),
            "background": _color(job) or DEFAULT_BACKGROUND,
            "format": self.step.format,
            "quality": None if self.step.format == "png" else self.step.quality or DEFAULT_QUALITY[self.step.format],
            "icc": "srgb",
        }
        return Result(params, None, self.step.format)

    def labels(self, job: Job) -> Sequence[str | None]:
        text = job.node.texts.get("label")
        if text is None:
            return [None] * len(job.pictures)
        labels = [text((*each.point, self.number(each))) for each in job.pictures]
        for label in labels:
            if not can_be_drawn(label):
                self.lossy = self.lossy or f"'{label[:60]}' as '{as_ascii(label[:60])}'"
                self.making.tally(
                    f"steps.{self.node.name}: labels are drawn in Latin letters, without accents; others show as ?: "
                    + self.lossy
                )
        return labels

    def number(self, picture: Picture) -> Value:
        """`${candidate}` of a picture; a source is the first of its kind."""
        number = 1 if picture.made is None else picture.made.instance.candidate
        if number not in self.numbers:
            self.numbers[number] = Value("candidate", str(number), {})
        return self.numbers[number]
