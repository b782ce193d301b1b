# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The drafter's backlog: what waits, what is lost, which blocks cannot be trusted."""

from __future__ import annotations

import torch

from echo_vllm.step.v1.window import DrafterBacklog, DrafterInput

BLOCK = 4


def tokens(start: int, count: int) -> DrafterInput:
    ids = torch.arange(start, start + count, dtype=torch.int32)
    return DrafterInput(start, ids, ids.float().unsqueeze(1))


def blocks(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_what_waits_comes_back_in_order() -> None:
    backlog = DrafterBacklog(limit=100)
    for start in (8, 9, 12):
        backlog.put("a", tokens(start, 3 if start == 9 else 1), blocks(0, 1, 2, 3), BLOCK)
    assert len(backlog) == 5
    assert backlog.waits("a")
    taken = backlog.take("a", tokens(13, 2))
    assert (taken.start, taken.stop) == (8, 15)
    assert taken.token_ids.tolist() == list(range(8, 15))
    assert taken.features[:, 0].tolist() == list(range(8, 15))
    assert not backlog.waits("a")
    assert backlog.take("b", tokens(0, 2)).stop == 2


def test_a_request_that_waits_too_long_drafts_no_more_and_leaves_stale_blocks() -> None:
    backlog = DrafterBacklog(limit=6)
    backlog.put("a", tokens(5, 4), blocks(10, 11, 12, 13), BLOCK)
    assert backlog.can_draft("a")
    backlog.put("a", tokens(9, 3), blocks(10, 11, 12, 13), BLOCK)
    assert not backlog.can_draft("a")
    assert len(backlog) == 0
    # Positions 5 to 11 lie in the second and third block.
    assert backlog.num_stale_blocks == 2
    backlog.put("a", tokens(12, 1), blocks(10, 11, 12, 13), BLOCK)
    assert backlog.num_stale_blocks == 3


def test_blocks_are_stale_until_they_are_allocated_anew() -> None:
    backlog = DrafterBacklog(limit=100)
    backlog.put("a", tokens(0, 7), blocks(4, 5), BLOCK)
    backlog.forget("a", blocks(4, 5), BLOCK)
    assert backlog.num_stale_blocks == 2
    backlog.begin("b", cached_blocks=[4], new_blocks=[6])
    assert not backlog.can_draft("b")
    backlog.begin("c", cached_blocks=[7], new_blocks=[5])
    assert backlog.can_draft("c")
    assert backlog.num_stale_blocks == 1
    backlog.allocate([4])
    backlog.begin("d", cached_blocks=[4], new_blocks=[])
    assert backlog.can_draft("d")


def test_a_request_that_begins_again_is_trusted_again() -> None:
    backlog = DrafterBacklog(limit=2)
    backlog.put("a", tokens(0, 3), blocks(1), BLOCK)
    assert not backlog.can_draft("a")
    backlog.begin("a", cached_blocks=[], new_blocks=[1])
    assert backlog.can_draft("a")
    assert backlog.num_stale_blocks == 0
