"""The packed forward pass against the dense one, which is the paper's, and what it leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from engine.attention import attend, choose_kernel
from engine.config import FlowConfig
from engine.latents import context_ids, grid_ids
from engine.linear import Linear, LowRank, multiplies_bfloat16, onednn
from engine.packed import Condition, Place, condition, velocities
from engine.sampling import schedule
from engine.text import TextFeatures
from engine.transformer import FlowTransformer
from tests.engine.tiny import shake, worst

BOUND = 2e-5
SMALL = FlowConfig(
    in_channels=16,
    hidden_size=64,
    num_heads=4,
    depth_double=2,
    depth_single=3,
    text_dim=24,
    pooled_dim=12,
    axes_dims=(4, 6, 6),
)
DEPTHS = {"both": (2, 3), "double alone": (2, 0), "single alone": (0, 2), "one of each": (1, 1)}


def model(config: FlowConfig = SMALL, seed: int = 0) -> FlowTransformer:
    torch.manual_seed(seed)
    made = FlowTransformer(config)
    shake(made, seed=seed)
    return made.requires_grad_(False).eval()


class Case:
    """One row's inputs, for either forward pass."""

    def __init__(
        self,
        grid: tuple[int, int],
        context: Sequence[tuple[int, int]],
        *,
        text: int = 7,
        guidance: float = 2.5,
        seed: int,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(grid[0] * grid[1], SMALL.in_channels, generator=generator)
        tokens = sum(rows * columns for rows, columns in context)
        self.context = torch.randn(tokens, SMALL.in_channels, generator=generator)
        self.ids = torch.cat([grid_ids(*grid), *context_ids(list(context), "offset")])
        self.text = TextFeatures(
            torch.randn(text, SMALL.text_dim, generator=generator), torch.randn(SMALL.pooled_dim, generator=generator)
        )
        self.guidance = guidance
        self.times = schedule(5, 24)

    def condition(self, model: FlowTransformer) -> Condition:
        return condition(
            model, text=self.text, context=self.context, ids=self.ids, times=self.times, guidance=self.guidance
        )

    def dense(self, model: FlowTransformer, step: int) -> Tensor:
        velocity: Tensor = model(
            img=torch.cat([self.x, self.context])[None],
            img_ids=self.ids[None],
            txt=self.text.t5[None],
            pooled=self.text.pooled[None],
            t=torch.tensor([self.times[step]]),
            guidance=torch.tensor([self.guidance]),
        )
        return velocity[0, : self.x.shape[0]]


def cases() -> list[Case]:
    """Rows that differ in everything."""
    return [
        Case((4, 6), [(4, 6)], seed=1),
        Case((6, 4), [(4, 6)], guidance=4.0, seed=2),
        Case((2, 3), [], text=5, seed=3),
        Case((5, 5), [(2, 2), (3, 4)], text=9, seed=4),
    ]


@pytest.mark.parametrize("depths", DEPTHS.values(), ids=DEPTHS)
@pytest.mark.parametrize("guidance_embed", [True, False])
def test_rows_of_any_sizes_equal_the_dense_pass_of_each(depths: tuple[int, int], guidance_embed: bool) -> None:
    config = replace(SMALL, depth_double=depths[0], depth_single=depths[1], guidance_embed=guidance_embed)
    flow = model(config)
    places = [Place(case.x, case.condition(flow), step) for step, case in enumerate(cases())]
    together = velocities(flow, places)
    for step, (case, found) in enumerate(zip(cases(), together, strict=True)):
        wanted = case.dense(flow, step)
        assert wanted.std() > 0.3
        assert worst(found, wanted) < BOUND
        (alone,) = velocities(flow, [places[step]])
        assert worst(alone, wanted) < BOUND


def test_a_pass_changes_nothing_that_a_place_brings() -> None:
    flow = model()
    places = [Place(case.x, case.condition(flow), 0) for case in cases()]
    for chosen in (places, places[:1]):
        first, second = velocities(flow, chosen), velocities(flow, chosen)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    flow = model()
    places = [Place(case.x, case.condition(flow), 0) for case in cases()]
    good = velocities(flow, places)
    spoilt = velocities(
        flow, [places[0], Place(torch.full_like(places[1].x, torch.nan), places[1].condition, 0), *places[2:]]
    )
    assert torch.isnan(spoilt[1]).all()
    assert all(torch.equal(good[index], spoilt[index]) for index in (0, 2, 3))


class Counting:
    """Tokens that each linear has computed, and how often it was called."""

    def __init__(self, flow: FlowTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, list[tuple[int, int]]] = {}
        names = {module: name for name, module in flow.named_modules() if isinstance(module, Linear)}
        original = Linear.rows

        def counted(linear: Linear, x: Tensor, start: int, stop: int, *, gelu: bool = False) -> Tensor:
            self.rows.setdefault(names[linear], []).append((x.shape[0], stop - start))
            return original(linear, x, start, stop, gelu=gelu)

        monkeypatch.setattr(Linear, "rows", counted)


def test_a_condition_computes_all_times_at_once_and_a_step_computes_it_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = model()
    counting = Counting(flow, monkeypatch)
    case = cases()[0]
    made = case.condition(flow)
    assert counting.rows["double_blocks.0.img_mod.lin"] == [(5, 6 * 64)]
    assert counting.rows["time_in.in_layer"] == [(5, 64)]
    assert counting.rows["vector_in.in_layer"] == [(1, 64)]
    once = {name for name in counting.rows if not name.startswith("img_in")}
    counting.rows.clear()
    velocities(flow, [Place(case.x, made, 0)])
    assert once.isdisjoint(counting.rows)
    assert counting.rows["img_in"] == [(24, 64)]  # the target alone; the context went through it when the row joined


def test_the_last_block_computes_the_target_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = model()
    case = cases()[0]  # 7 text, 24 target and 24 context tokens
    place = Place(case.x, case.condition(flow), 0)
    counting = Counting(flow, monkeypatch)
    velocities(flow, [place])
    assert counting.rows["single_blocks.1.linear1"] == [(55, 3 * 64), (55, 4 * 64)]
    assert counting.rows["single_blocks.2.linear1"] == [(55, 2 * 64), (24, 64), (24, 4 * 64)]
    assert counting.rows["single_blocks.2.linear2"] == [(24, 64)]
    assert counting.rows["final_layer.linear"] == [(24, 16)]


def test_where_no_single_block_follows_the_last_double_block_drops_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = model(replace(SMALL, depth_single=0))
    case = cases()[0]
    place = Place(case.x, case.condition(flow), 0)
    counting = Counting(flow, monkeypatch)
    velocities(flow, [place])
    assert counting.rows["double_blocks.0.txt_mlp.0"] == [(7, 4 * 64)]
    assert "double_blocks.1.txt_mlp.0" not in counting.rows
    assert "double_blocks.1.txt_attn.proj" not in counting.rows
    assert counting.rows["double_blocks.1.img_mlp.0"] == [(24, 4 * 64)]


# Linears


def test_some_output_features_of_a_linear_with_what_adapters_add() -> None:
    torch.manual_seed(0)
    linear = Linear(8, 12).requires_grad_(False)
    x = torch.randn(5, 8)
    plain = linear(x)
    linear.additions.append(LowRank(3, 9, torch.randn(2, 8), torch.randn(6, 2), torch.randn(6)))
    linear.additions.append(LowRank(0, 12, None, None, torch.randn(12)))
    whole = linear(x)
    assert worst(whole[:, :3], plain[:, :3] + linear.additions[1](x, 0, 3)) < 1e-6
    for start, stop in ((0, 12), (0, 2), (2, 5), (4, 8), (9, 12)):
        assert worst(linear.rows(x, start, stop), whole[:, start:stop]) < 1e-6
        gelu = nn.functional.gelu(whole[:, start:stop], approximate="tanh")
        assert worst(linear.rows(x, start, stop, gelu=True), gelu) < 1e-6


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(not multiplies_bfloat16(), reason="this CPU has no products in bfloat16"),
        ),
    ],
)
def test_onednn_computes_what_torch_does(gelu: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(70, 96).to(dtype), torch.randn(130, 96).to(dtype), torch.randn(130).to(dtype)
    wanted = nn.functional.linear(x.double(), weight.double(), bias.double())
    wanted = nn.functional.gelu(wanted, approximate="tanh") if gelu else wanted
    found = onednn(x, weight, bias, gelu=gelu)
    assert found.dtype == dtype
    assert worst(found, wanted) < (0.2 if dtype == torch.bfloat16 else 2e-4)  # a unit of bfloat16 at 32 is 0.25


# Attention


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (5, 40), (1, 1)])
def test_the_blocked_kernel_is_attention(queries: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.attention.SCORES", 3 * keys)  # three queries a block
    q, k, v = torch.randn(queries, 2, 8), torch.randn(keys, 2, 8), torch.randn(keys, 2, 8)
    wanted = attend(q.double(), k.double(), v.double(), "flash")
    assert worst(attend(q, k, v, "blocked"), wanted) < 1e-5
    half = [each.bfloat16() for each in (q, k, v)]
    assert worst(attend(half[0], half[1], half[2], "blocked"), wanted) < 0.05


def test_kernels_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_kernel(cpu, torch.float32) == "flash"
    for multiplies, name in ((True, "blocked"), (False, "flash")):
        monkeypatch.setattr("engine.attention.multiplies_bfloat16", lambda found=multiplies: found)
        assert choose_kernel(cpu, torch.bfloat16) == name
    for capability, name in (((9, 0), "cudnn"), ((8, 0), "flash"), ((7, 5), "any")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert choose_kernel(cuda, torch.bfloat16) == name
        assert choose_kernel(cuda, torch.float32) == "efficient"
        assert choose_kernel(cuda, torch.float64) == "any"
