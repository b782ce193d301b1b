# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`OnlineCost`: a measured StepCost, kept true by the times of real steps.

Start-up measures forwards alone, on an idle machine, with short contexts. Real steps differ: other
processes, long contexts, heat. Each real time is compared with its prediction; the logarithm of
the ratio goes into a bin of its count (one bin an octave), the bin's median is its correction.
A median ignores the steps in which something else took the processor, up to half of them.

A machine that is shared, or hot, is slower for a while whatever it works on. That says nothing
about the proportions between forwards, on which decisions depend, and a correction that was
learned in a slow minute would be wrong in a fast one. So a pace, shared by all curves, follows
the last few steps, and what the curves learn is what is left after it. Steps with trees and
without teach the same curve; what steps with trees take beyond that is one more factor
(`Contrast`). Two curves, each taught by its own steps, would differ wherever one of them has seen
nothing yet.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Self

import numpy as np

from echo_vllm.forecast.curve import CostCurve
from echo_vllm.forecast.step_cost import UNMEASURED, Costs, StepCost

WINDOW = 64
"""Observations that a bin remembers."""

PACE_WINDOW = 16
"""Steps whose median is the pace: fewer than a bin remembers, so that bins see several paces."""

PRIOR = 3.0
"""Observations that the start-up measurement counts for in a bin."""

REACH = 3.0
"""Octaves outside of what was observed in which a correction fades to its half."""

FEW = 8
"""Observations below which nothing is said of a fixed part."""

DIFFERENT = 1.25
"""Ratio of long to short predictions above which they say how seconds grow with them."""

STEEPEST = 2.0
"""Limit of that growth: seconds a predicted second, and its inverse."""

REFRESH = 48
"""Observations of a curve after which it is worked out again, at the latest."""


CONFIRMS = 4
"""Observations that can confirm what was measured."""

CLOSE = 1.25
"""Times as much as what is observed may be what was measured, if it is to be confirmed."""


NEAR, FEWEST_NEAR = 16, 3
"""Steps on either side of a change between kinds of steps that `Contrast` compares, at most and at
least."""

CHANGES = 16
"""Changes that it remembers."""

USUAL_CONTRAST = 0.08
"""Standard deviation of a contrast of which nothing is known."""

STEP_NOISE, DRIFT = 0.05, 0.04
"""Of the logarithm of a step's time the least standard deviation, and that of a machine's pace from
one side of a change to the other."""

FADES = 512
"""Steps after which a change counts half."""


class RunningMedian:
    """The median of the last `window` numbers.

    Attributes:
        seen: how many numbers there were in all.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self.seen = 0
        self._window = window
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, number: float) -> None:
        self.seen += 1
        if len(self._recent) == self._window:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(number)
        insort(self._sorted, number)

    def median(self) -> float:
        """Raises IndexError while there is no number."""
        middle = len(self._sorted) // 2
        if len(self._sorted) % 2:
            return self._sorted[middle]
        return (self._sorted[middle - 1] + self._sorted[middle]) / 2

    @property
    def confirms(self) -> bool:
        """Of logarithms of ratios: whether they are not much below 0."""
        return self.seen >= CONFIRMS and self.median() > -math.log(CLOSE)

    def error(self) -> float:
        """Standard error of the median, of numbers that are as spread as their middle half says;
        inf while there are too few."""
        count = len(self._sorted)
        if count < FEW:
            return math.inf
        middle_half = self._sorted[3 * count // 4] - self._sorted[count // 4]
        return 1.25 * middle_half / 1.35 / math.sqrt(count)


class CurveCorrection:
    """What observations say about one curve, as a factor over the count.

    Attributes:
        pending: observations since `corrected` was last called.
    """

    def __init__(self, curve: CostCurve) -> None:
        self.pending = 0
        self._curve = curve
        self._seen = 0
        # octave -> (medians of log2 of the count, of the log of the ratio)
        self._bins: dict[int, tuple[RunningMedian, RunningMedian]] = {}
        # The corrected curve bends where the measured one does, and where something was observed.
        # Points far behind keep the last slope from being that of two neighbours.
        last = curve.counts[-1]
        self._points = np.array([*curve.counts, *curve.padded_to, 2 * last + 1, 4 * last + 3])

    @property
    def is_due(self) -> bool:
        """Whether `corrected` has news: often at first, later every REFRESH observations."""
        return self.pending > 0 and self.pending >= min(REFRESH, self._seen // 4)

    def observe(self, count: float, log_ratio: float) -> None:
        place = math.log2(self._curve.padded(count))
        octave = math.floor(place)
        if octave not in self._bins:
            self._bins[octave] = (RunningMedian(), RunningMedian())
        places, ratios = self._bins[octave]
        places.add(place)
        ratios.add(log_ratio)
        self._seen += 1
        self.pending += 1

    def seen(self, count: float) -> int:
        """Observations in the bin of a count."""
        octave = math.floor(math.log2(self._curve.padded(count)))
        return self._bins[octave][1].seen if octave in self._bins else 0

    def errors(self) -> dict[int, float]:
        """By octave of the count (as `math.frexp` has it), the standard error of the curve."""
        return {octave + 1: _error(ratios) for octave, (_, ratios) in self._bins.items()}

    def confirmed(self) -> frozenset[int]:
        """Octaves, as of `errors`, where the curve is not much too high."""
        return frozenset(o + 1 for o, (_, ratios) in self._bins.items() if ratios.confirms)

    def corrected(self) -> CostCurve:
        """The curve times the factor, monotone again."""
        self.pending = 0
        if not self._bins:
            return self._curve
        observed = [self._bins[octave] for octave in sorted(self._bins)]
        places = np.array([place.median() for place, _ in observed])
        logs = np.array([r.median() * r.seen / (r.seen + PRIOR) for _, r in observed])
        counts = np.concatenate([self._points, np.exp2(places)])
        counts.sort()
        counts = counts[np.concatenate([[True], counts[1:] > counts[:-1]])]
        at = np.log2(np.maximum(counts, 2.0**-20))
        outside = np.maximum(0.0, np.maximum(places[0] - at, at - places[-1]))
        log_factor = np.interp(at, places, logs) * np.exp2(-outside / REACH)
        seconds = self._curve(counts) * np.exp(log_factor)
        # Monotone again; where the faded part and the observed disagree, the observed is right.
        first = int(np.searchsorted(at, places[0]))
        seconds[: first + 1] = np.minimum.accumulate(seconds[first::-1])[::-1]
        seconds = np.maximum.accumulate(seconds)
        return CostCurve.from_valid(counts, seconds, self._curve.padded_to)


class FixedPart:
    """What observations take beyond what grows with their predictions, in seconds.

    The intercept of a resistant line through the last WINDOW pairs of prediction and time: its
    slope is that between the medians of the lowest and the highest third. Where all predictions
    are alike, the slope is 1: what was measured at start-up is believed, and the rest is fixed.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._pending = 0

    def observe(self, predicted: float, seconds: float) -> None:
        self._recent.append((predicted, seconds))
        self._pending += 1
        if self._pending >= FEW:
            self._pending = 0
            self.seconds = self._intercept()

    def _intercept(self) -> float:
        pairs = np.array(sorted(self._recent))
        third = max(1, len(pairs) // 3)
        low, high = np.median(pairs[:third], axis=0), np.median(pairs[-third:], axis=0)
        slope = 1.0
        if high[0] > DIFFERENT * low[0]:
            slope = float((high[1] - low[1]) / (high[0] - low[0]))
            slope = min(max(slope, 1 / STEEPEST), STEEPEST)
        intercept = float(np.median(pairs[:, 1] - slope * pairs[:, 0]))
        return max(0.0, intercept) * len(pairs) / (len(pairs) + PRIOR)


@dataclass(frozen=True)
class Step:
    """A step that was timed.

    Attributes:
        rows: of the target forward.
        level_rows: of each level of the drafting.
        committed: tokens of its catch-up forward; 0: nothing was drafted.
        seconds: of all of it.
    """

    rows: int
    level_rows: tuple[int, ...]
    committed: int
    seconds: float

    def log_ratio(self, cost: StepCost) -> float:
        """Of the time to what `cost` says; NaN where there is no such thing."""
        return _log_ratio(self.seconds, cost.step(self.rows, self.level_rows, self.committed))


@dataclass(frozen=True)
class _Side:
    """Of the steps on one side of a change the middle one, and the variance of its log ratio."""

    step: Step
    variance: float

    @classmethod
    def of(cls, run: Sequence[tuple[float, Step]]) -> Self | None:
        """None of too few steps, as log ratio and step."""
        if len(run) < FEWEST_NEAR:
            return None
        ordered = sorted(run, key=itemgetter(0))
        count = len(ordered)
        middle_half = ordered[3 * count // 4][0] - ordered[count // 4][0]
        spread = max(STEP_NOISE, middle_half / 1.35)
        return cls(ordered[count // 2][1], (1.25 * spread) ** 2 / count)


class Contrast:
    """How much longer steps with trees take, over what is predicted, than plain ones do.

    Caches, allocators and processors do differently in a row of plain steps and in a row of steps
    with trees, whatever their rows. That is a contrast of steps that are near each other in time:
    in two different minutes the machine may be another. So it is looked for where one kind of steps
    follows the other, and each such change is one observation d_i of it, however many steps there
    are on its sides: with the variance v_i of that, w_i = 2^(-age / FADES) / v_i, their sum W and a
    prior of variance u, the contrast is W / (W + 1 / u) times the weighted median of the d_i, and
    its variance 1 / (W + 1 / u).
    Predictions are those of now: what the curves have learnt since is no contrast any more.
    """

    def __init__(self) -> None:
        self._step = 0
        self._trees = False
        self._run: deque[tuple[float, Step]] = deque(maxlen=NEAR)
        self._before: _Side | None = None
        # Step of the change; the sides without and with trees.
        self._changes: deque[tuple[int, _Side, _Side]] = deque(maxlen=CHANGES)

    def observe(self, step: Step, log_ratio: float, *, trees: bool) -> None:
        """A step of a kind took exp(log_ratio) times what is predicted for it."""
        self._step += 1
        if trees != self._trees:
            self._compare()
            self._before, self._trees = _Side.of(self._run), trees
            self._run.clear()
        self._run.append((log_ratio, step))
        if len(self._run) == NEAR:
            self._compare()

    def _compare(self) -> None:
        """The present run with the one before it, once."""
        after = _Side.of(self._run)
        if self._before is None or after is None:
            return
        plain, trees = (self._before, after) if self._trees else (after, self._before)
        self._changes.append((self._step, plain, trees))
        self._before = None

    def found(self, plain: StepCost, trees: StepCost) -> tuple[float, float]:
        """By how much the log of what steps with trees are predicted to take is too low, and the
        standard error of that.

        Args:
            plain, trees: what predicts both kinds of steps.
        """
        found: list[tuple[float, float]] = []
        for step, without, with_ in self._changes:
            difference = with_.step.log_ratio(trees) - without.step.log_ratio(plain)
            if math.isfinite(difference):
                # Each run of steps is a side of two changes.
                variance = 2 * (without.variance + with_.variance) + DRIFT**2
                found.append((difference, 2 ** ((step - self._step) / FADES) / variance))
        if not found:
            return 0.0, USUAL_CONTRAST
        differences, weights = np.array(sorted(found)).T
        middle = float(
            np.interp(0.5, (weights.cumsum() - weights / 2) / weights.sum(), differences)
        )
        # Where they differ by more than their variances say, a change says less.
        apart = float(np.median(np.abs(differences - middle) * np.sqrt(weights))) / 0.67
        total = float(weights.sum()) / max(1.0, apart**2)
        prior = 1 / USUAL_CONTRAST**2
        return middle * total / (total + prior), 1 / math.sqrt(total + prior)


class OnlineCost:
    """A StepCost that learns from real steps. Not thread-safe.

    What it predicts is what steps cost at a pace of 1, the pace of the start-up measurement;
    `pace` says how much longer everything takes at the moment.

    Corrections are factors: where nothing was observed within REACH octaves they fade to 1, and
    with few observations they are closer to 1 (PRIOR). A drafting time is one number for several
    forwards and for what the policy does: what is fixed of it is told apart (`FixedPart`), because
    it must not make one level more seem dear, and the ratio of the rest corrects the levels and the
    catch-up forward alike.

    The result depends on timing: where several processes must decide alike, one of them owns the
    OnlineCost and sends `current().to_dict()` to the others.
    """

    def __init__(self, base: StepCost) -> None:
        self.base = base
        self.pace = 1.0
        self._paces = RunningMedian(PACE_WINDOW)
        self._verify = CurveCorrection(base.verify)
        self._draft_level = CurveCorrection(base.draft_level)
        self._catch_up = CurveCorrection(base.catch_up)
        self._contrast = Contrast()
        # Of draftings, beyond what they are thought to take.
        self._draft_beyond = RunningMedian()
        # The same, beyond what start-up measured.
        self._draft_ratios = RunningMedian()
        # Of steps without and with trees.
        self._other = (RunningMedian(), RunningMedian())
        self._draft_fixed = FixedPart()
        self._current = base
        self._costs: Costs | None = None

    def observe_verify(self, rows: int, seconds: float) -> None:
        """A target forward of `rows` rows took `seconds` (with sampling and commit)."""
        ratio = _log_ratio(seconds / self.pace, self.base.verify(rows))
        if math.isnan(ratio) or rows <= 0:
            return
        now = math.log(self._current.verify(rows) / self.base.verify(rows))
        self._verify.observe(rows, ratio)
        self._paces.add(math.log(self.pace) + ratio - now)
        self.pace = math.exp(self._paces.median())

    def observe_draft(self, level_rows: Sequence[int], committed: int, seconds: float) -> None:
        """Drafting took `seconds`: a catch-up over `committed` tokens and these levels."""
        predicted = self.base.draft(level_rows, committed)
        if math.isnan(_log_ratio(seconds, predicted)):
            return
        taken = seconds / self.pace
        self._draft_ratios.add(math.log(taken / predicted))
        self._draft_beyond.add(math.log(taken / self._current.draft(level_rows, committed)))
        self._draft_fixed.observe(predicted, taken)
        # Never all of it: the fixed part is a median, and some draftings take less.
        taken = max(taken - self._draft_fixed.seconds, taken / 8)
        ratio = math.log(taken / predicted)
        if committed > 0:
            self._catch_up.observe(committed, ratio)
        # Once an octave, however many levels it has.
        for rows in {rows.bit_length(): rows for rows in level_rows if rows > 0}.values():
            self._draft_level.observe(rows, ratio)

    def observe_other(self, seconds: float, *, trees: bool = False) -> None:
        """A step spent `seconds` outside of target and drafter."""
        if math.isfinite(seconds) and seconds >= 0:
            self._other[trees].add(seconds / self.pace)

    def observe_step(
        self, rows: int, level_rows: Sequence[int], committed: int, seconds: float, *, trees: bool
    ) -> None:
        """A whole step took `seconds`: a target forward of `rows` rows, a drafting if `committed`
        is not 0 (see `observe_draft`), and the time in between."""
        if rows <= 0 or self._verify.seen(rows) < FEW:
            return  # The curve has yet to learn, which is no matter of kinds.
        step = Step(rows, tuple(level_rows), committed, seconds)
        ratio = step.log_ratio(self._trees if trees else self._current)
        if math.isfinite(ratio):
            self._contrast.observe(step, ratio, trees=trees)

    def _other_of(self, trees: bool) -> float:
        """Seconds outside of target and drafter. A kind of which little was seen is believed to be
        like the other one."""
        seconds = self.base.other
        for seen in (self._other[not trees], self._other[trees]):
            if seen.seen:
                seconds += (seen.median() - seconds) * seen.seen / (seen.seen + PRIOR)
        return seconds

    @property
    def _trees(self) -> StepCost:
        """Of steps with trees, by their parts."""
        return replace(self._current, other=self._other_of(True))

    def costs(self) -> Costs:
        """Of steps with and without trees, as known now; the same object until enough new steps
        were observed."""
        now = self.current()
        if self._costs is None or self._costs.plain is not now:
            trees = self._trees
            contrast, contrast_error = self._contrast.found(now, trees)
            self._costs = Costs(
                plain=now,
                trees=trees.scaled(math.exp(contrast)),
                errors=self._verify.errors(),
                contrast_error=contrast_error,
                draft_error=_error(self._draft_beyond),
                confirmed=self._verify.confirmed(),
                draft_confirmed=self._draft_ratios.confirms,
            )
        return self._costs

    def current(self) -> StepCost:
        """The cost of steps without trees, as known now; the same object until enough new steps
        were observed.

        One call works out one curve at most, so that no step pays for all of them.
        """
        now = self._current
        if self._verify.is_due:
            now = replace(now, verify=self._verify.corrected())
        elif self._draft_level.is_due:
            now = replace(now, draft_level=self._draft_level.corrected())
        elif self._catch_up.is_due:
            now = replace(now, catch_up=self._catch_up.corrected())
        else:
            return now
        now = replace(now, other=self._other_of(False), draft_fixed=self._draft_fixed.seconds)
        self._current = now
        return now


def _error(ratios: RunningMedian) -> float:
    """Standard error of a correction: that of start-up, until enough was observed."""
    believed = UNMEASURED * PRIOR / (ratios.seen + PRIOR)
    return min(UNMEASURED, math.hypot(ratios.error(), believed))


def _log_ratio(seconds: float, predicted: float) -> float:
    """log(seconds / predicted), or NaN where there is no such thing."""
    if not (0 < seconds < math.inf and predicted > 0):
        return math.nan
    return math.log(seconds / predicted)
