# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`auto` on costs that were measured while the machine was busy: a clock that is only counted."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from echo_vllm.forecast import CostCurve, StepCost
from echo_vllm.forecast.forecaster import TRIALS
from echo_vllm.forecast.plan import Load
from echo_vllm.policies import DraftBatch, Observation
from echo_vllm.policies.auto import AutoPolicy
from echo_vllm.trees.forest import DraftForest
from tests.policies.test_policies import grow, policy_of

TRUE = StepCost(
    verify=CostCurve((1.0, 8.0, 24.0, 64.0, 256.0), (0.080, 0.084, 0.096, 0.150, 0.400)),
    draft_level=CostCurve((1.0, 16.0, 128.0), (0.020, 0.022, 0.060)),
    catch_up=CostCurve((1.0, 16.0, 128.0), (0.020, 0.022, 0.060)),
    other=0.002,
)
"""Seconds of a small model on two cores: a token takes 82 ms."""

SLOWER = 3.0


def beyond(curve: CostCurve, rows: float) -> CostCurve:
    """The curve with all larger forwards measured too slow."""
    slow = [y * (SLOWER if x > rows else 1.0) for x, y in zip(*curve.to_points(), strict=True)]
    return CostCurve(curve.counts, tuple(slow))


WRONG = {
    "drafter": StepCost(
        TRUE.verify, TRUE.draft_level.scaled(SLOWER), TRUE.catch_up.scaled(SLOWER), TRUE.other
    ),
    "larger-forwards": StepCost(beyond(TRUE.verify, 1.0), TRUE.draft_level, TRUE.catch_up),
    "all-but-the-smallest": StepCost(
        beyond(TRUE.verify, 1.0),
        TRUE.draft_level.scaled(SLOWER),
        TRUE.catch_up.scaled(SLOWER),
        TRUE.other,
    ),
    "everything": StepCost(
        TRUE.verify.scaled(SLOWER),
        TRUE.draft_level.scaled(SLOWER),
        TRUE.catch_up.scaled(SLOWER),
        SLOWER * TRUE.other,
    ),
}


@dataclass
class Serving:
    """One or more endless requests, served by a policy on a machine that costs `true`."""

    policy: AutoPolicy
    true: StepCost
    requests: int = 1
    seconds: float = 0.0
    tokens: int = 0
    drafted: list[tuple[float, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._forest = DraftForest.empty(self.requests)
        self._waiting = self.requests

    def step(self) -> None:
        plan = self.policy.plan(Load(self.requests, waiting=self._waiting))
        # The forward that verifies the last draft.
        forest, true = self._forest, self.true
        verify_s = float(true.verify(self.requests + forest.num_nodes)) * self._noise()
        accepted = self._accepted(forest)
        self._waiting += self.requests + int(accepted.sum())
        # The next draft.
        probes = plan.probed(self.requests)
        drafts = plan.max_depth != 0 or bool(probes)
        levels: list[int] = []
        draft_s, committed, pool = 0.0, 0, None
        batch = DraftBatch(
            self.requests, self.requests, plan, torch.tensor(probes, dtype=torch.int64)
        )
        self._forest = DraftForest.empty(self.requests)
        if drafts:
            pool = grow(self.policy, self.requests, int(self._random.integers(12)), batch)
            levels = [n * self.policy.max_frontier for n in pool.level_sizes()[1:]]
            committed, self._waiting = self._waiting, 0
            draft_s = float(true.draft(levels, committed)) * self._noise()
            self._forest = self.policy.select(pool, batch)
        self.seconds += verify_s + draft_s + true.other
        self.tokens += self.requests + int(accepted.sum())
        self.drafted.append((self.seconds, plan.max_depth != 0))
        report = self.policy.report(
            verified=forest, num_accepted=accepted, pool=pool, probes=batch.probes
        )
        step = Observation(
            rows=self.requests + forest.num_nodes,
            num_nodes=forest.num_nodes,
            verify_s=verify_s,
            other_s=true.other,
            draft_s=draft_s,
            committed=committed,
            level_rows=levels,
            report=report,
        )
        self.policy.observe(step)

    def run(self, seconds: float) -> Serving:
        end = self.seconds + seconds
        while self.seconds < end:
            self.step()
        return self

    def share_drafting(self, since: float) -> float:
        return float(np.mean([drafting for when, drafting in self.drafted if when >= since]))

    def _noise(self) -> float:
        return float(np.exp(self._random.normal(0, 0.05)))

    def _accepted(self, forest: DraftForest) -> torch.Tensor:
        """Each child of an accepted node is accepted as often as it is probable; one at most."""
        accepted = []
        scores = forest.path_logprobs.exp().tolist()
        for start, (_, parents) in zip(forest.cu_nodes.tolist(), forest.trees(), strict=False):
            last, length, above = -1, 0, 1.0
            while True:
                draw, hit = self._random.random() * above, None
                for node, parent in enumerate(parents):
                    if parent == last:
                        draw -= scores[start + node]
                        if draw < 0:
                            hit = node
                            break
                if hit is None:
                    break
                last, length, above = hit, length + 1, scores[start + hit]
            accepted.append(length)
        return torch.tensor(accepted)


def serving(cost: StepCost, true: StepCost = TRUE, requests: int = 1) -> Serving:
    policy = policy_of(16, policy="auto", max_depth=4, top_k=3, width=4)
    assert isinstance(policy, AutoPolicy)
    policy.set_cost(cost)
    return Serving(policy, true, requests)


def test_with_true_costs_it_drafts() -> None:
    assert serving(TRUE).run(20).share_drafting(since=10) > 0.8


@pytest.mark.parametrize("name", WRONG)
def test_within_a_minute_of_serving_it_drafts_whatever_was_measured(name: str) -> None:
    assert serving(WRONG[name]).run(60).share_drafting(since=50) > 0.8


def test_where_drafting_does_not_pay_the_doubt_costs_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dear = StepCost(
        CostCurve((1.0, 256.0), (0.080, 0.080 + 255 * 0.04)),
        TRUE.draft_level.scaled(2.0),
        TRUE.catch_up.scaled(2.0),
        TRUE.other,
    )
    speeds = []
    for trials in (TRIALS, 0):
        monkeypatch.setattr("echo_vllm.forecast.forecaster.TRIALS", trials)
        run = serving(dear, true=dear).run(100)
        assert run.share_drafting(since=20) < 0.05
        speeds.append(run.tokens / run.seconds)
    assert speeds[0] > 0.99 * speeds[1]
