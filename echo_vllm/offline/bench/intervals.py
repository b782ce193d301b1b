# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What measured values are worth: a middle and its 95 % interval, by scipy's bootstrap.

Two configurations are compared by pairs: runs of the same prompts close in time, whose ratio is
free of whatever makes one time differ from another. The middle of ratios is their geometric mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A middle value between `low` and `high`, of `count` values; with one value there is no more.

    In a table "0.97 [0.95, 0.99]": the middle is 0.97, and if the values had been drawn anew, 95 of
    100 intervals made like this one would hold what the middle estimates.
    """

    middle: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.middle:.2f}"
        return f"{self.middle:.2f} [{self.low:.2f}, {self.high:.2f}]"


def median(values: Sequence[float]) -> Interval:
    """Of values that are not compared with others.

    Raises:
        ValueError: there is none.
    """
    return bootstrapped([values], lambda drawn, axis: np.median(drawn, axis=axis))


def ratio(*groups: Sequence[float]) -> Interval:
    """Geometric mean of ratios of pairs, each group with the same weight.

    Args:
        groups: ratios; several groups are of several loads, and are drawn from one by one.

    Raises:
        ValueError: there is no ratio, or a group without one.
    """

    def mean(*drawn: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        means: NDArray[np.float64] = np.mean([np.mean(d, axis=axis) for d in drawn], axis=0)
        return means

    logs = bootstrapped([np.log(group) for group in groups], mean)
    low, middle, high = np.exp([logs.low, logs.middle, logs.high]).tolist()
    return Interval(middle, low, high, logs.count)


def bootstrapped(
    groups: Sequence[Sequence[float] | NDArray[np.float64]],
    statistic: Callable[..., Any],
    paired: bool = False,
) -> Interval:
    """A statistic of groups of values, and its interval.

    Args:
        groups: values; drawn from one by one, or together if they are `paired`.
        statistic: of the groups along `axis`.
        paired: whether value i of each group belongs to value i of the others.

    Raises:
        ValueError: a group is empty.
    """
    from scipy.stats import bootstrap

    samples = [np.asarray(group, dtype=np.float64) for group in groups]
    if not samples or not all(map(len, samples)):
        raise ValueError("no values")
    middle = float(statistic(*samples, axis=-1))
    count = min(map(len, samples))
    if count < 2:
        return Interval(middle, middle, middle, count)
    found = bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        vectorized=True,
        paired=paired,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(middle, float(found.low), float(found.high), count)
