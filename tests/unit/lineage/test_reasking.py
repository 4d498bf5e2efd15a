"""Which steps run: the rules of `to_run`, and a property over random graphs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kontext_batch.lineage.reasking import Known, deps_left, to_run
from kontext_batch.planning.states import LIVE, StepState

S = StepState
CHAIN = [[], [0], [1]]


def known(state: StepState, *, kept: bool = True) -> Known:
    return Known(1, state, kept and state is S.DONE)


def everything(count: int) -> range:
    return range(count)


def test_new_steps_run() -> None:
    assert to_run(CHAIN, [None, None, None], asked=everything(3), pictures=set()) == [True, True, True]


def test_what_is_done_and_kept_is_not_run_again() -> None:
    done = known(S.DONE)
    assert to_run(CHAIN, [done, done, None], asked=everything(3), pictures={2}) == [False, False, True]


def test_a_collected_picture_that_nobody_needs_stays_collected() -> None:
    steps = [known(S.DONE, kept=False), known(S.DONE), known(S.DONE)]
    assert to_run(CHAIN, steps, asked=everything(3), pictures={2}) == [False, False, False]


def test_a_collected_picture_is_made_again_for_a_reader_and_upwards() -> None:
    collected = known(S.DONE, kept=False)
    assert to_run(CHAIN, [collected, collected, None], asked=everything(3), pictures=set()) == [True, True, True]


def test_a_collected_picture_is_made_again_for_a_delivery() -> None:
    collected = known(S.DONE, kept=False)
    assert to_run(CHAIN, [known(S.DONE), known(S.DONE), collected], asked=[], pictures={2}) == [False, False, True]


def test_an_unsuccessful_step_runs_when_asked_for() -> None:
    steps = [known(S.FAILED), known(S.SKIPPED), known(S.SKIPPED)]
    assert to_run(CHAIN, steps, asked=[0], pictures=set()) == [True, False, False]


def test_an_unsuccessful_parent_runs_for_a_reader_that_is_asked_for() -> None:
    steps = [known(S.FAILED), known(S.SKIPPED), known(S.SKIPPED)]
    assert to_run(CHAIN, steps, asked=[2], pictures=set()) == [True, True, True]


def test_one_parent_read_twice_is_waited_for_once() -> None:
    assert deps_left([0, 0, 1, 2], [True, False, True]) == 2


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[list[int]], list[Known | None]]:
    count = draw(st.integers(1, 8))
    parents = [draw(st.lists(st.integers(0, index - 1), max_size=3)) if index else [] for index in range(count)]
    states = draw(
        st.lists(
            st.one_of(st.none(), st.builds(known, st.sampled_from(S), kept=st.booleans())),
            min_size=count,
            max_size=count,
        )
    )
    return parents, states


@given(graphs(), st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7)))
def test_whoever_runs_has_parents_that_run_or_are_kept(
    graph: tuple[list[list[int]], list[Known | None]], asked: set[int], pictures: set[int]
) -> None:
    parents, states = graph
    runs = to_run(parents, states, asked=asked, pictures=pictures)
    for index, step in enumerate(states):
        if step is None or step.state in LIVE:
            assert runs[index]
        if step is not None and step.kept:
            assert not runs[index]
        for parent in parents[index] if runs[index] else ():
            before = states[parent]
            assert runs[parent] or (before is not None and before.kept)
