"""Requests that are sampled together on one engine: admit, step, retire.

    with engine.session() as session:
        session.admit(request, tag)      # any time a slot is free, also while others are half done
        session.step()                   # one denoise step of everything that is in
        for tag, result in session.retire(): ...

`KontextEngine.edit` and the worker drive the same three calls. A session belongs to one thread at a time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, Self, TypeVar

import torch

from engine import geometry
from engine.batching import Batch, Forward, Row
from engine.errors import NonFiniteError
from engine.graphs import Graphs
from engine.latents import Latents, context_ids, draw_noise, grid_ids
from engine.packed import Condition, condition, velocities
from engine.requests import EditRequest, EditResult, check, size_of
from engine.reuse import ContextMemory, Velocities
from engine.sampling import schedule

if TYPE_CHECKING:
    from engine.pipeline import KontextEngine

Tag = TypeVar("Tag")


@dataclass(frozen=True, slots=True, eq=False)
class _Job(Generic[Tag]):
    """A request while its row is alive."""

    tag: Tag
    request: EditRequest
    row: Row
    width: int
    height: int
    encode_seconds: float
    admitted: float
    joined: int


class Session(Generic[Tag]):
    """The requests that one engine has in hand; while it is open the engine's adapters cannot be changed."""

    def __init__(self, engine: KontextEngine) -> None:
        self._engine = engine
        forward: Forward = partial(velocities, engine.transformer, apart=engine.batch_invariant, kernels=engine.kernels)
        if engine.cuda_graphs and engine.device.type == "cuda":
            forward = Graphs(forward)
        self._batch = Batch(forward, engine.max_rows, engine.max_tokens)
        self._alive: dict[Row, _Job[Tag]] = {}
        self._begun: torch.Event | None = None
        """Told by the device when it has done the last step that was begun; a CPU is done when a call returns."""
        self.steps_taken = 0
        """Denoise steps taken so far: the clock by which `joined` and `left` are told."""

    def __enter__(self) -> Self:
        self._engine.open_sessions += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self._engine.open_sessions -= 1

    @property
    def alive(self) -> int:
        """Requests that are being sampled."""
        return len(self._alive)

    @property
    def free(self) -> int:
        """How many requests may be admitted now."""
        return self._batch.free

    def admit(self, request: EditRequest, tag: Tag) -> None:
        """Encode text and context, draw the noise: from the next step on the request takes part.

        Raises `RequestError`, and then the request is not in.
        """
        engine = self._engine
        check(request, engine.config)
        started = time.perf_counter()
        width, height = size_of(request, engine.config)
        rows, columns = geometry.token_grid(width, height)
        channels = engine.config.flow.in_channels
        noise = request.noise
        if noise is None:
            noise = draw_noise(rows * columns, channels, rows, columns, request.seed)
        grids = [geometry.token_grid(picture.width, picture.height) for picture in request.context]
        context = [engine.encode_picture(picture) for picture in request.context]
        context_latents = torch.cat([torch.empty(0, channels, device=engine.device), *context])
        ids = torch.cat([grid_ids(rows, columns), *context_ids(grids, request.reference_layout)])
        times = schedule(request.steps, rows * columns)

        def conditioned(prompt: str) -> Condition:
            return condition(
                engine.transformer,
                text=engine.encode_prompt(prompt),
                context=context_latents,
                ids=ids,
                times=times,
                guidance=request.guidance,
            )

        negative = request.negative_prompt if request.guided else None
        near = engine.approximation
        row = Row(
            x=noise.to(engine.device, torch.float32),
            condition=conditioned(request.prompt),
            times=times,
            negative=None if negative is None else conditioned(negative),
            cfg_scale=request.true_cfg_scale,
            velocities=Velocities(near.step_tolerance, request.steps - 1) if near.step_tolerance else None,
            memories=(ContextMemory(near.context_every), ContextMemory(near.context_every))
            if near.keeps_context
            else (None, None),
        )
        now = time.perf_counter()
        self._batch.admit(row)
        self._alive[row] = _Job(tag, request, row, width, height, now - started, now, self.steps_taken)

    def step(self) -> None:
        """Move every request that is in one denoise step on; returns when the device has done the step before."""
        self._batch.step()
        self.steps_taken += 1
        # One step ahead the device never waits for the CPU, and calls take as long as steps do.
        if self._engine.device.type == "cuda":
            before, self._begun = self._begun, torch.Event(self._engine.device)
            self._begun.record()
            if before is not None:
                before.synchronize()

    def retire(self) -> list[tuple[Tag, EditResult | NonFiniteError]]:
        """Let the finished requests leave, decoded, in the order in which they joined."""
        return [(job.tag, self._finish(job)) for job in map(self._alive.pop, self._batch.retire())]

    def _finish(self, job: _Job[Tag]) -> EditResult | NonFiniteError:
        latents = job.row.x.cpu()  # waits for the device
        sampled = time.perf_counter()
        if not torch.isfinite(latents).all():
            return NonFiniteError(f"the result of seed {job.request.seed} is not finite; check the model's weights")
        try:
            image = self._engine.decode(Latents(latents, job.width, job.height))
        except NonFiniteError as error:
            return error
        return EditResult(
            image=image,
            latents=latents,
            seed=job.request.seed,
            width=job.width,
            height=job.height,
            timings={
                "encode": job.encode_seconds,
                "sample": sampled - job.admitted,
                "decode": time.perf_counter() - sampled,
            },
            joined=job.joined,
            left=self.steps_taken,
        )
