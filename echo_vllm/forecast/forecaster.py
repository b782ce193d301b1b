# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Whether drafting pays at the present load, and how deep: forecast, not tried.

The forecast keeps the scores of recent drafts that went to full depth. For a load it works out,
for every depth and every number of nodes, the expected tokens a second as if all requests were
like the recent ones, and compares the best of them with plain decoding. Because the load is an
input, a change of it changes the decision in the next step, and because the forecast is the
maximum of functions that are continuous in the load, nothing jumps where the decision changes.

Forecasts have standard errors. Drafting begins where it pays although it was forecast too well, and
ends where it does not pay although it was forecast a little too badly; between the two all stays as
it is, but for experiments, whose price is forecast as well and is a small share of all time. That
holds for about one load and one kind of requests: at another load what is likely decides, and of
other requests drafting has to begin anew.

Everything that depends on timing or on past steps lives here, in one process; ranks get the
resulting `DraftPlan`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq

from echo_vllm.forecast.plan import AHEAD, DraftPlan, Load
from echo_vllm.forecast.step_cost import Costs
from echo_vllm.forecast.survival import OnlineSurvival, SurvivalModel

Floats = NDArray[np.float64]

Kind = Literal["best", "drawn"]
"""Of candidates: the drafter's best tokens, or tokens drawn from its distribution."""

MEMORY = 128
"""Drafts of each kind that are remembered."""

ENOUGH = 8
"""Remembered drafts of a kind below which there are probes before anything else."""

UNTRIED = 32
"""Steps at most in which there are probes for that alone: some requests never draft so deep."""

NEEDED = 0.25
"""Share of the requests from which on it matters what drafts of their kind are like."""

RESTING_MEMORY = 16
"""Drafts that are remembered in the end while nothing is drafted: with so few probes, `MEMORY`
would be of long ago, and better prompts would not be noticed for thousands of steps."""

BOUND = 1.3
"""Standard errors between a forecast and its bounds."""

UNKNOWN = 0.005
"""What no observation tells, as a share of the speed: what the forecast leaves out."""

EXPERIMENTS = 0.003
"""Share of the time that each kind of experiment may take: probes, and the others."""

YOUNG = 64
"""Remembered drafts of each kind that matters up to which `YOUNG_PROBES` times as much time goes to
probes while others draft."""

YOUNG_PROBES = 4.0

FIRST_PAUSES, YOUNG_PAUSES = 2, 8.0
"""Pauses at about one load up to which `YOUNG_PAUSES` times as much time goes to them, where
log(speed) gains no more than `DOUBTFUL`: until then nobody knows what plain decoding takes here,
and what is thought of it is wrong by a fifth at times."""

DOUBTFUL = 0.3

PROBES = (1, 2, 4, 8)
MOST_PROBES = PROBES[-1]
"""Requests of one step that draft to full depth, so that their scores can be remembered."""

PROBED_NODES = 2
"""Nodes of a probe that are verified in any case."""

PROBE_STEPS = 8
"""Steps between probes at least."""

PLAIN_STEPS = 64
"""Steps between pauses of the drafting, at least, for some plain decoding: what that costs now is
the other half of every comparison."""

PAUSE = 8
"""Steps of a pause: the first verifies what was drafted before, the last ones are typical."""

ATTEMPT, ATTEMPT_PROBES = 8, 2
"""Steps of an attempt: drafting where the forecast says that it pays, but not for sure. And how
many of them, the first ones, have probes."""

ATTEMPT_STEPS = (32, 1024)
"""Steps between attempts at about one load: twice as many after each one that was given up."""

FIRST_ATTEMPTS, YOUNG_ATTEMPTS = 4, 2.0
"""Attempts up to which so many times as much time goes to them."""

DOUBT = 3.0
"""How many times too long start-up may have measured forwards: on a machine that was busy then."""

TRIALS = 16
"""Trials at about one load, at most (`Forecaster._trial`)."""

TRIAL_ROWS = (16, 2)
"""Rows of a trial at most: so many, or so many times those of the step without drafts."""

LARGER = 1.25
"""How many times as many nodes make a trial while something is drafted anyway."""

TRIAL_STEPS = 32
"""Steps between them."""

BEHIND = 48
"""Tokens that a request has to catch up with after a long rest, before any had to: a window, and
half a block."""

SAMPLED = 0.8
"""How often a target that samples takes a best token of the drafter for once that a greedy one
does, a level, before it is known: profiles are of greedy answers."""

FRESH = 256.0
"""Drafts whose first level tells what the present ones are like; older ones are forgotten."""

FRESH_PRIOR = 16.0
"""Drafts that count as being like the remembered ones."""

MOST_TILT = 8.0
"""Of remembered drafts towards those that begin as the present ones do."""

OTHER_MIX = 0.1
"""Change of the share of requests of a kind that makes all forecasts old."""

OTHER_REQUESTS = 0.5
"""Change of these shares since drafting began that makes it begin anew, where it pays."""

REUSE, RESTING_REUSE = 8, 32
"""Steps for which the expected tokens are not worked out anew, nor a forecast for the same load:
while something is drafted, and at rest, where little is learnt and a plan should cost nothing."""

POINTS = 32
"""Numbers of nodes that are priced for a shape."""


@dataclass(frozen=True)
class Forecast:
    """What is best at one load.

    Attributes:
        depth: levels to draft, 0 for plain decoding.
        width: nodes of a request that are expanded of a level.
        nodes: nodes a request that drafts.
        speed: tokens per second with that.
        plain: tokens per second of plain decoding.
        error: standard error of log(speed / plain).
        least: what the last of the nodes is worth, in accepted tokens.
    """

    depth: int
    width: int
    nodes: float
    speed: float
    plain: float
    error: float = 0.0
    least: float = 1.0

    @property
    def gain(self) -> float:
        """log(speed / plain); -inf where nothing can be drafted."""
        return math.log(self.speed / self.plain) if self.speed > 0 else -math.inf


@dataclass(frozen=True)
class _Expected:
    """What trees are expected to bring, for P points: of trees of each depth and width of the
    frontier rising numbers of nodes.

    Attributes:
        growth: by width, per depth how often its nodes are followed by an accepted one.
        depths, widths: [P], of the trees.
        nodes: [P], a request that drafts.
        gains: [P], accepted tokens to expect of them.
        all_gains: [P], of all nodes of such trees.
        chosen: [P], how many of the remembered nodes, in the order of `Forecaster._order`.
    """

    growth: dict[int, tuple[float, ...]]
    depths: NDArray[np.int64]
    widths: NDArray[np.int64]
    nodes: Floats
    gains: Floats
    all_gains: Floats
    chosen: NDArray[np.int64]


class Account:
    """Time saved up for experiments of one kind: a share of what passes."""

    def __init__(self, share: float, steps: int) -> None:
        """Args: share: of the time; steps: between two experiments at least."""
        self._share, self._least = share, steps
        self._saved = 0.0
        self._steps = 0

    def passes(self, seconds: float) -> None:
        """A step passes, of `seconds`."""
        self._saved += self._share * seconds
        self._steps += 1

    def buys(self, price: float) -> bool:
        """Whether an experiment that takes `price` seconds is due; then they are spent. What was
        saved beyond that is lost: many steps without need for one are no reason for many later."""
        if self._steps < self._least or self._saved < price:
            return False
        self._saved = 0.0
        self._steps = 0
        return True


def _most_probes(load: Load) -> int:
    """Requests that may be probes of one step."""
    return min(MOST_PROBES, load.able)


def _trial_rows(load: Load) -> int:
    """Rows of a trial at most."""
    least, times = TRIAL_ROWS
    return max(load.rows + least, times * load.rows)


@dataclass
class Calibrated:
    """What is known of one kind of candidates.

    Attributes:
        survival: calibrated probability of acceptance, by score and depth.
        online: what serving has shown of it, for greedy requests; None: it is not followed.
        sampled: the same for requests with a temperature, where these are told apart.
        sampled_share: of the present requests, those.
        first: of how many drafts lately the probability of the best first node is known, and the
            sum of these; without factors.
    """

    survival: SurvivalModel
    online: OnlineSurvival | None
    sampled: OnlineSurvival | None = None
    sampled_share: float = 0.0
    first: tuple[float, float] = (0.0, 0.0)

    def observe_first(self, count: int, total: float) -> None:
        """`count` more drafts, with `total` the sum of their best first nodes' probabilities."""
        keep = max(0.0, 1 - count / FRESH)
        self.first = keep * self.first[0] + count, keep * self.first[1] + total

    def factors(self) -> tuple[float, ...]:
        """Per depth, accepted over predicted acceptance lately."""
        return () if self.online is None else self._mixed(OnlineSurvival.factors)

    def errors(self) -> tuple[float, ...]:
        """Per depth, the relative standard error of its factor."""
        return () if self.online is None else self._mixed(OnlineSurvival.errors)

    def _mixed(self, values: Callable[[OnlineSurvival], list[float]]) -> tuple[float, ...]:
        """`values` of both kinds of requests, as many as there are of each."""
        assert self.online is not None
        share = self.sampled_share
        if self.sampled is None or share == 0:
            return tuple(values(self.online))
        pairs = zip(values(self.online), values(self.sampled), strict=True)
        return tuple((1 - share) * greedy + share * sampled for greedy, sampled in pairs)

    def observe(
        self, predicted: Sequence[float], accepted: Sequence[int], *, sampled: bool
    ) -> None:
        """Learn from the verified nodes of requests of one kind; where there were none, forget,
        but not of a kind of which there is no request."""
        online = self.sampled if sampled else self.online
        if online is None:
            return
        if predicted:
            online.update(predicted, accepted)
        elif self.sampled_share != (0.0 if sampled else 1.0):
            online.forget()

    def probability(self, scores: Floats, depths: NDArray[np.int64]) -> Floats:
        """[n], of nodes of these scores and depths [n], with the factors of now."""
        model = self.survival
        if factors := self.factors():
            model = model.with_factors(torch.tensor(factors))
        found = model.probability(torch.from_numpy(scores), torch.from_numpy(depths))
        result: Floats = found.double().numpy()
        return result

    def weights(self, first: Floats) -> Floats:
        """[n] weights, of mean 1, with which remembered drafts, whose best first nodes have the
        probabilities `first` [n], would on average begin as the present ones do.

        Every draft shows its first level, only a probe the others. Of drafts that begin alike the
        rest is taken to be alike: the weights are exp(t * first), the least change that there is.
        """
        count, total = self.first
        if count == 0 or len(first) < 2:
            return np.ones(len(first))
        factor = (self.factors() or (1.0,))[0]
        mean = (factor * total + FRESH_PRIOR * first.mean()) / (count + FRESH_PRIOR)

        def tilted(t: float) -> Floats:
            weights = np.exp(t * (first - first.mean()))
            result: Floats = weights / weights.mean()
            return result

        def beyond(t: float) -> float:
            return float((tilted(t) * first).mean() - mean)

        if beyond(-MOST_TILT) >= 0 or beyond(MOST_TILT) <= 0:
            return tilted(math.copysign(MOST_TILT, -beyond(0.0)))
        return tilted(brentq(beyond, -MOST_TILT, MOST_TILT, xtol=0.01))


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
        drawn: SurvivalModel | None = None,
    ) -> None:
        """
        Args:
            survival: calibrated probability of acceptance of a candidate.
            drawn: the same of a slot of drawn candidates, by what is expected of it; None where
                there are none.
            max_depth: of one request's tree.
            frontier: nodes of one request that a drafter forward expands.
            k_max: the most nodes of the batch, prompt tokens included; None for no such limit.
            online: whether to follow observed acceptance.
        """
        self.max_depth = max_depth
        self.frontier = frontier
        self.widths = tuple(sorted({frontier, *(1 << i for i in range(frontier.bit_length()))}))
        """Those that are weighed."""
        self.k_max = k_max
        models: dict[Kind, SurvivalModel] = {"best": survival}
        if drawn is not None:
            models["drawn"] = drawn
        self._kinds = {
            kind: Calibrated(model, OnlineSurvival(max_depth) if online else None)
            for kind, model in models.items()
        }
        if online:
            self._kinds["best"].sampled = OnlineSurvival(max_depth, start=SAMPLED)
        self._drafts: dict[Kind, deque[tuple[Floats, NDArray[np.int64], NDArray[np.int64]]]]
        self._drafts = {kind: deque(maxlen=MEMORY) for kind in models}
        self._untried = dict.fromkeys(models, UNTRIED)
        """Of each kind, steps that may still be spent on getting to know it."""
        self._mix = self._mix_of_drafting = (0.0, 0.0)
        """Of the requests' kinds: shares of drawn candidates, and of best ones despite a
        temperature."""
        self._drafting = False
        self._step = 0
        self._turn = 0
        self._probes = Account(EXPERIMENTS, PROBE_STEPS)
        self._plain_steps = Account(EXPERIMENTS, PLAIN_STEPS)
        self._attempts = Account(EXPERIMENTS, ATTEMPT_STEPS[0])
        self._attempt_until = self._pause_until = 0
        # For how many requests, and how many that can draft, the last step that rested weighed it.
        self._weighed = (0, 0)
        self._num_attempts = 0
        # By the octave of the load: of attempts the first step of the next one, and the steps
        # between the last one and it.
        self._next_attempts: dict[int, tuple[int, int]] = {}
        # The octave of the load at which drafting was found to pay.
        self._drafting_at = 0
        self._num_trials: dict[int, int] = {}
        self._num_pauses: dict[int, int] = {}
        self._next_trial = TRIAL_STEPS
        self._behind = float(BEHIND)
        self._reading = 0.0
        # What is worked out anew every `REUSE` or `RESTING_REUSE` steps.
        self._until = 0
        self._expected: _Expected
        self._order: tuple[NDArray[Any], ...] = ()
        self._weights: Floats = np.ones(0)
        self._known: dict[tuple[int, ...], Forecast] = {}
        self._known_costs: Costs | None = None

    def observe_draft(
        self, scores: list[float], depths: list[int], widths: list[int], kind: Kind = "best"
    ) -> None:
        """Remember a draft to full depth with all of the frontier: of its best nodes the scores
        (nats), the depths, and which of `self.widths` each needs at least."""
        drafts = self._drafts[kind]
        drafts.append(
            (
                np.array(scores, np.float32),
                np.array(depths, np.int64),
                np.array(widths, np.int64),
            )
        )
        for _ in range(2):
            if not self._is_drafting and len(drafts) > RESTING_MEMORY:
                drafts.popleft()

    def observe_acceptance(
        self,
        predicted: list[float],
        accepted: list[int],
        kind: Kind = "best",
        *,
        sampled: bool = False,
    ) -> None:
        """Learn from a verification.

        Args:
            predicted: per depth, the sum of the calibrated probabilities of all verified nodes.
            accepted: per depth, how many of them were accepted.
            kind: of the nodes.
            sampled: whether their requests have a temperature, for the best candidates.
        """
        self._kinds[kind].observe(predicted, accepted, sampled=sampled)

    def observe_first(self, count: int, total: float, kind: Kind = "best") -> None:
        """Learn from a drafting of `count` requests what the present drafts are like: `total` is
        the sum of the calibrated probabilities of each one's best first node."""
        self._kinds[kind].observe_first(count, total)

    def factors(self, kind: Kind = "best") -> tuple[float, ...]:
        """Per depth, accepted over predicted acceptance lately."""
        return self._kinds[kind].factors() if kind in self._kinds else ()

    @property
    def _is_drafting(self) -> bool:
        return self._drafting or self._step < self._attempt_until

    # ---- The plan ----

    def plan(self, load: Load, costs: Costs | None) -> DraftPlan:
        """The plan of the next drafting; `costs` is None before they are known."""
        self._step += 1
        if load.able:
            self._follow_mix(load)
        if self._step == self._attempt_until:
            self._until = 0  # What the attempt has shown counts now.
        if not self._is_drafting:  # Resting, the remembered drafts are the last ones.
            for each in self._kinds.values():
                each.first = 0.0, 0.0
        plan = DraftPlan(
            max_depth=0,
            turn=self._turn,
            prefill_tokens=load.prefill_tokens,
            cost=None if costs is None else costs.trees,
            factors=self.factors(),
            drawn_factors=self.factors("drawn"),
            least_worth=1.0,
        )
        if costs is None:
            return plan  # Nothing can be weighed yet.
        if not any(self._drafts.values()) or self._is_unknown(load):
            self._turn += 1
            return replace(plan, probes=ENOUGH // 2 if load.able else 0)
        self._reading += (load.prefill_tokens - self._reading) / AHEAD[-1]
        if load.num_decoding == 0:
            # Prompts alone: whether their requests will draft once they decode.
            later = self._best(Load(max(1, load.num_reading)), costs)
            return replace(plan, reads_prompts=later.gain > BOUND * later.error)
        if load.able == 0:
            return replace(plan, reads_prompts=self._is_drafting)
        # Prompts come and go with the steps; whether drafting pays is a matter of all of them.
        usual = replace(load, prefill_tokens=0)
        best = self._best(usual, costs)
        self._decide(usual, costs, best)
        now = self._best(load, costs) if load.prefill_tokens else best
        if (trial := self._trial(load, costs, now)) is not None:
            doubted, other = trial
            plan = replace(
                plan,
                max_rows=_trial_rows(load),
                price=other.speed,
                nodes=other.nodes,
                least_worth=other.least,
                cost=doubted.trees,
                reads_prompts=self._is_drafting,
                growth=self._expected.growth.get(other.width, ()),
            )
            if self._is_drafting:
                return replace(plan, max_depth=other.depth, width=other.width)
            # A few requests show as much, and all would have to catch up.
            self._turn += 1
            return replace(plan, probes=_most_probes(load))
        plan = replace(
            plan,
            price=now.plain,
            reads_prompts=self._is_drafting,
            growth=self._expected.growth.get(now.width, ()),
        )
        step = load.num_decoding / now.plain
        is_attempt = self._is_drafting and not self._drafting
        is_young = (
            self._is_drafting
            and min(
                len(self._drafts[kind]) for kind, share in self._shares().items() if share >= NEEDED
            )
            < YOUNG
        )
        self._probes.passes(step * (YOUNG_PROBES if is_young else 1.0))
        octave = load.num_decoding.bit_length()
        num_pauses = self._num_pauses.get(octave, 0)
        is_doubtful = num_pauses < FIRST_PAUSES and now.gain < DOUBTFUL
        self._plain_steps.passes(step * (YOUNG_PAUSES if is_doubtful else 1.0))
        # Where prompts leave no room for trees, this step alone has none.
        if self._is_drafting and (now.gain > 0 or not load.prefill_tokens):
            # Not what is likely: drafting that seems to gain nothing would be paused for nothing.
            lost = PAUSE * step * max(0.0, math.expm1(now.gain + BOUND * now.error))
            if not is_attempt and self._plain_steps.buys(lost):
                self._pause_until = self._step + PAUSE
                self._num_pauses[octave] = num_pauses + 1
            if self._step < self._pause_until:
                return plan
            plan = replace(
                plan,
                max_depth=now.depth,
                width=now.width,
                price=now.speed,
                nodes=now.nodes,
                least_worth=now.least,
            )
        if probes := self._due_probes(load, costs, plan, is_attempt):
            self._turn += 1
            plan = replace(plan, probes=probes)
        return plan

    def _follow_mix(self, load: Load) -> None:
        """Other kinds of requests make forecasts old, and drafting begin anew."""
        mix = load.drawn_share, load.sampled_share

        def differs(other: tuple[float, float], by: float) -> bool:
            return max(abs(a - b) for a, b in zip(mix, other, strict=True)) > by

        if differs(self._mix, OTHER_MIX):
            self._until, self._weighed = 0, (0, 0)
            self._mix = mix
        self._kinds["best"].sampled_share = load.sampled_share
        if not self._is_drafting:
            self._mix_of_drafting = mix
        elif differs(self._mix_of_drafting, OTHER_REQUESTS):
            self._drafting, self._attempt_until = False, 0
            self._next_attempts.clear()
            self._mix_of_drafting = mix

    def _shares(self) -> dict[Kind, float]:
        """Of the requests that may have a tree, those of each kind."""
        drawn = self._mix[0] if "drawn" in self._kinds else 0.0
        return {kind: drawn if kind == "drawn" else 1 - drawn for kind in self._kinds}

    def _is_unknown(self, load: Load) -> bool:
        """Whether next to nothing is known of what most requests draft, and may still be found
        out; counts the steps that this takes."""
        for kind, share in self._shares().items():
            if len(self._drafts[kind]) >= ENOUGH:
                self._untried[kind] = UNTRIED
            elif share >= NEEDED and load.able and self._untried[kind]:
                self._untried[kind] -= 1
                return True
        return False

    def _due_probes(self, load: Load, costs: Costs, plan: DraftPlan, is_attempt: bool) -> int:
        """How many requests are probes in a step of this plan: as many as cost the least each, when
        the time for them is saved up, or the most there are in an attempt."""
        most = _most_probes(load)
        depth, width = plan.max_depth or 0, plan.width or self.frontier
        if depth and is_attempt:
            return most if self._attempt_until - self._step > ATTEMPT - ATTEMPT_PROBES else 0
        if self._step % PROBE_STEPS:
            return 0
        counts = [most] if depth else [count for count in PROBES if count < most] + [most]
        price, count = min(
            (self._price_of_probes(count, depth, width, load, costs) / count, count)
            for count in counts
        )
        return count if self._probes.buys(count * price) else 0

    def _decide(self, load: Load, costs: Costs, best: Forecast) -> None:
        """Begin or stop drafting, or attempt it."""
        step = load.num_decoding / best.plain
        is_young = self._num_attempts < FIRST_ATTEMPTS
        self._attempts.passes(step * (YOUNG_ATTEMPTS if is_young else 1.0))
        if load.waiting > load.able:
            self._behind += (load.waiting / load.able - self._behind) / 16
        octave = load.num_decoding.bit_length()
        next_attempt, between = self._next_attempts.get(octave, (0, ATTEMPT_STEPS[0]))
        bound = BOUND * best.error
        was_attempt = 0 < self._attempt_until <= self._step
        if self._is_drafting or was_attempt:
            # An attempt that ends has shown what it could: then what is likely decides, as it does
            # at another load.
            ends = was_attempt and not self._drafting
            moved = self._drafting and octave != self._drafting_at
            optimism = 0.0 if ends or moved else bound
            self._drafting_at = octave
            goes_on = self._pays(load, costs, best, optimism)
            if ends:
                self._attempt_until = 0
                self._drafting = goes_on
                shortest, longest = ATTEMPT_STEPS
                between = shortest if goes_on else min(2 * between, longest)
                self._next_attempts[octave] = self._step + between, between
            elif not goes_on:
                self._drafting, self._attempt_until = False, 0
            self._weighed = (0, 0)
            return
        # The answer for the same load hardly changes from step to step.
        before, self._weighed = self._weighed, (load.num_decoding, load.able)
        if best.gain <= -bound or (self._weighed == before and self._step % REUSE):
            return
        if self._pays(load, costs, best, -bound):
            self._drafting, self._drafting_at = True, octave
            self._next_attempts.pop(octave, None)
            self._until = min(self._until, self._step + REUSE)
        elif self._step >= next_attempt:
            lost = ATTEMPT * step * max(0.0, math.expm1(-best.gain))
            lost += self._catch_up(load.waiting, load, costs)
            probes = _most_probes(load)
            probe = self._price_of_probes(probes, best.depth, best.width, load, costs)
            if self._attempts.buys(lost + ATTEMPT_PROBES * probe):
                self._attempt_until = self._step + ATTEMPT
                self._num_attempts += 1

    def _pays(self, load: Load, costs: Costs, best: Forecast, optimism: float) -> bool:
        """Whether to draft now makes the tokens up to the horizon in less time than to rest now, if
        later it is always done what is best then.

        The load falls as answers end, and what has to be caught up with grows up to a window for
        each request that is left. Backwards over `AHEAD`, the least time from each point on is that
        of a drafter that is up to date (`current`) or not (`behind`).

        Args:
            best: forecast for the load.
            optimism: by how much drafting is taken for faster than it is forecast, in log(speed).
        """
        missed_now = self._catch_up(load.waiting, load, costs)
        if best.gain + optimism > 0 and (self._drafting or missed_now <= 0):
            return True  # It is faster now, and later it helps to be up to date.
        loads = [*(load.ahead or [load.num_decoding] * (len(AHEAD) - 1))]
        loads[0] = load.num_decoding
        plain, drafting = self._seconds_a_token(loads, load, costs)
        drafting = drafting * math.exp(-optimism)
        able = load.able / load.num_decoding
        current = behind = 0.0
        for i in range(len(loads) - 1, -1, -1):
            length = AHEAD[i + 1] - AHEAD[i]
            rest, draft = length * plain[i] + behind, length * drafting[i] + current
            if i == 0:
                return bool(missed_now + draft < rest)
            missed = load.waiting / load.able
            missed = min(max(self._behind, missed), missed + AHEAD[i])
            catch_up = self._catch_up(missed * able * loads[i], load, costs)
            current, behind = min(draft, rest), min(draft + catch_up, rest)
        raise AssertionError("unreachable")

    def _catch_up(self, waiting: float, load: Load, costs: Costs) -> float:
        """Seconds of catching up with `waiting` tokens, beyond what each drafting takes."""
        catch_up = costs.trees.catch_up
        usual = min(waiting, 2.0 * load.able)
        return float(catch_up(waiting) - catch_up(usual))

    def _price_of_probes(
        self, count: int, depth: int, width: int, load: Load, costs: Costs
    ) -> float:
        """Seconds that `count` probes add to a step that drafts `depth` levels of a frontier of
        `width` nodes, which is all of it then."""
        trees = costs.trees
        levels = (self.max_depth - max(1, depth)) * trees.draft_level(count * self.frontier)
        if depth:
            wider = trees.draft_level(load.able * self.frontier)
            wider -= trees.draft_level(load.able * width)
            return float(levels + (depth - 1) * wider)
        rows = load.rows
        waiting = count * max(1.0, load.waiting / load.able)
        seconds = levels + trees.catch_up(waiting) + trees.draft_fixed
        seconds += trees.verify(rows + PROBED_NODES * count) - costs.plain.verify(rows)
        return float(seconds + max(0.0, trees.other - costs.plain.other))

    def _trial(self, load: Load, costs: Costs, best: Forecast) -> tuple[Costs, Forecast] | None:
        """Now and then other costs, and what would be best if they were the true ones, where that
        is to draft more than `best` does.

        A rest shows nothing of what drafting costs, and small trees nothing of large ones, so
        curves that were measured too high would keep up what they are the reason of. What no step
        has shown is doubted, by a factor that falls from `DOUBT` to nothing over the second half of
        `TRIALS` trials, each of which teaches the curves what forwards of such sizes take; once
        they have shown that it is not much less, nothing is doubted any more.
        """
        octave = load.num_decoding.bit_length()
        num_trials = self._num_trials.get(octave, 0)
        if (
            self._kinds["best"].online is None
            or num_trials == TRIALS
            or self._step < self._next_trial
        ):
            return None
        self._next_trial = self._step + TRIAL_STEPS
        doubted = costs.doubted(load.rows, DOUBT ** min(1.0, 2 - 2 * num_trials / TRIALS))
        other = self.forecast(load, doubted, _trial_rows(load) - load.rows)
        if other.gain <= BOUND * other.error:
            return None
        if costs.is_confirmed(load.rows + load.able * other.nodes):
            self._num_trials[octave] = TRIALS
            return None
        if self._is_drafting:
            is_more = (other.depth, other.width) > (best.depth, best.width)
            is_more |= other.nodes > LARGER * best.nodes
            if not is_more or costs.is_known(load.rows + load.able * other.nodes):
                return None
        self._num_trials[octave] = num_trials + 1
        return doubted, other

    # ---- The forecast ----

    def _best(self, load: Load, costs: Costs) -> Forecast:
        """`forecast`, or what it said a few steps ago for the same load at the same cost."""
        self._renew(load)
        if costs is not self._known_costs:
            self._known, self._known_costs = {}, costs
        key = (load.num_decoding, load.able, load.prefill_tokens)
        if key not in self._known:
            self._known[key] = self.forecast(load, costs)
        return self._known[key]

    def forecast(self, load: Load, costs: Costs, most: float = math.inf) -> Forecast:
        """The best depth and number of nodes, `most` of the batch, by the remembered drafts."""
        self._renew(load)
        requests = load.num_decoding
        plain = requests / costs.plain.plain_step(requests, load.prefill_tokens)
        points = self._expected
        (speeds,) = self._speeds(np.array([float(requests)]), load, costs, load.prefill_tokens)
        speeds[load.able * points.nodes > most] = 0.0
        i = int(np.argmax(speeds)) if len(speeds) else 0
        if not len(speeds) or speeds[i] <= 0:
            return Forecast(0, self.frontier, 0.0, 0.0, plain)
        depth, width = int(points.depths[i]), int(points.widths[i])
        nodes, speed = float(points.nodes[i]), float(speeds[i])
        share = load.able / requests
        rows = load.rows + share * requests * nodes
        seconds = requests * (1 + share * float(points.gains[i])) / speed
        drafting = max(0.0, 1 - (costs.trees.verify(rows) + costs.trees.other) / seconds)
        chosen = self._nodes_of(depth, width)[: points.chosen[i]]
        error = math.hypot(
            self._error_of_tokens(chosen, share),
            costs.error(load.rows, rows, drafting),
            UNKNOWN,
        )
        least = float(self._order[0][chosen[-1]])
        return Forecast(depth, width, nodes, speed, plain, error, least)

    def _seconds_a_token(
        self, loads: list[float], load: Load, costs: Costs
    ) -> tuple[Floats, Floats]:
        """[n] seconds in which each request makes a token at each of `loads`, by plain decoding and
        by the best drafting; 0 without requests."""
        requests = np.maximum(np.array(loads), 1e-6)
        plain = np.asarray(costs.plain.plain_step(requests))
        best = self._speeds(requests, load, costs, 0).max(axis=1, initial=0.0)
        drafting = np.divide(requests, best, out=np.full(len(loads), np.inf), where=best > 0)
        empty = np.array(loads) <= 0
        return np.where(empty, 0.0, plain), np.where(empty, 0.0, drafting)

    def _speeds(self, requests: Floats, load: Load, costs: Costs, prefill: int) -> Floats:
        """[n, P] tokens a second with `requests` [n] that decode, of which as many may draft as of
        `load`; 0 where that is more than `k_max`."""
        trees, points = costs.trees, self._expected
        shares = load.shares(self.max_depth)
        count = requests[:, None]
        # [n, widths, depths], of all levels of a tree below the first.
        rows = count[:, :, None] * np.outer(self.widths, shares[1:])
        below = np.pad(np.cumsum(trees.draft_level(rows), axis=2), ((0, 0), (0, 0), (1, 0)))
        levels = below[:, np.searchsorted(self.widths, points.widths), points.depths - 1]
        nodes = shares[0] * count * points.nodes
        tokens = count * (1 + shares[0] * points.gains)
        committed = count * (1 + shares[0] * points.all_gains) + self._reading
        seconds = trees.verify(count + prefill + nodes) + trees.catch_up(committed)
        seconds += levels + (trees.draft_fixed + trees.other)
        speeds: Floats = tokens / seconds
        if self.k_max is not None:
            speeds[nodes > self.k_max - prefill] = 0.0
        return speeds

    def _renew(self, load: Load) -> None:
        """Per depth, what is to be expected: nodes in the order of their probability."""
        if self._step < self._until:
            return
        self._until = self._step + (REUSE if self._is_drafting else RESTING_REUSE)
        self._known = {}
        shares_of_kinds = self._shares()
        # Those that have been seen stand for the others.
        kinds = [kind for kind, share in shares_of_kinds.items() if share and self._drafts[kind]]
        kinds = kinds or [kind for kind in self._kinds if self._drafts[kind]]
        of_all = [(*draft, kind) for kind in kinds for draft in self._drafts[kind]]
        count = len(of_all)
        scores, levels, widths = (
            np.concatenate(parts) for parts in list(zip(*of_all, strict=True))[:3]
        )
        sizes = [len(scores) for scores, *_ in of_all]
        owners = np.repeat(np.arange(count), sizes)
        is_drawn = np.repeat([kind == "drawn" for *_, kind in of_all], sizes)
        gains = np.zeros(len(scores))
        self._weights = np.ones(count)
        for kind in kinds:
            each = self._kinds[kind]
            own = np.flatnonzero(is_drawn == (kind == "drawn"))
            gains[own] = each.probability(scores[own], levels[own])
            first = np.zeros(count)
            np.maximum.at(first, owners[own], np.where(levels[own] == 1, gains[own], 0.0))
            drafts = np.array([number for number, draft in enumerate(of_all) if draft[-1] == kind])
            self._weights[drafts] = each.weights(first[drafts])
            if len(kinds) > 1:
                self._weights[drafts] *= shares_of_kinds[kind] * count / len(drafts)
        order = np.argsort(-gains, kind="stable")
        gains, levels, widths = gains[order], levels[order], widths[order]
        self._order = gains, levels, widths, owners[order], is_drawn[order]
        # Requests that may not have a level have no nodes there.
        shares = load.shares(self.max_depth)
        weights = (shares / max(shares[0], 1e-9))[levels - 1] / count
        weights *= self._weights[self._order[3]]
        growth: dict[int, tuple[float, ...]] = {}
        integers, floats = np.zeros(0, np.int64), np.zeros(0)
        parts: list[tuple[NDArray[Any], ...]]
        parts = [(integers, integers, floats, floats, floats, integers)]
        for width in self.widths:
            of_width = self._nodes_of(self.max_depth, width)
            of_levels = np.bincount(
                levels[of_width] - 1,
                gains[of_width] * self._weights[self._order[3][of_width]],
                minlength=self.max_depth,
            )
            grows = (of_levels[1:] / np.maximum(of_levels[:-1], 1e-9)).clip(0.0, 1.0)
            for depth in range(1, int((shares > 0).sum()) + 1):
                if depth == 1 and width > self.widths[0]:
                    continue  # Only what is expanded is of a width.
                among = self._nodes_of(depth, width)
                if not len(among):
                    continue
                growth[width] = tuple(grows.tolist())
                nodes, expected = np.cumsum(weights[among]), np.cumsum((weights * gains)[among])
                # A few points of the curve are enough, and cheaper to price.
                step = -(-len(among) // POINTS)
                kept = np.arange(step - 1, len(among), step)
                columns = (depth, width, nodes[kept], expected[kept], expected[-1], kept + 1)
                parts.append(tuple(np.broadcast_to(each, kept.shape) for each in columns))
        self._expected = _Expected(growth, *map(np.concatenate, zip(*parts, strict=True)))

    def _nodes_of(self, depth: int, width: int) -> NDArray[np.int64]:
        """[n] places in `_order` of the nodes that trees of a depth and a width have."""
        _, levels, widths, *_ = self._order
        return np.flatnonzero((levels <= depth) & (widths <= width))

    def _error_of_tokens(self, among: NDArray[np.int64], share: float) -> float:
        """Standard error of the log of the tokens of a step, for the nodes at `among` [n] of
        `_order`: by how much drafts differ, and by how much acceptance does."""
        gains, levels, _, owners, is_drawn = self._order
        count = len(self._weights)
        each = np.bincount(owners[among], weights=gains[among], minlength=count)
        shares = self._weights / count
        mean = float(shares @ each)
        variance = float(shares**2 @ (each - mean) ** 2)
        for kind, known in self._kinds.items():
            if known.online is None:
                continue
            own = among[is_drawn[among] == (kind == "drawn")]
            expected = gains[own] * shares[owners[own]]
            of_levels = np.bincount(levels[own] - 1, weights=expected)
            errors = np.array(known.errors())[: len(of_levels)]
            variance += float(((of_levels * errors) ** 2).sum())
        return share * math.sqrt(variance) / (1 + share * mean)
