# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Expected gains against enumeration of all draws."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_vllm.forecast.gains import expected_gains, guess_target, reaches_of
from echo_vllm.ops import reference

probabilities = st.lists(st.floats(0.01, 1.0), min_size=5, max_size=5)


def distribution(weights: list[float]) -> torch.Tensor:
    x = torch.tensor(weights, dtype=torch.float64)
    return x / x.sum()


def enumerated_gains(q: torch.Tensor, p: torch.Tensor, k: int) -> list[float]:
    """Of every order of k draws: its probability times the chance that the r-th is accepted."""
    gains = [0.0] * k
    for order in itertools.permutations(range(len(q)), k):
        weight, left = 1.0, 1.0
        for token in order:
            weight, left = weight * float(q[token]) / left, left - float(q[token])
        reach = 1.0
        for rank, chance in enumerate(reference.rejection(p, q, order)[0]):
            gains[rank] += weight * reach * chance
            reach *= 1 - chance
    return gains


@given(q=probabilities, p=probabilities)
@settings(max_examples=60, deadline=None)
def test_the_first_gain_is_exact_and_the_others_are_near(q: list[float], p: list[float]) -> None:
    draft, target = distribution(q), distribution(p)
    expected = enumerated_gains(draft, target, 3)
    gains = expected_gains(draft, target, 3).tolist()
    assert gains[0] == pytest.approx(expected[0], abs=1e-6)
    assert gains[0] == pytest.approx(float(torch.minimum(draft, target).sum()), abs=1e-6)
    assert gains[1] == pytest.approx(expected[1], abs=0.05)
    assert gains[2] == pytest.approx(expected[2], abs=0.15)
    assert sum(gains) <= 1 + 1e-6


def test_gains_are_near_where_the_draft_resembles_the_target() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(60):
        logits = 1.5 * torch.randn(6, generator=generator).double()
        noise = 0.7 * torch.randn(6, generator=generator).double()
        q, p = torch.softmax(logits + noise, 0), torch.softmax(logits, 0)
        found = expected_gains(q, p, 3).double()
        errors.append((found - torch.tensor(enumerated_gains(q, p, 3))).abs())
    assert (torch.stack(errors).mean(0) < 0.01).all()


def test_a_guess_that_is_not_whole_leaves_the_rest_elsewhere() -> None:
    q, p = distribution([4, 3, 2, 1]), torch.tensor([0.3, 0.1, 0.1, 0.0], dtype=torch.float64)
    whole = torch.cat([p, 1 - p.sum(0, keepdim=True)])
    expected = enumerated_gains(torch.cat([q, q.new_zeros(1)]), whole, 2)
    assert expected_gains(q, p, 2).tolist() == pytest.approx(expected, abs=0.02)


def test_the_most_probable_tokens_bound_a_vocabulary_from_below() -> None:
    q = distribution([2.0**-i for i in range(12)])
    p = guess_target(q, lambda logq: 0.7 * logq.exp() ** 0.8)
    whole, part = expected_gains(q, p, 3), expected_gains(q[:8], p[:8], 3)
    assert (part <= whole + 1e-6).all()
    torch.testing.assert_close(part, whole, atol=0.02, rtol=0)


@given(q=probabilities, p=probabilities, order=st.permutations(range(5)), missing=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_what_was_drawn_is_reached_as_recursive_rejection_has_it(
    q: list[float], p: list[float], order: list[int], missing: int
) -> None:
    draft, target = distribution(q), distribution(p)
    tokens = order[: 3 - missing]
    expected, reach = [], 1.0
    for chance in reference.rejection(target, draft, tokens)[0]:
        expected.append(reach * chance)
        reach *= 1 - chance
    padded = torch.tensor([tokens + [-1] * missing])
    found = reaches_of(draft.unsqueeze(0), target.unsqueeze(0), padded)[0].tolist()
    assert found == pytest.approx(expected + [0.0] * missing, abs=1e-5)


def test_a_guess_is_a_distribution() -> None:
    q = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]])
    sure = guess_target(q, lambda logq: torch.ones_like(logq))
    assert sure.tolist() == [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]
    timid = guess_target(q, lambda logq: logq.exp() / 2)
    torch.testing.assert_close(timid, q.double() / 2)
