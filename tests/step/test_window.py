# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the drafter has seen, what it catches up with, and which blocks it can be trusted with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echo_vllm.step.v1.window import DrafterWindow, FeatureRing
from echo_vllm.trees.store import Ints

BLOCK, WINDOW = 4, 6


def ints(*values: int) -> Ints:
    return np.array(values, np.int64)


class Request:
    """One request of a window, which commits tokens and catches up or does not."""

    def __init__(self, window: DrafterWindow, slot: int, blocks: list[int], cached: int) -> None:
        self.window, self.slot, self.blocks, self.length = window, slot, blocks, cached
        window.begin(slot, blocks, cached)

    def rest(self, count: int) -> None:
        self.length += count

    def catch_up(self, count: int) -> tuple[int, int]:
        """Commit `count` tokens and pass through the drafter what is due: (first, stop)."""
        begin, stop = self.length, self.length + count
        slots = ints(self.slot)
        firsts = self.window.firsts(slots, ints(begin), ints(stop))
        table = np.array([self.blocks], np.int32)
        self.window.seen(slots, firsts, ints(stop), table)
        self.length = stop
        return int(firsts[0]), stop

    def visible(self) -> list[int]:
        """The blocks that it drafts from."""
        slots = ints(self.slot)
        skipped = int(self.window.skipped_blocks(slots)[0])
        table = self.window.compact(torch.tensor([self.blocks], dtype=torch.int32), slots)
        length = self.length - skipped * BLOCK
        return table[0, : -(-length // BLOCK)].tolist()


def make(num_slots: int = 4) -> DrafterWindow:
    return DrafterWindow(num_slots, num_blocks=64, block_size=BLOCK, window=WINDOW)


def test_who_never_rests_passes_each_token_once_and_sees_all() -> None:
    request = Request(make(), 1, list(range(10, 20)), 0)
    assert request.catch_up(9) == (0, 9)
    assert request.catch_up(1) == (9, 10)
    assert request.catch_up(3) == (10, 13)
    assert request.visible() == [10, 11, 12, 13]


def test_a_short_rest_is_caught_up_with_whole() -> None:
    request = Request(make(), 0, list(range(10, 20)), 0)
    request.catch_up(5)
    request.rest(WINDOW + BLOCK)
    assert request.catch_up(1) == (5, 16)
    assert request.visible() == [10, 11, 12, 13]


def test_behind_a_long_rest_a_request_drafts_from_its_whole_blocks_and_a_window() -> None:
    request = Request(make(), 0, list(range(10, 20)), 0)
    request.catch_up(9)  # two whole blocks and one token
    request.rest(20)
    first, stop = request.catch_up(1)
    assert (first, stop) == (24, 30)
    assert stop - first <= WINDOW + BLOCK
    assert request.visible() == [10, 11, 16, 17]
    # It goes on from there, and a second hole gives up the first window, not the leading blocks.
    assert request.catch_up(2) == (30, 32)
    request.rest(1)
    assert request.catch_up(1) == (32, 34)
    assert request.visible() == [10, 11, 16, 17, 18]


def test_a_prompt_is_never_skipped_while_the_drafter_reads() -> None:
    request = Request(make(), 0, list(range(20)), 0)
    assert request.catch_up(50) == (0, 50)


def test_a_hit_of_whole_blocks_is_as_good_as_having_read_them() -> None:
    window = make()
    first = Request(window, 0, [1, 2, 3, 4], 0)
    first.catch_up(13)  # three whole blocks
    second = Request(window, 1, [1, 2, 3, 7, 8], 12)
    assert second.catch_up(2) == (12, 14)
    assert second.visible() == [1, 2, 3, 7]


def test_a_hit_of_a_block_that_the_drafter_never_saw_leaves_a_hole() -> None:
    window = make()
    first = Request(window, 0, [1, 2, 3, 4], 0)
    first.catch_up(5)
    first.rest(8)
    second = Request(window, 1, [1, 2, 3, 7, 8], 12)
    assert second.catch_up(2) == (12, 14)
    assert second.visible() == [1, 7]
    # The other's blocks are whole for whoever comes once it has caught up without a hole.
    first.catch_up(1)
    third = Request(window, 2, [1, 2, 3, 9], 12)
    third.catch_up(1)
    assert third.visible() == [1, 2, 3, 9]


def test_a_block_that_is_allocated_anew_is_not_whole() -> None:
    window = make()
    Request(window, 0, [1, 2, 3], 0).catch_up(12)
    Request(window, 1, [2, 9], 0)
    third = Request(window, 2, [1, 2, 3, 5], 12)
    third.catch_up(1)
    assert third.visible() == [1, 5]


def test_a_session_that_goes_on_earlier_reads_again_from_there() -> None:
    request = Request(make(), 0, list(range(10)), 0)
    request.catch_up(11)
    request.window.rewind(0, 9)
    request.length = 9
    assert request.catch_up(3) == (9, 12)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=12), st.integers(0, 3))
def test_the_window_always_covers_the_last_tokens_and_costs_no_more(
    steps: list[tuple[bool, int]], cached: int
) -> None:
    """Whatever a request does, what it drafts from is its leading blocks and, without a gap, its
    last tokens; and what it passes through the drafter never exceeds what is new and the window."""
    window = make()
    if cached:
        Request(window, 3, list(range(cached)), 0).catch_up(cached * BLOCK)
    request = Request(window, 0, list(range(64)), cached * BLOCK)
    written: set[int] = set(range(cached * BLOCK))
    for rests, count in steps:
        count = min(count, 63 * BLOCK - request.length)
        if count <= 0:
            break
        if rests:
            request.rest(count)
            continue
        begin = request.length
        first, stop = request.catch_up(count)
        assert stop - first <= count + window.capacity
        assert first >= begin - window.capacity
        written |= set(range(first, stop))
        blocks = request.visible()
        seen = [p for b in blocks for p in range(b * BLOCK, b * BLOCK + BLOCK) if p < stop]
        assert set(seen) <= written
        assert seen == sorted(seen)
        assert set(range(max(0, stop - min(WINDOW, count)), stop)) <= set(seen)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_ring_gives_back_the_last_tokens_of_each_slot(num_layers: int) -> None:
    capacity, hidden = 5, 2
    ring = FeatureRing(
        3,
        capacity,
        num_layers=num_layers,
        hidden_size=hidden,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )

    def features(slot: int, positions: Ints) -> list[torch.Tensor]:
        values = torch.from_numpy(1000 * slot + positions).float().unsqueeze(1)
        return [values.expand(-1, hidden) + layer / 10 for layer in range(num_layers)]

    for start, stop in ((0, 3), (3, 4), (4, 9)):
        for slot in (0, 2):
            positions = np.arange(start, stop)
            ring.put(features(slot, positions), np.full(len(positions), slot), positions, None)
    wanted = np.arange(4, 9)
    for slot in (0, 2):
        found = ring.take(np.full(5, slot), wanted)
        assert torch.equal(found, torch.cat(features(slot, wanted), dim=1))
    ring.put(features(1, np.arange(6)), ints(1, 1), ints(4, 5), ints(4, 5))
    assert torch.equal(ring.take(ints(1), ints(5)), torch.cat(features(1, ints(5)), dim=1))
