# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What drawn children are expected to be worth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_vllm.forecast.gains import (
    LOOKED_AT,
    expected_gains,
    gains_and_reaches,
    reaches_of,
    usual_acceptance,
)
from echo_vllm.trees.draws import Draws, Sampling, draw_children

weights = st.lists(st.floats(0.01, 1.0), min_size=5, max_size=5)


def distribution(values: list[float]) -> torch.Tensor:
    x = torch.tensor(values, dtype=torch.float64)
    return x / x.sum()


@given(values=weights)
@settings(max_examples=100, deadline=None)
def test_the_first_gain_is_what_the_curve_says_of_a_draw(values: list[float]) -> None:
    q = distribution(values)
    gains = expected_gains(q, usual_acceptance, 4)
    assert gains[0] == pytest.approx(float((q * usual_acceptance(q)).sum()), abs=1e-6)
    assert 0 <= float(gains.min()) <= float(gains.sum()) <= 1


def test_a_sure_drafter_promises_more_than_one_that_is_not() -> None:
    """By its first child; and of the others less."""
    sure = distribution([0.95, 0.02, 0.01, 0.01, 0.01])
    unsure = distribution([0.2, 0.2, 0.2, 0.2, 0.2])
    of_sure, of_unsure = (expected_gains(q, usual_acceptance, 3) for q in (sure, unsure))
    assert of_sure[0] > 1.5 * of_unsure[0]
    assert of_sure[1] < of_unsure[1]


def test_a_child_after_rejections_is_worth_less() -> None:
    q = torch.softmax(2 * torch.randn(40, 30, generator=torch.Generator().manual_seed(0)), 1)
    gains = expected_gains(q, usual_acceptance, 4)
    assert (gains.diff(dim=1) < 0).all()


def test_expectations_are_the_mean_of_what_is_reached() -> None:
    """Over many draws, by rank: the estimate before and that after know the same curve."""
    logits = 1.5 * torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    count, k = 20_000, 3
    keys = torch.arange(count)
    draws = draw_children(logits.expand(count, -1), k, keys, Sampling(torch.ones(count)))
    gains, reaches = gains_and_reaches(draws, usual_acceptance)
    assert reaches.mean(0)[0] == pytest.approx(float(gains[0, 0]), abs=0.005)
    # What was drawn before is taken by its expectation.
    torch.testing.assert_close(reaches.mean(0), gains[0], atol=0.02, rtol=0.0)


def test_what_is_missing_of_a_vocabulary_is_no_gain() -> None:
    q = distribution([2.0**-i for i in range(12)])
    whole, part = expected_gains(q, usual_acceptance, 3), expected_gains(q[:8], usual_acceptance, 3)
    assert (part <= whole + 1e-6).all()
    torch.testing.assert_close(part, whole, atol=0.02, rtol=0)


def test_nothing_drawn_is_not_reached() -> None:
    reaches = reaches_of(torch.tensor([[0.5, 0.3, 0.0], [1.0, 0.0, 0.0]]), usual_acceptance)
    assert reaches[0, 2] == reaches[1, 1] == reaches[1, 2] == 0
    assert reaches[1, 0] == pytest.approx(float(usual_acceptance(torch.ones(()))), abs=1e-6)
    # The second child had 0.3 of the half that was left.
    first, second = usual_acceptance(torch.tensor([0.5, 0.6])).tolist()
    assert reaches[0].tolist() == pytest.approx([first, (1 - first) * second / 2, 0], abs=1e-6)


def test_a_fixed_shape_and_a_row_that_is_not_finite() -> None:
    ids = torch.tensor([[3, 1], [-1, -1]])
    probs = torch.softmax(torch.randn(2, 2 * LOOKED_AT), 1)
    probs[1] = torch.nan
    draws = Draws(ids, torch.zeros(2, 2), torch.zeros(2, 2).long(), probs)
    fixed, reached = gains_and_reaches(draws, None)
    assert fixed.tolist() == reached.tolist() == [[1, 1], [1, 1]]
    gains, reaches = gains_and_reaches(draws, usual_acceptance)
    assert gains.isfinite().all()
    assert gains[1].tolist() == reaches[1].tolist() == [0, 0]
