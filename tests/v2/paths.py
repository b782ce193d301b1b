# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Penalties and bad words along the paths of trees: to the bit what vLLM's own kernels say of each
path alone, as a chain."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm.v1.worker.cpu.shm  # noqa: F401  (the pretended streams)
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsContext,
    LogitsProcRequestState,
)
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.states import RequestState

from echo_vllm import ops
from echo_vllm.step.v2.paths import AlongPaths, PathBadWords, PathPenalties, Paths
from echo_vllm.step.v2.state import ScheduledTrees

VOCAB, DEPTH = 9, 5
CPU = torch.device("cpu")
PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": 0.3},
    {},
    {"repetition_penalty": 0.8, "frequency_penalty": -0.4},
]
LONG_WORDS = [[a, b, (a + b) % VOCAB] for a in range(VOCAB) for b in (1, 2, 6)]
BAD_WORDS = [[[3, 4], [5]], [[7, 1, 0, 4], *LONG_WORDS], [], [[6, 6, 6, 6], *LONG_WORDS]]


class Case:
    """A batch of requests that have said something, each with a tree."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        count = len(PENALTIES)
        states = RequestState(count + 2, 64, 64, 16, VOCAB, CPU)
        view = LogitsProcRequestState.from_request_state(states)
        none: Any = None
        self.penalties, self.bad_words = PenaltiesState(none, view), BadWordsState(none, view)
        slots = []
        for name in range(count):
            said = [draw.randrange(VOCAB) for _ in range(draw.randrange(2, 12))]
            # Of a request that was preempted what it said comes behind its prompt.
            states.add_request(str(name), draw.randrange(1, len(said)), said, 0, 32)
            slots.append(states.req_id_to_index[str(name)])
            params = SamplingParams(**PENALTIES[name])
            params._bad_words_token_ids = BAD_WORDS[name]
            for processor in (self.penalties, self.bad_words):
                processor.add_request(slots[-1], params)
        states.apply_staged_writes()
        self.penalties.apply_staged_writes()
        self.bad_words.apply_staged_writes()

        parents, depths, tokens, bounds, self.chains = [], [], [], [0], []
        for slot in slots:
            own: list[int] = []
            paths = [[int(states.all_token_ids.gpu[slot, states.total_len.gpu[slot] - 1])]]
            for node in range(draw.choice([0, 1, 9, 12, 15])):
                parent = draw.choice([k for k in range(-1, node) if k < 0 or own[k] < DEPTH])
                token = draw.randrange(VOCAB)
                own.append(1 + (0 if parent < 0 else own[parent]))
                parents.append(parent)
                tokens.append(token)
                paths.append([*paths[parent + 1], token])
            depths += own
            bounds.append(bounds[-1] + len(own))
            self.chains += [(slot, path) for path in paths]
        self.slots = torch.tensor(slots)
        self.cu_nodes = torch.tensor(bounds, dtype=torch.int32)
        sizes = self.cu_nodes.diff() + 1
        self.local = torch.cat([torch.arange(int(size), dtype=torch.int32) for size in sizes])
        input_ids = torch.tensor([path[-1] for _, path in self.chains], dtype=torch.int32)
        rows = torch.arange(len(input_ids))
        batch: Any = SimpleNamespace(
            expanded_local_pos=self.local, input_ids=input_ids, logits_indices=rows
        )
        self.paths = Paths(
            ScheduledTrees(
                num_trees=count,
                token_ids=torch.tensor(tokens),
                parents=torch.tensor(parents, dtype=torch.int32),
                depths=torch.tensor(depths, dtype=torch.int32),
                path_logprobs=torch.zeros(len(tokens)),
                cu_nodes=self.cu_nodes,
            ),
            batch,
            DEPTH,
        )
        self.logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed))
        self.context = self._context(self.slots.repeat_interleave(sizes), input_ids, self.local)

    def _context(
        self, slot_of_row: torch.Tensor, input_ids: torch.Tensor, local: torch.Tensor
    ) -> LogitsContext:
        return LogitsContext(
            expanded_idx_mapping=slot_of_row.to(torch.int32),
            idx_mapping=self.slots,
            idx_mapping_np=self.slots.numpy(),
            expanded_local_pos=local,
            input_ids=input_ids,
            pos=local.to(torch.int64),
            seq_lens_upper_bound_np=np.zeros(len(self.slots), np.int32),
        )

    def as_chains(self, processor: Any) -> torch.Tensor:
        """What vLLM's processor makes of the last row of every path."""
        found = []
        for logits, (slot, path) in zip(self.logits, self.chains, strict=True):
            n = len(path)
            context = self._context(
                torch.full((n,), slot),
                torch.tensor(path, dtype=torch.int32),
                torch.arange(n, dtype=torch.int32),
            )
            found.append(processor.apply(logits.repeat(n, 1), context)[-1])
        return torch.stack(found)


@pytest.mark.parametrize("kind", [PathPenalties, PathBadWords])
def test_what_a_row_looks_back_at_is_its_path(kind: type[AlongPaths]) -> None:
    num_edited = num_otherwise = 0
    for seed in range(5):
        case = Case(seed)
        ours = kind(case.penalties if kind is PathPenalties else case.bad_words)
        ours.paths = case.paths
        edited = ours.apply(case.logits.clone(), case.context)
        assert torch.equal(edited, case.as_chains(ours.stock))
        num_edited += not torch.equal(edited, case.logits)
        # As vLLM has it, with a request's rows for one chain.
        ours.paths = None
        num_otherwise += not torch.equal(ours.apply(case.logits.clone(), case.context), edited)
    assert num_edited == 5
    assert num_otherwise > 1


def test_depths_are_those_of_the_mask() -> None:
    case = Case(5)
    _, depths = ops.build_super_tree(case.paths._trees.parents, case.cu_nodes, 1)
    assert torch.equal(case.paths.depths, depths)
