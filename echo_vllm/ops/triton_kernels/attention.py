# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Tree attention over vLLM's paged CUDA cache, and over the suffix alone, in Triton.

A tile is a few rows of one request times the query heads of one KV head, so that K and V are read
once for a group. It goes over the paged context in blocks of keys, then over the suffix under the
bitmask, with an online softmax. Few tiles would leave a GPU idle: then the context is divided into
splits, whose partial results a second kernel merges by their log-sum-exp (LSE). How many splits
there are follows from shapes only, never from lengths, which the device knows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Split until there are about two programs for each multiprocessor of a large GPU, but no finer
# than this many context tokens.
WANTED_PROGRAMS = 264
MIN_TOKENS_OF_SPLIT = 256
MAX_SPLITS = 32

# Whether Triton interprets these kernels on the CPU; it decides when it decorates them.
INTERPRETED: bool = triton.knobs.runtime.interpret

BYTES_OF_KEY_TILE = 1 << 14
MASK_WORD_BITS = 64


@triton.jit
def _online_softmax(scores, value, top, total, weighted):
    """Adds one tile of keys: scores [M, N], -inf where hidden; value [N, D]."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing yet: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp(scores - base[:, None])
    shrink = tl.exp(top - base)
    total = total * shrink + tl.sum(weights, 1)
    weighted = weighted * shrink[:, None]
    weighted += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return new_top, total, weighted


@triton.jit
def _scores(query, key, visible, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """[M, N] of query [M, D] and key [D, N], -inf where a row does not see a key."""
    scores = tl.dot(query, key, input_precision="ieee") * scale
    if HAS_SOFTCAP:
        # softcap * tanh(scores / softcap); an exp that overflows to inf gives 1.
        scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))
    return tl.where(visible, scores, float("-inf"))


@triton.jit(do_not_specialize=["num_requests", "sliding_window"])
def _tree_attention_kernel(
    query,
    key_cache,
    value_cache,
    block_table,
    context_lens,
    query_start,
    row_start,
    suffix_key,
    suffix_value,
    suffix_start,
    suffix_len,
    mask,
    positions,
    out,
    lse,
    scale,
    softcap,
    sliding_window,
    num_requests,
    block_size,
    query_token_stride,
    query_head_stride,
    key_block_stride,
    key_token_stride,
    key_head_stride,
    value_block_stride,
    value_token_stride,
    value_head_stride,
    table_stride,
    suffix_key_stride,
    suffix_key_head_stride,
    suffix_value_stride,
    suffix_value_head_stride,
    mask_stride,
    out_split_stride,
    out_token_stride,
    out_head_stride,
    lse_split_stride,
    lse_head_stride,
    HEAD_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    REQUESTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WRITES_LSE: tl.constexpr,
    FLOAT32_DOTS: tl.constexpr,
):
    """One tile, KV head and split. The last split has the suffix.

    With one split `out` and `lse` are indexed by token, with more by split and mask row.
    """
    TILE_ROWS: tl.constexpr = BLOCK_M // GROUP
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Request i has the tiles from (rows before it) // TILE_ROWS + i on, which are enough.
    candidate = tl.arange(0, REQUESTS)
    is_request = candidate < num_requests
    rows_before = tl.load(row_start + candidate, mask=is_request, other=0) - tl.load(row_start)
    begun = is_request & (rows_before // TILE_ROWS + candidate <= tile)
    request = tl.sum(begun.to(tl.int32), 0) - 1
    first_row = tl.load(row_start + request)
    num_rows = tl.load(row_start + request + 1) - first_row
    first_tile = (first_row - tl.load(row_start)) // TILE_ROWS + request
    if (tile - first_tile) * TILE_ROWS >= num_rows:
        return

    m = tl.arange(0, BLOCK_M)
    row = (tile - first_tile) * TILE_ROWS + m // GROUP
    is_row = (m // GROUP < TILE_ROWS) & (row < num_rows)
    head = kv_head * GROUP + m % GROUP
    mask_row = (first_row + row).to(tl.int64)
    token = (tl.load(query_start + request) + row).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    is_dim = dim < HEAD_SIZE
    query_at = query + token * query_token_stride + head.to(tl.int64) * query_head_stride
    q = tl.load(query_at[:, None] + dim[None, :], mask=is_row[:, None] & is_dim[None, :], other=0.0)
    if FLOAT32_DOTS:
        q = q.to(tl.float32)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if HAS_CONTEXT:
        context = tl.load(context_lens + request)
        begin = context * 0
        if HAS_WINDOW:
            position = tl.load(positions + token, mask=is_row, other=1 << 62)
            horizon = position - sliding_window  # a row sees what is above it
            lowest = tl.minimum(tl.min(horizon, 0) + 1, context.to(tl.int64))
            begin = tl.maximum(lowest, 0).to(tl.int32)
        span = tl.cdiv(context - begin, SPLITS)
        begin += split * span
        end = tl.minimum(begin + span, context)
        table = block_table + request.to(tl.int64) * table_stride
        for start in range(begin, end, BLOCK_N):
            key_token = start + tl.arange(0, BLOCK_N)
            is_key = key_token < end
            block = tl.load(table + key_token // block_size, mask=is_key, other=0).to(tl.int64)
            offset = (key_token % block_size).to(tl.int64)
            visible = is_row[:, None] & is_key[None, :]
            if HAS_WINDOW:
                visible &= key_token[None, :] > horizon[:, None]
                # What no row sees may be gone from the cache.
                is_key &= tl.max(visible.to(tl.int32), 0) > 0
            key_at = key_cache + block * key_block_stride + offset * key_token_stride
            key_at += kv_head.to(tl.int64) * key_head_stride
            k = tl.load(
                key_at[None, :] + dim[:, None], mask=is_key[None, :] & is_dim[:, None], other=0.0
            )
            value_at = value_cache + block * value_block_stride + offset * value_token_stride
            value_at += kv_head.to(tl.int64) * value_head_stride
            v = tl.load(
                value_at[:, None] + dim[None, :], mask=is_key[:, None] & is_dim[None, :], other=0.0
            )
            if FLOAT32_DOTS:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            scores = _scores(q, k, visible, scale, softcap, HAS_SOFTCAP)
            top, total, weighted = _online_softmax(scores, v, top, total, weighted)

    length = tl.where(split == SPLITS - 1, tl.load(suffix_len + request), 0)
    first_suffix = tl.load(suffix_start + request).to(tl.int64)
    for start in range(0, length, BLOCK_N):
        # BLOCK_N divides a word, so a row's bits for these columns are in one.
        column = start + tl.arange(0, BLOCK_N)
        word = tl.load(mask + mask_row * mask_stride + start // 64, mask=is_row, other=0)
        bits = (word[:, None] >> (column % 64).to(tl.int64)[None, :]) & 1
        visible = is_row[:, None] & (column < length)[None, :] & (bits != 0)
        # What no row sees may be unwritten: 0 * NaN is NaN.
        is_key = tl.max(visible.to(tl.int32), 0) > 0
        key_at = suffix_key + (first_suffix + column) * suffix_key_stride
        key_at += kv_head.to(tl.int64) * suffix_key_head_stride
        k = tl.load(
            key_at[None, :] + dim[:, None], mask=is_key[None, :] & is_dim[:, None], other=0.0
        )
        value_at = suffix_value + (first_suffix + column) * suffix_value_stride
        value_at += kv_head.to(tl.int64) * suffix_value_head_stride
        v = tl.load(
            value_at[:, None] + dim[None, :], mask=is_key[:, None] & is_dim[None, :], other=0.0
        )
        if FLOAT32_DOTS:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = _scores(q, k, visible, scale, softcap, HAS_SOFTCAP)
        top, total, weighted = _online_softmax(scores, v, top, total, weighted)

    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    index = token if SPLITS == 1 else mask_row
    out_at = out + split.to(tl.int64) * out_split_stride
    out_at += index * out_token_stride + head.to(tl.int64) * out_head_stride
    tl.store(
        out_at[:, None] + dim[None, :],
        (weighted / divisor[:, None]).to(out.dtype.element_ty),
        mask=is_row[:, None] & is_dim[None, :],
    )
    if WRITES_LSE:
        lse_at = lse + split.to(tl.int64) * lse_split_stride
        lse_at += head.to(tl.int64) * lse_head_stride + index
        tl.store(lse_at, tl.where(seen, top + tl.log(divisor), float("-inf")), mask=is_row)


@triton.jit(do_not_specialize=["num_requests"])
def _merge_kernel(
    partial,
    lse,
    query_start,
    row_start,
    out,
    lse_out,
    num_requests,
    partial_split_stride,
    partial_row_stride,
    partial_head_stride,
    lse_split_stride,
    lse_head_stride,
    out_token_stride,
    out_head_stride,
    lse_out_stride,
    WRITES_LSE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    REQUESTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One mask row and head: the splits' results, weighted by exp(LSE)."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    candidate = tl.arange(0, REQUESTS)
    is_request = candidate < num_requests
    first_rows = tl.load(row_start + candidate, mask=is_request, other=0)
    request = tl.sum((is_request & (first_rows <= row)).to(tl.int32), 0) - 1
    if (request < 0) | (row >= tl.load(row_start + num_requests)):
        return
    token = tl.load(query_start + request) + row - tl.load(row_start + request)
    split = tl.arange(0, SPLITS).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    of_split = tl.load(lse + split * lse_split_stride + head * lse_head_stride + row)
    top = tl.max(of_split, 0)
    weights = tl.exp(of_split - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    partial_at = partial + split * partial_split_stride + head * partial_head_stride
    partial_at += row.to(tl.int64) * partial_row_stride
    values = tl.load(partial_at[:, None] + dim[None, :], mask=(dim < HEAD_SIZE)[None, :], other=0.0)
    result = tl.sum(values * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    out_at = out + token.to(tl.int64) * out_token_stride + head * out_head_stride + dim
    tl.store(out_at, result.to(out.dtype.element_ty), mask=dim < HEAD_SIZE)
    if WRITES_LSE:
        merged = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(lse_out + head * lse_out_stride + token, merged)


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
    """See `echo_vllm.ops.tree_attention`; the layout is `nhd`, in memory NHD or HND by strides.

    The cache has the query's dtype, so the scales are 1.
    """
    if layout != "nhd":
        raise RuntimeError(f"tree_attention: the Triton kernel has the layout nhd, got {layout!r}")
    _check("tree_attention", query, mask, out, (key_cache, value_cache, suffix_key, suffix_value))
    num_requests, num_rows = context_lens.shape[0], mask.shape[0]
    if num_requests == 0 or num_rows == 0:
        return
    num_heads, head_size = query.shape[1:]
    num_kv_heads = suffix_key.shape[1]
    block_m = _rows_of_tile(num_rows, num_requests, num_heads // num_kv_heads)
    num_tiles = _num_tiles(num_rows, num_requests, num_heads // num_kv_heads, block_m)
    splits = num_splits(num_tiles * num_kv_heads, block_table.shape[1] * key_cache.shape[1])
    if lse is not None:
        _check_lse("tree_attention", query, lse)
    if splits == 1:
        partial, partial_lse = out[None], None if lse is None else lse[None]
    else:
        partial = query.new_empty((splits, num_rows, num_heads, head_size), dtype=torch.float32)
        partial_lse = query.new_empty((splits, num_heads, num_rows), dtype=torch.float32)
    _launch(
        query,
        (key_cache, value_cache, block_table, context_lens, positions, sliding_window),
        (query_start, row_start, suffix_key, suffix_value, suffix_start, suffix_len, mask),
        scale,
        softcap,
        partial,
        partial_lse,
        block_m,
    )
    if splits > 1 and partial_lse is not None:
        _merge_kernel[(num_rows, num_heads)](
            partial,
            partial_lse,
            query_start,
            row_start,
            out,
            partial_lse if lse is None else lse,
            num_requests,
            *partial.stride()[:3],
            *partial_lse.stride()[:2],
            *out.stride()[:2],
            0 if lse is None else lse.stride(0),
            WRITES_LSE=lse is not None,
            HEAD_SIZE=head_size,
            REQUESTS=triton.next_power_of_2(num_requests),
            BLOCK_D=triton.next_power_of_2(head_size),
            SPLITS=splits,
            num_warps=4,
        )


def suffix_attention(
    query: Tensor,
    query_start: Tensor,
    row_start: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    suffix_start: Tensor,
    suffix_len: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """See `echo_vllm.ops.suffix_attention`."""
    _check("suffix_attention", query, mask, out, (suffix_key, suffix_value))
    _check_lse("suffix_attention", query, lse)
    num_requests, num_rows = suffix_len.shape[0], mask.shape[0]
    if num_requests == 0 or num_rows == 0:
        return
    _launch(
        query,
        None,
        (query_start, row_start, suffix_key, suffix_value, suffix_start, suffix_len, mask),
        scale,
        softcap,
        out[None],
        lse[None],
        _rows_of_tile(num_rows, num_requests, query.shape[1] // suffix_key.shape[1]),
    )


def num_splits(programs: int, max_context: int) -> int:
    """Into how many parts the context is split: a power of two."""
    wanted = min(-(-WANTED_PROGRAMS // programs), max_context // MIN_TOKENS_OF_SPLIT)
    powers = max(1, min(wanted, MAX_SPLITS)).bit_length() - 1
    return 1 << powers


def _rows_of_tile(num_rows: int, num_requests: int, group: int) -> int:
    """BLOCK_M: the (row, head) pairs of a request of average size, 16 to 64; at least a group."""
    pairs = -(-num_rows // num_requests) * group
    block_m: int = triton.next_power_of_2(max(min(max(pairs, 16), 64), group))
    return block_m


def _num_tiles(num_rows: int, num_requests: int, group: int, block_m: int) -> int:
    return num_rows // (block_m // group) + num_requests


def _launch(
    query: Tensor,
    context: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int] | None,
    suffix: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    scale: float,
    softcap: float,
    out: Tensor,
    lse: Tensor | None,
    block_m: int,
) -> None:
    """`context`: K and V cache, block table, context lengths, positions, sliding window.

    `suffix`: query start, row start, K, V, suffix start, suffix length, mask. `out` and `lse` have
    a dimension of splits in front.
    """
    query_start, row_start, suffix_key, suffix_value, suffix_start, suffix_len, mask = suffix
    if context is None:
        context = (suffix_key, suffix_value, suffix_len, suffix_len, suffix_len, 0)
        has_context, block_size, cache_strides = False, 1, [0] * 6
    else:
        has_context, block_size = True, context[0].shape[1]
        cache_strides = [*context[0].stride()[:3], *context[1].stride()[:3]]
    key_cache, value_cache, block_table, context_lens, positions, sliding_window = context
    num_requests, num_kv_heads = suffix_len.shape[0], suffix_key.shape[1]
    num_heads, head_size = query.shape[1:]
    group = num_heads // num_kv_heads
    block_d = max(16, triton.next_power_of_2(head_size))
    block_n = BYTES_OF_KEY_TILE // (block_d * query.element_size())
    _tree_attention_kernel[
        (_num_tiles(mask.shape[0], num_requests, group, block_m), num_kv_heads, out.shape[0])
    ](
        query,
        key_cache,
        value_cache,
        block_table,
        context_lens,
        query_start,
        row_start,
        suffix_key,
        suffix_value,
        suffix_start,
        suffix_len,
        mask,
        positions,
        out,
        out if lse is None else lse,
        float(scale),
        float(softcap),
        sliding_window,
        num_requests,
        block_size,
        *query.stride()[:2],
        *cache_strides,
        block_table.stride(0),
        *suffix_key.stride()[:2],
        *suffix_value.stride()[:2],
        mask.stride(0),
        *out.stride()[:3],
        0 if lse is None else lse.stride(0),
        0 if lse is None else lse.stride(1),
        HEAD_SIZE=head_size,
        GROUP=group,
        REQUESTS=triton.next_power_of_2(num_requests),
        BLOCK_M=block_m,
        BLOCK_N=max(16, min(MASK_WORD_BITS, block_n)),
        BLOCK_D=block_d,
        SPLITS=out.shape[0],
        HAS_CONTEXT=has_context,
        HAS_SOFTCAP=softcap > 0,
        HAS_WINDOW=sliding_window > 0,
        WRITES_LSE=lse is not None,
        # The interpreter keeps bfloat16 as 16-bit integers, which it cannot multiply.
        FLOAT32_DOTS=INTERPRETED and query.dtype == torch.bfloat16,
        num_warps=4,
        num_stages=2,
    )


def _check_lse(op: str, query: Tensor, lse: Tensor) -> None:
    wanted = (query.shape[1], query.shape[0])
    if lse.dtype != torch.float32 or lse.shape != wanted or lse.stride(-1) != 1:
        raise RuntimeError(
            f"{op}: lse must be float32 {list(wanted)} with a contiguous last dimension, got "
            f"{lse.dtype} {list(lse.shape)}, strides {lse.stride()}"
        )


def _check(op: str, query: Tensor, mask: Tensor, out: Tensor, stored: tuple[Tensor, ...]) -> None:
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RuntimeError(f"{op}: query must be float32, bfloat16 or float16, got {query.dtype}")
    for tensor in (query, out, *stored):
        if tensor.dtype != query.dtype or tensor.stride(-1) != 1:
            raise RuntimeError(
                f"{op}: query, K, V and out must be {query.dtype} with a contiguous last "
                f"dimension, got {tensor.dtype} {list(tensor.shape)}, strides {tensor.stride()}"
            )
    if query.shape[2] % 16 != 0 or query.shape[1] % stored[-1].shape[1] != 0:
        raise RuntimeError(
            f"{op}: the head size must be a multiple of 16 and the heads a multiple of the KV "
            f"heads, got query {list(query.shape)} and {stored[-1].shape[1]} KV heads"
        )
    if mask.dtype != torch.int64 or not mask.is_contiguous():
        raise RuntimeError(f"{op}: mask must be contiguous int64, got {mask.dtype}")
