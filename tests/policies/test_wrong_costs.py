# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`auto` on costs that were measured while the machine was busy: a clock that is only counted."""

from __future__ import annotations

import numpy as np
import pytest

from echo_vllm.forecast import CostCurve, StepCost
from echo_vllm.forecast.forecaster import TRIALS
from tests.policies.serving import Prompts, Serving
from tests.policies.test_policies import policy_of

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


def serving(cost: StepCost, true: StepCost = TRUE) -> Serving:
    policy = policy_of(16, policy="auto", max_depth=4, top_k=3, width=4)
    policy.set_cost(cost)
    return Serving(policy, true, Prompts(sure=0.6))


def share_drafting(run: Serving, last_seconds: float) -> float:
    """Of the steps in the last seconds, those that draft."""
    ends = np.cumsum([seconds for _, _, seconds, _ in run.steps])
    return run.share_drafting(last=int((ends > ends[-1] - last_seconds).sum()))


def test_with_true_costs_it_drafts() -> None:
    assert share_drafting(serving(TRUE).until(20), 10) > 0.8


@pytest.mark.parametrize("name", WRONG)
def test_within_a_minute_of_serving_it_drafts_whatever_was_measured(name: str) -> None:
    assert share_drafting(serving(WRONG[name]).until(60), 10) > 0.8


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
        run = serving(dear, true=dear).until(100)
        assert share_drafting(run, 80) < 0.05
        speeds.append(run.tokens / run.seconds)
    assert speeds[0] > 0.99 * speeds[1]
