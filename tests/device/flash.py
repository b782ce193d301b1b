# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Stand-ins in plain torch for the two kernels that vLLM's CUDA attention backends call."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backends import flash_attn, triton_attn


def paged_attention(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    softmax_scale: float,
    causal: Any,
    block_table: Tensor,
    softcap: float,
    window_size: Any,
    **others: Any,
) -> None:
    """What `flash_attn_varlen_func` and Triton's `unified_attention` do, one row at a time.

    k, v: [num_blocks, block_size, KVH, D]; causal, as the last rows of each sequence.
    """
    assert causal is True
    assert len(q) == int(cu_seqlens_q[-1]), "the kernel gets padding, or not all rows"
    assert others["max_seqlen_q"] >= int(cu_seqlens_q.diff().max())
    assert others["max_seqlen_k"] >= int(seqused_k.max())
    block_size, group = k.shape[1], q.shape[1] // k.shape[2]
    for i, (first, stop) in enumerate(pairwise(cu_seqlens_q)):
        length = int(seqused_k[i])
        blocks = block_table[i, : -(-length // block_size)].long()
        key = k[blocks].flatten(0, 1)[:length].repeat_interleave(group, dim=1).double()
        value = v[blocks].flatten(0, 1)[:length].repeat_interleave(group, dim=1).double()
        for row in range(int(first), int(stop)):
            position = length - int(stop) + row
            scores = torch.einsum("hd,nhd->hn", q[row].double(), key) * softmax_scale
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            scores[:, position + 1 :] = -torch.inf
            if window_size[0] >= 0:
                scores[:, : max(0, position - window_size[0])] = -torch.inf
            out[row] = torch.einsum("hn,nhd->hd", scores.softmax(1), value).to(out.dtype)


def write_to_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, *_: Any
) -> None:
    """What `reshape_and_cache_flash` does; negative slots are padding."""
    block_size = key_cache.shape[1]
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            key_cache[slot // block_size, slot % block_size] = key[row]
            value_cache[slot // block_size, slot % block_size] = value[row]


def install(patch: pytest.MonkeyPatch) -> None:
    """Let vLLM's backends call the stand-ins."""
    patch.setattr(flash_attn, "flash_attn_varlen_func", paged_attention, raising=False)
    patch.setattr(flash_attn, "reshape_and_cache_flash", write_to_cache, raising=False)
    patch.setattr(triton_attn, "unified_attention", paged_attention, raising=False)
