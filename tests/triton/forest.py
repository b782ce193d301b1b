# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Triton's mask, walk and commit against the reference and dense models; run by test_triton.py.

Runs in Triton's interpreter, and without it on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from echo_vllm import ops
from echo_vllm.ops import reference, triton_kernels
from echo_vllm.ops.triton_kernels.attention import INTERPRETED
from tests.ops.test_forest_ops import Tree, flat, trees

DEVICE = "cpu" if INTERPRETED else "cuda"

examples = settings(max_examples=10, deadline=None, derandomize=True)


def build_super_tree(parents: Tensor, cu_nodes: Tensor, words: int) -> tuple[Tensor, Tensor]:
    mask, depths = triton_kernels.build_super_tree(parents.to(DEVICE), cu_nodes.to(DEVICE), words)
    return mask.cpu(), depths.cpu()


def accept_path(*tensors: Tensor, max_depth: int) -> tuple[Tensor, Tensor]:
    sampled, token_ids, parents, cu_nodes = (tensor.to(DEVICE) for tensor in tensors)
    rows, counts = triton_kernels.accept_path(sampled, token_ids, parents, cu_nodes, max_depth)
    return rows.cpu(), counts.cpu()


def commit_kv(caches: Sequence[Tensor], src: list[int], dst: list[int]) -> None:
    slots = (torch.tensor(src, device=DEVICE), torch.tensor(dst, device=DEVICE))
    triton_kernels.commit_kv(caches, *slots, 8, "nhd")


@given(forest=st.lists(trees(70), max_size=3), padding=st.integers(0, 3))
@examples
def test_mask_bits_are_the_ancestors(forest: list[Tree], padding: int) -> None:
    parents, _, cu_nodes = flat(forest)
    num_words = max((len(tree) // 64 + 1 for tree in forest), default=1)
    expected_mask, expected_depths = reference.build_super_tree(parents, cu_nodes, num_words)
    padded = torch.cat([parents, torch.full((padding,), 99, dtype=torch.int32)])
    mask, depths = build_super_tree(padded, cu_nodes, num_words)
    rows = expected_depths.shape[0]
    assert torch.equal(mask[:rows], expected_mask)
    assert torch.equal(depths[:rows], expected_depths)
    assert mask.dtype == torch.int64
    assert depths.dtype == torch.int32
    assert not mask[rows:].any()
    assert not depths[rows:].any()
    assert mask.shape == (rows + padding, num_words)


def test_the_64th_bit_is_a_bit_like_any_other() -> None:
    parents = torch.arange(-1, 65, dtype=torch.int32)  # a chain of 66 nodes
    cu_nodes = torch.tensor([0, 66], dtype=torch.int32)
    mask, _ = build_super_tree(parents, cu_nodes, 3)
    assert torch.equal(mask, reference.build_super_tree(parents, cu_nodes, 3)[0])
    assert mask[64].tolist() == [-1, 1, 0]


def test_what_is_not_a_forest_ends_all_the_same() -> None:
    parents = torch.tensor([1, 0, 2, 7], dtype=torch.int32)
    mask, depths = build_super_tree(parents, torch.tensor([0, 4], dtype=torch.int32), 1)
    assert mask.shape == (5, 1)
    assert (depths <= 4).all()


@given(forest=st.lists(trees(60), min_size=1, max_size=3), data=st.data())
@examples
def test_accepted_path_follows_the_samples(forest: list[Tree], data: st.DataObject) -> None:
    parents, token_ids, cu_nodes = flat(forest)
    sampled: list[int] = []
    for tree in forest:
        for row in range(len(tree) + 1):
            children = [token for parent, token in tree if parent + 1 == row]
            sampled.append(data.draw(st.sampled_from([*children, *children, 1000])))
    max_depth = data.draw(st.integers(0, 20))
    token_dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    arguments = (torch.tensor(sampled), token_ids.to(token_dtype), parents, cu_nodes)
    expected_rows, expected_counts = reference.accept_path(*arguments, max_depth)
    rows, counts = accept_path(*arguments, max_depth=max_depth)
    assert torch.equal(rows, expected_rows)
    assert torch.equal(counts, expected_counts)
    assert rows.dtype == counts.dtype == torch.int32


def test_a_wide_tree_is_searched_to_its_end() -> None:
    parents = torch.full((300,), -1, dtype=torch.int32)
    tokens = torch.arange(300)
    sampled = torch.full((301,), 299)
    cu_nodes = torch.tensor([0, 300], dtype=torch.int32)
    rows, counts = accept_path(sampled, tokens, parents, cu_nodes, max_depth=3)
    assert rows.tolist() == [[0, 300, -1, -1]]
    assert counts.tolist() == [1]


def make_caches(dtype: torch.dtype, order: str) -> tuple[list[Tensor], list[Tensor]]:
    """Three layers [blocks, KV heads, 8, 2 * D] in memory order `order`, and each by slot."""
    generator = torch.Generator().manual_seed(0)
    caches, dense = [], []
    for heads in (2, 2, 3):
        by_slot = torch.randn(4 * 8, heads, 2 * 48, generator=generator).to(dtype)
        pages = by_slot.view(4, 8, heads, 96).transpose(1, 2).to(DEVICE)
        caches.append(pages.clone(memory_format=torch.contiguous_format))
        if order == "nhd":
            caches[-1] = caches[-1].transpose(1, 2).contiguous().transpose(1, 2)
        dense.append(by_slot)
    return caches, dense


@pytest.mark.parametrize("order", ["nhd", "hnd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_moves_happen_at_once(dtype: torch.dtype, order: str) -> None:
    caches, dense = make_caches(dtype, order)
    before = [cache.stride() for cache in caches]
    src = [9, 10, 11, 30, -1, 5, 3, 2]
    dst = [8, 9, 10, 11, 7, -1, 3, 31]
    commit_kv(caches, src, dst)
    moves = [(s, d) for s, d in zip(src, dst, strict=True) if s >= 0 and d >= 0]
    for cache, by_slot in zip(caches, dense, strict=True):
        expected = by_slot.clone()
        for s, d in moves:
            expected[d] = by_slot[s]
        assert torch.equal(
            cache.cpu().transpose(1, 2).reshape(expected.shape).float(), expected.float()
        )
    assert [cache.stride() for cache in caches] == before


def test_layers_may_be_strided_over_blocks() -> None:
    storage = torch.randn(
        4, 2, 2, 8, 32, device=DEVICE
    )  # [block, layer, kv head, block_size, 2 * D]
    separate = [layer.clone() for layer in storage.unbind(1)]
    src, dst = [5, 17, 31], [0, 1, 2]
    commit_kv(storage.unbind(1), src, dst)
    for layer in separate:
        by_slot = layer.transpose(1, 2).reshape(32, 2, 32)
        by_slot[dst] = by_slot[src]
        layer.copy_(by_slot.view(4, 8, 2, 32).transpose(1, 2))
    assert torch.equal(storage, torch.stack(separate, 1))


def test_slots_outside_the_cache_are_not_touched() -> None:
    cache = torch.randn(3, 2, 8, 32, device=DEVICE)
    inner, before = cache[:2], cache.clone()
    commit_kv([inner], [16, 1, 3], [0, 16, -5])
    assert torch.equal(cache, before)


def test_bad_arguments_are_refused() -> None:
    slots = torch.tensor([1])
    with pytest.raises(RuntimeError, match="the Triton kernel has nhd and hnd, got layout 'vec'"):
        triton_kernels.commit_kv([torch.zeros(2, 2, 8, 32)], slots, slots, 8, "vec")
    with pytest.raises(RuntimeError, match=r"must be \[num_blocks, num_kv_heads, 16, 2 \* head"):
        triton_kernels.commit_kv([torch.zeros(2, 2, 8, 32)], slots, slots, 16, "nhd")
    with pytest.raises(RuntimeError, match=r"src_slots must be a contiguous int64 \[1\]"):
        triton_kernels.commit_kv([torch.zeros(2, 2, 8, 32)], slots.int(), slots, 8, "nhd")
    with pytest.raises(RuntimeError, match="parents must be a contiguous int32 vector"):
        triton_kernels.build_super_tree(slots, slots.int(), 1)


def test_dispatch_can_be_told_to_use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHO_VLLM_OPS", "triton")
    ops.dispatch.implementation.cache_clear()
    assert (
        ops.dispatch.implementation("accept_path", DEVICE == "cuda") is triton_kernels.accept_path
    )
    rows, _ = ops.accept_path(
        torch.tensor([4, 0], device=DEVICE),
        torch.tensor([4], device=DEVICE),
        torch.tensor([-1], dtype=torch.int32, device=DEVICE),
        torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
        1,
    )
    assert rows.tolist() == [[0, 1]]
