# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`StepCost`: what one decoding step takes, with and without trees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from echo_vllm.forecast.curve import CostCurve, CostError


@dataclass(frozen=True)
class StepCost:
    """The parts of a step, each a function of what it works on.

    On Model Runner V2 the drafter's first forward runs over the target's rows in every step but a
    rest, and is part of `verify`; `catch_up` is what drafting begins with, over the requests that
    draft.

    Attributes:
        verify: target forward, sampling and commit, over rows (roots, nodes, prefill tokens).
        draft_level: one drafter level, over its rows (the frontier nodes of all requests).
        catch_up: the drafter's first forward, over the tokens committed since the last one.
        other: seconds that a step spends outside of these (scheduler, output).
        draft_fixed: seconds of a drafting that its forwards do not explain (choosing the nodes,
            making the forest).
    """

    verify: CostCurve
    draft_level: CostCurve
    catch_up: CostCurve
    other: float = 0.0
    draft_fixed: float = 0.0

    def __post_init__(self) -> None:
        for seconds in (self.other, self.draft_fixed):
            if not (0.0 <= seconds < float("inf")):
                raise CostError(
                    f"the seconds outside of the forwards must be finite and >= 0, got {seconds}; "
                    "measure again."
                )

    @overload
    def plain_step(self, requests: float, prefill: float = 0) -> float: ...
    @overload
    def plain_step(self, requests: NDArray[Any], prefill: float = 0) -> NDArray[np.float64]: ...
    def plain_step(
        self, requests: float | NDArray[Any], prefill: float = 0
    ) -> float | NDArray[np.float64]:
        """Seconds of a step of plain decoding: no nodes, and the drafter does not run.

        Args:
            requests: requests that decode, one row each.
            prefill: prefill tokens in the same forward.
        """
        return self.verify(requests + prefill) + self.other

    def draft(self, levels: Sequence[float], committed: float) -> float:
        """Seconds of drafting.

        Args:
            levels: rows of each level behind the catch-up forward; a level without rows is free.
            committed: tokens of the catch-up forward; 0: nothing is drafted.
        """
        seconds = self.catch_up(committed) + self.draft_fixed if committed > 0 else 0.0
        level = self.draft_level
        return seconds + sum(level(rows) for rows in levels if rows > 0)

    @overload
    def step(self, rows: float, levels: Sequence[float], committed: float) -> float: ...
    @overload
    def step(
        self, rows: NDArray[Any], levels: Sequence[float], committed: float
    ) -> NDArray[np.float64]: ...
    def step(
        self, rows: float | NDArray[Any], levels: Sequence[float], committed: float
    ) -> float | NDArray[np.float64]:
        """Seconds of a step with trees.

        Args:
            rows: rows of the target forward; an array asks for many at once.
            levels, committed: as in `draft`.
        """
        return self.verify(rows) + (self.draft(levels, committed) + self.other)

    def scaled(self, factor: float) -> StepCost:
        """The cost of a machine on which everything takes `factor` times as long."""
        return StepCost(
            verify=self.verify.scaled(factor),
            draft_level=self.draft_level.scaled(factor),
            catch_up=self.catch_up.scaled(factor),
            other=self.other * factor,
            draft_fixed=self.draft_fixed * factor,
        )

    def to_dict(self) -> dict[str, Any]:
        """Numbers and lists only."""
        return {
            "verify": self.verify.to_dict(),
            "draft_level": self.draft_level.to_dict(),
            "catch_up": self.catch_up.to_dict(),
            "other": self.other,
            "draft_fixed": self.draft_fixed,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The cost that `to_dict` wrote.

        Raises:
            CostError: it is not one.
        """
        try:
            return cls(
                verify=CostCurve.from_dict(data["verify"]),
                draft_level=CostCurve.from_dict(data["draft_level"]),
                catch_up=CostCurve.from_dict(data["catch_up"]),
                other=float(data["other"]),
                draft_fixed=float(data.get("draft_fixed", 0.0)),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CostError):
                raise
            raise CostError(
                "a step cost is an object with the curves verify, draft_level and catch_up and "
                f"the number other, got {data!r:.80}; measure it again."
            ) from None


UNMEASURED = 0.02
"""Standard error of a proportion between forwards as start-up measures it, where no step has said
how true it is; of its logarithm, as all errors here."""


@dataclass(frozen=True)
class Costs:
    """What steps cost now: the same number of rows takes longer where some of them are trees.

    Attributes:
        plain: of steps without trees.
        trees: of steps with trees.
        errors: by octave of rows, the standard error of a target forward's time.
        contrast_error: of what steps with trees take beyond their parts.
        draft_error: of a drafting's time.
        confirmed: octaves of rows of which steps have shown that a target forward does not take
            much less than start-up measured.
        draft_confirmed: whether draftings have shown the same.
    """

    plain: StepCost
    trees: StepCost
    errors: Mapping[int, float] = field(default_factory=dict, compare=False)
    contrast_error: float = UNMEASURED
    draft_error: float = UNMEASURED
    confirmed: frozenset[int] = field(default_factory=frozenset, compare=False)
    draft_confirmed: bool = field(default=False, compare=False)

    def error(self, plain_rows: float, rows: float, draft_share: float) -> float:
        """Standard error of how much longer a step with trees takes than one without.

        Args:
            plain_rows, rows: of the two target forwards.
            draft_share: of the step with trees, the share of time that is drafting.
        """
        octaves = {math.frexp(plain_rows)[1], math.frexp(rows)[1]}
        squares = self.contrast_error**2 + (draft_share * self.draft_error) ** 2
        if len(octaves) == 2:  # One octave is corrected as a whole.
            squares += sum(self.errors.get(octave, UNMEASURED) ** 2 for octave in octaves)
        return math.sqrt(squares)

    @classmethod
    def of(cls, cost: StepCost) -> Self:
        """Both alike, as before anything was observed."""
        return cls(cost, cost)

    def is_known(self, rows: float) -> bool:
        """Whether steps have shown what drafting takes, and a target forward of about so many
        rows."""
        error = self.errors.get(math.frexp(rows)[1], UNMEASURED)
        return max(error, self.draft_error) < UNMEASURED

    def is_confirmed(self, rows: float) -> bool:
        """Whether neither drafting nor a target forward of at least about half as many rows can be
        believed to take much less than was measured."""
        return self.draft_confirmed and max(self.confirmed, default=0) >= math.frexp(rows)[1] - 1

    def doubted(self, rows: float, factor: float) -> Self:
        """The same if drafting, and what a target forward takes beyond one of `rows` rows, were
        measured `factor` times too long."""
        return replace(self, trees=_doubted(self.trees, rows, factor))


def _doubted(cost: StepCost, rows: float, factor: float) -> StepCost:
    return StepCost(
        verify=cost.verify.shrunk(factor, above=float(cost.verify(rows))),
        draft_level=cost.draft_level.shrunk(factor),
        catch_up=cost.catch_up.shrunk(factor),
        other=cost.other,
        draft_fixed=cost.draft_fixed / factor,
    )
