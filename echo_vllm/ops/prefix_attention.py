# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Tree attention in three calls: prefix by FlashAttention, suffix by our kernel, and their merge.

`tree_attention` is the implementation `flash` of the table in `dispatch.py`. The context holds no
tree, so that any attention that gives log-sum-exps (LSE) will do for it; `merged_tree_attention`
takes one. Which FlashAttention there is, `load_flash_attention` finds out.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PrefixAttention = Callable[..., tuple[Tensor, Tensor]]
"""Takes the arguments of `tree_attention` but `out` and `lse`, by name.

It returns the output [T, H, D] and the LSE float32 [H, T] of the rows' attention to the context
alone, for the requests' rows at least; -inf or +inf where a row sees no token of it.
"""

PACKAGES = ("vllm.vllm_flash_attn", "flash_attn")


@functools.cache
def load_flash_attention() -> tuple[str, Callable[..., Any]]:
    """The package that has `flash_attn_varlen_func`, and the function: vLLM's own first.

    Of vLLM's it is version 3 on a GPU that runs it (Hopper), else the package's default, 2.

    Raises RuntimeError if neither can be imported.
    """
    reasons = []
    for package in PACKAGES:
        try:
            module = importlib.import_module(package)
            function = module.flash_attn_varlen_func
            supports = getattr(module, "is_fa_version_supported", None)
            if supports is not None and supports(3):
                function = functools.partial(function, fa_version=3)
        except Exception as error:  # a broken installation can raise anything
            reasons.append(f"{package} ({error})")
            continue
        return package, function
    raise RuntimeError(f"FlashAttention is not installed: {', '.join(reasons)}")


def packed_bounds(query_start: Tensor, row_start: Tensor) -> Tensor:
    """FlashAttention's `cu_seqlens_q`, int32 [R + 1], computed on the device.

    A row between two requests counts to the one before it. FlashAttention writes something there,
    which the merge leaves out.
    """
    num_requests = row_start.shape[0] - 1
    starts = query_start[:num_requests]
    return torch.cat([starts, starts[-1:] + row_start[-1:] - row_start[-2:-1]])


def flash_prefix_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    query_start: Tensor,
    row_start: Tensor,
    scale: float,
    softcap: float,
    flash: tuple[str, Callable[..., Any]] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The rows' attention to the paged context by `flash_attn_varlen_func`, without a mask.

    `flash` replaces what `load_flash_attention` finds. The context's length is on the device, so
    FlashAttention gets the most that the block table can hold. See `PrefixAttention`.
    """
    package, function = flash or load_flash_attention()
    num_requests = context_lens.shape[0]
    bounds = packed_bounds(query_start, row_start)
    arguments: dict[str, Any] = {
        "max_seqlen_q": query.shape[0],
        "max_seqlen_k": block_table.shape[1] * key_cache.shape[1],
        "cu_seqlens_q": bounds,
        "block_table": block_table[:num_requests],
        "softmax_scale": scale,
        "softcap": softcap,
        "causal": False,
    }
    if package == "flash_attn":  # it reads lengths from sums, and has another name for the LSE
        lengths = torch.nn.functional.pad(context_lens.cumsum(0, dtype=torch.int32), (1, 0))
        output, lse, *_rest = function(
            query, key_cache, value_cache, cu_seqlens_k=lengths, return_attn_probs=True, **arguments
        )
    else:
        output, lse = function(
            query, key_cache, value_cache, seqused_k=context_lens, return_softmax_lse=True,
            **arguments,
        )  # fmt: skip
    return output, lse


def merged_tree_attention(
    prefix: PrefixAttention,
    suffix: Callable[..., None],
    merge: Callable[..., None],
    out: Tensor,
    lse: Tensor | None = None,
    **arguments: Any,
) -> None:
    """`tree_attention` from its parts.

    Args:
        prefix: the attention to the context, see `PrefixAttention`.
        suffix, merge: the operators `suffix_attention` and `merge_attention`.
        out, lse, arguments: as `echo_vllm.ops.tree_attention` has them, by name.
    """
    query = arguments["query"]
    rows = {name: arguments[name] for name in ("query_start", "row_start")}
    own = ("suffix_key", "suffix_value", "suffix_start", "suffix_len", "mask", "scale", "softcap")
    prefix_out, prefix_lse = prefix(**arguments)
    suffix_out = torch.empty_like(query, memory_format=torch.contiguous_format)
    suffix_lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    suffix(
        query=query,
        **rows,
        **{name: arguments[name] for name in own},
        out=suffix_out,
        lse=suffix_lse,
    )
    merge(prefix_out, prefix_lse, suffix_out, suffix_lse, **rows, out=out, lse=lse)


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
) -> None:
    """See `echo_vllm.ops.tree_attention`; the layout is `nhd`, without window and 8-bit cache."""
    from echo_vllm import ops

    if layout != "nhd":
        raise RuntimeError(f"tree_attention: FlashAttention has the layout nhd, got {layout!r}")
    if sliding_window > 0:
        # A row's window begins at its own position, FlashAttention's at its place in the batch.
        raise RuntimeError(
            f"tree_attention: FlashAttention has no window for trees, got {sliding_window}"
        )
    if key_cache.dtype != query.dtype:
        raise RuntimeError(
            f"tree_attention: FlashAttention reads a cache of {query.dtype} only, got "
            f"{key_cache.dtype}"
        )
    if context_lens.shape[0] == 0 or mask.shape[0] == 0:
        return
    merged_tree_attention(
        flash_prefix_attention,
        ops.suffix_attention,
        ops.merge_attention,
        out,
        lse,
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        block_table=block_table,
        context_lens=context_lens,
        query_start=query_start,
        row_start=row_start,
        suffix_key=suffix_key,
        suffix_value=suffix_value,
        suffix_start=suffix_start,
        suffix_len=suffix_len,
        mask=mask,
        positions=positions,
        scale=scale,
        softcap=softcap,
        sliding_window=sliding_window,
    )
