# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`auto` and `evict` where the host never sees a tree: how many nodes a batch has is decided from
what was heard of steps two before, who gets them from the scores of now."""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from echo_vllm.forecast import CostCurve, StepCost
from echo_vllm.forecast.forecaster import PROBED_NODES
from echo_vllm.forecast.online_cost import OnlineCost
from echo_vllm.forecast.plan import DraftPlan, Load
from echo_vllm.policies import DraftBatch, DraftPolicy, Observation
from echo_vllm.policies.cost_aware import CostAwarePolicy, gain_curve
from echo_vllm.trees.forest import ROOT
from echo_vllm.trees.pool import NO_CANDIDATE, CandidatePool
from echo_vllm.trees.ranked import FILLER_TIER, RankedTrees
from tests.policies.serving import Prompts, Serving
from tests.policies.test_auto_serving import MACHINES, auto
from tests.policies.test_policies import grow, policy_of
from tests.trees.test_ranked import served

REQUESTS, NODES = 4, 16


def cost_aware(name: str = "auto", **fields: Any) -> CostAwarePolicy:
    fields = {"max_depth": 4, "top_k": 3, "width": 4, **fields}
    policy = policy_of(NODES, policy=name, **fields)
    assert isinstance(policy, CostAwarePolicy)
    return policy


def unseen(policy: DraftPolicy, batch: DraftBatch, seed: int = 1) -> CandidatePool:
    pool = CandidatePool.empty_unseen(batch.num_requests)
    return grow(policy, batch.num_requests, seed, batch, pool=pool)


# ---- On the device ----


@pytest.mark.parametrize("name", ["auto", "evict"])
def test_a_budget_that_comes_later_buys_the_nodes_of_a_seen_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, batch = cost_aware(name), DraftBatch.of(REQUESTS)
    pool = unseen(policy, batch)
    trees = policy.ranked(pool, batch)
    for budget in range(0, int(trees.sizes.sum()) + 1, 7):
        monkeypatch.setattr(policy, "budget", lambda *_, budget=budget: budget)
        at_once = policy.select(pool, batch)
        counts = served(trees, budget)
        assert counts == at_once.cu_nodes.diff().tolist()
        for request, count in enumerate(counts):
            here = slice(int(at_once.cu_nodes[request]), int(at_once.cu_nodes[request + 1]))
            for field_name in ("token_ids", "parents", "depths", "path_logprobs"):
                found = getattr(trees, field_name)[request, :count].tolist()
                assert found == getattr(at_once, field_name)[here].tolist(), field_name


def test_probes_come_before_everybody() -> None:
    probed = torch.tensor([1, 3])
    batch = DraftBatch(REQUESTS, REQUESTS, DraftPlan(max_depth=1, probes=2), probed)
    policy = cost_aware()
    pool = unseen(policy, batch)
    trees = policy.ranked(pool, batch)
    counts = served(trees, 2 * PROBED_NODES)
    assert counts == [0, PROBED_NODES, 0, PROBED_NODES]
    # They alone go below the plan's level.
    assert (trees.depths.max(1).values > 1).tolist() == [False, True, False, True]


def test_a_level_that_nobody_asks_about_runs_for_all() -> None:
    """However dear it is: it costs the same whoever goes on."""
    dear = CostCurve((1.0, 2.0), (1.0, 1e6))
    plan = DraftPlan(max_depth=3, price=1.0, cost=StepCost(dear, dear, dear), width=2)
    pool = unseen(cost_aware(), DraftBatch(REQUESTS, REQUESTS, plan))
    assert pool.num_levels == 3
    assert (pool.path_logprobs > NO_CANDIDATE).all()


@given(
    st.lists(st.lists(st.floats(0, 1, width=32), max_size=5), min_size=1, max_size=6),
)
@settings(deadline=None, max_examples=60)
def test_the_gain_curve_is_what_the_best_nodes_come_to(chances: list[list[float]]) -> None:
    shape = len(chances), 5
    scores, tiers = torch.zeros(shape), torch.full(shape, FILLER_TIER, dtype=torch.int32)
    for row, own in enumerate(chances):
        scores[row, : len(own)] = torch.tensor(sorted(own, reverse=True))
        tiers[row, : len(own)] = 1
    nothing = torch.zeros(shape, dtype=torch.int32)
    zeros = torch.zeros(shape, dtype=torch.int64)
    trees = RankedTrees(zeros, nothing + ROOT, tiers, scores, nothing, scores, zeros)
    num_trees, *gains = gain_curve(trees, 5).tolist()
    assert num_trees == sum(map(bool, chances))
    best = sorted((chance for own in chances for chance in own), reverse=True)
    for k, gain in enumerate(gains):
        wanted = math.fsum(best[: k * int(num_trees)]) / max(1, num_trees)
        assert gain == pytest.approx(wanted, abs=1e-5)


# ---- On the host ----

ROWS = CostCurve((1.0, 1000.0), (0.010, 0.010 + 999 * 0.0005))
FREE = CostCurve((1.0,), (1e-9,))
PLAN = DraftPlan(max_depth=4, cost=StepCost(ROWS, FREE, FREE), nodes=5.0)


def hear(policy: CostAwarePolicy, gains: list[float], trees: int = 100) -> None:
    report = {
        "gains": [trees, *gains],
        "first": (0, 0.0),
        "samples": [],
        "predicted": [],
        "accepted": [],
    }
    policy.observe(Observation(report=report))


def falling(first: float, keep: float) -> list[float]:
    """A gain curve: every further node a tree is worth `keep` of the last."""
    return list(itertools.accumulate((first * keep**k for k in range(NODES)), initial=0.0))


def test_before_anything_was_heard_the_forecast_says_how_many() -> None:
    policy = cost_aware()
    assert policy.num_nodes_of(Load(3), [16] * 3, PLAN, 0) == 15
    assert policy.num_nodes_of(Load(3), [16, 16, 2], PLAN, 0) == 15
    assert policy.num_nodes_of(Load(3), [], PLAN, 0) == 0


@pytest.mark.parametrize("requests", [1, 7, 64])
def test_as_many_nodes_as_would_have_been_best(requests: int) -> None:
    """Against every number there is, one by one."""
    policy, curve = cost_aware(), falling(0.7, 0.6)
    hear(policy, curve)
    found = policy.num_nodes_of(Load(requests, 10), [NODES] * requests, PLAN, 0)
    assert PLAN.cost is not None
    speeds = [
        (requests + requests * float(np.interp(total / requests, range(NODES + 1), curve)))
        / float(PLAN.cost.step(requests + 10 + total, (), requests))
        for total in range(NODES * requests + 1)
    ]
    assert speeds[found] > 0.999 * max(speeds)
    assert 0 < found < NODES * requests


def test_better_drafts_get_more_nodes_and_dear_rows_fewer() -> None:
    def nodes(first: float, row_s: float) -> int:
        policy = cost_aware()
        hear(policy, falling(first, 0.7))
        rows = CostCurve((1.0, 1000.0), (0.010, 0.010 + 999 * row_s))
        plan = DraftPlan(cost=StepCost(rows, FREE, FREE))
        return policy.num_nodes_of(Load(8), [NODES] * 8, plan, 0)

    assert nodes(0.3, 0.0005) < nodes(0.9, 0.0005)
    assert nodes(0.9, 0.002) < nodes(0.9, 0.0005)
    assert nodes(0.9, 1.0) == 0


def test_probes_have_their_nodes_whatever_is_thought_of_them() -> None:
    policy = cost_aware()
    hear(policy, falling(1e-6, 0.5))
    rest = DraftPlan(max_depth=0, probes=2, cost=PLAN.cost)
    assert policy.num_nodes_of(Load(8), [NODES] * 2, rest, 2) == 2 * PROBED_NODES


@given(
    sizes=st.lists(st.integers(0, NODES), max_size=9),
    prompts=st.integers(0, 60),
    heard=st.booleans(),
    probes=st.integers(0, 2),
    max_rows=st.none() | st.integers(0, 80),
)
@settings(deadline=None, max_examples=80)
def test_the_budget_is_never_exceeded(
    sizes: list[int], prompts: int, heard: bool, probes: int, max_rows: int | None
) -> None:
    policy = cost_aware(k_max=40)
    if heard:
        hear(policy, falling(0.9, 0.99))
    load = Load(len(sizes), prompts)
    plan = DraftPlan(cost=PLAN.cost, nodes=9.0, max_rows=max_rows)
    found = policy.num_nodes_of(load, sizes, plan, min(probes, len(sizes)))
    assert 0 <= found <= min(sum(sizes), max(0, 40 - prompts))
    assert max_rows is None or found <= max(0, max_rows - load.rows)


def test_one_tree_says_little_of_the_next_and_many_say_all() -> None:
    policy = cost_aware()
    hear(policy, falling(0.2, 0.5))
    assert policy._gains is not None
    before = policy._gains[1]
    hear(policy, falling(0.8, 0.5), trees=1)
    assert policy._gains[1] < before + 0.1
    hear(policy, falling(0.8, 0.5), trees=100)
    assert policy._gains[1] == pytest.approx(0.8, abs=0.01)
    hear(policy, falling(0.0, 0.5), trees=0)
    assert policy._gains[1] == pytest.approx(0.8, abs=0.01)


# ---- Both, on a machine that costs what it is said to ----


@dataclass
class Drafts:
    """Trees that the next step verifies.

    Attributes:
        alive: [r, n] bool, which of their places the target would take.
    """

    trees: RankedTrees
    alive: torch.Tensor
    plan: DraftPlan
    num_probes: int


@dataclass
class UnseenServing(Serving):
    """Requests without end, as Model Runner V2 serves them: what a step leaves is heard `late`
    steps later, and the drafter is always up to date."""

    late: int = 2
    _coming: deque[Observation] = field(default_factory=deque)
    _drafted: Drafts | None = None

    def step(self) -> None:
        policy, true, count = self.policy, self.true, len(self._left)
        load, now, given = Load(count), self._drafted, [0]
        nodes, expected, verified = 0, 0.0, []
        if now is not None:
            nodes = policy.num_nodes_of(load, now.trees.sizes.tolist(), now.plan, now.num_probes)
            given = served(now.trees, nodes)
            place = torch.arange(now.alive.shape[1])
            is_given = place < torch.tensor(given).unsqueeze(1)
            accepted = (now.alive & is_given).sum(1).to(torch.int32)
            logprobs = now.trees.path_logprobs[is_given]
            depths = now.trees.depths[is_given]
            verified = [n.numpy() for n in policy.notes_of_verified(logprobs, depths, accepted)]
            self.tokens += int(accepted.sum())
            expected = float((logprobs.exp() * self.prompts.honesty**depths).sum())
        plan = policy.plan(load)
        probes = plan.probed(count)
        requests = np.array(probes) if plan.max_depth == 0 else np.arange(count)
        if plan.max_depth == 0:
            probes = list(range(len(probes)))
        batch = DraftBatch(len(requests), count, plan, torch.tensor(probes, dtype=torch.int64))
        self._drafted, draft_s = None, 0.0
        drafted: list[NDArray[Any]] = []
        levels: list[int] = []
        if len(requests):
            pool = CandidatePool.empty_unseen(len(requests))
            alive, levels = self._grow(pool, batch, self._sure[requests])
            pool.token_ids = pool.all_columns().clone()
            trees = policy.ranked(pool, batch)
            drafted = [n.numpy() for n in policy.notes_of_drafted(pool, trees, batch.probes)]
            draft_s = float(true.draft(levels, len(requests)))
            self._drafted = Drafts(trees, alive.gather(1, trees.token_ids), plan, len(probes))
        verify_s = float(true.verify(count + nodes))
        self.tokens += count
        self.expected_tokens += count + expected
        self.expected_seconds += verify_s + draft_s + true.other
        self.steps.append((count, plan.max_depth != 0, verify_s + draft_s, len(probes)))
        self._coming.append(
            Observation(
                rows=count + nodes,
                num_nodes=nodes,
                rested=not nodes and not drafted,
                verify_s=verify_s * self._noise(),
                other_s=true.other * self._noise(),
                draft_s=draft_s * self._noise(),
                committed=len(requests),
                level_rows=levels,
                report=policy.report_of_notes(verified, drafted),
            )
        )
        if len(self._coming) > self.late:
            policy.observe(self._coming.popleft())


@pytest.mark.parametrize(
    ("name", "sure", "requests"),
    [("gpu", 0.7, 1), ("gpu", 0.4, 64), ("two-cores", 0.7, 4), ("steep", 0.4, 16)],
)
def test_what_is_decided_late_is_about_as_fast(name: str, sure: float, requests: int) -> None:
    """As where the host sees every tree first, on the same machine."""
    true, prompts = MACHINES[name], Prompts(sure, spread=0.1)
    seen = Serving(auto(true), true, prompts, requests).run(200).speed(200)
    late = UnseenServing(auto(true), true, prompts, requests).run(200).speed(200)
    assert late > 0.95 * seen


@pytest.mark.parametrize(
    ("name", "sure", "requests", "drafts"),
    [("gpu", 0.7, 16, True), ("dear-drafter", 0.15, 256, False), ("steep", 0.05, 64, False)],
)
def test_it_drafts_where_that_pays_and_rests_where_not(
    name: str, sure: float, requests: int, drafts: bool
) -> None:
    true = MACHINES[name]
    run = UnseenServing(auto(true), true, Prompts(sure), requests).run(300)
    assert (run.share_drafting(last=100) > 0.9) == drafts
    assert (run.share_drafting(last=100) < 0.1) != drafts


def test_rests_teach_what_plain_decoding_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    taught: list[bool] = []

    def observe(_: OnlineCost, *step: object, trees: bool) -> None:
        taught.append(trees)

    monkeypatch.setattr(OnlineCost, "observe_step", observe)
    true = MACHINES["dear-drafter"]
    run = UnseenServing(auto(true), true, Prompts(0.15), 64).run(300)
    num_plain = sum(not drafts for _, drafts, *_ in run.steps)
    assert taught.count(False) > 0.8 * num_plain > 200


def test_evict_has_as_many_nodes_as_pay() -> None:
    def nodes(machine: str) -> float:
        policy = cost_aware("evict")
        policy.set_cost(MACHINES[machine])
        run = UnseenServing(policy, MACHINES[machine], Prompts(0.6), 16)
        run.run(60)
        return float(np.mean([step.num_nodes for step in run._coming]))

    assert nodes("gpu") > 2 * nodes("steep") > 0
