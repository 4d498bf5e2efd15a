"""The flow transformer's forward pass as it is sampled: rows of any sizes one after another, nothing padded.

`engine.transformer` is the model as the paper has it, for equal rows and with gradients. Here are the same weights and
the same numbers (tests/engine/test_packed.py) without gradients, with all that need not be done again left out:

* What a place brings to every step of its schedule is computed once, when it joins (`Condition`): text and context
  through their first linears, rotations, and every block's modulation at every time.
* Linears run on the tokens of all rows together, attention a row at a time.
* The last block computes target tokens alone, since nothing else of it is read.

n, m, T: target, context and text tokens of a row; L = T + n + m; C = hidden size; H = heads; D = head width;
S = denoise steps of a schedule. Within a row text comes first, then the target, then the context.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from engine.attention import Kernel, attend, kernel_for
from engine.kernels import Kernels, Rows, kernels_for
from engine.layers import DoubleStreamBlock, SingleStreamBlock
from engine.linear import Linear
from engine.reuse import ContextMemory
from engine.rope import angles
from engine.text import TextFeatures
from engine.transformer import FlowTransformer

Result = TypeVar("Result")
Turns = Generator[None, None, Result]
"""Work that pauses before each linear, so that several passes can take turns."""


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """What one place brings to every forward pass of its schedule."""

    text: Tensor
    """(T, C)"""
    context: Tensor
    """(m, C)"""
    rotation: Tensor
    """(L, D/2) complex fp32: what each pair of a head's width is multiplied with."""
    modulation: tuple[Tensor, ...]
    """For each double block image and text (S, 6, C), for each single block (S, 3, C), at last (S, 2, C).

    In the order shift, 1 + scale, gate.
    """


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One row's place in a forward pass."""

    x: Tensor
    """(n, channels) fp32: packed latents."""
    condition: Condition
    step: int
    """Denoise steps taken: which of the schedule's times it is at."""
    memory: ContextMemory | None = None
    """Where keys and values of the context are kept from pass to pass; None computes them in each."""

    @property
    def remembers(self) -> bool:
        """Whether the context is taken from memory and brings no tokens of its own."""
        return self.memory is not None and self.memory.fresh(self.step)

    @property
    def context(self) -> Tensor:
        """The context's tokens that take part in the pass, (m, C) or none."""
        return self.condition.context[:0] if self.remembers else self.condition.context

    @property
    def tokens(self) -> int:
        """Of the pass."""
        return self.condition.text.shape[0] + self.x.shape[0] + self.context.shape[0]


@torch.no_grad()
def condition(
    model: FlowTransformer, *, text: TextFeatures, context: Tensor, ids: Tensor, times: Sequence[float], guidance: float
) -> Condition:
    """From a prompt's features, packed context latents (m, channels) fp32, positions of target and context
    (n + m, 3), the S + 1 times of the schedule, of which the last is not evaluated, and the guidance scale.
    """
    weight = model.img_in.weight
    device, dtype = weight.device, weight.dtype
    t = torch.tensor(times[:-1], dtype=torch.float32, device=device)
    scale = torch.tensor([guidance], dtype=torch.float32, device=device)
    lit = F.silu(model.conditioning(text.pooled[None].to(device), t, scale))
    text_ids = ids.new_zeros(text.t5.shape[0], 3)
    angle = angles(torch.cat([text_ids, ids]), model.config.axes_dims, model.config.theta)
    return Condition(
        text=model.txt_in(text.t5.to(device, dtype)),
        context=model.img_in(context.to(dtype)),
        rotation=torch.polar(torch.ones_like(angle), angle).to(torch.complex64).to(device),
        modulation=tuple(_modulation(linear, lit) for linear in _modulations(model)),
    )


def _doubles(model: FlowTransformer) -> list[DoubleStreamBlock]:
    return [cast(DoubleStreamBlock, block) for block in model.double_blocks]


def _singles(model: FlowTransformer) -> list[SingleStreamBlock]:
    return [cast(SingleStreamBlock, block) for block in model.single_blocks]


def _modulations(model: FlowTransformer) -> Iterable[Linear]:
    """The linears that modulations come from, in the order in which the blocks want them."""
    for double in _doubles(model):
        yield from (double.img_mod.lin, double.txt_mod.lin)
    for single in _singles(model):
        yield single.modulation.lin
    yield cast(Linear, model.final_layer.adaLN_modulation[1])


def _modulation(linear: Linear, lit: Tensor) -> Tensor:
    """(S, parts, C), with 1 added to each scale."""
    out: Tensor = rearrange(linear(lit), "S (parts C) -> S parts C", C=linear.in_features)
    out[:, 1::3] += 1
    return out


@torch.no_grad()
def velocities(
    model: FlowTransformer, places: Sequence[Place], *, apart: bool = False, kernels: Kernels | None = None
) -> list[Tensor]:
    """Velocity (n, channels) fp32 of each place's target tokens; `kernels`: others than the device's quickest.

    `apart`: no operation is on the tokens of more than one place, so that each result is bit for bit that of the place
    alone. The places take turns at each linear, which leaves its weights in the cache for the next place.
    """
    weight = model.img_in.weight
    for place in places:
        if place.memory is not None and not place.remembers:
            place.memory.renew(place.step)
    kernels = kernels or kernels_for(weight.device)
    with kernel_for(weight.device, weight.dtype) as kernel:
        parts = [[place] for place in places] if apart else [places]
        passes = [_Pass(model, each, kernel, kernels) for each in parts]
        for _ in zip(*(each.turns() for each in passes), strict=True):
            pass
    return [velocity for each in passes for velocity in each.velocities]


def _first(rows: Sequence[slice], counts: Sequence[int]) -> list[slice]:
    """The first so many tokens of each row."""
    return [slice(row.start, row.start + count) for row, count in zip(rows, counts, strict=True)]


def _taken(x: Tensor, where: Sequence[slice]) -> Tensor:
    """These tokens, one row after another."""
    return x[where[0]] if len(where) == 1 else torch.cat([x[each] for each in where])


def _heads(x: Tensor, heads: int, parts: int = 3) -> Tensor:
    """(tokens, parts C) to (tokens, parts, H, D), the parts being queries, keys and values or some of them."""
    return rearrange(x, "N (K H D) -> N K H D", K=parts, H=heads)


class _Pass:
    """One forward pass over some places."""

    def __init__(self, model: FlowTransformer, places: Sequence[Place], kernel: Kernel, kernels: Kernels) -> None:
        self.model, self.places, self.kernel, self.kernels = model, places, kernel, kernels
        self.conditions = conditions = [place.condition for place in places]
        texts = [each.text.shape[0] for each in conditions]
        targets = [place.x.shape[0] for place in places]
        device = model.img_in.weight.device
        counted = partial(Rows.counted, device=device)
        self.texts, self.targets = counted(texts), counted(targets)
        self.images = counted(n + place.context.shape[0] for n, place in zip(targets, places, strict=True))
        self.joint = counted(place.tokens for place in places)
        # Where tokens of one kind lie among others.
        joint = self.joint.slices
        self.texts_in_joint = _first(joint, texts)
        self.images_in_joint = [slice(row.start + text, row.stop) for row, text in zip(joint, texts, strict=True)]
        self.targets_in_joint = _first(self.images_in_joint, targets)
        self.targets_in_images = _first(self.images.slices, targets)
        self.rotation = torch.cat([place.condition.rotation[: place.tokens] for place in places])
        self.image_rotation = _taken(self.rotation, self.images_in_joint)
        self.target_rotation = _taken(self.rotation, self.targets_in_joint)
        self._used = self._attended = 0
        """Modulations and attentions that blocks have taken."""
        self.velocities: list[Tensor] = []
        """(n, channels) fp32 of each place."""

    def turns(self) -> Turns[None]:
        """Go through the model; at the end there are `velocities`."""
        model = self.model
        latents = torch.cat([place.x for place in self.places])
        x = model.img_in(latents.to(model.img_in.weight.dtype))
        txt = torch.cat([each.text for each in self.conditions])
        parts = zip(self.targets.slices, self.places, strict=True)
        img = torch.cat([part for where, place in parts for part in (x[where], place.context)])
        doubles, singles = _doubles(model), _singles(model)
        last = [*doubles, *singles][-1]
        for double in doubles:
            img, txt = yield from self._double(double, img, txt, last=double is last)
        if singles:
            img = self._join(txt, img)
            for single in singles:
                img = yield from self._single(single, img, last=single is last)
        velocity = model.final_layer.linear(self.kernels.modulated(img, self.targets, *self._modulation())).float()
        self.velocities = [velocity[where] for where in self.targets.slices]

    def _modulation(self) -> tuple[Tensor, ...]:
        """What the next modulation holds, in order (shift, 1 + scale, gate, ...), each (R, C) for R places."""
        rows = [place.condition.modulation[self._used][place.step] for place in self.places]
        self._used += 1
        return (rows[0][None] if len(rows) == 1 else torch.stack(rows)).unbind(1)

    def _add_gated(self, x: Tensor, rows: Rows, gate: Tensor, y: Tensor) -> None:
        self.kernels.add_gated(x, rows, gate, y)
        if x.dtype == torch.float16:  # keep fp16 activations finite (diffusers PR #9097)
            x.clip_(-65504, 65504)

    def _join(self, txt: Tensor, img: Tensor) -> Tensor:
        """Each row's text and then its image tokens."""
        parts = zip(self.texts.slices, self.images.slices, strict=True)
        return torch.cat([part for text, image in parts for part in (txt[text], img[image])])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, queries: Sequence[slice]) -> Tensor:
        """Attention of each row's queries over all of that row, (tokens, C); `queries`: where they lie in `q`."""
        block, self._attended = self._attended, self._attended + 1
        found = []
        for place, mine, row, image in zip(self.places, queries, self.joint.slices, self.images_in_joint, strict=True):
            keys, values = k[row], v[row]
            if place.memory is not None:
                if place.remembers:
                    keys = torch.cat([keys, place.memory.keys[block]])
                    values = torch.cat([values, place.memory.values[block]])
                else:
                    context = slice(image.start + place.x.shape[0], image.stop)
                    place.memory.keys.append(k[context].clone())
                    place.memory.values.append(v[context].clone())
            found.append(attend(q[mine], keys, values, self.kernel))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _double(
        self, block: DoubleStreamBlock, img: Tensor, txt: Tensor, *, last: bool
    ) -> Turns[tuple[Tensor, Tensor]]:
        """Image and text after the block; after the last block the target alone, and the text as it was."""
        kernels, heads = self.kernels, block.img_attn.num_heads
        img_shift, img_scale, img_gate, *img_mod = self._modulation()
        txt_shift, txt_scale, txt_gate, *txt_mod = self._modulation()
        yield
        qkv_img = _heads(block.img_attn.qkv(kernels.modulated(img, self.images, img_shift, img_scale)), heads)
        yield
        qkv_txt = _heads(block.txt_attn.qkv(kernels.modulated(txt, self.texts, txt_shift, txt_scale)), heads)
        kernels.norm_rotate(qkv_img[:, :2], block.img_attn.norm.weight(), self.image_rotation)
        kernels.norm_rotate(qkv_txt[:, :2], block.txt_attn.norm.weight(), None)
        q, k, v = self._join(qkv_txt, qkv_img).unbind(1)
        if last:
            out_img = self._attend(q, k, v, self.targets_in_joint)
            img, rows = _taken(img, self.targets_in_images), self.targets
        else:
            out = self._attend(q, k, v, self.joint.slices)
            out_txt, out_img, rows = _taken(out, self.texts_in_joint), _taken(out, self.images_in_joint), self.images
            yield
            self._add_gated(txt, self.texts, txt_gate, block.txt_attn.proj(out_txt))
            yield from self._mlp(block.txt_mlp, txt, self.texts, txt_mod)
        yield
        self._add_gated(img, rows, img_gate, block.img_attn.proj(out_img))
        yield from self._mlp(block.img_mlp, img, rows, img_mod)
        return img, txt

    def _mlp(self, layers: nn.Sequential, x: Tensor, rows: Rows, modulation: Sequence[Tensor]) -> Turns[None]:
        """x += gate MLP(modulated x), in place."""
        first, second = cast(Linear, layers[0]), cast(Linear, layers[2])
        shift, scale, gate = modulation
        yield
        hidden = first.rows(self.kernels.modulated(x, rows, shift, scale), 0, first.out_features, gelu=True)
        yield
        self._add_gated(x, rows, gate, second(hidden))

    def _single(self, block: SingleStreamBlock, x: Tensor, *, last: bool) -> Turns[Tensor]:
        """The tokens after the block; after the last block the target's alone."""
        kernels, heads, linear1, size = self.kernels, block.num_heads, block.linear1, x.shape[-1]
        shift, scale, gate = self._modulation()
        normed = kernels.modulated(x, self.joint, shift, scale)
        yield
        if not last:
            qkv = _heads(linear1.rows(normed, 0, 3 * size), heads)
            kernels.norm_rotate(qkv[:, :2], block.norm.weight(), self.rotation)
            (q, k, v), rows = qkv.unbind(1), self.joint
        else:
            kv = _heads(linear1.rows(normed, size, 3 * size), heads, 2)
            normed, x, rows = _taken(normed, self.targets_in_joint), _taken(x, self.targets_in_joint), self.targets
            queries = _heads(linear1.rows(normed, 0, size), heads, 1)
            kernels.norm_rotate(queries, block.norm.query_norm.weight(), self.target_rotation)
            kernels.norm_rotate(kv[:, :1], block.norm.key_norm.weight(), self.rotation)
            q, (k, v) = queries[:, 0], kv.unbind(1)
        yield
        hidden = linear1.rows(normed, 3 * size, linear1.out_features, gelu=True)
        yield
        out = self._attend(q, k, v, rows.slices)
        yield
        self._add_gated(x, rows, gate, block.linear2(torch.cat([out, hidden], dim=-1)))
        return x
