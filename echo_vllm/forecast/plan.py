# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What is known and what was decided before a drafting, in one process for all ranks.

In every step the scheduler says what comes next (`Load`), and its policy makes a `DraftPlan` of
that; the model runner and the worker's policy follow it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from echo_vllm.forecast.step_cost import StepCost


@dataclass(frozen=True)
class Load:
    """What the scheduler knows of the step that will verify the next drafts.

    Attributes:
        num_decoding: requests that it will decode.
        prefill_tokens: prompt tokens expected in it.
        waiting: tokens that the drafter has to catch up with if it drafts now, and need not if it
            rests.
        left: tokens that a running request may still generate, on average.
        num_reading: requests whose prompts are being read.
    """

    num_decoding: int
    prefill_tokens: int = 0
    waiting: int = 0
    left: float = math.inf
    num_reading: int = 0

    @property
    def rows(self) -> int:
        """Rows of the step without any draft."""
        return self.num_decoding + self.prefill_tokens


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
        reads_prompts: whether prompts pass the drafter as they are read, so that their requests
            draft from the whole of them; where it rests, they do not.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` undoes it."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__ if name != "cost"},
            "factors": list(self.factors),
            "cost": self.cost.to_dict() if self.cost else None,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DraftPlan:
        cost = values["cost"]
        return cls(
            **{
                **values,
                "factors": tuple(values["factors"]),
                "cost": StepCost.from_dict(cost) if cost else None,
            }
        )

    def probed(self, num_requests: int) -> list[int]:
        """Which of the batch's `num_requests` requests are probes."""
        count = min(self.probes, num_requests)
        return sorted((self.turn * count + i) % num_requests for i in range(count))
