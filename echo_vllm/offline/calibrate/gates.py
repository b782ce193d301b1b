# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Where to put gates, and their thresholds.

A gate at depth d lets a tree grow deeper than d only if c > tau, c being the probability of the
best path of depth d by the drafter's own account. A tree that fails keeps its nodes of depth d, so
what a gate decides about is what lies deeper, and there is none at the last depth. "Sparse gates"
and "sweet spots" are of ECHO (arXiv 2604.09603), which publishes neither delta nor the rule for
tau; both are stated here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from echo_vllm.offline.calibrate.samples import Samples

if TYPE_CHECKING:
    from echo_vllm.forecast import StepCost

DELTA = 0.65
"""AUC above which c is taken to separate at all: halfway from chance to a good separator (0.8)."""

MIN_SAMPLES = 50
"""Trees of both kinds that a sweet spot needs; with fewer its AUC is uncertain by 0.04 and more."""

MIN_RISE = 0.02
"""Two depths next to each other are both gates only if the AUC rises by more than this: otherwise
the second asks what the first has just answered."""

MAX_GATES = 3
"""The root and a few more. Each gate can be wrong, and a tree must pass all of them."""


@dataclass(frozen=True)
class GateCosts:
    """What it takes to draft deeper, for one request of a batch at a reference load.

    All times are a request's share of the batch's time: seconds of a step divided by `requests`.
    Tokens of one request per such second are the batch's tokens a second.

    Attributes:
        requests: decoding requests of that batch.
        plain_s: of a plain decoding step.
        base_s: the same for a step with trees of depth 1.
        level_s: what each further level adds: its drafter forward and its nodes' verification.
        nodes_per_level: nodes of a level that are verified.
    """

    requests: int
    plain_s: float
    base_s: float
    level_s: float
    nodes_per_level: int

    @classmethod
    def at_load(
        cls,
        cost: StepCost,
        *,
        requests: int,
        frontier: int,
        nodes_per_level: int,
        max_depth: int,
    ) -> GateCosts:
        """Shares of a batch in which every tree has all levels.

        Args:
            cost: of a step.
            requests: decoding requests.
            frontier: nodes of one request that one drafter forward expands.
            nodes_per_level: nodes of a level that are verified.
            max_depth: levels of the deepest tree.
        """
        deepest = max_depth * nodes_per_level
        rows = (requests * (1 + nodes_per_level), requests * (1 + deepest))
        verify = cost.verify(rows[1]) - cost.verify(rows[0])
        levels = max(1, max_depth - 1)
        return cls(
            requests=requests,
            plain_s=cost.plain_step(requests) / requests,
            base_s=cost.step(rows[0], [], requests) / requests,
            level_s=(verify / levels + cost.draft_level(requests * frontier)) / requests,
            nodes_per_level=nodes_per_level,
        )


def separation(confidence: NDArray[np.float64], label: NDArray[np.bool_]) -> float | None:
    """AUC of `confidence` [n] for `label` [n]; None if all labels are the same."""
    from scipy.stats import mannwhitneyu

    if label.all() or not label.any():
        return None
    # U counts the pairs of either label that are in order, ties as a half.
    u = mannwhitneyu(confidence[label], confidence[~label], method="asymptotic").statistic
    return float(u / (label.sum() * (~label).sum()))


def choose_depths(
    aucs: Sequence[float | None],
    smaller_class: Sequence[int],
    *,
    delta: float = DELTA,
    min_samples: int = MIN_SAMPLES,
) -> list[int]:
    """The depths that become gates.

    Sweet spots are the depths before the last whose AUC is above delta, with at least min_samples
    trees in which a node of the depth was accepted, and as many in which none was. Of these, from
    the root down, a depth next to the last one chosen is left out unless its AUC is higher by more
    than MIN_RISE. If more than MAX_GATES are left, the root (depth 1) stays, and of the others
    those with the highest AUC, the shallower one of equals.

    Args:
        aucs: of depth 1, 2, ...
        smaller_class: per depth, how many trees the rarer of the two outcomes has.

    Returns:
        Depths, shallowest first.
    """
    chosen: list[int] = []
    quality: dict[int, float] = {}
    for depth, (auc, count) in enumerate(zip(aucs[:-1], smaller_class[:-1], strict=True), start=1):
        if auc is None or auc <= delta or count < min_samples:
            continue
        if chosen and chosen[-1] == depth - 1 and auc <= quality[depth - 1] + MIN_RISE:
            continue
        chosen.append(depth)
        quality[depth] = auc
    best = sorted(chosen, key=lambda depth: (depth > 1, -quality[depth], depth))
    return sorted(best[:MAX_GATES])


def best_threshold(confidence: NDArray[np.float64], value: NDArray[np.float64]) -> float:
    """The tau that maximises the sum of `value` over all samples with confidence > tau.

    This is where the isotonic regression of value on confidence crosses zero, so a single sample
    moves it little. It lies in the middle between two confidences. Of equals it is the smallest:
    where it makes no difference, samples pass.

    Args:
        confidence: [n], between 0 and 1.
        value: [n], what passing is worth, negative if failing is better.

    Returns:
        0 if all should pass, 1 if none should.
    """
    order = np.argsort(-confidence, kind="stable")
    ordered = confidence[order]
    # Samples of equal confidence pass together.
    ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    totals = np.append(0.0, np.cumsum(value[order])[ends])
    passing = int(len(ends) - np.argmax(totals[::-1]))
    if passing == 0:
        return 1.0
    if passing == len(ends):
        return 0.0
    above, below = ordered[ends[passing - 1]], ordered[ends[passing]]
    middle = below + (above - below) / 2
    return float(middle if middle < above else below)


def youden_thresholds(samples: Samples, gates: Sequence[int]) -> dict[int, float]:
    """Without costs: per gate, the tau that maximises Youden's J.

    J is the share of the trees with an accepted node of depth d that pass, minus the share of the
    others that pass: it weighs both mistakes alike, whatever they cost.
    """
    taus = {}
    for depth in gates:
        drafted = samples.drafted[:, depth - 1]
        accepted = samples.accepted_depth[drafted] >= depth
        value = accepted / accepted.sum() - ~accepted / (~accepted).sum()
        taus[depth] = best_threshold(samples.confidence[drafted, depth - 1], value)
    return taus


@dataclass(frozen=True)
class Thresholds:
    """Gates with the price that they were set at.

    Attributes:
        taus: threshold on c by depth, shallowest first.
        price: what a second is worth, in tokens a second of the batch.
        achieved: tokens a second of the batch with these gates.
        costs: what deeper drafting was taken to cost.
    """

    taus: dict[int, float]
    price: float
    achieved: float
    costs: GateCosts


def fastest_thresholds(samples: Samples, gates: Sequence[int], costs: GateCosts) -> Thresholds:
    """The thresholds with which the samples would have been decoded fastest.

    Passing the gate at d is worth E[tokens accepted deeper than d | c] - price * seconds spent
    deeper than d. The price of a second is what plain decoding makes of it at first, then what the
    thresholds achieve with the samples, until that stays the same (Dinkelbach's method for the
    maximum of a ratio); never less than plain decoding, which is always possible. At a given price
    the deepest gate comes first: what it lets pass is known when the gate above it is set. Only the
    best `nodes_per_level` nodes of each depth count as accepted, as only these are paid for.
    """
    reach = _reach(samples, costs.nodes_per_level)
    plain = price = 1.0 / costs.plain_s
    for _ in range(50):
        taus = _thresholds_at(price, samples, gates, reach, costs.level_s)
        achieved = _rate(taus, samples, reach, costs)
        if np.isclose(max(plain, achieved), price, rtol=1e-9, atol=0.0):
            break
        price = max(plain, achieved)
    return Thresholds(taus, price, achieved, costs)


def truncation_depths(samples: Samples, taus: Mapping[int, float]) -> NDArray[np.int64]:
    """[S] int64, the depth at which each tree stops with these gates."""
    stop = np.full(samples.num_trees, samples.max_depth, dtype=np.int64)
    for depth in sorted(taus, reverse=True):
        stop[samples.confidence[:, depth - 1] <= taus[depth]] = depth
    return stop


def _reach(samples: Samples, nodes_per_level: int) -> NDArray[np.int64]:
    """[S] int64, the accepted depth if only the best nodes of each level were verified."""
    rank = samples.accepted_rank
    kept = (rank >= 0) & (rank < nodes_per_level)
    reach: NDArray[np.int64] = np.cumprod(kept, axis=1).sum(axis=1)
    return reach


def _thresholds_at(
    price: float,
    samples: Samples,
    gates: Sequence[int],
    reach: NDArray[np.int64],
    level_s: float,
) -> dict[int, float]:
    taus: dict[int, float] = {}
    deeper = np.zeros(samples.num_trees)  # What lies behind the next gate is worth.
    following = samples.max_depth
    for depth in sorted(gates, reverse=True):
        tokens = np.clip(reach, depth, following) - depth
        value = tokens - price * level_s * (following - depth) + deeper
        confidence = samples.confidence[:, depth - 1]
        taus[depth] = best_threshold(confidence, value)
        deeper = np.where(confidence > taus[depth], value, 0.0)
        following = depth
    return dict(sorted(taus.items()))


def _rate(
    taus: Mapping[int, float], samples: Samples, reach: NDArray[np.int64], costs: GateCosts
) -> float:
    stop = truncation_depths(samples, taus)
    tokens = 1.0 + np.minimum(reach, stop)
    seconds = costs.base_s + costs.level_s * (stop - 1)
    return float(tokens.sum() / seconds.sum())
