# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Where the drafter's level forwards find their rows and keep their keys and values.

Made once, for the largest batch there can be, so that every level of every drafting is at the same
addresses: that is what a CUDA graph keeps, and memory that the paged cache cannot take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from echo_vllm.policies import DraftPolicy
from echo_vllm.step.attention.tree import DraftScratch, TreeAttention, num_mask_words
from echo_vllm.step.frontier import LevelRows, level_capacity


class LevelBuffers:
    """One level of A requests at a time, W rows each, n = A * W.

    Args:
        policy: whose trees grow.
        layers: of the drafter's attention, by name, with their `num_kv_heads` and `head_size`.
        max_reqs: of a batch.
        hidden_size, dtype: of what a row takes as hidden state.

    Attributes:
        token_ids, positions: [most rows] int32 and int64.
        hidden: [most rows, hidden].
        output, features: [most rows, hidden], where graphs leave what the drafter's head reads and
            what the next level reads.
        scratch: keys and values of all levels of a drafting, and a row for those of padding.
    """

    def __init__(
        self,
        policy: DraftPolicy,
        layers: Mapping[str, Any],
        *,
        max_reqs: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def zeros(*shape: int, of: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=of, device=device)

        capacity = level_capacity(policy)
        rows = max_reqs * (policy.max_frontier if policy.max_depth > 1 else 1)
        self.token_ids = zeros(rows)
        self.positions = zeros(rows, of=torch.int64)
        self.hidden = zeros(rows, hidden_size, of=dtype)
        self.output, self.features = torch.zeros_like(self.hidden), torch.zeros_like(self.hidden)
        self._mask = zeros(rows, num_mask_words(capacity), of=torch.int64)
        self._scratch_rows = zeros(rows, of=torch.int64)
        self._row_start = zeros(max_reqs + 1)
        self._counted = torch.arange(max_reqs + 1, dtype=torch.int32, device=device)
        self._context_lens = zeros(max_reqs)
        self._suffix_start = zeros(max_reqs)
        self._suffix_len = zeros(max_reqs)
        self._block_tables: list[torch.Tensor] = []
        self.scratch = DraftScratch(max_reqs * capacity + 1)
        for name, layer in layers.items():
            shape = self.scratch.num_rows, layer.num_kv_heads, layer.head_size
            self.scratch.layers[name] = zeros(*shape, of=dtype), zeros(*shape, of=dtype)

    def fit(self, block_tables: Sequence[torch.Tensor]) -> None:
        """Make room for tables like these, [max_reqs, max blocks] int32 of each cache group."""
        self._block_tables = [torch.zeros_like(table) for table in block_tables]

    def hold_requests(
        self, context_lens: torch.Tensor, block_tables: Sequence[torch.Tensor]
    ) -> None:
        """The A requests of the levels that come: [A] int32, and [A, max blocks] int32 of each
        cache group."""
        count = len(context_lens)
        self._context_lens[:count].copy_(context_lens)
        for held, table in zip(self._block_tables, block_tables, strict=True):
            held[:count].copy_(table)

    def hold(self, level: LevelRows, token_ids: torch.Tensor, positions: torch.Tensor) -> None:
        """A level of `token_ids` [A, W], at `positions` [A], which all rows of a request have."""
        count, width = token_ids.shape
        n = count * width
        self.token_ids[:n].view(count, width).copy_(token_ids)
        self.positions[:n].view(count, width).copy_(positions.unsqueeze(1))
        self.hidden[:n].view(count, width, -1).copy_(level.hidden)
        self._mask[:n].view(count, width, -1).copy_(level.seen)
        self._scratch_rows[:n].view(count, width).copy_(level.first_rows.unsqueeze(1) + level.slots)
        torch.mul(self._counted[: count + 1], width, out=self._row_start[: count + 1])
        self._suffix_start[:count].copy_(level.first_rows)
        self._suffix_len[:count].fill_(level.num_slots)

    def pad(self, count: int, padded: int, width: int) -> None:
        """Let the level of `count` requests with `width` rows be one of `padded` requests: the
        others see nothing, and their keys go to the last row of the scratch."""
        self._context_lens[count:padded].zero_()
        self._suffix_len[count:padded].zero_()
        self._scratch_rows[count * width : padded * width].fill_(self.scratch.num_rows - 1)
        bounds = slice(count + 1, padded + 1)
        torch.mul(self._counted[bounds], width, out=self._row_start[bounds])

    def keep(self, output: torch.Tensor, features: torch.Tensor) -> None:
        """What a level gave, [n, hidden] both."""
        self.output[: len(output)].copy_(output)
        self.features[: len(features)].copy_(features)

    def attention(self, group: int, count: int, width: int) -> TreeAttention:
        """For the layers of a cache group: the level of `count` requests that is held."""
        n = count * width
        return TreeAttention(
            block_table=self._block_tables[group][:count],
            context_lens=self._context_lens[:count],
            query_start=self._row_start[:count],
            row_start=self._row_start[: count + 1],
            suffix_start=self._suffix_start[:count],
            suffix_len=self._suffix_len[:count],
            mask=self._mask[:n],
            positions=self.positions[:n],
            scratch=self.scratch,
            scratch_rows=self._scratch_rows[:n],
        )
