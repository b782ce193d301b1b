# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The paper's cost model: flat up to K_max rows, linear beyond (ECHO, arXiv 2604.09603).

`T(rows) = base * (1 + gamma * max(0, rows - k_max))`. Policy `echo` needs k_max as its budget;
`auto` uses the measured curve itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from echo_vllm.forecast.curve import CostCurve, CostError

AFFORDABLE = 1.25
"""How much longer than the smallest forward one may take that fills the budget of a curve without
a flat part."""

FLAT_ROWS = 8
"""Rows below which a hinge has no flat part to speak of: one tree does not fit there."""


@dataclass(frozen=True)
class Hinge:
    """A fitted hinge.

    Attributes:
        k_max: rows up to which a forward takes no longer than one row.
        gamma: growth a row beyond k_max, as a share of `base`.
        base: seconds at and below k_max.
        error: root mean square of the relative error at the curve's points; 0 for a given hinge.
    """

    k_max: float
    gamma: float
    base: float
    error: float = 0.0

    @overload
    def __call__(self, rows: float) -> float: ...
    @overload
    def __call__(self, rows: NDArray[Any]) -> NDArray[np.float64]: ...
    def __call__(self, rows: float | NDArray[Any]) -> float | NDArray[np.float64]:
        """Seconds for `rows`."""
        if isinstance(rows, np.ndarray):
            return self.base * (1.0 + self.gamma * np.maximum(0.0, rows - self.k_max))
        return self.base * (1.0 + self.gamma * max(0.0, rows - self.k_max))

    def to_curve(self) -> CostCurve:
        """The same function as a CostCurve (from 1 row on, or from k_max if that is less)."""
        first = min(1.0, self.k_max)
        counts = sorted({first, self.k_max, self.k_max + 1.0})
        return CostCurve(tuple(counts), tuple(self(count) for count in counts))


def fit_hinge(curve: CostCurve) -> Hinge:
    """The hinge with the least sum of squared relative errors at the curve's points.

    The search is exact. For each gap between neighbouring points the best hinge that bends inside
    it is either the one whose two branches, fitted apart, meet there, or it bends at a point; both
    are tried, and the best of all wins, the smallest k_max first.

    A curve that never rises has gamma 0 and the last count as k_max: as far as was measured, rows
    are free. A curve of one point is such a curve.

    Raises:
        CostError: the curve has a point of 0 seconds, for which no relative error exists.
    """
    x, y = np.asarray(curve.counts), np.asarray(curve.seconds)
    if y[0] <= 0:
        raise CostError(
            f"a hinge needs seconds above 0 at every point, got 0 at count {x[0]:g}; measure "
            "that count again."
        )
    if y[0] == y[-1]:
        return Hinge(k_max=float(x[-1]), gamma=0.0, base=float(y[0]))
    # From here on there are at least two points.
    candidates = set(x[:-1].tolist())
    for i in range(1, len(x) - 1):
        # Left of the gap x[i - 1] .. x[i] flat, right of it a line of its own.
        flat = _solve(np.ones((i, 1)), y[:i])[0]
        offset, slope = _solve(np.column_stack([np.ones(len(x) - i), x[i:]]), y[i:])
        if slope > 0 and x[i - 1] < (bend := (flat - offset) / slope) < x[i]:
            candidates.add(float(bend))
    best: Hinge | None = None
    for k_max in sorted(candidates):
        base, rise = _solve(np.column_stack([np.ones_like(x), np.maximum(0.0, x - k_max)]), y)
        if base <= 0 or rise < 0:
            continue
        error = float(np.sqrt(np.mean(((base + rise * np.maximum(0.0, x - k_max)) / y - 1) ** 2)))
        if best is None or error < best.error:
            best = Hinge(k_max=k_max, gamma=float(rise / base), base=float(base), error=error)
    if best is None:  # steep and bent: no hinge with a positive base is a least-squares solution
        best = Hinge(
            k_max=float(x[0]),
            gamma=float((y[-1] / y[0] - 1) / (x[-1] - x[0])),
            base=float(y[0]),
        )
        error = float(np.sqrt(np.mean((best(x) / y - 1) ** 2)))
        best = Hinge(best.k_max, best.gamma, best.base, error)
    return best


def budget_rows(curve: CostCurve) -> float:
    """Rows that a forward should not exceed, roots and prompts included: the hinge's k_max.

    A curve that is concave, or rises from the first row on, has its best hinge at or near its
    first point, which would leave no room for one tree. There the budget ends where a forward
    takes `AFFORDABLE` times as long as the smallest.

    Raises:
        CostError: as `fit_hinge`.
    """
    k_max = fit_hinge(curve).k_max
    if k_max >= FLAT_ROWS:
        return k_max
    rows = np.arange(curve.counts[0], curve.counts[-1] + 1.0)
    affordable = rows[curve(rows) <= AFFORDABLE * curve.seconds[0]]
    return max(k_max, float(affordable[-1]))


def _solve(columns: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares of the relative errors: (columns @ result) / y is close to 1."""
    solution, *_ = np.linalg.lstsq(columns / y[:, None], np.ones_like(y), rcond=None)
    return solution.astype(np.float64)
