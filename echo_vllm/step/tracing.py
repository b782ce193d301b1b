# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Records every drafting and its verification, if echo.json asks for a trace."""

from __future__ import annotations

import atexit
import datetime
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.version import __version__ as vllm_version

from echo_vllm import __version__
from echo_vllm.policies import DraftBatch
from echo_vllm.step.v1.drafter import DraftReport
from echo_vllm.trace_format import TraceHeader, TraceRequest, TraceStep, TraceWriter
from echo_vllm.trees.forest import ROOT, DraftForest
from echo_vllm.trees.pool import NO_CANDIDATE

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class _Draft:
    """A request's candidates, waiting for their verification."""

    context: int
    parents: list[int]
    logprobs: list[float]
    level_starts: list[int]
    selected: list[int]
    drawn: bool


class TraceRecorder:
    """Writes one trace file; of all ranks, the first one has it."""

    def __init__(self, path: str, header: TraceHeader) -> None:
        self._writer = TraceWriter(path, header)
        if self._writer.kept is not None:
            logger.info("The trace that was there is kept as %s.", self._writer.kept)
        atexit.register(self.close)
        self._drafts: dict[str, _Draft] = {}
        """Of the last drafting, in its order."""
        self._draft_s = 0.0
        self._draft_levels: list[int] = []
        self._plan: dict[str, Any] = {}
        self._step: TraceStep | None = None
        self._num_steps = 0

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> TraceRecorder | None:
        """The recorder that the configuration asks for, if it does."""
        spec = vllm_config.speculative_config
        assert spec is not None
        if spec.echo.trace is None:
            return None
        return cls(
            spec.echo.trace,
            TraceHeader(
                model=Path(vllm_config.model_config.model).name,
                drafter=Path(spec.model).name,
                dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
                num_speculative_tokens=spec.num_speculative_tokens,
                echo=spec.echo.model_dump(mode="json", exclude={"trace"}),
                created=datetime.date.today().isoformat(),
                versions={
                    "vllm": vllm_version,
                    "torch": torch.__version__,
                    "echo-vllm": __version__,
                },
            ),
        )

    def drafted(
        self,
        req_ids: list[str],
        context_lens: list[int],
        report: DraftReport,
        batch: DraftBatch,
        seconds: float,
    ) -> None:
        """Keep what was drafted for `req_ids` in `seconds`, until it is verified.

        `context_lens` are each request's tokens before the root of its tree.
        """
        self._drafts.clear()
        self._draft_s, self._draft_levels = seconds, list(report.level_rows)
        limits = batch.depth_limits
        self._plan = {
            **batch.plan.to_dict(),
            "batch": {
                "num_requests": batch.num_requests,
                "num_decoding": batch.num_decoding,
                "probes": batch.probes.tolist(),
                "depth_limits": None if limits is None else limits.tolist(),
            },
        }
        forest = report.forest
        if forest is None or not forest.num_nodes:
            return
        assert forest.columns is not None
        cu = forest.cu_nodes.tolist()
        drawn = report.drawn_places
        is_best = torch.ones(len(req_ids), dtype=torch.bool)
        is_best[drawn] = False
        kinds = []
        if report.pool is not None:
            pool = report.pool.on_host()
            best = (pool.path_logprobs, pool.parents, pool.level_starts)
            kinds.append((is_best.nonzero().squeeze(1), best, False))
        if report.drawn_pool is not None:
            slots = (*report.drawn_pool.candidates(), report.drawn_pool.level_starts)
            kinds.append((drawn, slots, True))
        for places, (scores, parents, level_starts), is_drawn in kinds:
            for row, i in enumerate(places.tolist()):
                exists = scores[row] > NO_CANDIDATE
                # Index -1, the root, finds the last entry.
                place = torch.cat([exists.cumsum(0) - 1, torch.tensor([ROOT])])
                size = int(exists.sum())
                starts = [int(exists[:start].sum()) for start in level_starts]
                self._drafts[req_ids[i]] = _Draft(
                    context_lens[i] + 1,
                    place[parents[row, exists]].tolist(),
                    scores[row, exists].tolist(),
                    [start for start in starts if start < size],
                    place[forest.columns[cu[i] : cu[i + 1]]].tolist(),
                    is_drawn,
                )

    def verified(
        self,
        req_ids: list[str],
        forest: DraftForest,
        accepted_rows: np.ndarray,
        num_accepted: np.ndarray,
        *,
        rows: int,
        decoding: int,
    ) -> None:
        """The trees of `forest`, one for each of the batch's `req_ids`, were verified.

        Args:
            accepted_rows, num_accepted: as in `Verdict`.
            rows: of the whole forward.
            decoding: requests that decoded in it.
        """
        self._num_steps += 1
        place = {req_id: i for i, req_id in enumerate(req_ids)}
        sizes = forest.cu_nodes.diff().tolist()
        found = []
        for req_id, draft in self._drafts.items():
            if req_id not in place:
                continue
            i = place[req_id]
            path = accepted_rows[i, 1 : int(num_accepted[i]) + 1].tolist()
            found.append(
                TraceRequest(
                    id=req_id,
                    context=draft.context,
                    parents=draft.parents,
                    logprobs=draft.logprobs,
                    level_starts=draft.level_starts,
                    selected=draft.selected[: sizes[i]],
                    accepted=[draft.selected[row - 1] for row in path],
                    drawn=draft.drawn,
                )
            )
        self._drafts.clear()
        if any(request.selected for request in found):
            self._step = TraceStep(
                step=self._num_steps,
                rows=rows,
                decoding=decoding,
                prefill_tokens=rows - forest.num_nodes - decoding,
                verify_s=0.0,
                draft_s=self._draft_s,
                draft_levels=self._draft_levels,
                plan=self._plan,
                requests=found,
            )

    def forget(self, req_id: str) -> None:
        """Leave out a draft of which somebody else decides what is verified."""
        self._drafts.pop(req_id, None)

    def write(self, verify_s: float) -> None:
        """Write the step whose trees were verified, now that its time is known."""
        if self._step is not None:
            self._writer.append(replace(self._step, verify_s=verify_s))
            self._step = None

    def close(self) -> None:
        """End the file; what is recorded later is lost."""
        self._writer.close()
