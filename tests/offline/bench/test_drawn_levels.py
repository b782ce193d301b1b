# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""How often children of one level are accepted, by small distributions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from benchmarks.drawn_levels import BEST, DRAWN, MIXED, MOST, accepted
from echo_vllm.ops import reference

P = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
Q = torch.tensor([0.1, 0.5, 0.05, 0.2, 0.15], dtype=torch.float64)


def enumerated() -> np.ndarray:
    """Of draws without replacement, over all their orders."""
    total = np.zeros(MOST)
    for tokens in itertools.permutations(range(len(P)), MOST):
        chance, left = 1.0, 1.0
        for token in tokens:
            chance *= float(Q[token]) / left
            left -= float(Q[token])
        accepts, _ = reference.rejection(P, Q, tokens)
        total += chance * (1 - np.cumprod(1 - np.array(accepts)))
    return total


def test_each_kind_of_children_is_accepted_as_often_as_it_should_be() -> None:
    found = accepted(P, Q, 4000, torch.Generator().manual_seed(0))
    assert found[DRAWN] == pytest.approx(enumerated(), abs=0.02)
    assert found[DRAWN][0] == pytest.approx(float(torch.minimum(P, Q).sum()), abs=0.02)
    assert found[BEST] == pytest.approx([0.3, 0.4, 0.45, 0.85])
    # One child: min(p, q). Two: the best one, and of the others 0.7 of p against 0.7 of q, anew.
    left_q = Q * (0.7 / 0.5)
    second = 0.3 + float(torch.minimum(P, left_q).sum() - torch.minimum(P, left_q)[1])
    assert found[MIXED][:2] == pytest.approx([float(torch.minimum(P, Q).sum()), second])


def test_a_drafter_that_knows_the_target_is_always_accepted_by_its_first_draw() -> None:
    found = accepted(P, P, 50, torch.Generator().manual_seed(0))
    assert found[DRAWN] == pytest.approx([1.0] * MOST)
    assert found[MIXED] == pytest.approx([1.0] * MOST)
    assert found[BEST][0] == pytest.approx(0.4)
