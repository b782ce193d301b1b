# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`auto` and `evict` on Model Runner V2: what a step leaves is heard later, and decides what is
drafted and how many nodes a batch has."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from echo_vllm.forecast import CostCurve, StepCost
from echo_vllm.forecast.plan import DraftPlan, Load
from echo_vllm.policies import Observation
from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, generate
from tests.engine.test_exactness import greedy
from tests.v2.budget import Watch, watch
from tests.v2.stock import PROMPTS, TOKENS, scheduler, v2_engine
from tests.v2.trees import MANY, both, plain, plain_many, sampling, trees

__all__ = ["plain", "plain_many", "watch"]

NODES = 16
FLAT = CostCurve((1.0, 1000.0), (0.010, 0.0101))
RISING = CostCurve((1.0, 1001.0), (0.010, 0.210))
FREE, DEAR = CostCurve((1.0,), (1e-6,)), CostCurve((1.0,), (10.0,))

Costing = Callable[[StepCost], None]


@pytest.fixture
def costing(monkeypatch: pytest.MonkeyPatch) -> Costing:
    """Makes forwards cost what the test says, since the interpreter's times mean nothing."""

    def say(cost: StepCost) -> None:
        monkeypatch.setattr("echo_vllm.step.v2.worker.measured_cost", lambda *_: cost)

    return say


def learning(tiny: TinyModel, policy: str = "auto", **section: Any) -> dict[str, Any]:
    return echo(tiny.head, NODES, policy=policy, **{"online": False, **section})


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Observation]:
    """What the scheduler's policy was told."""
    from echo_vllm.policies.cost_aware import CostAwarePolicy

    found: list[Observation] = []
    observe = CostAwarePolicy.observe

    def observed(policy: CostAwarePolicy, step: Observation) -> None:
        found.append(step)
        observe(policy, step)

    monkeypatch.setattr(CostAwarePolicy, "observe", observed)
    return found


@both
def test_what_costs_nothing_is_drafted_and_exact(
    tiny: TinyModel,
    plain: list[list[int]],
    is_async: bool,
    costing: Costing,
    watch: Watch,
    steps: list[Observation],
) -> None:
    costing(StepCost(RISING, FREE, FREE))
    with v2_engine(tiny, learning(tiny), async_scheduling=is_async) as llm:
        assert generate(llm, PROMPTS, greedy(TOKENS)) == plain
        count = counters(llm)
        forecaster = scheduler(llm)._policy.forecaster
    assert count["spec_decode_num_accepted_tokens"] > 20
    assert forecaster._is_drafting
    shared = [step for step in watch.steps if step.given is not None]
    assert len(shared) > 6
    for step in shared:
        assert step.given is not None
        assert sum(step.given) == step.num_nodes
        assert max(step.given) <= max(step.placeholders)
    # Not all that there are, and not in equal parts.
    full = [step.given for step in shared if step.given and len(step.placeholders) == 4]
    assert any(sum(given) < 4 * NODES and max(given) > min(given) + 1 for given in full)
    # The times, rows and nodes of every step but the last, none of which anybody waited for.
    assert len(steps) >= len(watch.steps) - 2
    timed = [step for step in steps if step.rows]
    assert all(step.verify_s > 0 for step in timed)
    drafted = [step for step in timed if step.level_rows]
    assert all(step.draft_s > 0 and step.committed > 0 for step in drafted)
    assert [step.num_nodes for step in timed] == [step.num_nodes for step in watch.steps][
        1 : 1 + len(timed)
    ]
    # What was accepted is what requests got, but for what lies behind their ends.
    accepted = sum(sum(step.report["accepted"]) for step in steps if step.report)
    assert 0 <= accepted - count["spec_decode_num_accepted_tokens"] <= 6 * len(PROMPTS)


@both
@pytest.mark.full
def test_what_costs_much_is_not_drafted(
    tiny: TinyModel,
    plain: list[list[int]],
    is_async: bool,
    costing: Costing,
    watch: Watch,
    steps: list[Observation],
) -> None:
    """But by the few that show what drafting would bring: no placeholders for anybody else."""
    costing(StepCost(FLAT, DEAR, DEAR))
    with v2_engine(tiny, learning(tiny), async_scheduling=is_async) as llm:
        assert generate(llm, PROMPTS, greedy(TOKENS)) == plain
        assert not scheduler(llm)._policy.forecaster._is_drafting
    assert len(watch.steps) > 24
    assert not any(step.placeholders for step in watch.steps[14:])
    tried = [step for step in watch.steps if step.placeholders]
    assert 2 <= len(tried) <= 8
    for step in tried:
        assert step.given is not None
        assert sum(step.given) == step.num_nodes >= 2 * len(step.placeholders)
        assert all(count >= 2 for count in step.given if count)
    # The policy hears which steps were plain ones, from which it learns what these take.
    heard = [step for step in steps if step.rows]
    assert all(step.rested == (not step.num_nodes and not step.committed) for step in heard)
    assert sum(step.rested for step in heard) > len(heard) / 2


@pytest.mark.full
def test_a_drafter_that_rested_drafts_as_if_it_had_not(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After short and long rests, with requests that end in one, and from the prefix cache."""
    from echo_vllm.policies.echo import EchoPolicy
    from echo_vllm.step.v2.drafter import TreeSpeculator

    num_forwards = 0
    forward = TreeSpeculator._run_model

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_forwards
        num_forwards += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(TreeSpeculator, "_run_model", counted)
    found, forwards = [], []
    for most in (4, 0):
        monkeypatch.setattr("echo_vllm.step.v2.rests.RESTS", most)
        step, num_forwards = itertools.count(), 0

        def plan(_: EchoPolicy, load: Load, step: Any = step) -> DraftPlan:
            return DraftPlan(max_depth=0 if next(step) % 14 < 10 else None)

        monkeypatch.setattr(EchoPolicy, "plan", plan)
        options = {"enable_prefix_caching": True, "block_size": 32}
        with v2_engine(tiny, trees(tiny, "echo-16"), **options) as llm:
            first = generate(llm, PROMPTS, greedy(TOKENS))
            more = [
                {"prompt_token_ids": prompt["prompt_token_ids"] + tokens}
                for prompt, tokens in zip(PROMPTS, first, strict=True)
            ]
            found.append((first, generate(llm, more, greedy(TOKENS)), counters(llm)))
        forwards.append(num_forwards)
    assert found[0] == found[1]
    assert found[0][2]["spec_decode_num_accepted_tokens"] > 5
    assert forwards[0] < 0.7 * forwards[1]


@pytest.mark.full
@pytest.mark.parametrize("policy", ["auto", "evict"])
def test_no_step_has_more_nodes_than_k_max(
    tiny: TinyModel, plain: list[list[int]], policy: str, costing: Costing, watch: Watch
) -> None:
    costing(StepCost(FLAT, FREE, FREE))
    with v2_engine(tiny, learning(tiny, policy, k_max=18), async_scheduling=True) as llm:
        assert generate(llm, PROMPTS, greedy(TOKENS)) == plain
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 5
    for step in watch.steps:
        assert step.num_nodes <= max(0, 18 - step.prompt_rows)


@pytest.mark.full
def test_evict_verifies_what_pays(
    tiny: TinyModel, plain: list[list[int]], costing: Costing, watch: Watch
) -> None:
    """Every row takes as long as half a token: only nodes that are more probable pay."""
    rows = CostCurve((1.0, 101.0), (0.010, 0.510))
    costing(StepCost(rows, FREE, FREE))
    with v2_engine(tiny, learning(tiny, "evict"), async_scheduling=True) as llm:
        assert generate(llm, PROMPTS, greedy(TOKENS)) == plain
    late = [step for step in watch.steps[6:] if len(step.placeholders) == 4]
    assert len(late) > 4
    assert all(step.num_nodes < 4 * NODES / 2 for step in late)


@both
@pytest.mark.full
def test_seeds_give_what_plain_decoding_gives(
    tiny: TinyModel, is_async: bool, costing: Costing
) -> None:
    params = [
        sampling(seed=1),
        sampling(seed=2, temperature=0.6, top_p=0.9),
        greedy(TOKENS),
        sampling(seed=3, top_k=4),
        greedy(TOKENS, repetition_penalty=1.3),
        sampling(seed=4, min_p=0.1),
    ]
    with v2_engine(tiny, None) as llm:
        plain = generate(llm, PROMPTS, params)
    costing(StepCost(FLAT, FREE, FREE))
    with v2_engine(tiny, learning(tiny), async_scheduling=is_async) as llm:
        assert generate(llm, PROMPTS, params) == plain
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 5


@pytest.mark.full
@pytest.mark.parametrize("policy", ["auto", "evict"])
def test_trees_stay_exact_under_pressure(
    tiny: TinyModel, plain_many: list[list[int]], policy: str, costing: Costing
) -> None:
    """Prompts in chunks, preemption, slots used again."""
    costing(StepCost(FLAT, FREE, FREE))
    options = {
        "max_num_batched_tokens": 40,
        "long_prefill_token_threshold": 12,
        "num_gpu_blocks_override": 9,
        "block_size": 32,
    }
    with v2_engine(tiny, learning(tiny, policy), async_scheduling=True, **options) as llm:
        assert generate(llm, MANY, greedy(TOKENS)) == plain_many
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 5


@pytest.mark.full
def test_what_forwards_cost_is_measured_and_learned(
    tiny: TinyModel,
    plain: list[list[int]],
    steps: list[Observation],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the interpreter the times say nothing, but there are some, and they are kept by a key of
    V2's own."""
    monkeypatch.setenv("ECHO_VLLM_CACHE", str(tmp_path))
    monkeypatch.setattr("echo_vllm.startup.measure.DISAGREES", 1e6)
    with v2_engine(tiny, learning(tiny, online=True), async_scheduling=True) as llm:
        (file,) = (tmp_path / "costs").iterdir()
        assert "Model Runner V2" in file.read_text()
        assert generate(llm, PROMPTS, greedy(TOKENS)) == plain
        costs = scheduler(llm)._policy.costs()
    assert costs is not None
    assert costs.plain.verify(1) > 0
    assert costs.trees.draft_level(4) > 0
    assert len(steps) > 20
    # The same costs are the budget of `echo` without `k_max`.
    spec = echo(tiny.head, NODES, policy="echo", gates={"1": 0.1})
    with v2_engine(tiny, spec, async_scheduling=True) as llm:
        assert generate(llm, PROMPTS, greedy(TOKENS)) == plain
        assert scheduler(llm)._policy._max_rows is not None
