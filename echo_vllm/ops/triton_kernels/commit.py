# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Moving accepted K/V in vLLM's CUDA cache, in Triton.

Layers with one shape and stride share two launches, which find the layers in a table of pointers:
the first reads every source into a staging buffer, the second writes, so all reads come first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@triton.jit(do_not_specialize=["num_slots", "num_moves"])
def _move_kernel(
    layers,
    staging,
    src_slots,
    dst_slots,
    num_slots,
    num_moves,
    block_size,
    num_heads,
    row_size,
    block_stride,
    head_stride,
    token_stride,
    HEADS: tl.constexpr,
    ROW: tl.constexpr,
    READS: tl.constexpr,
):
    """One token of one layer, between its slot and the staging buffer."""
    move, layer = tl.program_id(0), tl.program_id(1)
    src = tl.load(src_slots + move)
    dst = tl.load(dst_slots + move)
    moves = (src >= 0) & (src < num_slots) & (dst >= 0) & (dst < num_slots) & (src != dst)
    slot = tl.where(moves, src if READS else dst, 0)
    head = tl.arange(0, HEADS)[:, None]
    element = tl.arange(0, ROW)[None, :]
    cache = tl.load(layers + layer).to(tl.pointer_type(staging.dtype.element_ty))
    cache += slot // block_size * block_stride + slot % block_size * token_stride
    cache += head.to(tl.int64) * head_stride + element
    held = staging + (layer.to(tl.int64) * num_moves + move) * num_heads * row_size
    held += head * row_size + element
    inside = moves & (head < num_heads) & (element < row_size)
    if READS:
        tl.store(held, tl.load(cache, mask=inside, other=0), mask=inside)
    else:
        tl.store(cache, tl.load(held, mask=inside, other=0), mask=inside)


@functools.lru_cache(maxsize=64)
def _pointer_table(device: torch.device, pointers: tuple[int, ...]) -> Tensor:
    """int64 [layers] on the device; kept, because a copy to the device waits for it."""
    return torch.tensor(pointers, dtype=torch.int64, device=device)


def commit_kv(
    kv_caches: Sequence[Tensor],
    src_slots: Tensor,
    dst_slots: Tensor,
    block_size: int,
    layout: str,
) -> None:
    """See `echo_vllm.ops.commit_kv`; the layout is `nhd` or `hnd`, which differ in strides only.

    Each cache is [num_blocks, KVH, block_size, 2 * D] with any strides but the last, which is how
    vLLM's CUDA backends see both memory orders (NHD, HND): K and V of a token and head side by
    side. Moves from or to a slot outside the cache, -1 among them, are skipped.
    """
    if layout not in ("nhd", "hnd"):
        raise RuntimeError(f"commit_kv: the Triton kernel has nhd and hnd, got layout {layout!r}")
    num_moves = src_slots.shape[0]
    for name, slots in (("src_slots", src_slots), ("dst_slots", dst_slots)):
        if slots.dtype != torch.int64 or slots.shape != (num_moves,) or not slots.is_contiguous():
            raise RuntimeError(
                f"commit_kv: {name} must be a contiguous int64 [{num_moves}], got {slots.dtype} "
                f"{list(slots.shape)}"
            )
    groups: dict[tuple[object, ...], list[Tensor]] = {}
    for cache in kv_caches:
        key = (cache.shape, cache.stride(), cache.element_size())
        groups.setdefault(key, []).append(cache)
    if num_moves == 0:
        return
    for caches in groups.values():
        _commit_alike(caches, src_slots, dst_slots, block_size)


def _commit_alike(
    caches: list[Tensor], src_slots: Tensor, dst_slots: Tensor, block_size: int
) -> None:
    first = caches[0]
    if first.dim() != 4 or first.shape[2] != block_size or first.stride(3) != 1:
        raise RuntimeError(
            f"commit_kv: kv_caches must be [num_blocks, num_kv_heads, {block_size}, 2 * head_size] "
            f"with a contiguous last dimension, got {list(first.shape)}, strides {first.stride()}"
        )
    if first.element_size() not in _INTEGER_OF_SIZE:
        raise RuntimeError(
            f"commit_kv: kv_caches must have elements of 1, 2 or 4 bytes, got {first.dtype}"
        )
    num_blocks, num_heads, _, row_size = first.shape
    num_moves = src_slots.shape[0]
    layers = _pointer_table(first.device, tuple(cache.data_ptr() for cache in caches))
    staging = torch.empty(
        (len(caches), num_moves, num_heads, row_size),
        dtype=_INTEGER_OF_SIZE[first.element_size()],
        device=first.device,
    )
    for reads in (True, False):
        _move_kernel[(num_moves, len(caches))](
            layers,
            staging,
            src_slots,
            dst_slots,
            num_blocks * block_size,
            num_moves,
            block_size,
            num_heads,
            row_size,
            first.stride(0),
            first.stride(1),
            first.stride(2),
            HEADS=triton.next_power_of_2(num_heads),
            ROW=triton.next_power_of_2(row_size),
            READS=reads,
            num_warps=4,
        )
