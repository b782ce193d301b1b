# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Which positions of each request the drafter has seen, and what it drafts from where it has not.

A drafter that rests sees nothing. The target's features of the last tokens of each request go to a
ring; a request that drafts again catches up from there. After a short rest its cache is whole
again. After a longer one, or behind a hit of the prefix cache on blocks that the drafter never saw,
there is a hole: the request drafts from its leading whole blocks and a window of its last tokens.
The window begins at a block's boundary, so that the attention kernels need no more than a shorter
block table; positions stay absolute.

    positions  0 ......... lead * block_size ....... start ........... end
               whole blocks                  a hole  the window        not seen yet

A block is whole once the drafter has written all of it. Blocks are the cache's, not a request's:
whoever hits one in the prefix cache learns from `_whole` whether the drafter can use it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from echo_vllm.transfer import upload
from echo_vllm.trees.store import Ints, owners

WINDOW = 32
"""Tokens that a request with a hole drafts from at least, where it has so many."""


class DrafterWindow:
    """What the drafter has seen of the requests of an engine, by their slots."""

    def __init__(self, num_slots: int, num_blocks: int, block_size: int, window: int) -> None:
        """
        Args:
            num_slots: requests that can run at once.
            num_blocks: of the paged cache.
            block_size: tokens a block.
            window: see `WINDOW`.
        """
        self.block_size = block_size
        self.window = window
        self._end = np.zeros(num_slots, np.int64)
        self._start = np.zeros(num_slots, np.int64)
        self._lead = np.zeros(num_slots, np.int64)
        self._whole = np.zeros(num_blocks, np.bool_)

    # ---- Requests and blocks come and go ----

    def begin(self, slot: int, blocks: Sequence[int], num_computed: int) -> None:
        """A request starts, or starts again after preemption.

        Args:
            blocks: all its blocks; those of the first `num_computed` tokens come with content.
            num_computed: tokens that the target need not compute.
        """
        cached = num_computed // self.block_size
        whole = self._whole[list(blocks[:cached])]
        lead = cached if whole.all() else int(whole.argmin())
        self._lead[slot] = lead
        self._start[slot] = 0 if lead == cached else num_computed
        self._end[slot] = num_computed
        self.allocate(blocks[cached:])

    def rewind(self, slot: int, num_computed: int) -> None:
        """A request goes on with other tokens behind its first `num_computed`."""
        block = num_computed // self.block_size
        self._end[slot] = min(self._end[slot], num_computed)
        self._start[slot] = min(self._start[slot], block * self.block_size)
        self._lead[slot] = min(self._lead[slot], block)

    def allocate(self, blocks: Sequence[int]) -> None:
        """A request got blocks that will be written anew."""
        if blocks:
            self._whole[list(blocks)] = False

    # ---- What is to be caught up with ----

    @property
    def capacity(self) -> int:
        """Tokens before those of a step that catching up may ask for."""
        return self.window + self.block_size

    def firsts(self, slots: Ints, begins: Ints, stops: Ints) -> Ints:
        """[n] first position that each request has to pass through the drafter so that it has seen
        all positions before `stops` [n], or a window of them.

        Args:
            begins: [n], the first position of this step; what it missed lies before.
        """
        windows = (stops - self.window) // self.block_size * self.block_size
        end = self._end[slots]
        return np.where(begins - end <= self.capacity, end, windows)

    def num_behind(self, slots: Ints, stops: Ints) -> int:
        """Tokens that would pass through the drafter if all of `slots` caught up now."""
        return int((stops - self.firsts(slots, stops, stops)).sum())

    def seen(self, slots: Ints, firsts: Ints, stops: Ints, block_table: NDArray[np.int32]) -> None:
        """The positions `firsts` to `stops` [n] of each request went through the drafter.

        Args:
            block_table: [n, max blocks], on the host.
        """
        size = self.block_size
        skips = firsts > self._end[slots]
        if skips.any():
            # What is whole before a first hole leads; an older window is given up.
            skipping = slots[skips]
            first_hole = skipping[self._start[skipping] == 0]
            self._lead[first_hole] = self._end[first_hole] // size
            self._start[skipping] = firsts[skips]
        self._end[slots] = stops
        filled = stops // size - firsts // size
        if filled.any():
            owner, place = owners(filled)
            self._whole[block_table[owner, (firsts // size)[owner] + place]] = True

    # ---- What is drafted from ----

    def skipped_blocks(self, slots: Ints) -> Ints:
        """[n] blocks between the leading ones and the window, 0 without a hole."""
        return np.maximum(0, self._start[slots] // self.block_size - self._lead[slots])

    def compact(self, block_table: torch.Tensor, slots: Ints) -> torch.Tensor:
        """`block_table` [n, max blocks] of `slots`, on any device, without the skipped blocks."""
        skipped = self.skipped_blocks(slots)
        if not skipped.any():
            return block_table
        holes = torch.from_numpy(np.stack([self._lead[slots], skipped]))
        lead, skipped_blocks = upload(holes, block_table.device).unsqueeze(2)
        columns = torch.arange(block_table.shape[1], device=block_table.device)
        columns = columns + torch.where(columns >= lead, skipped_blocks, 0)
        return block_table.gather(1, columns.clamp(max=block_table.shape[1] - 1))


class FeatureRing:
    """The target's features of each slot's last tokens, in memory that is there from the start."""

    def __init__(
        self,
        num_slots: int,
        capacity: int,
        *,
        num_layers: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Args:
            num_slots: requests that can run at once.
            capacity: tokens of each that are kept.
            num_layers, hidden_size, dtype: of the features: those of `num_layers` hidden states.
        """
        self.capacity = capacity
        layers = torch.empty(
            num_layers, num_slots * capacity, hidden_size, dtype=dtype, device=device
        )
        self._layers = layers.unbind()

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers)

    def put(
        self, features: Sequence[torch.Tensor], slots: Ints, positions: Ints, rows: Ints | None
    ) -> None:
        """Keep `rows` [n] of `features`, a tensor [rows, hidden] a layer; None for the first n.

        Args:
            slots, positions: [n], whose they are. No two of them share a place.
        """
        device = self._layers[0].device
        place = upload(torch.from_numpy(slots * self.capacity + positions % self.capacity), device)
        index = None if rows is None else upload(torch.from_numpy(rows), device)
        for layer, values in zip(self._layers, features, strict=True):
            values = values[: len(place)] if index is None else values[index]
            layer.index_copy_(0, place, values)

    def take(self, slots: Ints, positions: Ints) -> torch.Tensor:
        """[n, num_layers * hidden]: the features of `positions` [n] of `slots` [n]."""
        place = slots * self.capacity + positions % self.capacity
        index = upload(torch.from_numpy(place), self._layers[0].device)
        return torch.cat([layer[index] for layer in self._layers], dim=-1)
