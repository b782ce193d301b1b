# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The emulated graph: right for what reads persistent buffers, loud about everything else."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.worker.gpu.input_batch import InputBuffers, prepare_pos_seq_lens

from echo_vllm import ops
from tests.v2.emulated_graph import CaptureError, EmulatedGraph


def test_a_replay_reads_what_stands_in_the_buffers_now() -> None:
    buffer, out = torch.zeros(4), torch.zeros(4)
    graph = EmulatedGraph([buffer, out])
    with graph.capture():
        out.copy_((buffer + 1) * 2)
    buffer.copy_(torch.arange(4.0))
    graph.replay()
    assert out.tolist() == [2, 4, 6, 8]
    assert graph.strangers == []


def test_numbers_are_those_of_the_capture() -> None:
    out = torch.zeros(1)
    graph = EmulatedGraph([out])
    budget = 3
    with graph.capture():
        out.fill_(budget)
    budget = 5
    out.zero_()
    graph.replay()
    assert out.item() == 3 != budget


def test_metadata_of_the_capture_is_spoiled_before_a_replay() -> None:
    buffer, out = torch.arange(4.0), torch.zeros(2)
    metadata = torch.tensor([0, 1])  # made for this step alone
    graph = EmulatedGraph([buffer, out])
    with graph.capture():
        out.copy_(buffer[metadata])
    assert graph.strangers == ["aten::index reads (2,) int64"]
    graph.replay()
    assert out.tolist() != [0, 1]


def test_asking_the_host_is_an_error() -> None:
    buffer = torch.ones(3)
    with (
        pytest.raises(CaptureError, match="makes the host wait"),
        EmulatedGraph([buffer]).capture(),
    ):
        buffer.sum().item()


def test_vllms_own_input_kernels_can_be_captured() -> None:
    """Positions and lengths of two batches of one shape, from one capture."""
    buffers = InputBuffers(max_num_reqs=4, max_num_tokens=16, device=torch.device("cpu"))
    slots, computed = torch.tensor([2, 0]), torch.zeros(4, dtype=torch.int32)

    def step() -> None:
        prepare_pos_seq_lens(
            slots, buffers.query_start_loc[:3], computed, buffers.positions, buffers.seq_lens
        )

    buffers.query_start_loc[:3] = torch.tensor([0, 3, 5])
    graph = EmulatedGraph([*vars_of(buffers), slots, computed])
    with graph.capture():
        step()
    slots.copy_(torch.tensor([1, 3]))
    computed.copy_(torch.tensor([0, 7, 0, 9]))
    graph.replay()
    assert graph.strangers == []
    assert buffers.positions[:5].tolist() == [7, 8, 9, 9, 10]
    assert buffers.seq_lens.tolist() == [10, 11, 0, 0]


def test_our_masks_can_be_captured() -> None:
    parents = torch.tensor([-1, 0, -1, -1], dtype=torch.int32)
    cu_nodes = torch.tensor([0, 2, 4], dtype=torch.int32)
    mask, depths = torch.zeros(6, 1, dtype=torch.int64), torch.zeros(6, dtype=torch.int32)
    graph = EmulatedGraph([parents, cu_nodes, mask, depths])
    with graph.capture():
        for kept, new in zip(
            (mask, depths), ops.build_super_tree(parents, cu_nodes, 1), strict=True
        ):
            kept.copy_(new)
    parents.copy_(torch.tensor([-1, -1, -1, 0], dtype=torch.int32))
    graph.replay()
    assert graph.strangers == []
    assert depths.tolist() == [0, 1, 1, 0, 1, 2]
    assert mask.flatten().tolist() == [0b1, 0b11, 0b101, 0b1, 0b11, 0b111]


def vars_of(buffers: InputBuffers) -> list[torch.Tensor]:
    return [value for value in vars(buffers).values() if isinstance(value, torch.Tensor)]
