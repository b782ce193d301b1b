# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the drafter has not seen yet, and where its cache cannot be trusted.

A request that does not draft in a step skips the drafter altogether. Its committed tokens and
their features wait here, and go through the drafter in one forward before the request drafts
again: no draft is ever made from a cache with holes.

A backlog that is dropped (the request ends, or waits too long) leaves blocks of the paged cache in
which the target's keys are right and the drafter's are not. Prefix caching may hand such a block
to another request, so they are remembered until they are allocated anew; a request that begins
behind one runs without drafts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass
class DrafterInput:
    """Consecutive tokens of one request as the drafter takes them.

    Attributes:
        start: position of the first.
        token_ids: [n] int32, the token AFTER each position.
        features: [n, target features], the target's hidden states at each position.
    """

    start: int
    token_ids: torch.Tensor
    features: torch.Tensor

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


class DrafterBacklog:
    """The backlog of every request of an engine."""

    def __init__(self, limit: int) -> None:
        """Args: limit: tokens of one request that may wait; must fit in one forward."""
        self.limit = max(0, limit)
        self._waiting: dict[str, list[DrafterInput]] = {}
        self._stale_blocks: set[int] = set()
        self._lost: set[str] = set()

    def __len__(self) -> int:
        """Tokens that wait, all requests."""
        return sum(map(self.length, self._waiting))

    @property
    def num_stale_blocks(self) -> int:
        return len(self._stale_blocks)

    def can_draft(self, req_id: str) -> bool:
        """Whether the drafter's cache of the request is whole, or can be made so."""
        return req_id not in self._lost

    def begin(self, req_id: str, cached_blocks: list[int], new_blocks: list[int]) -> None:
        """A request starts, or starts again after preemption.

        Args:
            cached_blocks: blocks that it takes over with their content.
            new_blocks: blocks that were allocated for it to be written.
        """
        self.forget(req_id, None)
        if not self._stale_blocks.isdisjoint(cached_blocks):
            self._lost.add(req_id)
        self._stale_blocks.difference_update(new_blocks)

    def allocate(self, new_blocks: list[int]) -> None:
        """A running request got blocks that will be written."""
        if self._stale_blocks:
            self._stale_blocks.difference_update(new_blocks)

    def put(self, req_id: str, tokens: DrafterInput, blocks: torch.Tensor, block_size: int) -> None:
        """Let `tokens`, which follow what waits already, wait too.

        Args:
            blocks: [n] int32, all blocks of the request.
            block_size: tokens a block.
        """
        if req_id in self._lost:
            self._mark(blocks, block_size, tokens.start, tokens.stop)
            return
        parts = self._waiting.pop(req_id, [])
        parts.append(tokens)
        if tokens.stop - parts[0].start > self.limit:
            self._mark(blocks, block_size, parts[0].start, tokens.stop)
            self._lost.add(req_id)
            return
        self._waiting[req_id] = parts

    def take(self, req_id: str, tokens: DrafterInput) -> DrafterInput:
        """`tokens` with all that waited before them, which then waits no longer."""
        parts = self._waiting.pop(req_id, [])
        if not parts:
            return tokens
        parts.append(tokens)
        assert all(before.stop == after.start for before, after in pairwise(parts))
        return DrafterInput(
            parts[0].start,
            torch.cat([part.token_ids for part in parts]),
            torch.cat([part.features for part in parts]),
        )

    def waits(self, req_id: str) -> bool:
        return req_id in self._waiting

    def length(self, req_id: str) -> int:
        """Tokens of a request that wait."""
        parts = self._waiting.get(req_id)
        return parts[-1].stop - parts[0].start if parts else 0

    def forget(self, req_id: str, blocks: torch.Tensor | None, block_size: int = 1) -> None:
        """The request ended or was preempted; `blocks` [n] are those that it had."""
        parts = self._waiting.pop(req_id, [])
        if parts and blocks is not None:
            self._mark(blocks, block_size, parts[0].start, parts[-1].stop)
        self._lost.discard(req_id)

    def _mark(self, blocks: torch.Tensor, block_size: int, start: int, stop: int) -> None:
        stale = blocks[start // block_size : -(-stop // block_size)]
        self._stale_blocks.update(stale.tolist())
