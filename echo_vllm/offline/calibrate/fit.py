# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""From samples to a profile: survival curves with their calibration error, AUCs, gates.

`fit` is the whole of it, the other functions are its steps.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from echo_vllm.forecast.drafter_profile import (
    MAX_KNOTS,
    DepthProfile,
    DrafterProfile,
    DrawnDepth,
    DrawnProfile,
)
from echo_vllm.offline.calibrate.gates import (
    DELTA,
    MIN_SAMPLES,
    GateCosts,
    choose_depths,
    fastest_thresholds,
    separation,
    youden_thresholds,
)
from echo_vllm.offline.calibrate.samples import Samples

NUM_BINS = 10
"""Bins of a calibration error with equally many nodes, cut further into as many with equally many
predicted acceptances."""

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Reliability:
    """Predictions held against outcomes, bin by bin; [b] each.

    Attributes:
        predicted: mean prediction of the bin.
        accepted: share of its nodes that were accepted.
        count: its nodes.
    """

    predicted: Floats
    accepted: Floats
    count: NDArray[np.int64]

    @property
    def ece(self) -> float:
        """Expected calibration error: mean |predicted - accepted| over nodes."""
        gaps = np.abs(self.predicted - self.accepted)
        return float((gaps * self.count).sum() / self.count.sum())


@dataclass(frozen=True)
class HeldOut:
    """One depth's predictions on requests that its curve has not seen.

    Attributes:
        before: of exp(path log-probability).
        after: of a curve fitted to the other half of the requests.
    """

    before: Reliability
    after: Reliability


@dataclass(frozen=True)
class Calibration:
    """A profile, and what its report shows besides."""

    profile: DrafterProfile
    held_out: tuple[HeldOut, ...]
    samples: Samples


def fit_drawn(samples: Samples, temperature: float | None) -> DrawnProfile:
    """The part of a profile that is of drawn candidates.

    Args:
        samples: verified trees of drawn candidates.
        temperature: at which they were drawn; None if that is not known.
    """
    test_half = samples.halves()[samples.node_tree]
    depths = []
    for depth in range(1, samples.max_depth + 1):
        here = samples.node_depth == depth
        scores, accepted = samples.node_logprob[here], samples.node_accepted[here]
        knots = survival_knots(scores, accepted)
        errors = _held_out(scores, accepted, test_half[here])
        drafted = samples.drafted[:, depth - 1]
        depths.append(
            DrawnDepth(
                depth=depth,
                samples=int(here.sum()),
                acceptance=float((samples.accepted_depth[drafted] >= depth).mean()),
                survival_logprobs=tuple(knots[0].tolist()),
                survival_probs=tuple(knots[1].tolist()),
                ece_before=errors.before.ece,
                ece_after=errors.after.ece,
            )
        )
    return DrawnProfile(temperature=temperature, depths=tuple(depths))


def fit(
    samples: Samples,
    *,
    target: str,
    drafter: str,
    dtype: str,
    prompts: str,
    delta: float = DELTA,
    min_samples: int = MIN_SAMPLES,
    costs: Sequence[GateCosts] = (),
    created: str | None = None,
    drawn: DrawnProfile | None = None,
) -> Calibration:
    """Make a profile.

    The survival curves of the profile come from all samples; their errors are measured with curves
    that were fitted to one half of the requests, on the other half.

    Args:
        samples: verified trees, fully verified for a profile that holds for all tree sizes.
        target, drafter, dtype, prompts: for the profile, see there.
        delta: AUC above which a depth may become a gate.
        min_samples: trees of both outcomes that a gate depth needs.
        costs: what deeper drafting takes, for one or more numbers of nodes a level, of which the
            fastest one counts; none for Youden's J.
        created: ISO date; today by default.
        drawn: of drawn candidates (`fit_drawn`), where they were measured.
    """
    depths = range(1, samples.max_depth + 1)
    labels = {}
    for depth in depths:
        drafted = samples.drafted[:, depth - 1]
        labels[depth] = samples.accepted_depth[drafted] >= depth
    aucs = [
        separation(samples.confidence[samples.drafted[:, d - 1], d - 1], labels[d]) for d in depths
    ]
    rarer = [int(min(labels[d].sum(), (~labels[d]).sum())) for d in depths]
    gates = choose_depths(aucs, rarer, delta=delta, min_samples=min_samples)
    taus, objective = _thresholds(samples, gates, costs)
    test_half = samples.halves()[samples.node_tree]
    held_out, profiles = [], []
    for depth, auc in zip(depths, aucs, strict=True):
        here = samples.node_depth == depth
        logprobs, accepted = samples.node_logprob[here], samples.node_accepted[here]
        knots = survival_knots(logprobs, accepted)
        errors = _held_out(logprobs, accepted, test_half[here])
        held_out.append(errors)
        profiles.append(
            DepthProfile(
                depth=depth,
                samples=len(labels[depth]),
                auc=auc,
                acceptance=float(labels[depth].mean()),
                is_gate=depth in taus,
                tau=taus.get(depth),
                survival_logprobs=tuple(knots[0].tolist()),
                survival_probs=tuple(knots[1].tolist()),
                ece_before=errors.before.ece,
                ece_after=errors.after.ece,
            )
        )
    profile = DrafterProfile(
        target=target,
        drafter=drafter,
        dtype=dtype,
        created=created or datetime.datetime.now(datetime.UTC).date().isoformat(),
        prompts=prompts,
        num_steps=samples.num_trees,
        delta=delta,
        objective=objective,
        depths=tuple(profiles),
        drawn=drawn,
    )
    return Calibration(profile=profile, held_out=tuple(held_out), samples=samples)


def survival_knots(logprobs: Floats, accepted: Bools) -> tuple[Floats, Floats]:
    """The calibrated curve of one depth.

    Isotonic regression of acceptance on path log-probability gives blocks of equal probability.
    Neighbours are merged, the pair first whose merging costs the least squared error over nodes,
    until MAX_KNOTS are left. A block's knot stands at the mean log-probability of its nodes. One
    more node, accepted with the drafter's own probability, is counted in each block, so that no
    curve says never: a policy would not try such nodes again and could not find out otherwise.

    Args:
        logprobs: [n], nats.
        accepted: [n].

    Returns:
        (log-probabilities, strictly ascending; probabilities, not falling), [k] each.
    """
    from scipy.optimize import isotonic_regression

    places, inverse, counts = np.unique(logprobs, return_inverse=True, return_counts=True)
    hits = np.bincount(inverse, weights=accepted)
    levels = isotonic_regression(hits / counts, weights=counts).x
    starts = np.flatnonzero(np.append(True, np.diff(levels) > 0))
    nodes = np.add.reduceat(counts.astype(np.float64), starts)
    hits = np.add.reduceat(hits, starts)
    moments = np.add.reduceat(places * counts, starts)
    while len(nodes) > MAX_KNOTS:
        gaps = np.diff(hits / nodes) ** 2 * nodes[:-1] * nodes[1:] / (nodes[:-1] + nodes[1:])
        left = int(np.argmin(gaps))
        for sums in (nodes, hits, moments):
            sums[left] += sums[left + 1]
        nodes, hits, moments = (np.delete(sums, left + 1) for sums in (nodes, hits, moments))
    knots = moments / nodes
    probs = (hits + np.exp(np.minimum(knots, 0.0))) / (nodes + 1.0)
    return knots, np.maximum.accumulate(probs)


def reliability(predicted: Floats, accepted: Bools, bins: int = NUM_BINS) -> Reliability:
    """Compare predictions with outcomes, bin by bin.

    Most nodes of a tree have next to no chance and a few carry most of the expected tokens. So the
    edges of the bins split the nodes, and also the sum of the predictions, into equal parts; bins
    of equal width would put nearly all nodes into the lowest one. Equal predictions stay in one
    bin, so there may be fewer bins.

    Args:
        predicted: [n], at least one.
        accepted: [n].
        bins: parts of either kind.
    """
    parts = np.linspace(0, 1, bins + 1)[1:-1]
    ordered = np.sort(predicted)
    sums = np.cumsum(ordered)
    by_sum = ordered[np.searchsorted(sums, parts * sums[-1])]
    edges = np.union1d(np.quantile(ordered, parts), by_sum)
    index = np.searchsorted(edges, predicted, side="right")
    count = np.bincount(index)
    filled = count > 0
    return Reliability(
        predicted=np.bincount(index, weights=predicted)[filled] / count[filled],
        accepted=np.bincount(index, weights=accepted)[filled] / count[filled],
        count=count[filled],
    )


def _held_out(logprobs: Floats, accepted: Bools, test: Bools) -> HeldOut:
    if test.all() or not test.any():  # One request: there is nothing to hold out.
        train = test = np.ones_like(test)
    else:
        train = ~test
    knots, probs = survival_knots(logprobs[train], accepted[train])
    tested = logprobs[test]
    return HeldOut(
        before=reliability(np.exp(tested), accepted[test]),
        after=reliability(np.interp(tested, knots, probs), accepted[test]),
    )


def _thresholds(
    samples: Samples, gates: Sequence[int], costs: Sequence[GateCosts]
) -> tuple[dict[int, float], str]:
    if not costs:
        taus = youden_thresholds(samples, gates)
        objective = "Youden's J of c for a node of the depth being accepted (no costs were given)"
    else:
        tried = [fastest_thresholds(samples, gates, each) for each in costs]
        best = max(tried, key=lambda thresholds: thresholds.achieved)
        taus, load = best.taus, best.costs
        objective = (
            f"tokens a second at {load.requests} requests with {load.nodes_per_level} verified "
            "nodes a level: a gate passes where the tokens accepted deeper outweigh the time "
            f"spent deeper ({load.level_s * 1e3:.3g} ms a level, a request's share of the batch), "
            f"at {best.price:.4g} tokens a second; plain decoding makes "
            f"{1 / load.plain_s:.4g}, these gates {best.achieved:.4g}"
        )
    # A gate that lets everything pass is none.
    return {depth: tau for depth, tau in taus.items() if tau > 0}, objective
