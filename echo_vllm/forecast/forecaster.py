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

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from echo_vllm.forecast.plan import DraftPlan, Load
from echo_vllm.forecast.step_cost import Costs
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

DOUBT = 3.0
"""How many times too long start-up may have measured forwards: on a machine that was busy then."""

TRIALS = 16
"""Trials at about one load, at most (`Forecaster._trial`)."""

LARGER = 1.25
"""How many times as many nodes make a trial while something is drafted anyway."""

TRIAL_STEPS = 16
"""Steps between them."""

PLAIN_STEPS = (16, 128)
"""Steps between single steps of plain decoding while others draft: what plain decoding costs now
is the other half of every comparison. They become rarer, from the first number to the second, the
more of them there were at about this load (requests up to a factor of two): twice as long after
every other one."""

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
        # By the octave of the load.
        self._num_plain: dict[int, int] = {}
        self._num_trials: dict[int, int] = {}
        self._next_trial = TRIAL_STEPS
        self._turn = 0
        self._curves: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
        self._curves_until = 0
        self._last: tuple[tuple[int, int, Costs], Forecast] | None = None

    def observe_draft(self, scores: list[float], depths: list[int]) -> None:
        """Remember a draft to full depth: path log-probabilities and depths of its best nodes."""
        self._drafts.append((np.array(scores, np.float32), np.array(depths, np.int64)))
        for _ in range(2):
            if not self._drafting and len(self._drafts) > RESTING_MEMORY:
                self._drafts.popleft()

    def observe_acceptance(self, predicted: list[float], accepted: list[int]) -> None:
        """Learn from a verification.

        Args:
            predicted: per depth, the sum of the calibrated probabilities of all verified nodes.
            accepted: per depth, how many of them were accepted.
        """
        if self.online is None:
            return
        if predicted:
            self.online.update(predicted, accepted)
        else:
            self.online.forget()

    def factors(self) -> tuple[float, ...]:
        """Per depth, accepted over predicted acceptance lately."""
        return () if self.online is None else tuple(self.online.factors())

    def plan(self, load: Load, costs: Costs | None) -> DraftPlan:
        """The plan of the next drafting; `costs` is None before they are known."""
        self._step += 1
        plan = DraftPlan(
            max_depth=0,
            turn=self._turn,
            prefill_tokens=load.prefill_tokens,
            cost=None if costs is None else costs.trees,
            factors=self.factors(),
        )
        if costs is None:
            return plan  # Nothing can be weighed yet.
        if len(self._drafts) < ENOUGH:
            self._turn += 1
            return replace(plan, probes=2 * PROBES if load.num_decoding else 0)
        if load.num_decoding == 0:
            # Prompts alone: whether their requests will draft once they decode.
            later = replace(load, num_decoding=max(1, load.num_reading), prefill_tokens=0)
            best = self._forecast(later, costs)
            return replace(plan, reads_prompts=best.speed > (1 + GAIN) * best.plain)
        best = self._forecast(load, costs)
        self._drafting = best.depth > 0 and best.speed > self._hurdle(load, costs) * best.plain
        if self._drafting and self._is_plain_due(load):
            return replace(plan, price=best.plain)
        if (trial := self._trial(load, costs, best)) is not None:
            doubted, other = trial
            return replace(
                plan,
                max_depth=other.depth,
                price=other.speed,
                cost=doubted.trees,
                reads_prompts=self._drafting,
            )
        depth = best.depth if self._drafting else 0
        probes = 0
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
        return replace(
            plan, max_depth=depth, probes=probes, price=price, reads_prompts=self._drafting
        )

    def _hurdle(self, load: Load, costs: Costs) -> float:
        """The least speed, over that of plain decoding, at which drafting is worth it.

        Of the time of the next `HORIZON` steps, catching up takes the share x first; drafting at s
        times the speed in the rest of it makes more tokens if s (1 - x) > 1.
        """
        least = 1 + GAIN + (-MARGIN if self._drafting else MARGIN)
        if load.waiting <= load.num_decoding:
            return least
        step = costs.plain.plain_step(load.num_decoding, load.prefill_tokens)
        share = costs.trees.catch_up(load.waiting) / (max(1.0, min(HORIZON, load.left)) * step)
        return least / (1 - share) if share < 1 else float("inf")

    def _is_plain_due(self, load: Load) -> bool:
        """Whether this step should be one of plain decoding although drafting pays."""
        if self._step < self._next_plain:
            return False
        octave = load.num_decoding.bit_length()
        num_plain = self._num_plain.get(octave, 0)
        self._num_plain[octave] = num_plain + 1
        shortest, longest = PLAIN_STEPS
        most = (longest // shortest).bit_length()  # Doublings; a shift must not grow for good.
        self._next_plain = self._step + min(longest, shortest << min(num_plain // 2, most))
        return True

    def _trial(self, load: Load, costs: Costs, best: Forecast) -> tuple[Costs, Forecast] | None:
        """Now and then other costs, and what would be best if they were the true ones, where that
        is to draft more than `best` does.

        A rest shows nothing of what drafting costs, and small trees nothing of large ones, so
        curves that were measured too high would keep up what they are the reason of. What is
        doubted falls from `DOUBT` to nothing over the second half of `TRIALS` trials, each of which
        teaches the curves what forwards of such sizes take.
        """
        octave = load.num_decoding.bit_length()
        num_trials = self._num_trials.get(octave, 0)
        if self.online is None or num_trials == TRIALS or self._step < self._next_trial:
            return None
        self._next_trial = self._step + TRIAL_STEPS
        doubted = costs.doubted(load.rows, DOUBT ** min(1.0, 2 - 2 * num_trials / TRIALS))
        other = self.forecast(load, doubted)
        if other.speed <= self._hurdle(load, doubted) * other.plain:
            return None
        is_more = other.depth > best.depth or other.nodes > LARGER * best.nodes
        if self._drafting and not is_more:
            return None
        self._num_trials[octave] = num_trials + 1
        return doubted, other

    def _forecast(self, load: Load, costs: Costs) -> Forecast:
        """`forecast`, or what it said a few steps ago for the same load at the same cost."""
        key = (load.num_decoding, load.prefill_tokens, costs)
        if self._last is None or self._last[0] != key or self._step >= self._curves_until:
            self._last = (key, self.forecast(load, costs))
        return self._last[1]

    def forecast(self, load: Load, costs: Costs) -> Forecast:
        """The best depth and number of nodes for a load, by the remembered drafts."""
        requests = load.num_decoding
        plain = requests / costs.plain.plain_step(requests, load.prefill_tokens)
        best = Forecast(0, 0.0, 0.0, plain)
        levels: list[float] = []
        for depth, (nodes, gains) in enumerate(self._expected(), 1):
            if depth > 1:
                levels.append(requests * self.frontier)
            if self.k_max is not None:
                fits = requests * nodes <= self.k_max - load.prefill_tokens
                nodes, gains = nodes[fits], gains[fits]
                if not len(nodes):
                    continue
            tokens = requests * (1.0 + gains)
            committed = requests * (1.0 + float(gains[-1]))
            speeds = tokens / costs.trees.step(load.rows + requests * nodes, levels, committed)
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
            survival = model.probability(torch.from_numpy(scores), torch.from_numpy(levels))
            order = np.argsort(-survival.numpy(), kind="stable")
            gains, levels = survival.double().numpy()[order], levels[order]
            count = len(self._drafts)
            for depth in range(1, self.max_depth + 1):
                expected = np.cumsum(gains[levels <= depth]) / count
                nodes = np.arange(1, len(expected) + 1) / count
                # A few points of the curve are enough, and cheaper to price.
                step = max(1, len(expected) // 64)
                self._curves.append((nodes[step - 1 :: step], expected[step - 1 :: step]))
        return self._curves
