# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What one step reports about its trees, from the worker to the front end.

Plain lists of integers: they cross process borders inside vLLM's own output and stats objects.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo_vllm.trees.forest import DraftForest


@dataclass
class StepStats:
    """Per verified tree of a step, in the order of the batch; empty trees are left out.

    Attributes:
        nodes: verified nodes of each tree.
        depths: depth of each tree.
        widths: the most nodes that one level of each tree has.
        accepted: accepted draft tokens of each tree. The scheduler leaves those out that lie behind
            a stop or a limit, and the trees of requests that ended meanwhile.
        budget: nodes that these trees could have had at most, together; the scheduler knows it.
        rows: rows of the target's forward.
        verify_s, draft_s, idle_s: see `StepClock`.
        committed, level_rows: see `DraftReport`; of the drafting at the end of this step, if its
            time is known.
        starved: requests that were drafted for at the end of this step and got no node.
        waiting: tokens that would pass the drafter if every request caught up now.
        beyond_head: requests of the batch that are too long for the head.
        report, sampled_report, drawn_report: what the worker's policy tells the scheduler's
            (`DraftPolicy.report`, `report_drawn`); see `Observation`.
        cost: the measured cost of steps (`StepCost.to_dict()`), in the first report only.
        rested: whether the step was vLLM's own: nothing was verified, and nothing drafted.
        predicted_s: what the policy thought the step would take, of `spent_s`; 0 if it has no idea.
        spent_s: verify_s, draft_s, and idle_s where requests did not lack.
        expected: per depth, nodes that the calibration thought would be accepted; empty if unknown.
        plan_depth: levels that the latest plan allows, None where the policy is free.
        plan_price, plan_rows: see `DraftPlan`; 0 if unknown.
    """

    nodes: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    budget: int = 0
    rows: int = 0
    verify_s: float = 0.0
    draft_s: float = 0.0
    idle_s: float = 0.0
    committed: int = 0
    level_rows: list[int] = field(default_factory=list)
    starved: int = 0
    waiting: int = 0
    beyond_head: int = 0
    report: dict[str, Any] | None = None
    sampled_report: dict[str, Any] | None = None
    drawn_report: dict[str, Any] | None = None
    cost: dict[str, Any] | None = None
    rested: bool = False
    predicted_s: float = 0.0
    spent_s: float = 0.0
    expected: list[float] = field(default_factory=list)
    plan_depth: int | None = None
    plan_price: float = 0.0
    plan_rows: float = 0.0

    @classmethod
    def of(cls, forest: DraftForest, num_accepted: NDArray[np.int32]) -> StepStats:
        """The stats of a verified forest; `num_accepted` is [R]."""
        sizes = forest.cu_nodes.diff().numpy()
        trees = np.flatnonzero(sizes)
        depths, owner = forest.depths.numpy(), forest.request_of_node().numpy()
        num_levels = 1 + int(depths.max())
        levels = np.bincount(owner * num_levels + depths, minlength=len(sizes) * num_levels)
        widths = levels.reshape(-1, num_levels)[trees]
        return cls(
            nodes=sizes[trees].tolist(),
            depths=(widths > 0).sum(1).tolist(),
            widths=widths.max(1).tolist(),
            accepted=num_accepted[trees].tolist(),
        )

    def to_dict(self) -> dict[str, Any]:
        """The form that crosses process borders; `StepStats(**d)` undoes it."""
        return vars(self).copy()
