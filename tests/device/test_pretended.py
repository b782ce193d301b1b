# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The pretended GPU sees what it is there to see."""

from __future__ import annotations

import pytest
import torch

from echo_vllm import ops
from echo_vllm.transfer import download, upload
from echo_vllm.trees.forest import DraftForest
from tests.device.pretended import GPU, MixedDevices, held, on_gpu, pretended_gpu


def test_tensors_of_host_and_device_do_not_mix() -> None:
    values = on_gpu(torch.arange(6.0))
    with pretended_gpu():
        assert values.device == GPU
        with pytest.raises(MixedDevices):
            values + torch.ones(6)
        with pytest.raises(MixedDevices):
            values[torch.tensor([1, 2])]
        assert held(values + 1).tolist() == [1, 2, 3, 4, 5, 6]
        values[1:3] = 9
        assert held(values).tolist() == [0, 9, 9, 3, 4, 5]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.tolist(),
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: int(x[0]),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.nonzero(),
        lambda x: x[x > 2],
        lambda x: torch.equal(x, x),
        lambda x: x.long().repeat_interleave(x.long()),
        lambda x: torch.ones(6).to(GPU),
        lambda x: torch.tensor([1, 2], device=GPU),
        lambda x: x.copy_(torch.ones(6)),
        lambda x: list(range(x[1])),
    ],
)
def test_each_way_to_wait_for_a_device_is_counted(wait: object) -> None:
    with pretended_gpu() as waits:
        wait(on_gpu(torch.arange(6)))  # type: ignore[operator]
    assert waits.total == 1, waits.places


def test_what_cuda_lacks_is_refused() -> None:
    with pretended_gpu():
        x, places = on_gpu(torch.zeros(4, dtype=torch.bool)), on_gpu(torch.tensor([1, 2]))
        with pytest.raises(NotImplementedError, match="truth values"):
            x.scatter_reduce_(0, places, x[:2], "amax")
        assert held(x.int().scatter_add_(0, places, x[:2].int())).tolist() == [0] * 4


def test_what_does_not_wait_is_not_counted() -> None:
    with pretended_gpu() as waits:
        x = torch.zeros(4, device=GPU) + upload(torch.arange(4), GPU)
        x[x > 2] = 0.0
        x = torch.repeat_interleave(x, x.new_ones(4, dtype=torch.int64), output_size=4)
        torch.where(x > 1, 1, 2).masked_fill(x > 2, 0).argsort().cumsum(0)
        assert x.shape == (4,)
    assert waits.total == 0, waits.places


def test_pinning_is_seen_after_vllm_has_replaced_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda values, device=None: values)
    with pretended_gpu() as waits:
        assert held(upload(torch.arange(4), GPU)).tolist() == [0, 1, 2, 3]
    assert waits.total == 0, waits.places


def test_a_download_brings_everything_at_once() -> None:
    given = (
        torch.tensor([True, False, True]),
        torch.arange(6).view(2, 3),
        torch.rand(5, 1),
        torch.empty(0, 4, dtype=torch.int32),
        torch.arange(3, dtype=torch.int32),
    )
    with pretended_gpu() as waits:
        found = download(*map(on_gpu, given))
    assert waits.total == 1
    for one, other in zip(given, found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_a_forest_goes_to_the_device_without_waiting() -> None:
    forest = DraftForest.from_parents([[5, 6], [], [7]], [[-1, 0], [], [-1]], [[-1.5, -2], [], [0]])
    with pretended_gpu() as waits:
        there = forest.to(GPU)
        mask, depths = ops.build_super_tree(there.parents, there.cu_nodes, 1)
    assert waits.total == 0
    for name in ("token_ids", "parents", "depths", "path_logprobs", "cu_nodes"):
        assert torch.equal(held(getattr(there, name)), getattr(forest, name))
    assert held(depths).tolist() == [0, 1, 2, 0, 0, 1]
    assert held(mask).flatten().tolist() == [1, 3, 7, 1, 1, 3]
