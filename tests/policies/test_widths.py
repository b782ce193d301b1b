# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`auto` chooses how many nodes of a request the drafter expands of a level."""

from __future__ import annotations

import pytest
import torch

from echo_vllm.forecast import CostCurve, StepCost
from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.policies import DraftBatch
from echo_vllm.policies.auto import AutoPolicy, least_widths
from echo_vllm.trees.forest import ROOT
from echo_vllm.trees.pool import NO_CANDIDATE, CandidatePool
from tests.policies.serving import Prompts, Serving
from tests.policies.test_policies import grow, policy_of

REQUESTS = 5


def auto() -> AutoPolicy:
    policy = policy_of(32, policy="auto", max_depth=4, top_k=4, width=4)
    assert isinstance(policy, AutoPolicy)
    return policy


def paths(pool: CandidatePool, request: int) -> dict[tuple[int, ...], int]:
    """Path of tokens -> column of a candidate."""
    of_columns: list[tuple[int, ...]] = []
    for token, parent in zip(
        pool.token_ids[request].tolist(), pool.parents[request].tolist(), strict=True
    ):
        of_columns.append((*(() if parent == ROOT else of_columns[parent]), token))
    exists = (pool.path_logprobs[request] > NO_CANDIDATE).tolist()
    return {path: i for i, path in enumerate(of_columns) if exists[i]}


@pytest.mark.parametrize("seed", range(8))
def test_the_widest_trees_tell_which_nodes_narrower_ones_have(seed: int) -> None:
    policy = auto()
    whole = grow(policy, REQUESTS, seed)
    widths = policy.forecaster.widths
    assert widths == (1, 2, 4)
    least = least_widths(whole.path_logprobs, whole.parents, whole.level_starts, widths)
    by_width = []
    for width in widths:
        plan = DraftPlan(max_depth=4, width=width)
        batch = DraftBatch(REQUESTS, REQUESTS, plan)
        narrow = grow(policy, REQUESTS, seed, batch)
        for level in range(1, narrow.num_levels):
            assert narrow.level(level + 1).stop - narrow.level(level + 1).start == 4 * width
        by_width.append([set(paths(narrow, request)) for request in range(REQUESTS)])
    for request in range(REQUESTS):
        for path, column in paths(whole, request).items():
            has = [path in of_width[request] for of_width in by_width]
            assert widths[has.index(True)] == least[request, column]


def test_a_probe_makes_the_trees_of_its_step_whole() -> None:
    policy, plan = auto(), DraftPlan(max_depth=4, width=1)
    batch = DraftBatch(REQUESTS, REQUESTS, plan, torch.tensor([2]))
    whole = grow(policy, REQUESTS, 1)
    (sample,) = policy.samples(grow(policy, REQUESTS, 1, batch), torch.tensor([2]))
    assert sample == policy.samples(whole, torch.tensor([2]))[0]
    assert len(sample[2]) == 32
    assert set(sample[2]) == {1, 2, 4}
    assert policy.samples(grow(policy, REQUESTS, 1), torch.empty(0, dtype=torch.int64)) == []


def served(requests: int, row_s: float) -> Serving:
    """On a machine on which a row of the drafter takes `row_s` beyond a fixed time."""
    rows = (1.0, 4096.0)
    drafter = CostCurve(rows, (0.002, 0.002 + 4095 * row_s))
    cost = StepCost(CostCurve((1.0, 256.0, 4096.0), (0.05, 0.05, 1.0)), drafter, drafter, 0.002)
    policy = auto()
    policy.set_cost(cost)
    return Serving(policy, cost, Prompts(sure=0.8), requests)


def test_dear_rows_make_it_narrow_where_there_are_many() -> None:
    def width(requests: int, row_s: float) -> int:
        run = served(requests, row_s).run(200)
        assert run.share_drafting(last=50) > 0.5
        plan = run.policy.plan(run.load())
        assert plan.width is not None
        return plan.width

    assert width(1, 1e-5) == 4
    assert width(64, 1e-4) == 1


def test_a_dear_frontier_costs_less_than_always_drafting_it_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speeds = []
    for widths in ((1, 2, 4), (4,)):
        run = served(64, 1e-4)
        assert isinstance(run.policy, AutoPolicy)
        monkeypatch.setattr(run.policy.forecaster, "widths", widths)
        speeds.append(run.run(100).speed(200))
    assert speeds[0] > 1.05 * speeds[1]
