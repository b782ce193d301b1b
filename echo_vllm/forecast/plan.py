# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What is known and what was decided before a drafting, in one process for all ranks.

In every step the scheduler says what comes next (`Load`), and its policy makes a `DraftPlan` of
that; the model runner and the worker's policy follow it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo_vllm.forecast.step_cost import StepCost

AHEAD = (0, 4, 8, 16, 32, 64, 128, 256)
"""Tokens from now at which the load is forecast. Beyond the last one nothing is: it is the horizon
in which catching up must pay for itself."""


@dataclass(frozen=True)
class Load:
    """What the scheduler knows of the step that will verify the next drafts.

    Attributes:
        num_decoding: requests that it will decode.
        prefill_tokens: prompt tokens expected in it.
        waiting: tokens that the drafter has to catch up with if it drafts now, and need not if it
            rests.
        num_reading: requests whose prompts are being read.
        num_drafting: of those that decode, how many may have a tree of at least 1, 2, ... levels: a
            grammar, a thinking budget or the end of the answer leaves less. The last number stands
            for deeper trees too; empty where all may have any tree.
        num_sampled: of those that decode, how many have a temperature and yet the drafter's best
            tokens as candidates, which are accepted less often then.
        num_drawn: of those that may have a tree, how many have drawn candidates.
        ahead: requests that decode once each of today's has made `AHEAD` tokens more, but for the
            last of these; empty for a load that stays.
    """

    num_decoding: int
    prefill_tokens: int = 0
    waiting: int = 0
    num_reading: int = 0
    num_drafting: tuple[int, ...] = ()
    num_sampled: int = 0
    num_drawn: int = 0
    ahead: tuple[float, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of the step without any draft."""
        return self.num_decoding + self.prefill_tokens

    @property
    def able(self) -> int:
        """Requests that may have a tree at all."""
        return self.num_drafting[0] if self.num_drafting else self.num_decoding

    @property
    def sampled_share(self) -> float:
        """`num_sampled` of those that decode and have no drawn candidates."""
        others = self.num_decoding - self.num_drawn
        return self.num_sampled / others if others else 0.0

    @property
    def drawn_share(self) -> float:
        """`num_drawn` of those that may have a tree."""
        return self.num_drawn / self.able if self.able else 0.0

    @property
    def steps_ahead(self) -> float:
        """Tokens that a request will still make on average, up to the horizon."""
        if not self.ahead or not self.num_decoding:
            return AHEAD[-1]
        loads = np.minimum(self.ahead, self.num_decoding)
        return float((loads * np.diff(AHEAD)).sum()) / self.num_decoding

    def shares(self, max_depth: int) -> NDArray[np.float64]:
        """[max_depth], of the requests that decode those that may have a tree of d levels."""
        if not self.num_drafting or not self.num_decoding:
            return np.ones(max_depth)
        last = len(self.num_drafting) - 1
        counts = [self.num_drafting[min(depth, last)] for depth in range(max_depth)]
        return np.array(counts) / self.num_decoding


@dataclass(frozen=True)
class DraftPlan:
    """What was decided before a drafting, in one place for all ranks.

    Attributes:
        max_depth: levels that an ordinary request may have; None leaves it to the policy, 0 means
            that only probes draft.
        probes: how many requests draft to the policy's full depth, whatever `max_depth` says.
        turn: which requests these are: it counts the draftings with probes, so that they go round.
        prefill_tokens: prompt tokens expected in the forward that will verify this draft.
        max_rows: rows up to which a target forward may be filled (`forecast.budget_rows`),
            None if unknown.
        price: what a second is worth, in tokens; 0 if unknown.
        cost: predicted times of forwards, None if unknown.
        factors: per depth, accepted over predicted acceptance lately; empty if unknown.
        growth: per depth, how often its nodes are followed by an accepted one; empty if unknown.
        nodes: nodes that a request which drafts is expected to have; 0 if unknown.
        least_worth: accepted tokens that a slot of drawn candidates must be expected to add.
        drawn_factors: `factors`, of drawn candidates.
        reads_prompts: whether prompts pass the drafter as they are read, so that their requests
            draft from the whole of them; where it rests, they do not.
        width: nodes of a request that the drafter expands of a level; None leaves it to the policy.
            Where there are probes nobody has less than the policy's.
    """

    max_depth: int | None = None
    probes: int = 0
    turn: int = 0
    prefill_tokens: int = 0
    max_rows: float | None = None
    price: float = 0.0
    cost: StepCost | None = None
    factors: tuple[float, ...] = ()
    reads_prompts: bool = True
    growth: tuple[float, ...] = ()
    width: int | None = None
    nodes: float = 0.0
    least_worth: float = 0.0
    drawn_factors: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` undoes it."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__ if name != "cost"},
            "factors": list(self.factors),
            "growth": list(self.growth),
            "drawn_factors": list(self.drawn_factors),
            "cost": self.cost.to_dict() if self.cost else None,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DraftPlan:
        cost = values["cost"]
        return cls(
            **{
                **values,
                "factors": tuple(values["factors"]),
                "growth": tuple(values.get("growth", ())),
                "drawn_factors": tuple(values.get("drawn_factors", ())),
                "cost": StepCost.from_dict(cost) if cost else None,
            }
        )

    def probed(self, num_requests: int) -> list[int]:
        """Which of the batch's `num_requests` requests are probes."""
        count = min(self.probes, num_requests)
        return sorted((self.turn * count + i) % num_requests for i in range(count))
