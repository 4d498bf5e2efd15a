"""What the parameters of each operation hold, and what of it makes a step's key.

Every value is JSON. Sizes and boxes are pixels: `{width, height}`, `{x, y, width, height}`.

edit
    model              name in the registry (not part of the key; the weights' hash is)
    model_sha256       hash of the weights
    adapters           [{name, scale, sha256}], in order; the name is not part of the key
    prompt             text, references resolved
    negative_prompt    text or null
    true_cfg_scale     1.0: off
    steps              denoise steps
    guidance           embedded guidance
    seed               0 .. 2**32-1
    canvas             {width, height, fit, background, box}
                         fit `pad`: the whole picture is scaled into `box` of the canvas, the rest is `background`
                         fit `crop`: `box` of the picture (its pixels after EXIF orientation) is scaled to the canvas
    target             {width, height} of the result, a size of the model
    references         [{width, height, box, background}], one for each input of role `reference`: always padded
    reference_layout   `index` or `offset`
    text_length        tokens that the encoder reads
    numeric_mode       as the settings say
    handoff            how the canvas comes from its parent: `pixels` or `latents`
    candidate          1, 2, ...
    take               0; more for a deliberate new try
generate
    as edit, without canvas, references, reference_layout and handoff
finish
    box                part of the input to use, or null for all of it
    size               {width, height} of the result
    fit                `pad` or `crop`: how `box` meets `size`
    background         `#RRGGBB`, behind padding and behind what is transparent where the format has no alpha
    format             `jpeg`, `png`, `webp`, `avif`
    quality            1 .. 100, null for png
    max_bytes          largest file, or null
    icc                `srgb`
    overlay            [{anchor, margin, scale}], one for each input of role `logo`;
                         margin: pixels, or `3%` of the shorter side of the result
                         scale: width of the logo as a part of the result's width, or null for its own pixels
contact_sheet
    columns            cells in a row
    cell               {width, height}
    labels             a text or null for each input of role `cell`, in order
    background, format, quality, icc   as in finish

Inputs: role `image` (edit, finish: one), `reference`, `logo`, `cell`; positions count from 0 within a role.

Seed contract (`seed: derive`): the first four bytes, big-endian, of BLAKE2b over the canonical JSON of
`{"axes": {axis: key}, "candidate": c, "take": t}` with the step's own axes. So a seed is stable when rows or axes'
values are added, when words change, and when steps are renamed; it changes when the step follows another axis.
`seed: N` gives N + candidate - 1, and derives from N, candidate and take for takes above 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from kontext_batch.hashing import canonical_json, content_hash
from kontext_batch.planning.plan import OPERATIONS_LANE, Axes, StepInput

VERSIONS: Mapping[str, int] = {"edit": 1, "generate": 1, "finish": 1, "contact_sheet": 1}
"""Raised when an operation makes other pixels of the same parameters; part of every key."""

SAMPLING = frozenset({"edit", "generate"})
"""Operations that a model computes."""

DEFAULT_STEPS = 28
DEFAULT_GUIDANCE = 2.5
DEFAULT_BACKGROUND = "#FFFFFF"
DEFAULT_QUALITY: Mapping[str, int | None] = {"jpeg": 90, "webp": 85, "avif": 60, "png": None}


def step_key(operation: str, params: Mapping[str, Any], inputs: Sequence[StepInput]) -> str:
    """The identity of a step (RECIPES.md 3): what it makes, nothing of what it is called or where things lie."""
    hashed = dict(params)
    hashed.pop("model", None)
    if hashed.get("adapters"):
        hashed["adapters"] = [{"scale": each["scale"], "sha256": each["sha256"]} for each in params["adapters"]]
    return content_hash(
        {
            "operation": operation,
            "version": VERSIONS[operation],
            "params": hashed,
            "inputs": [[each.role, each.position, input_identity(each)] for each in inputs],
        }
    )


def input_identity(each: StepInput) -> str:
    """`sha256:...` of a source picture, the key of a parent."""
    if each.source is not None:
        return f"sha256:{each.source.sha256}"
    assert each.parent is not None
    return each.parent


def materials(params: Mapping[str, Any]) -> Mapping[str, str]:
    """sha256 of the weights that a step is computed with -> `model` or `adapter`."""
    found = {each["sha256"]: "adapter" for each in params.get("adapters") or ()}
    if params.get("model_sha256"):
        found[params["model_sha256"]] = "model"
    return found


def lane_of(operation: str, params: Mapping[str, Any]) -> str:
    """What a worker must have loaded to compute the step: `edit/<model>/<sha256>/<adapters>/<numeric mode>`."""
    if operation not in SAMPLING:
        return OPERATIONS_LANE
    adapters = "+".join(f"{each['name']}:{each['sha256'][:8]}@{each['scale']:g}" for each in params["adapters"]) or "-"
    return f"edit/{params['model']}/{params['model_sha256'][:12]}/{adapters}/{params['numeric_mode']}"


def seed_of(written: str | int, axes: Axes, candidate: int, take: int) -> int:
    """The seed of one instance; see the contract above. `written`: `derive` or a number."""
    if written != "derive":
        if take == 0:
            return (int(written) + candidate - 1) % 2**32
        return _hashed({"seed": int(written), "candidate": candidate, "take": take})
    return _hashed({"axes": dict(axes), "candidate": candidate, "take": take})


def _hashed(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(canonical_json(value).encode(), digest_size=4).digest(), "big")
