# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What could have been drafted at best by one who knows what will be accepted.

Of each request of a step it is known how many nodes of a path the target accepts. Whoever knows
that drafts no node that is rejected; what is left to decide is how many of the accepted ones are
worth their time, and of which requests.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from echo_vllm.forecast import StepCost

Ints = NDArray[np.int64]


def best_lengths(
    acceptable: Ints, committed: Ints, rows: int, cost: StepCost, price: float
) -> Ints:
    """[B] nodes of each request's path that make `tokens - price * seconds` of the step largest.

    Largest for every verification cost if drafting costs are linear in rows behind a fixed part and
    all of `committed` are alike: for a given number of nodes and levels only the number of
    requests that draft matters then, and its two ends are among what is compared.

    Args:
        acceptable: [B], nodes of each request's path that the target accepts.
        committed: [B], tokens that the drafter has to read first if it drafts for a request.
        rows: of the target's forward without any node.
        cost: of a step.
        price: tokens that a second is worth, > 0.
    """
    best_value = -price * cost.plain_step(rows)
    best = np.zeros_like(acceptable)
    for owner, depth in _orders(acceptable, committed):
        seconds = _seconds(owner, depth, committed, rows, cost)
        values = np.arange(1, len(owner) + 1) - price * seconds
        last = int(values.argmax())
        if values[last] > best_value:
            best_value = float(values[last])
            best = np.bincount(owner[: last + 1], minlength=len(acceptable))
    return best


def level_rows(lengths: Ints) -> list[int]:
    """Rows of each drafter level behind the catch-up forward for paths of `lengths` [B] nodes."""
    return [int((lengths >= depth).sum()) for depth in range(2, int(lengths.max(initial=0)) + 1)]


def _orders(acceptable: Ints, committed: Ints) -> list[tuple[Ints, Ints]]:
    """Orders of nodes, as (owner, depth), every beginning of which is a choice: level by level, and
    for every greatest depth request by request."""
    orders = []
    deepest = int(acceptable.max(initial=0))
    for most in range(1, deepest + 1):
        capped = np.minimum(acceptable, most)
        ranked = np.lexsort((committed, -capped))
        owner = np.repeat(ranked, capped[ranked])
        depth = np.concatenate([np.arange(1, length + 1) for length in capped[ranked]])
        orders.append((owner, depth))
        if most == deepest:
            by_level = np.argsort(depth, kind="stable")
            orders.append((owner[by_level], depth[by_level]))
    return orders


def _seconds(
    owner: Ints, depth: Ints, committed: Ints, rows: int, cost: StepCost
) -> NDArray[np.float64]:
    """[n]: `StepCost.step` of the first 1 to n nodes."""
    seconds: NDArray[np.float64] = cost.verify(rows + np.arange(1, len(owner) + 1)) + cost.other
    seconds += cost.draft_fixed
    seconds += cost.catch_up(np.cumsum(np.where(depth == 1, committed[owner], 0)))
    for level in range(2, int(depth.max()) + 1):
        level_size = np.cumsum(depth == level)
        seconds += np.where(level_size > 0, cost.draft_level(level_size), 0.0)
    return seconds
