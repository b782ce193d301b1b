# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Tree attention from xFormers' partial attention: a fallback on GPUs, and an oracle.

The context and the suffix are two partial attentions with log-sum-exps (LSE), merged by
`reference.merge_partials`. Lengths are read on the host and the context is gathered, one request
after the other, so this is neither fast nor usable in a CUDA graph. That function stands in for
xFormers' `merge_attentions`, which says nothing of rows that see no key of a part.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from echo_vllm.ops import reference

PartialAttention = Callable[..., tuple[Tensor, Tensor]]

# xFormers wants the rows of a bias to start at multiples of 16 bytes.
BIAS_ALIGNMENT = 8


@functools.cache
def load_partial_attention() -> PartialAttention:
    """xFormers' `memory_efficient_attention_partial`.

    Raises RuntimeError if it cannot be imported.
    """
    try:
        fmha: Any = importlib.import_module("xformers.ops.fmha")
        partial: PartialAttention = fmha.memory_efficient_attention_partial
    except ModuleNotFoundError as error:
        raise RuntimeError(f"xformers is not installed ({error})") from error
    except Exception as error:  # built for another torch, or its kernels live elsewhere
        raise RuntimeError(
            f"xformers has no usable memory_efficient_attention_partial ({error})"
        ) from error
    return partial


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    scale: float,
    partial: PartialAttention,
) -> tuple[Tensor, Tensor]:
    """Attention of one request's rows to some keys.

    Args:
        query: [n, KVH, group, D].
        key, value: [keys, KVH, D], at least one key; what no row sees may be NaN.
        visible: bool [n, keys], None: every row sees every key.
        partial: as xFormers' `memory_efficient_attention_partial`.

    Returns:
        output [n, KVH, group, D] and LSE [n, KVH, group], -inf for a row that sees nothing.
    """
    num_rows, num_kv_heads, group, head_size = query.shape
    num_keys = key.shape[0]
    bias = None
    if visible is not None:
        hidden = ~visible.any(0)[:, None, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
        width = -(-num_keys // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
        plane = query.new_zeros((num_rows, width))[:, :num_keys]
        plane.masked_fill_(~visible, float("-inf"))
        bias = plane.expand(1, num_kv_heads, group, num_rows, num_keys)

    def expanded(tensor: Tensor) -> Tensor:
        return tensor[None, :, :, None].expand(1, num_keys, num_kv_heads, group, head_size)

    output, lse = partial(query[None], expanded(key), expanded(value), attn_bias=bias, scale=scale)
    # Some of xFormers' kernels pad the rows of the LSE.
    output, lse = output[0], lse[0, :, :, :num_rows].permute(2, 0, 1)
    if visible is not None:
        blind = ~visible.any(1)[:, None, None]
        output = output.masked_fill(blind[..., None], 0.0)
        lse = lse.masked_fill(blind, float("-inf"))
    return output, lse


def tree_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    row_start: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    suffix_start: Tensor,
    suffix_len: Tensor,
    mask: Tensor,
    positions: Tensor,
    scale: float,
    softcap: float,
    sliding_window: int,
    layout: str,
    out: Tensor,
    lse: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    partial: PartialAttention | None = None,
) -> None:
    """See `echo_vllm.ops.tree_attention`; the layout is `nhd`, without softcap.

    xFormers takes bfloat16 and float16. `partial` replaces its function.
    """
    if layout != "nhd":
        raise RuntimeError(f"tree_attention: xformers has the layout nhd, got {layout!r}")
    if softcap > 0:
        raise RuntimeError(f"tree_attention: xformers has no softcap, got {softcap}")
    partial = partial or load_partial_attention()
    block_size = key_cache.shape[1]
    num_kv_heads = suffix_key.shape[1]
    starts, mask_starts = query_start.tolist(), row_start.tolist()
    contexts, lengths = context_lens.tolist(), suffix_len.tolist()
    for request, suffix_first in enumerate(suffix_start.tolist()):
        first, mask_first = starts[request], mask_starts[request]
        num_rows = mask_starts[request + 1] - mask_first
        context, length = contexts[request], lengths[request]
        rows = slice(first, first + num_rows)
        if num_rows == 0:
            continue
        q = query[rows].view(num_rows, num_kv_heads, -1, query.shape[2])
        parts = []
        if context:
            blocks = block_table[request, : -(-context // block_size)]
            key, value = reference.gather_context(key_cache, value_cache, blocks, context, layout)
            if key.dtype != query.dtype:  # 8-bit floats
                key = (key.float() * k_scale).to(query.dtype)
                value = (value.float() * v_scale).to(query.dtype)
            visible = None
            if sliding_window > 0:
                token = torch.arange(context, device=query.device)
                visible = token > positions[rows, None] - sliding_window
            parts.append(attend(q, key, value, visible, scale, partial))
        if length:
            suffix = slice(suffix_first, suffix_first + length)
            visible = reference.mask_bits(mask[mask_first : mask_first + num_rows], length)
            parts.append(
                attend(q, suffix_key[suffix], suffix_value[suffix], visible, scale, partial)
            )
        if parts:
            merged, merged_lse = reference.merge_partials(parts)
            out[rows] = merged.flatten(1, 2).to(out.dtype)
        else:
            merged_lse = torch.full(q.shape[:3], float("-inf"), device=q.device)
            out[rows] = 0.0
        if lse is not None:
            lse[:, rows] = merged_lse.flatten(1).T
