# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What vLLM's sampler asks of a row's past, for rows that stand in trees: penalties and bad words.

vLLM takes the drafts before a row, in its request's rows, for its past. In a tree the past are the
row's ancestors alone. They are written out once for every row, as tokens, by whoever asks first; a
batch in which nobody has a penalty or a bad word pays nothing. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler

from echo_vllm.ops.triton_kernels.paths import forbid_ends, penalise_paths
from echo_vllm.step.v2.drawn import DrawnSlots
from echo_vllm.step.v2.state import ScheduledTrees, TreeSlots


class Paths:
    """The drafts on the way from its root to each of the L rows that a batch has logits for.

    Args:
        trees: of the batch.
        batch: with rows [root, node 0, node 1, ...] of every request.
        max_depth: D, of the deepest node there can be.
    """

    def __init__(self, trees: ScheduledTrees, batch: InputBatch, max_depth: int) -> None:
        self._trees = trees
        self._batch = batch
        self.max_depth = max_depth

    @cached_property
    def _nodes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[L] bool, which rows are nodes, and [L] int64, which ones; 0 for roots."""
        local = self._batch.expanded_local_pos
        # In front of a row stand as many roots as there are requests up to its own.
        place = torch.arange(len(local), device=local.device) - (local == 0).cumsum(0)
        return local > 0, place.clamp(min=0)

    @cached_property
    def depths(self) -> torch.Tensor:
        """[L] int32, drafts on the way to each row, its own among them; 0 for roots."""
        is_node, nodes = self._nodes
        return torch.where(is_node, self._trees.depths[nodes], 0)

    @cached_property
    def tokens(self) -> torch.Tensor:
        """[L, D] int64: the last `depths` of a row's D are its drafts, its own the last one. What
        stands before these is a token too, so that all of them may be indices."""
        is_node, nodes = self._nodes
        batch = self._batch
        local = batch.expanded_local_pos
        rows = torch.arange(len(local), device=local.device)
        above = torch.where(is_node, rows - local + 1 + self._trees.parents[nodes], rows)
        own = batch.input_ids[batch.logits_indices].to(torch.int64)
        tokens = own.new_empty(len(rows), self.max_depth)
        for column in reversed(range(self.max_depth)):
            tokens[:, column] = own[rows]
            rows = above[rows]
        return tokens


class AlongPaths(LogitsProcessor):
    """Stands before a processor of vLLM's and does its work where rows have paths."""

    stock: Any

    def __init__(self, stock: LogitsProcessor) -> None:
        self.stock = stock
        self.paths: Paths | None = None
        """Of the batch that is sampled, if it has trees."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        edits: bool = self.stock.add_request(req_idx, sampling_params)
        return edits

    def apply_staged_writes(self) -> None:
        self.stock.apply_staged_writes()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        if self.paths is None or not self.is_wanted(ctx.idx_mapping_np):
            edited: torch.Tensor = self.stock.apply(logits, ctx)
            return edited
        self.edit(logits, ctx, self.paths)
        return logits

    def is_wanted(self, slots: NDArray[np.int32]) -> bool:
        """Whether a request in one of `slots` asks for the processor's work."""
        raise NotImplementedError

    def edit(self, logits: torch.Tensor, ctx: LogitsContext, paths: Paths) -> None:
        """Change `logits` [L, vocab] float32 by the path of every row."""
        raise NotImplementedError


class PathPenalties(AlongPaths):
    """Every row is penalised for what its request has said, by vLLM's own kernel. What the tokens
    of its path come to with the path is computed anew, from what they were before."""

    stock: PenaltiesState

    def is_wanted(self, slots: NDArray[np.int32]) -> bool:
        return bool(self.stock.use_penalty[slots].any())

    def edit(self, logits: torch.Tensor, ctx: LogitsContext, paths: Paths) -> None:
        stock, tokens = self.stock, paths.tokens
        before = logits.gather(1, tokens)
        no_drafts = torch.zeros_like(ctx.expanded_local_pos)
        stock.apply(logits, replace(ctx, expanded_local_pos=no_drafts))
        penalise_paths(
            logits,
            before,
            tokens,
            paths.depths,
            ctx.expanded_idx_mapping,
            stock.repetition_penalty.gpu,
            stock.frequency_penalty.gpu,
            stock.presence_penalty.gpu,
            stock.output_bin_counts,
        )


class PathBadWords(AlongPaths):
    """A bad word may begin among what a request has said and end behind a path."""

    stock: BadWordsState

    def is_wanted(self, slots: NDArray[np.int32]) -> bool:
        return bool(self.stock.num_bad_words.np[slots].any())

    def edit(self, logits: torch.Tensor, ctx: LogitsContext, paths: Paths) -> None:
        stock, states = self.stock, self.stock.req_states
        forbid_ends(
            logits,
            paths.tokens,
            paths.depths,
            ctx.expanded_idx_mapping,
            stock.num_bad_words.gpu,
            stock.bad_word_offsets.gpu,
            stock.bad_word_token_ids.gpu,
            states.all_token_ids.gpu,
            states.prompt_len.gpu,
            states.total_len.gpu,
            most_words=int(stock.num_bad_words.np[ctx.idx_mapping_np].max()),
        )


class PathSampler:
    """vLLM's sampler, which samples the rows of trees as well.

    Args:
        sampler: whose processors make way.
        max_depth: of the deepest node there can be.
        slots: of all requests.
        drawn: the same, where candidates are drawn.
    """

    def __init__(
        self, sampler: Sampler, max_depth: int, slots: TreeSlots, drawn: DrawnSlots | None
    ) -> None:
        self.sampler = sampler
        self._max_depth = max_depth
        self._slots, self._drawn = slots, drawn
        ours = {PenaltiesState: PathPenalties, BadWordsState: PathBadWords}
        sampler.logits_processors = [
            ours[type(stock)](stock) if type(stock) in ours else stock
            for stock in sampler.logits_processors
        ]

    def __call__(
        self, logits: torch.Tensor, batch: InputBatch, trees: ScheduledTrees
    ) -> SamplerOutput:
        """Sample every row of `logits` [L, vocab]; see vLLM's `Sampler`."""
        self._go_along(Paths(trees, batch, self._max_depth))
        with self._drawing(batch, trees):
            output: SamplerOutput = self.sampler(logits, batch)
        self._go_along(None)
        return output

    @contextmanager
    def _drawing(self, batch: InputBatch, trees: ScheduledTrees) -> Iterator[None]:
        """The sampler, with recursive rejection where candidates are drawn: behind all that edits
        logits, and before anybody asks for log-probabilities."""
        drawn, sampler = self._drawn, self.sampler
        if drawn is None or not drawn.draws(batch.idx_mapping_np).any():
            yield
            return
        stock = sampler.sample

        def sample(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            sampled, processed = stock(*args, **kwargs)
            return drawn.verified(processed, sampled, batch, trees, self._slots), processed

        # What samples and cuts in one kernel does not say what it has cut.
        with (
            patch.object(sampler, "use_flashinfer", False),
            patch.object(sampler, "use_xpu_sampler", False),
            patch.object(sampler, "sample", sample),
        ):
            yield

    def _go_along(self, paths: Paths | None) -> None:
        for processor in self.sampler.logits_processors:
            if isinstance(processor, AlongPaths):
                processor.paths = paths
