# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What one step reports about its trees, from the worker to the front end.

Plain lists of integers: they cross process borders inside vLLM's own output and stats objects.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from echo_vllm.trees.forest import DraftForest


@dataclass
class StepStats:
    """Per verified tree of a step, in the order of the batch; empty trees are left out.

    Attributes:
        nodes: verified nodes of each tree.
        depths: depth of each tree.
        widths: the most nodes that one level of each tree has.
        accepted: accepted draft tokens of each tree.
        rows: rows of the target's forward.
        verify_s, draft_s, idle_s: see `StepClock`.
        committed, level_rows: see `DraftReport`; of the drafting at the end of this step, if its
            time is known.
        starved: requests that were drafted for at the end of this step and got no node.
        waiting: tokens in the drafter's backlog.
        report: what the worker's policy tells the scheduler's (`DraftPolicy.report`).
        cost: the measured cost of steps (`StepCost.to_dict()`), in the first report only.
    """

    nodes: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    rows: int = 0
    verify_s: float = 0.0
    draft_s: float = 0.0
    idle_s: float = 0.0
    committed: int = 0
    level_rows: list[int] = field(default_factory=list)
    starved: int = 0
    waiting: int = 0
    report: dict[str, Any] | None = None
    cost: dict[str, Any] | None = None

    @classmethod
    def of(cls, forest: DraftForest, num_accepted: Sequence[int]) -> StepStats:
        """The stats of a verified forest; `num_accepted` has one entry a request."""
        stats = cls()
        cu = forest.cu_nodes.tolist()
        for i, (start, stop) in enumerate(itertools.pairwise(cu)):
            if start == stop:
                continue
            levels = torch.bincount(forest.depths[start:stop])
            stats.nodes.append(stop - start)
            stats.depths.append(len(levels) - 1)
            stats.widths.append(int(levels.max()))
            stats.accepted.append(int(num_accepted[i]))
        return stats

    def to_dict(self) -> dict[str, Any]:
        """The form that crosses process borders; `StepStats(**d)` undoes it."""
        return asdict(self)
