# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""commit_kv against a dense model: a list of tokens in which assignments happen at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from echo_vllm import ops
from echo_vllm.ops import reference
from tests.ops.cases import PACKED_LAYOUTS, write_cache

LAYERS = 3


def make_caches(
    layout: str, dtype: torch.dtype, num_blocks: int, block_size: int, seed: int
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Caches of several layers, and K and V of every slot as dense tensors."""
    generator = torch.Generator().manual_seed(seed)
    num_kv_heads, head_size = 2, 32
    caches, dense = [], []
    for _ in range(LAYERS):
        num_slots = num_blocks * block_size
        key, value = (
            torch.randn(num_slots, num_kv_heads, head_size, generator=generator).to(dtype)
            for _ in range(2)
        )
        cache = torch.empty((num_blocks, num_kv_heads, block_size, 2 * head_size), dtype=dtype)
        write_cache(cache, torch.arange(num_slots), key, value, layout)
        caches.append(cache)
        dense.append((key, value))
    return caches, dense


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_moves_happen_at_once(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(PACKED_LAYOUTS))
    dtype = torch.bfloat16
    if layout != "amx":
        # Bytes are what vLLM holds an FP8 cache as.
        dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
        dtype = data.draw(st.sampled_from(dtypes))
    block_size = data.draw(st.sampled_from([32, 64]))
    num_blocks = data.draw(st.integers(1, 3))
    slot = st.integers(0, num_blocks * block_size - 1)
    dst = data.draw(st.lists(slot, unique=True, max_size=40))
    src = data.draw(st.lists(slot, min_size=len(dst), max_size=len(dst)))
    caches, dense = make_caches(
        layout, dtype, num_blocks, block_size, data.draw(st.integers(0, 99))
    )
    by_reference = [cache.clone() for cache in caches]
    expected = [torch.empty_like(cache) for cache in caches]
    for cache, (key, value) in zip(expected, dense, strict=True):
        key[dst], value[dst] = key[src], value[src]  # indexing copies: reads come first
        write_cache(cache, torch.arange(num_blocks * block_size), key, value, layout)

    arguments = (torch.tensor(src).long(), torch.tensor(dst).long(), block_size, layout)
    ops.commit_kv(caches, *arguments)
    reference.commit_kv(by_reference, *arguments)
    for actual, also, cache in zip(caches, by_reference, expected, strict=True):
        assert torch.equal(actual, cache)
        assert torch.equal(also, cache)


@pytest.mark.parametrize("layout", PACKED_LAYOUTS)
def test_a_path_slides_down_over_itself(layout: str) -> None:
    caches, dense = make_caches(layout, torch.bfloat16, 2, 32, 1)
    src, dst = torch.arange(30, 62), torch.arange(28, 60)
    ops.commit_kv(caches, src, dst, 32, layout)
    for cache, (key, value) in zip(caches, dense, strict=True):
        expected = torch.empty_like(cache)
        key[28:60], value[28:60] = key[30:62].clone(), value[30:62].clone()
        write_cache(expected, torch.arange(64), key, value, layout)
        assert torch.equal(cache, expected)


def test_layers_may_be_strided_over_blocks() -> None:
    """Layers that share one allocation lie apart in the block dimension."""
    storage = torch.randn(2, 4, 2, 32, 64)  # [layer, block, kv head, block_size, 2 * D]
    interleaved = storage.transpose(0, 1).contiguous().transpose(0, 1)
    separate = [layer.clone() for layer in storage]
    src, dst = torch.tensor([5, 70, 127]), torch.tensor([0, 1, 2])
    ops.commit_kv(list(interleaved), src, dst, 32, "vec")
    ops.commit_kv(separate, src, dst, 32, "vec")
    assert not interleaved.is_contiguous()
    assert torch.equal(interleaved, torch.stack(separate))


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("commit", [ops.commit_kv, reference.commit_kv])
def test_cuda_layouts_follow_the_strides(layout: str, commit: object) -> None:
    assert callable(commit)
    cache = torch.randn(4, 2, 16, 64)  # [block, kv head, token, K and V]
    expected = cache.clone().transpose(1, 2).flatten(0, 1)
    src, dst = torch.tensor([5, 33, 6, 7]), torch.tensor([6, 2, 40, 5])
    expected[dst] = expected[src]
    if layout == "nhd":  # tokens before heads in memory
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    commit([cache], src, dst, 16, layout)
    assert torch.equal(cache.transpose(1, 2).flatten(0, 1), expected)


@pytest.mark.parametrize("layout", ["vec", "amx", "nhd"])
@pytest.mark.parametrize("commit", [ops.commit_kv, reference.commit_kv])
def test_negative_slots_are_skipped(layout: str, commit: object) -> None:
    assert callable(commit)
    cache = torch.randn(2, 2, 32, 64).bfloat16()
    expected = cache.clone()
    ops.commit_kv([expected], torch.tensor([9]), torch.tensor([1]), 32, layout)
    commit([cache], torch.tensor([-1, 9, 7]), torch.tensor([3, 1, -1]), 32, layout)
    assert torch.equal(cache, expected)


def test_much_work_is_shared_by_threads() -> None:
    caches, _ = make_caches("vec", torch.float32, 30, 64, 2)
    expected = [cache.clone() for cache in caches]
    src, dst = torch.arange(900, 1900), torch.arange(0, 1000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        ops.commit_kv(caches, src, dst, 64, "vec")
    finally:
        torch.set_num_threads(threads)
    reference.commit_kv(expected, src, dst, 64, "vec")
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"src_slots": torch.tensor([64])}, "outside the 64 slots"),
        ({"dst_slots": torch.tensor([99])}, "outside the 64 slots"),
        ({"dst_slots": torch.tensor([1, 2])}, r"dst_slots.shape\[0\] must be 1"),
        ({"src_slots": torch.tensor([1], dtype=torch.int32)}, "src_slots must be Long"),
        ({"layout": "neon"}, "layout must be one of vec, vec16, amx, nhd, hnd, got 'neon'"),
        ({"block_size": 16}, r"must be \[num_blocks, num_kv_heads, 16, 2 \* head_size\]"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "kv_caches": [torch.zeros(2, 2, 32, 64)],
        "src_slots": torch.tensor([3]),
        "dst_slots": torch.tensor([2]),
        "block_size": 32,
        "layout": "vec",
    }
    with pytest.raises(RuntimeError, match=message):
        ops.commit_kv(**{**arguments, **change})  # type: ignore[arg-type]
