# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the rows of a drafter level read and see, while the trees of a batch grow.

A level's rows are the nodes that are expanded, W a request. Each takes the hidden state of the row
that it hangs under and sees that row's ancestors and itself; its keys and values go to a scratch
buffer. `Frontier` carries this from level to level, for whatever chose the nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from echo_vllm.policies import DraftPolicy
from echo_vllm.step.attention.tree import (
    MASK_WORD_BITS,
    DraftScratch,
    TreeAttention,
    num_mask_words,
)
from echo_vllm.transfer import upload

ALL = slice(None)


@dataclass(frozen=True)
class LevelRows:
    """One level of A requests, W rows each.

    Attributes:
        hidden: [A, W, hidden], what each row takes as hidden state.
        seen: [A, W, words] int64, which scratch rows of its request each row sees, as bits.
        first_rows: [A] int64, where each request's scratch rows begin.
        slots: [W] int64, where among these this level goes.
        num_slots: how many of a request's scratch rows are filled then.
        scratch: the buffer.
    """

    hidden: torch.Tensor
    seen: torch.Tensor
    first_rows: torch.Tensor
    slots: torch.Tensor
    num_slots: int
    scratch: DraftScratch

    def attention(
        self,
        *,
        block_table: torch.Tensor,
        context_lens: torch.Tensor,
        positions: torch.Tensor,
        part: slice = ALL,
    ) -> TreeAttention:
        """For the requests `part` of the level.

        Args:
            block_table: [A, max blocks] int32.
            context_lens: [A] int32, tokens in the drafter's paged cache that are seen.
            positions: [rows of the part] int64.
            part: which of the A requests.
        """
        first_rows, seen = self.first_rows[part], self.seen[part]
        count, width = seen.shape[:2]
        row_start = torch.arange(count + 1, dtype=torch.int32, device=seen.device) * width
        return TreeAttention(
            block_table=block_table[part],
            context_lens=context_lens[part],
            query_start=row_start[:-1],
            row_start=row_start,
            suffix_start=first_rows.to(torch.int32),
            suffix_len=torch.full_like(row_start[1:], self.num_slots),
            mask=seen.reshape(count * width, -1),
            positions=positions,
            scratch=self.scratch,
            scratch_rows=(first_rows.unsqueeze(1) + self.slots).flatten(),
        )


def level_capacity(policy: DraftPolicy) -> int:
    """Scratch rows that a request needs for all levels of a tree."""
    return max(1, (policy.max_depth - 1) * policy.max_frontier)


class Frontier:
    """The rows of the last level that ran, from the root on.

    Args:
        features: [R, hidden], what the children of the root take as hidden state.
        policy: whose trees grow.
        scratch: of at least R * `level_capacity` rows; None makes one.
    """

    def __init__(
        self, features: torch.Tensor, policy: DraftPolicy, scratch: DraftScratch | None = None
    ) -> None:
        num_requests, device = len(features), features.device
        capacity = level_capacity(policy)
        self._scratch = scratch or DraftScratch(num_requests * capacity)
        self._requests = torch.arange(num_requests)
        self._first_rows = torch.arange(num_requests, device=device) * capacity
        words = num_mask_words(capacity)
        self._seen = torch.zeros(num_requests, 1, words, dtype=torch.int64, device=device)
        self._hidden = features.unsqueeze(1)
        self._used = 0

    @property
    def width(self) -> int:
        """W of the last level; 1 for the root."""
        return self._seen.shape[1]

    def keep(self, requests: torch.Tensor) -> None:
        """Only `requests` [A] go on, ascending, on the host, out of those that are left."""
        if len(requests) == len(self._requests):
            return
        kept = upload(torch.searchsorted(self._requests, requests), self._seen.device)
        self._seen, self._hidden = self._seen[kept], self._hidden[kept]
        self._first_rows, self._requests = self._first_rows[kept], requests

    def advance(self, under: torch.Tensor) -> LevelRows:
        """The next level, whose rows hang under the rows `under` [A, W] int64 of the last one."""
        width, (words, hidden_size) = under.shape[1], (self._seen.shape[2], self._hidden.shape[2])
        slots = torch.arange(self._used, self._used + width, device=under.device)
        self._used += width
        seen = self._seen.gather(1, under.unsqueeze(2).expand(-1, -1, words))
        bits = torch.ones_like(slots) << slots % MASK_WORD_BITS
        seen[:, slots - slots[0], slots // MASK_WORD_BITS] |= bits
        hidden = self._hidden.gather(1, under.unsqueeze(2).expand(-1, -1, hidden_size))
        self._seen = seen
        return LevelRows(hidden, seen, self._first_rows, slots, self._used, self._scratch)

    def ran(self, features: torch.Tensor) -> None:
        """The level's forward gave `features` [A * W, hidden] to what hangs under it."""
        self._hidden = features.view(*self._seen.shape[:2], -1)
