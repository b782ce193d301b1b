# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Who knows what will be accepted: nobody is faster, and shares are measured against it."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_vllm.forecast import CostCurve, Hinge, StepCost
from echo_vllm.offline.trace.comparison import compare, measured, resamples, rows
from echo_vllm.offline.trace.contenders import AnyContender, BestTable, Contender, Oracle
from echo_vllm.offline.trace.oracle import best_lengths, level_rows
from echo_vllm.offline.trace.published import specdecode_bench
from echo_vllm.offline.trace.recorded import RecordedDrafter
from echo_vllm.offline.trace.replay import Ledger, ReplayResult, replay
from echo_vllm.trace_format import TraceRequest


def linear(fixed: float, row: float) -> CostCurve:
    return CostCurve((0.0, 1.0), (fixed, fixed + row))


small = st.floats(0, 3)


@given(
    acceptable=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    committed=st.integers(1, 4),
    k_max=st.integers(1, 12),
    gamma=st.floats(0, 0.5),
    draft=st.tuples(small, small, small, small),
    price=st.floats(0.01, 3),
)
def test_no_choice_of_lengths_is_worth_more(
    acceptable: list[int],
    committed: int,
    k_max: int,
    gamma: float,
    draft: tuple[float, float, float, float],
    price: float,
) -> None:
    fixed, token, level, level_row = draft
    cost = StepCost(
        verify=Hinge(float(k_max), gamma, 1.0).to_curve(),
        draft_level=linear(level, level_row),
        catch_up=linear(fixed, token),
        other=0.3,
        draft_fixed=0.1,
    )
    waiting = np.full(len(acceptable), committed)
    count = len(acceptable)

    def value(lengths: Any) -> float:
        lengths = np.array(lengths)
        if not lengths.any():
            return -price * cost.plain_step(count)
        passed = int(waiting[lengths > 0].sum())
        nodes = int(lengths.sum())
        return nodes - price * cost.step(count + nodes, level_rows(lengths), passed)

    best = best_lengths(np.array(acceptable), waiting, count, cost, price)
    assert (best <= acceptable).all()
    every = product(*(range(most + 1) for most in acceptable))
    assert value(best) == pytest.approx(max(map(value, every)), abs=1e-9)


def requests(count: int, seed: int = 0) -> list[TraceRequest]:
    """Trees of depth 3 and width 2, all verified; some accept along the best tokens, some not."""
    rng = np.random.default_rng(seed)
    parents = [-1, -1, 0, 0, 1, 1, 2, 2, 4, 4]
    paths = [[], [0], [0, 2], [0, 2, 6], [0, 3], [1], [1, 4], [1, 4, 9]]
    scores = [-0.4, -1.2, -0.8, -2.0, -1.6, -3.0, -1.2, -2.5, -2.0, -4.0]
    return [
        TraceRequest(
            id=f"{i // 8}",
            context=300,
            parents=parents,
            logprobs=scores,
            level_starts=[0, 2, 6],
            selected=range(10),
            accepted=paths[rng.choice(8, p=[0.3, 0.15, 0.1, 0.2, 0.05, 0.05, 0.1, 0.05])],
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def drafter() -> RecordedDrafter:
    return RecordedDrafter(requests(160))


def test_what_is_accepted_is_told_apart_by_where_it_goes(drafter: RecordedDrafter) -> None:
    along = TraceRequest("a", 9, [-1, -1, 0, 0], [-1.0, -2, -2, -3], [0, 2], range(4), [0, 3])
    beside = TraceRequest("b", 9, [-1, -1, 0, 0], [-1.0, -2, -2, -3], [0, 2], range(4), [1])
    known = RecordedDrafter([along, beside])
    assert known.in_chain.tolist() == [1, 0]
    assert known.in_tree.tolist() == [2, 1]
    assert (drafter.in_chain <= drafter.in_tree).all()
    assert len(set(drafter.answers.tolist())) == 20


@pytest.mark.parametrize("load", [1, 200])
def test_nobody_is_faster_than_who_knows(load: int, drafter: RecordedDrafter) -> None:
    cost = specdecode_bench().with_context(300 * load)

    def speed(contender: Contender | Oracle | BestTable) -> float:
        return replay(drafter, contender, load, cost, request_steps=256).tokens_per_second

    chain, tree = speed(Oracle("chain")), speed(Oracle("tree"))
    table = speed(BestTable())
    chains = [speed(Contender.chain(length)) for length in range(4)]
    wide = Contender.of("wide", {"policy": "topn", "max_depth": 3, "top_k": 2}, 10)
    assert table == max(chains)
    assert tree > chain > table
    assert tree > speed(wide)


def test_the_oracle_verifies_what_is_accepted_and_rests_where_nothing_pays(
    drafter: RecordedDrafter,
) -> None:
    cheap = StepCost(linear(1.0, 0.0), linear(0.0, 1e-9), linear(0.0, 1e-9))
    result = replay(drafter, Oracle("tree"), 8, cheap, request_steps=2000)
    # Drafting costs nothing, so all that would be accepted is drafted, and nothing else.
    assert result.tokens == pytest.approx(1 + drafter.in_tree.mean(), rel=0.03)
    assert result.tokens == pytest.approx(1 + result.nodes / 8)
    dear = StepCost(linear(0.1, 1.0), linear(5.0, 5.0), linear(5.0, 5.0))
    rests = replay(drafter, Oracle("tree"), 8, dear, request_steps=200)
    assert (rests.tokens, rests.nodes, rests.drafting) == (1, 0, 0)
    assert rests.tokens_per_second == pytest.approx(8 / dear.plain_step(8))


def of_speed(name: str, speed: float) -> ReplayResult:
    ledger = Ledger(np.full(4, speed), np.ones(4))
    return ReplayResult(name, 1, 1, 1, 0, 0, 0, 0, 1 / speed, speed, 0, 0, 0, 0, ledger)


def test_shares_are_of_the_gain_over_plain_decoding_and_of_the_gap_to_the_table() -> None:
    speeds = {"plain": 100.0, "auto": 160, "best table": 120, "oracle": 200, "oracle tree": 240}
    results = {name: of_speed(name, speed) for name, speed in speeds.items()}
    found = measured(results, resamples(np.array([0, 0, 1, 2]), 0))
    share = {name: figures.share.middle for name, figures in found.items() if figures.share}
    closed = {name: figures.closed.middle for name, figures in found.items() if figures.closed}
    assert share == pytest.approx(
        {"plain": 0, "auto": 0.6, "best table": 0.2, "oracle": 1, "oracle tree": 1.4}
    )
    assert closed["auto"] == pytest.approx(0.5)
    assert closed["best table"] == 0
    assert str(found["auto"].over_plain) == "1.60 [1.60, 1.60]"
    flat = measured({name: of_speed(name, 100.0) for name in speeds}, np.ones((2, 4)))
    assert flat["auto"].share is flat["auto"].closed is None


def test_answers_are_drawn_as_wholes() -> None:
    weights = resamples(np.array([0, 0, 1, 2, 2, 2]), 3)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()


def test_an_interval_covers_the_figure_of_another_recording(drafter: RecordedDrafter) -> None:
    cost = specdecode_bench().with_context
    chain = Contender.chain(2)

    def figure(known: RecordedDrafter) -> Any:
        return compare(known, [chain], [16], cost)[16]["chain:2"].over_plain

    others = [figure(RecordedDrafter(requests(160, seed))).middle for seed in range(1, 6)]
    found = figure(drafter)
    assert found.low < found.middle < found.high
    assert sum(found.low - 0.02 < other < found.high + 0.02 for other in others) >= 3
    width = found.high - found.low
    assert 1.5 * np.std(others) < width < 12 * np.std(others)


def test_a_comparison_has_every_contender_at_every_load(drafter: RecordedDrafter) -> None:
    cost = specdecode_bench().with_context
    chosen: list[AnyContender] = [Contender("plain"), Oracle("chain"), Contender.chain(1)]
    found = compare(drafter, chosen, [1, 4], cost, request_steps=64)
    names = ["plain", "chain:1", "best table", "oracle", "oracle tree"]
    assert [list(at_load) for at_load in found.values()] == [names, names]
    table = rows(found, "Share of the oracle's gain over plain decoding")
    assert [row[0] for row in table] == names
    assert table[0][1].startswith("0.00")
    assert table[3][2] == "1.00 [1.00, 1.00]"
