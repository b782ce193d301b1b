# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What a trace is told of a step on Model Runner V2: all of it comes to the host a step later, with
whatever else a step leaves to learn (`outputs.py`), and in the order of the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.worker.gpu.async_utils import async_copy_to_np
from vllm.v1.worker.gpu.input_batch import InputBatch

from echo_vllm.policies import DraftBatch
from echo_vllm.step.tracing import TraceRecorder
from echo_vllm.step.v1.drafter import DraftReport
from echo_vllm.step.v2.state import ScheduledTrees
from echo_vllm.trees.drawn import DrawnPool
from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.pool import CandidatePool
from echo_vllm.trees.ranked import RankedTrees


@dataclass(frozen=True)
class TracedDrafting:
    """The candidates of a drafting, on the device.

    Attributes:
        req_ids: of the R requests, those with drawn candidates first.
        context_lens: [R] int32, tokens of each before the root of its tree.
        batch: what the policy was told.
        trees: of the R requests.
        drawn, best: the candidates of each kind.
    """

    req_ids: list[str]
    context_lens: torch.Tensor
    batch: DraftBatch
    trees: RankedTrees
    drawn: DrawnPool | None
    best: CandidatePool | None


@dataclass(frozen=True)
class _Slots:
    """What a trace asks of a `DrawnPool`, on the host."""

    scores: torch.Tensor
    parents: torch.Tensor
    level_starts: list[int]

    def candidates(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.scores, self.parents


@dataclass
class TraceNotes:
    """What one step leaves for a trace.

    Args:
        recorder: that is told.
        batch: of the step.
        trees: that it verified, if any.
        drafting: at its end, if there was one.
        rewritten: requests whose trees are not what was drafted, and are left out.
    """

    recorder: TraceRecorder
    batch: InputBatch
    trees: ScheduledTrees | None
    drafting: TracedDrafting | None
    rewritten: Sequence[str]
    _here: list[NDArray[Any]] = field(default_factory=list)

    def copy(self) -> None:
        """Begin to copy to the host, on the stream that is the current one."""
        self._req_ids, self._rows = list(self.batch.req_ids), self.batch.num_tokens
        others = self.batch.num_scheduled_tokens
        if self.batch.num_draft_tokens_per_req is not None:
            others = others - self.batch.num_draft_tokens_per_req
        # One row alone may also be the end of a prompt.
        self._decoding = int((others == 1).sum())
        # Kept, as the copies read them on another stream.
        self._there: list[torch.Tensor] = []
        if self.trees is not None:
            assert self.trees.accepted_rows is not None
            self._there += [self.trees.cu_nodes, self.trees.accepted_rows]
        if (drafting := self.drafting) is not None:
            self._there += [drafting.context_lens, drafting.trees.sizes, drafting.trees.columns]
            for pool in (drafting.drawn, drafting.best):
                if pool is not None:
                    self._there += [pool.path_logprobs, pool.parents]
        self._here = [async_copy_to_np(values) for values in self._there]

    def record(self, verify_s: float, draft_s: float, level_rows: Sequence[int]) -> None:
        """Tell the recorder, once the copies are there."""
        here = iter(torch.from_numpy(values) for values in self._here)
        num_reqs = len(self._req_ids)
        forest, accepted = DraftForest.empty(num_reqs), np.zeros((num_reqs, 1), np.int32)
        if self.trees is not None:
            forest, accepted = _of_sizes(next(here)), next(here).numpy()
        for req_id in self.rewritten:
            self.recorder.forget(req_id)
        self.recorder.verified(
            self._req_ids,
            forest,
            accepted,
            (accepted >= 0).sum(1) - 1,
            rows=self._rows,
            decoding=self._decoding,
        )
        self.recorder.write(verify_s)
        if (drafting := self.drafting) is None:
            return
        context_lens, sizes, columns = next(here), next(here), next(here)
        bounds = torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
        is_node = torch.arange(columns.shape[1]) < sizes.unsqueeze(1)
        report = DraftReport(level_rows=list(level_rows))
        report.forest = _of_sizes(bounds, columns[is_node])
        if (drawn := drafting.drawn) is not None:
            slots: Any = _Slots(next(here), next(here), drawn.level_starts)
            report.drawn_pool, report.drawn_places = slots, torch.arange(len(slots.scores))
        if (best := drafting.best) is not None:
            scores, parents = next(here), next(here)
            active = torch.arange(len(scores))
            report.pool = CandidatePool(parents, parents, scores, best.level_starts, active)
        self.recorder.drafted(
            drafting.req_ids, context_lens.tolist(), report, drafting.batch, draft_s
        )


def _of_sizes(cu_nodes: torch.Tensor, columns: torch.Tensor | None = None) -> DraftForest:
    """A forest of which nothing is known but how many nodes its trees have, and their columns."""
    nothing = torch.zeros(int(cu_nodes[-1]), dtype=torch.int32)
    return DraftForest(nothing, nothing, nothing, nothing.float(), cu_nodes, columns)
