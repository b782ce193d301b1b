# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`CostCurve`: seconds as a function of a count of rows, monotone and piecewise linear, or a step
function as far as CUDA graphs pad.

More rows never take less time on any machine worth modelling; where measurements say so it is
noise, and isotonic regression takes it out. A curve is asked several times in every step, so one
call is a look-up and nothing else.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

FAR = 1e9
"""Rows behind the last point up to which a curve extrapolates; it is constant beyond."""


class CostError(ValueError):
    """What is wrong with a cost, as one sentence."""


@dataclass(frozen=True)
class CostCurve:
    """Seconds over a count; equal curves have equal points.

    Between two points the curve is linear, below the first it is constant, above the last it goes
    on with the last slope. With `padded_to`, a count up to the last of these sizes costs what the
    next size does: the forward runs in the CUDA graph of that size.

    Attributes:
        counts: strictly rising, >= 0; at least one.
        seconds: one a count, finite, >= 0, never falling.
        padded_to: strictly rising, > 0; empty where nothing pads.
    """

    counts: tuple[float, ...]
    seconds: tuple[float, ...]
    padded_to: tuple[float, ...] = ()
    # The same with a far point at the end, so that a look-up also extrapolates.
    _x: NDArray[np.float64] = field(init=False, repr=False, compare=False)
    _y: NDArray[np.float64] = field(init=False, repr=False, compare=False)
    _far: tuple[float, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        x, y = np.asarray(self.counts, np.float64), np.asarray(self.seconds, np.float64)
        if x.ndim != 1 or x.shape != y.shape or not len(x):
            raise CostError(
                f"a cost curve needs one number of seconds for each count, got {x.size} counts "
                f"and {y.size} seconds; give at least one point."
            )
        if not (np.isfinite(x).all() and np.isfinite(y).all() and x[0] >= 0 and y[0] >= 0):
            raise CostError(
                f"counts and seconds of a cost curve must be finite and >= 0, got counts "
                f"{x.tolist()} and seconds {y.tolist()}; measure again."
            )
        if (np.diff(x) <= 0).any() or (np.diff(y) < 0).any():
            raise CostError(
                f"counts of a cost curve must rise and its seconds must not fall, got counts "
                f"{x.tolist()} and seconds {y.tolist()}; build it with CostCurve.from_points."
            )
        sizes = np.asarray(self.padded_to, np.float64)
        if len(sizes) and not (sizes[0] > 0 and (np.diff(sizes) > 0).all()):
            raise CostError(
                f"the sizes that a cost curve pads to must rise from above 0, got {sizes.tolist()};"
                " sort them."
            )
        self._set(x, y, tuple(sizes.tolist()))

    def _set(
        self, x: NDArray[np.float64], y: NDArray[np.float64], padded_to: tuple[float, ...]
    ) -> None:
        n = len(x)
        far_x, far_y = np.empty(n + 1), np.empty(n + 1)
        far_x[:n], far_y[:n] = x, y
        slope = (y[-1] - y[-2]) / (x[-1] - x[-2]) if n > 1 else 0.0
        far_x[n], far_y[n] = x[-1] + FAR, y[-1] + slope * FAR
        set_field = object.__setattr__
        set_field(self, "counts", tuple(x.tolist()))
        set_field(self, "seconds", tuple(y.tolist()))
        set_field(self, "padded_to", padded_to)
        set_field(self, "_x", far_x)
        set_field(self, "_y", far_y)
        set_field(self, "_far", (float(far_x[n]), float(far_y[n])))

    @classmethod
    def from_valid(
        cls,
        counts: NDArray[np.float64],
        seconds: NDArray[np.float64],
        padded_to: tuple[float, ...] = (),
    ) -> Self:
        """A curve of arrays that are known to be one: no check, for the hot path."""
        curve = cls.__new__(cls)
        curve._set(counts, seconds, padded_to)
        return curve

    def scaled(self, factor: float) -> Self:
        """`factor` times the seconds; `factor` > 0."""
        x, y = np.array(self.counts), np.array(self.seconds)
        return self.from_valid(x, factor * y, self.padded_to)

    def shrunk(self, factor: float, above: float = 0.0) -> Self:
        """What lies above `above` seconds divided by `factor` >= 1."""
        x, y = np.array(self.counts), np.array(self.seconds)
        return self.from_valid(x, y - np.maximum(0.0, y - above) * (1 - 1 / factor), self.padded_to)

    @classmethod
    def from_points(
        cls,
        counts: ArrayLike,
        seconds: ArrayLike,
        weights: ArrayLike | None = None,
        padded_to: Sequence[float] = (),
    ) -> Self:
        """The monotone curve closest to measured points, in weighted least squares.

        Points of the same count are averaged. Points that are monotone already are kept exactly.

        Args:
            counts: [n] rows, in any order.
            seconds: [n] what they took; medians of repeated measurements, if there are any.
            weights: [n] > 0, all 1 without.
            padded_to: as of the class.

        Raises:
            CostError: the shapes differ, nothing is given, or a number is not finite or negative.
        """
        x = np.atleast_1d(np.asarray(counts, np.float64))
        y = np.atleast_1d(np.asarray(seconds, np.float64))
        w = np.ones_like(y) if weights is None else np.asarray(weights, np.float64)
        if x.ndim != 1 or x.shape != y.shape or w.shape != y.shape:
            raise CostError(
                f"counts, seconds and weights must have one length, got shapes {x.shape}, "
                f"{y.shape} and {w.shape}; give one of each a point."
            )
        if not (np.isfinite(w).all() and (w > 0).all()):
            raise CostError(f"weights must be finite and > 0, got {w.tolist()}; drop the point.")
        unique, inverse = np.unique(x, return_inverse=True)
        total = np.bincount(inverse, weights=w)
        if len(unique) == len(x):
            mean = np.empty_like(y)
            mean[inverse] = y  # exact: no weight is multiplied in and divided out
        else:
            mean = np.bincount(inverse, weights=w * y) / total
        if (np.diff(mean) < 0).any() and np.isfinite(mean).all():
            from scipy.optimize import isotonic_regression

            mean = np.maximum.accumulate(isotonic_regression(mean, weights=total).x)
        return cls(tuple(unique.tolist()), tuple(mean.tolist()), tuple(padded_to))

    @overload
    def __call__(self, count: float) -> float: ...
    @overload
    def __call__(self, count: NDArray[Any]) -> NDArray[np.float64]: ...
    def __call__(self, count: float | NDArray[Any]) -> float | NDArray[np.float64]:
        """Seconds for `count` rows: a float for a number, an array of its shape for an array."""
        sizes = self.padded_to
        if isinstance(count, np.ndarray):
            if sizes:
                place = np.searchsorted(sizes, count)
                count = np.where(count <= sizes[-1], np.take(sizes, place, mode="clip"), count)
            seconds: NDArray[np.float64] = np.interp(count, self._x, self._y)
            return seconds
        if sizes:
            count = self.padded(count)
        x, y = self.counts, self.seconds
        i = bisect_right(x, count)
        if i == 0:
            return y[0]
        x0, y0 = x[i - 1], y[i - 1]
        x1, y1 = (x[i], y[i]) if i < len(x) else self._far
        return (y1 - y0) / (x1 - x0) * (min(count, x1) - x0) + y0

    def padded(self, count: float) -> float:
        """The rows that a forward of `count` rows runs with."""
        sizes = self.padded_to
        return sizes[bisect_left(sizes, count)] if sizes and count <= sizes[-1] else count

    def to_points(self) -> tuple[list[float], list[float]]:
        """(counts, seconds) as lists."""
        return list(self.counts), list(self.seconds)

    def to_dict(self) -> dict[str, list[float]]:
        return {
            "counts": list(self.counts),
            "seconds": list(self.seconds),
            "padded_to": list(self.padded_to),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Sequence[float]]) -> Self:
        """The curve that `to_dict` wrote.

        Raises:
            CostError: it is not one.
        """
        try:
            return cls(
                tuple(data["counts"]), tuple(data["seconds"]), tuple(data.get("padded_to", ()))
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CostError):
                raise
            raise CostError(
                f"a cost curve is an object of two lists, counts and seconds, got {data!r:.80}; "
                "measure it again."
            ) from None
