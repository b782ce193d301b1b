# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Whether drafting pays at the present load, and how deep: forecast, not tried.

The forecast keeps the scores of recent drafts that went to full depth. For a load it works out,
for every depth and every number of nodes, the expected tokens a second as if all requests were
like the recent ones, and compares the best of them with plain decoding. Because the load is an
input, a change of it changes the decision in the next step, and because the forecast is the
maximum of functions that are continuous in the load, nothing jumps where the decision changes.

Everything that depends on timing or on past steps lives here, in one process; ranks get the
resulting `DraftPlan`.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from echo_vllm.forecast import StepCost
from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.forecast.survival import OnlineSurvival, SurvivalModel

MEMORY = 64
"""Drafts that are remembered."""

ENOUGH = 8
"""Remembered drafts below which everything is drafted to full depth."""

GAIN = 0.02
"""By how much drafting must be predicted to be faster. What the prediction leaves out is against
it: requests that accept differently end one by one, and so do their successors' prompts come."""

MARGIN = 0.01
"""How far the prediction must be beyond that on the other side before the decision changes."""

HORIZON = 64
"""Steps, or tokens that are left if those are fewer, in which catching up with what waits for the
drafter must pay for itself."""

PROBE_STEPS = 32
"""Steps between drafts of a few requests to full depth while others draft less deep."""

SLOWEST_PROBE_STEPS = 256
"""The same while nothing is drafted and nothing suggests that it should be."""

RESTING_MEMORY = 16
"""Drafts that are remembered in the end while nothing is drafted: with so few probes, `MEMORY`
would be of long ago, and better prompts would not be noticed for thousands of steps."""

PROBES = 2

PLAIN_STEPS = (16, 128)
"""Steps between single steps of plain decoding while others draft: what plain decoding costs now
is the other half of every comparison. They become rarer, from the first number to the second, the
more of them there were at about this load (requests up to a factor of two)."""

REUSE = 8
"""Steps for which the expected tokens are not worked out anew, nor a forecast for the same load."""

NEARLY = 0.97
"""Below this share of plain decoding's speed, drafting is far from paying."""


@dataclass(frozen=True)
class Forecast:
    """What is best at one load.

    Attributes:
        depth: levels to draft, 0 for plain decoding.
        nodes: nodes a request.
        speed: tokens per second with that.
        plain: tokens per second of plain decoding.
    """

    depth: int
    nodes: float
    speed: float
    plain: float


class Forecaster:
    """Decides the `DraftPlan` of every step for policy `auto`."""

    def __init__(
        self,
        *,
        survival: SurvivalModel,
        max_depth: int,
        frontier: int,
        k_max: int | None,
        online: bool,
    ) -> None:
        """
        Args:
            survival: calibrated probability of acceptance of a candidate.
            max_depth: of one request's tree.
            frontier: nodes of one request that a drafter forward expands.
            k_max: the most nodes of the batch, prompt tokens included; None for no such limit.
            online: whether to follow observed acceptance.
        """
        self.survival = survival
        self.max_depth = max_depth
        self.frontier = frontier
        self.k_max = k_max
        self.online = OnlineSurvival(max_depth) if online else None
        self._drafts: deque[tuple[NDArray[np.float32], NDArray[np.int64]]] = deque(maxlen=MEMORY)
        self._drafting = True
        self._step = 0
        self._next_probe = 0
        self._probe_steps = PROBE_STEPS
        self._next_plain = PLAIN_STEPS[0]
        self._num_plain: dict[int, int] = {}  # By the octave of the load.
        self._turn = 0
        self._curves: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
        self._curves_until = 0
        self._last: tuple[tuple[Any, ...], Forecast] | None = None

    def observe_draft(self, scores: list[float], depths: list[int]) -> None:
        """Remember a draft to full depth: path log-probabilities and depths of its best nodes."""
        self._drafts.append((np.array(scores, np.float32), np.array(depths, np.int64)))
        for _ in range(2):
            if not self._drafting and len(self._drafts) > RESTING_MEMORY:
                self._drafts.popleft()

    def observe_acceptance(self, depth_scores: list[list[float]], accepted: list[int]) -> None:
        """Learn from a verification.

        Args:
            depth_scores: per depth, path log-probabilities of all verified nodes.
            accepted: per tree, how many of its nodes were accepted.
        """
        if self.online is None:
            return
        if not depth_scores:
            self.online.forget()
            return
        flat = torch.tensor([score for scores in depth_scores for score in scores])
        depths = torch.tensor(
            [d for d, scores in enumerate(depth_scores, 1) for _ in scores], dtype=torch.int64
        )
        expected = torch.zeros(len(depth_scores)).index_add_(
            0, depths - 1, self.survival.probability(flat, depths)
        )
        found = [sum(a >= d for a in accepted) for d in range(1, len(depth_scores) + 1)]
        self.online.update(expected.tolist(), found)

    def factors(self) -> tuple[float, ...]:
        """Per depth, accepted over predicted acceptance lately."""
        return () if self.online is None else tuple(self.online.factors())

    def plan(
        self,
        num_decoding: int,
        prefill_tokens: int,
        cost: StepCost | None,
        plain_cost: StepCost | None = None,
        waiting: int = 0,
        left: float = math.inf,
    ) -> DraftPlan:
        """The plan of the next drafting.

        Args:
            num_decoding: requests that will decode in the next step.
            prefill_tokens: prompt tokens expected in it.
            cost: predicted times of steps with trees, None before they are known.
            plain_cost: the same for steps without, if it is known apart: the same number of rows
                takes longer where some of them are trees.
            waiting: tokens that the drafter has to catch up with if it drafts now, and need not if
                it rests.
            left: tokens that a request of the batch may still generate, on average.
        """
        self._step += 1
        plan = DraftPlan(
            max_depth=0,
            turn=self._turn,
            prefill_tokens=prefill_tokens,
            cost=cost,
            factors=self.factors(),
        )
        if cost is None or num_decoding == 0:
            # Nothing can be weighed yet; the first steps are prefills.
            return plan
        if len(self._drafts) < ENOUGH:
            self._turn += 1
            return replace(plan, probes=2 * PROBES)
        best = self._forecast(num_decoding, prefill_tokens, cost, plain_cost)
        wanted = 1 + GAIN + (-MARGIN if self._drafting else MARGIN)
        if waiting > num_decoding:
            step = (plain_cost or cost).plain_step(num_decoding, prefill_tokens)
            wanted += cost.catch_up(waiting) / (max(1.0, min(HORIZON, left)) * step)
        self._drafting = best.depth > 0 and best.speed > wanted * best.plain
        depth = best.depth if self._drafting else 0
        probes = 0
        octave = num_decoding.bit_length()
        if depth and self._step >= self._next_plain:
            seen = self._num_plain[octave] = self._num_plain.get(octave, 0) + 1
            self._next_plain = self._step + min(PLAIN_STEPS[1], PLAIN_STEPS[0] << seen // 2)
            return replace(plan, price=best.plain)
        if self._step >= self._next_probe:
            probes = PROBES
            self._turn += 1
            if depth:
                self._probe_steps = PROBE_STEPS
            elif best.speed > NEARLY * best.plain:
                self._probe_steps = 2 * PROBE_STEPS
            else:
                self._probe_steps = min(2 * self._probe_steps, SLOWEST_PROBE_STEPS)
            self._next_probe = self._step + self._probe_steps
        price = best.speed if self._drafting else best.plain
        return replace(plan, max_depth=depth, probes=probes, price=price)

    def _forecast(self, *load: Any) -> Forecast:
        """`forecast`, or what it said a few steps ago for the same load at the same cost."""
        if self._last is None or self._last[0] != load or self._step >= self._curves_until:
            self._last = (load, self.forecast(*load))
        return self._last[1]

    def forecast(
        self,
        num_decoding: int,
        prefill_tokens: int,
        cost: StepCost,
        plain_cost: StepCost | None = None,
    ) -> Forecast:
        """The best depth and number of nodes for a load, by the remembered drafts."""
        rows = num_decoding + prefill_tokens
        seconds = float((plain_cost or cost).plain_step(num_decoding, prefill_tokens))
        plain = num_decoding / seconds
        best = Forecast(0, 0.0, 0.0, plain)
        levels: list[float] = []
        for depth, (nodes, gains) in enumerate(self._expected(), 1):
            if depth > 1:
                levels.append(num_decoding * self.frontier)
            if self.k_max is not None:
                fits = num_decoding * nodes <= self.k_max - prefill_tokens
                nodes, gains = nodes[fits], gains[fits]
                if not len(nodes):
                    continue
            tokens = num_decoding * (1.0 + gains)
            committed = num_decoding * (1.0 + float(gains[-1]))
            speeds = tokens / cost.step(rows + num_decoding * nodes, levels, committed)
            i = int(np.argmax(speeds))
            if speeds[i] > best.speed:
                best = Forecast(depth, float(nodes[i]), float(speeds[i]), plain)
        return best

    def _expected(self) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Per depth limit: nodes a request, rising, and the accepted tokens to expect of them."""
        if self._step >= self._curves_until:
            self._curves_until = self._step + REUSE
            self._curves = []
            scores = np.concatenate([scores for scores, _ in self._drafts])
            levels = np.concatenate([depths for _, depths in self._drafts])
            model = self.survival
            if factors := self.factors():
                model = model.with_factors(torch.tensor(factors))
            found = model.probability(torch.from_numpy(scores), torch.from_numpy(levels))
            order = np.argsort(-found.numpy(), kind="stable")
            gains, levels = found.double().numpy()[order], levels[order]
            count = len(self._drafts)
            for depth in range(1, self.max_depth + 1):
                expected = np.cumsum(gains[levels <= depth]) / count
                nodes = np.arange(1, len(expected) + 1) / count
                # A few points of the curve are enough, and cheaper to price.
                step = max(1, len(expected) // 64)
                self._curves.append((nodes[step - 1 :: step], expected[step - 1 :: step]))
        return self._curves
