# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""How probable it is that a drafted node will be accepted.

A drafter's path probability says which of two nodes is better, but not how often such a node is
accepted: heads are too sure of themselves, and more so the deeper they draft. `SurvivalModel` maps
(path log-probability, depth) to an acceptance probability by the curves of a profile, and
`OnlineSurvival` follows the ratio of accepted to predicted nodes while the engine runs. Policies
call both in every step, so everything is vectorised over the batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch

LOWEST = -32.0
"""Path log-probability, in nats, below which a node counts as impossible."""

RESOLUTION = 256
"""Table entries a nat: a probability is exact to 0.2 % of itself where it goes with exp(x)."""

FEWEST_STEPS = 32
"""Steps after which one counts half at the earliest, however many nodes a large batch has."""

SLACK, ALARM = 0.14, 16.0
"""A shift of acceptance is noticed when the nodes accepted too few, or too many, sum up to ALARM
beyond SLACK of those expected: a fall by twice the slack after some ALARM / SLACK nodes, and where
there is none nothing in some thousands of nodes (Page's cumulative sum)."""

_ENTRIES = int(-LOWEST) * RESOLUTION + 2
"""Table entries of one depth: 0 for what is below LOWEST, then LOWEST up to 0."""


class SurvivalModel:
    """Acceptance probability of a node, given its path log-probability and its depth.

    Each depth has a curve, linear between its knots and constant outside them. All curves stand in
    one table over a fine grid, because looking an index up takes a tenth of the time of searching
    for a segment, and this is called in every step.
    """

    def __init__(self, curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> None:
        """The curves of depth 1, 2, ...; the last one also stands for all deeper depths.

        Args:
            curves: per depth the knots: ascending path log-probabilities in nats, and
                probabilities between 0 and 1 that do not fall.

        Raises:
            ValueError: there is no curve, or one has no knots or not as many of both kinds.
        """
        if not curves:
            raise ValueError("a survival model needs the curve of at least one depth, got none")
        grid = np.arange(_ENTRIES - 1) / RESOLUTION + LOWEST
        table = np.zeros((len(curves), _ENTRIES), dtype=np.float32)
        for row, (logprobs, probs) in enumerate(curves):
            if not logprobs or len(logprobs) != len(probs):
                raise ValueError(
                    f"depth {row + 1} must have as many probabilities as log-probabilities and at "
                    f"least one, got {len(probs)} and {len(logprobs)}"
                )
            table[row, 1:] = np.interp(grid, logprobs, probs)
        self._table: torch.Tensor | None = torch.from_numpy(table).flatten()  # [D * entries]
        # [1 + D] float32: where the entry of log-probability 0 is, of depth 0 (none), 1, 2, ...;
        # and a half, because turning an entry into an integer cuts.
        self._zeros = (torch.arange(len(curves) + 1) * _ENTRIES - 1).float() + 0.5
        self._num_curves = len(curves)
        self._factors: torch.Tensor | None = None  # [n] float32

    @classmethod
    def default(cls, max_depth: int) -> SurvivalModel:
        """Without a profile: exp(path log-probability), unchanged.

        What is lost: the drafter's over-confidence stays in, so deep nodes look better than they
        are and a policy that weighs tokens against time drafts too deep until `OnlineSurvival` has
        seen enough nodes; and that corrects the level of a depth only, not the shape of its curve.

        Args:
            max_depth: depths that are told apart.
        """
        model = cls([((0.0,), (1.0,))])
        model._table = None
        model._num_curves = max_depth
        return model

    def probability(self, path_logprobs: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
        """Probability that each node is accepted.

        It need not fall along a path, as the curves of two depths are independent of each other;
        a caller that sums over trees takes the minimum over the ancestors.

        Args:
            path_logprobs: [..., P] float32, nats, at most 0; -inf where there is no node.
            depths: [P] int64, from 1; a depth without a curve takes the last one.

        Returns:
            [..., P] float32 between 0 and 1; 0 for -inf and below LOWEST.
        """
        if self._table is None:
            result = path_logprobs.exp()
        else:
            zero = self._zeros.index_select(0, depths.clamp(1, self._num_curves))  # [P]
            entry = path_logprobs.clamp(LOWEST - 1 / RESOLUTION, 0.0).mul_(RESOLUTION).add_(zero)
            result = self._table.index_select(0, entry.int().reshape(-1)).view(entry.shape)
        if self._factors is not None:
            scale = self._factors.index_select(0, depths.clamp(1, len(self._factors)).sub_(1))
            result = result.mul_(scale).clamp_(max=1.0)
        return result

    def with_factors(self, factors: torch.Tensor) -> SurvivalModel:
        """The same curves, each depth's probabilities scaled and cut at 1.

        Args:
            factors: [n] float32, of depth 1 to n; the last one stands for deeper depths. They take
                the place of factors that this model has already.

        Returns:
            A model that shares this one's table: nothing is computed here.
        """
        scaled = copy.copy(self)
        scaled._factors = factors
        return scaled

    @property
    def device(self) -> torch.device:
        """Where the table is."""
        return self._zeros.device

    def to(self, device: torch.device | str) -> SurvivalModel:
        """The same model on `device`."""
        moved = copy.copy(self)
        moved._zeros = self._zeros.to(device)
        moved._table = None if self._table is None else self._table.to(device)
        moved._factors = None if self._factors is None else self._factors.to(device)
        return moved


def counted(
    chances: torch.Tensor, depths: torch.Tensor, num_accepted: torch.Tensor, num_levels: int
) -> torch.Tensor:
    """[2, num_levels] float32, per depth from 1 on: the sum of the verified nodes' probabilities,
    and how many of them were accepted. Nothing waits for the device.

    Args:
        chances: [K] float32, of the verified nodes; 0 for what is none.
        depths: [K] int.
        num_accepted: [R] int, accepted nodes of each tree.
        num_levels: depths that are told apart.
    """
    found = chances.new_zeros(2, num_levels)
    found[0].index_add_(0, (depths.to(torch.int64) - 1).clamp(0, num_levels - 1), chances)
    levels = torch.arange(num_levels, device=chances.device)
    found[1].copy_((num_accepted.unsqueeze(1) > levels).sum(0))
    return found


class _Shift:
    """Looks for the place from which on acceptance is lower (`sign` -1) or higher (1) than thought.

    Attributes:
        predicted, accepted: sums since that place, if there is one.
    """

    def __init__(self, sign: int) -> None:
        self._sign = sign
        self.reset()

    def reset(self) -> None:
        """It has not been found."""
        self._excess = self.predicted = self.accepted = 0.0

    def is_seen(self, predicted: float, accepted: float, factor: float) -> bool:
        """Whether it has, after a step of which the model predicted so many nodes, which `factor`
        corrects."""
        expected = factor * predicted
        self._excess += self._sign * (accepted - expected) - SLACK * expected
        self.predicted += predicted
        self.accepted += accepted
        if self._excess <= 0:
            self.reset()
        return self._excess > ALARM


class OnlineSurvival:
    """Per depth, how many more (or fewer) nodes are accepted now than the model predicts.

    Where acceptance shifts, as with another temperature, what was before the shift is forgotten.

    The sums forget exponentially; the clock of a depth is the nodes that were accepted there, or
    that should have been, whichever are more, so that a depth which is rarely verified keeps what
    it knows. The prior holds the factor near 1 until as many nodes have been seen.
    """

    def __init__(
        self,
        max_depth: int,
        half_life: float = 256.0,
        prior: float = 16.0,
        resting_half_life: float = 512.0,
        start: float = 1.0,
    ) -> None:
        """
        Args:
            max_depth: depths that are followed.
            half_life: nodes of a depth, accepted or predicted to be, after which a step counts
                half. The factor then wavers by about 1/sqrt(1.44 * half_life), 5 % by default.
            prior: nodes that count as predicted and accepted from the start.
            resting_half_life: steps without any node after which what was seen counts half: low
                factors may be why nothing is verified, and must not outlive the prompts that they
                came from.
            start: factor of depth 1 before any node is seen; of depth d its d-th power.

        Raises:
            ValueError: one of them is not positive.
        """
        if min(max_depth, half_life, prior, resting_half_life, start) <= 0:
            raise ValueError(
                "max_depth, half_life, prior, resting_half_life and start must be positive, got "
                f"{max_depth}, {half_life}, {prior}, {resting_half_life} and {start}"
            )
        self.half_life = half_life
        self.prior = prior
        self.start = start
        self._keep = math.exp2(-1.0 / resting_half_life)
        self._predicted = [0.0] * max_depth
        self._accepted = [0.0] * max_depth
        self._shifts = [(_Shift(-1), _Shift(1)) for _ in range(max_depth)]

    def update(self, predicted: Sequence[float], accepted: Sequence[int]) -> None:
        """Learn from one step.

        Args:
            predicted: per depth, the sum over the verified nodes of the probability that the model
                gives them WITHOUT factors: with factors the correction would undo itself.
            accepted: per depth, how many of these nodes were accepted. Depths beyond the length of
                the shorter list, and beyond max_depth, are left as they are.
        """
        for i, (p, a) in enumerate(zip(predicted, accepted, strict=False)):
            if i == len(self._predicted):
                break
            factor = self._factor(i)
            keep = math.exp2(-min(max(p, a) / self.half_life, 1 / FEWEST_STEPS))
            self._predicted[i] = keep * self._predicted[i] + p
            self._accepted[i] = keep * self._accepted[i] + a
            for shift in [shift for shift in self._shifts[i] if shift.is_seen(p, a, factor)]:
                self._predicted[i], self._accepted[i] = shift.predicted, shift.accepted
                shift.reset()

    def forget(self) -> None:
        """A step passed in which nothing was verified."""
        self._predicted = [self._keep * p for p in self._predicted]
        self._accepted = [self._keep * a for a in self._accepted]

    def factors(self) -> list[float]:
        """Per depth, what to scale the model's probabilities with; between 0.25 and 4."""
        return [self._factor(i) for i in range(len(self._predicted))]

    def _factor(self, i: int) -> float:
        accepted = self._accepted[i] + self.prior * self.start ** (i + 1)
        ratio = accepted / (self._predicted[i] + self.prior)
        return min(4.0, max(0.25, ratio))

    def errors(self) -> list[float]:
        """Per depth, the relative standard error of its factor."""
        return [1 / math.sqrt(a + self.prior) for a in self._accepted]
