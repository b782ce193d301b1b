# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The operators: tree attention, K/V commit, the forest's mask and walk, the budget's choice, and
on a CPU the linear layers.

Called by `echo_vllm.policies` and `echo_vllm.step`; knows tensors only, no vLLM. Each function runs
the best implementation for the device of its tensors (`dispatch.py` has the table): the C++
extension, Triton, FlashAttention, xFormers or the plain-torch `reference.py`.
`ECHO_VLLM_OPS` in the environment names the one to use. `ECHO_VLLM_CPU_ISA` forces the instruction
set of the CPU kernels (`supported_cpu_isas()`).

Terms: a request's rows are [root, node 0, node 1, ...]; the root is the last sampled token. A
parent is the index of a node of the same request, -1 is the root. Bit j of a mask row is bit
j % 64 of its word j // 64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from echo_vllm.ops import attention_table
from echo_vllm.ops.dispatch import has_extension, implementation
from echo_vllm.ops.library import load_library
from echo_vllm.ops.rules import AcceptRule

__all__ = [
    "AcceptRule",
    "accept_path",
    "build_super_tree",
    "commit_kv",
    "draw_children",
    "has_extension",
    "load_library",
    "merge_attention",
    "pack_linear",
    "packed_linear",
    "rms_norm",
    "sample_path",
    "select_budget",
    "suffix_attention",
    "supported_cpu_isas",
    "tree_attention",
]


def supported_cpu_isas() -> tuple[str, ...]:
    """The values that `ECHO_VLLM_CPU_ISA` can take on this machine, slowest first."""
    load_library()
    names: str = torch.ops.echo_vllm.supported_cpu_isas()
    return tuple(names.split(","))


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
    sinks: Tensor | None = None,
) -> None:
    """Attention of R requests whose rows are trees; writes their rows of `out`, no others.

    Request i owns query rows `query_start[i] .. query_start[i] + n_i - 1` and mask rows
    `row_start[i] .. row_start[i + 1] - 1`, with `n_i = row_start[i + 1] - row_start[i]`. Each row
    attends to all context tokens `0 .. context_lens[i] - 1` in the paged cache, and to suffix rows
    `suffix_start[i] + j`, `j < suffix_len[i]`, where bit j of its mask row is set. A row that may
    see nothing gives zeros.

    Args:
        query: [T, H, D] float32, bfloat16 or float16; D a multiple of 16, last dim contiguous.
        key_cache, value_cache: paged K and V of query's dtype, or of float8_e4m3fn (not `amx`). For
            `vec`, `vec16` and `amx` the two halves `[num_blocks, KVH, block_size, D]` of vLLM's CPU
            cache (its `[num_blocks, KVH, block_size, 2 * D]` viewed as `[..., 2 * block_size, D]`,
            chunked in dim 2); for `nhd` `[num_blocks, block_size, KVH, D]`.
        block_table: int32 [>= R, max_blocks].
        context_lens, suffix_start, suffix_len: int32 [R].
        query_start: int32 [>= R]; row_start: int32 [R + 1].
        suffix_key, suffix_value: [S, KVH, D], last dim contiguous; H is a multiple of KVH.
        mask: int64 [rows, W], W >= ceil(max(suffix_len) / 64), contiguous.
        positions: int64 [T], read only with a sliding window.
        scale: factor of the scores.
        softcap: > 0 caps the scores, `softcap * tanh(score / softcap)`; 0 does not.
        sliding_window: > 0: a row sees only context tokens above `position - sliding_window` (the
            suffix is governed by the mask alone); <= 0: no window.
        layout: `vec`, `vec16`, `amx` (vLLM's isa names) or `nhd`. `amx` is bfloat16 with D and
            block_size multiples of 32; `vec` and `vec16` need a block_size that is a multiple
            of 16.
        out: [T, H, D], query's dtype, last dim contiguous.
        lse: None, or float32 [H, T], last dim contiguous, for the natural logarithm of the sum of
            the exponentials of each row's scores: -inf if it sees nothing. Only the requests' rows
            are written. The layout is that of FlashAttention and of vLLM's `merge_attn_states`.
        k_scale, v_scale: what the cache's 8-bit K and V are multiplied with, vLLM's
            `layer._k_scale_float` and `_v_scale_float`; positive, and 1 for other caches. The
            suffix has no scale.
        sinks: None, or [H] floating point, on query's device: a score that each row's softmax has
            beside those of its keys, with nothing behind it. Whatever runs the operator, it enters
            once, when all keys are merged. Not together with `lse`.

    Raises:
        ValueError: both `sinks` and `lse` are given.
        RuntimeError: an argument's shape, dtype, stride or range does not fit. On CUDA the layout
            is `nhd` (its strides may be those of `hnd`), D is at most 256, and lengths, starts and
            block numbers are trusted.
    """
    if sinks is not None:
        if lse is not None:
            raise ValueError("tree_attention: lse is of keys alone; give it, or sinks")
        # Rows that are not the requests' keep their values: they leave the sink nothing.
        lse = query.new_full((query.shape[1], query.shape[0]), torch.inf, dtype=torch.float32)
    features: tuple[str, ...] = ()
    if query.dtype is torch.float32:
        features += ("float32",)
    if key_cache.dtype != query.dtype:
        features += ("fp8 cache",)
    if sliding_window > 0:
        features += ("window",)
    if softcap > 0:
        features += ("softcap",)
    first = ""
    if query.is_cuda and query.element_size() == 2:  # That is what tables are measured with.
        group = query.shape[1] // max(1, suffix_key.shape[1])
        first = attention_table.preferred(
            group, query.shape[2], context_lens.shape[0], mask.shape[0]
        )
    implementation("tree_attention", query.is_cuda, features, first)(
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
        scale,
        softcap,
        sliding_window,
        layout,
        out,
        lse,
        k_scale,
        v_scale,
    )
    if sinks is not None:
        assert lse is not None
        # What the keys have of the softmax, exp(lse) / (exp(lse) + exp(sink)).
        share = torch.sigmoid(lse - sinks.float().unsqueeze(1))
        out.mul_(share.T.unsqueeze(2))


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
    """Attention of tree rows to their suffix alone, to be merged with that to the context.

    The arguments are those of `tree_attention`; `lse` is not optional.

    Raises:
        RuntimeError: an argument's shape, dtype, stride or range does not fit.
    """
    implementation("suffix_attention", query.is_cuda)(
        query,
        query_start,
        row_start,
        suffix_key,
        suffix_value,
        suffix_start,
        suffix_len,
        mask,
        scale,
        softcap,
        out,
        lse,
    )


def merge_attention(
    prefix_out: Tensor,
    prefix_lse: Tensor,
    suffix_out: Tensor,
    suffix_lse: Tensor,
    query_start: Tensor,
    row_start: Tensor,
    out: Tensor,
    lse: Tensor | None = None,
) -> None:
    """Attention to all keys from the attention to two disjoint sets of them, row by row.

    Writes the requests' rows of `out`, no others; see `tree_attention` for which those are.

    Args:
        prefix_out, suffix_out: [T, H, D] of `out`'s dtype, last dim contiguous.
        prefix_lse, suffix_lse: float32 [H, T], the natural log-sum-exp of the scores. -inf, or +inf
            as FlashAttention 2 has it: the row saw nothing, and its output is not read.
        query_start: int32 [>= R]; row_start: int32 [R + 1].
        out: [T, H, D] float32, bfloat16 or float16, D a multiple of 16; zeros where both saw
            nothing.
        lse: None, or float32 [H, T] for the LSE of both.

    Raises:
        RuntimeError: an argument's shape, dtype, stride or range does not fit.
    """
    implementation("merge_attention", out.is_cuda)(
        prefix_out, prefix_lse, suffix_out, suffix_lse, query_start, row_start, out, lse
    )


def commit_kv(
    kv_caches: Sequence[Tensor],
    src_slots: Tensor,
    dst_slots: Tensor,
    block_size: int,
    layout: str,
) -> None:
    """Moves K and V of slot `src_slots[j]` to slot `dst_slots[j]` in every layer.

    All reads precede all writes, so ranges may overlap; equal slots are skipped, and so is a move
    whose source or destination is negative. Destinations must be distinct.
    slot = block * block_size + offset.

    Args:
        kv_caches: per layer [num_blocks, KVH, block_size, 2 * D], as vLLM shapes it.
        src_slots, dst_slots: int64 [M]; on CUDA M is at most 8192 and no slot is checked.
        block_size: tokens per block, the same in all layers.
        layout: how a (block, kv head) holds its tokens: `vec`, `vec16` or `amx` in vLLM's CPU
            cache; `nhd` or `hnd` in its CUDA cache, where K and V of a token follow each other and
            the strides say the rest. On CUDA only these two, aligned to 16 bytes.

    Raises:
        RuntimeError: an argument's shape, dtype or stride does not fit, or a slot is out of range.
    """
    implementation("commit_kv", src_slots.is_cuda)(
        list(kv_caches), src_slots, dst_slots, block_size, layout
    )


def build_super_tree(parents: Tensor, cu_nodes: Tensor, num_words: int) -> tuple[Tensor, Tensor]:
    """The ancestor mask and the depths of every row of a batch of trees.

    Args:
        parents: int32 [K], K nodes in all; a parent precedes its children.
        cu_nodes: int32 [R + 1], where each request's nodes start.
        num_words: W, words per mask row; 64 * W >= 1 + the most nodes of a request.

    Returns:
        mask: int64 [K + R, W]. Request i's rows start at `cu_nodes[i] + i`: root, then nodes. Bit
            j says that the request's row j is the row itself or an ancestor of it; the root is
            bit 0 of every row.
        depths: int32 [K + R], 0 for a root.

    Raises:
        RuntimeError: the parents or bounds are not a forest, or a tree does not fit the words. On
            CUDA they are trusted, `cu_nodes` may end before K, and the rows behind are zeros.
    """
    mask, depths = implementation("build_super_tree", parents.is_cuda)(parents, cu_nodes, num_words)
    return mask, depths


def accept_path(
    sampled: Tensor, token_ids: Tensor, parents: Tensor, cu_nodes: Tensor, max_depth: int
) -> tuple[Tensor, Tensor]:
    """Descends from each root to the child that holds the target's token, until none does.

    Args:
        sampled: int64 [K + R], the target's token at every row (request i from `cu_nodes[i] + i`).
        token_ids: int32 or int64 [K], the draft tokens. No two siblings share a token.
        parents: int32 [K]; cu_nodes: int32 [R + 1], as in `build_super_tree`.
        max_depth: the longest path that is accepted.

    Returns:
        accepted_rows: int32 [R, max_depth + 1], row indices inside the request along the path,
            beginning with 0 (the root), padded with -1. The bonus token is `sampled` at the last.
        num_accepted: int32 [R], accepted draft nodes, 0 .. max_depth.

    Raises:
        RuntimeError: the parents or bounds are not a forest, or shapes and dtypes do not fit.
    """
    accepted_rows, num_accepted = implementation("accept_path", parents.is_cuda)(
        sampled, token_ids, parents, cu_nodes, max_depth
    )
    return accepted_rows, num_accepted


def sample_path(
    target_logits: Tensor,
    target_rows: Tensor,
    draft_probs: Tensor,
    draft_rows: Tensor,
    draft_ids: Tensor | None,
    rules: Tensor,
    uniforms: Tensor,
    token_ids: Tensor,
    parents: Tensor,
    cu_nodes: Tensor,
    max_depth: int,
    temperatures: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk the trees of a batch from their roots, sampling from the target along the way.

    Where `accept_path` follows tokens that are known, this samples them, by one `AcceptRule` a
    request, and reads the logits of the rows on the walked paths only. The order of a row's
    children is that of their nodes; for DRAWN it is the order of drawing, and a prefix of each
    row's draws may be missing from the end without harm (docs/drawn.md).

    With DRAWN a row's children are accepted one after the other, child j with probability
    min(1, r_j(x_j) / q_j(x_j)); a child whose token has no probability in q is passed over. After
    the last child is rejected the last token is sampled from what is left of the target; at a row
    without children, or at `max_depth`, from the target.

    Args:
        target_logits: float32, on a CPU also bfloat16, [n, V], last dim contiguous, after the
            request's logits processors; -inf: never sampled. Not normalised.
        target_rows: int32 [K + R], which row of `target_logits` each row of the trees has (per
            request the root, then its nodes); -1: none, the walk ends there without a last token.
        draft_probs: float32 [m, V_draft], last dim contiguous, q of the rows that have drawn
            children, as they were drawn from; need not sum to 1, not negative.
        draft_rows: int32 [K + R], which row of `draft_probs` each row has; -1: none, its children
            are passed over.
        draft_ids: int32 [V], the place of each of the target's tokens in the draft vocabulary, -1
            for none; None where the two are one.
        rules: int32 [R], of `AcceptRule`.
        uniforms: float64 [K + R], in [0, 1), independent of all drawn tokens. A node's decides
            whether it is accepted (DRAWN), or its row's token (BEST); a root's decides the last
            token (DRAWN), or the root's token (BEST).
        token_ids: int32 [K], in the target's vocabulary.
        parents: int32 [K], cu_nodes: int32 [R + 1].
        max_depth: nodes that are accepted at most.
        temperatures: float32 [R], above 0, by which the logits are divided; None: by nothing.
            Where a request is GREEDY it has no effect.

    Returns:
        accepted_rows: int32 [R, max_depth + 1], the path, root first; -1 behind its end.
        num_accepted: int32 [R], nodes of the path.
        last_tokens: int32 [R], the token behind the path; -1 where its row has no logits. A row
            whose logits are all -inf gives token 0.

    On CUDA and in Triton the values of rows, rules, parents, ids and tokens are trusted.

    Raises:
        RuntimeError: shapes, dtypes or values do not fit.
    """
    accepted_rows, num_accepted, last_tokens = implementation("sample_path", parents.is_cuda)(
        target_logits,
        target_rows,
        draft_probs,
        draft_rows,
        draft_ids,
        rules,
        uniforms,
        token_ids,
        parents,
        cu_nodes,
        max_depth,
        temperatures,
    )
    return accepted_rows, num_accepted, last_tokens


def select_budget(
    scores: Tensor,
    tiers: Tensor,
    parents: Tensor,
    budget: int,
    max_per_request: int,
    limit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The best candidates of a whole batch, at most `budget`, as trees.

    A candidate ranks by tier (ascending), score (descending), request, column (both ascending).
    Each request first keeps the `max_per_request` best of its own; the `budget` best of these are
    the result. As no child may rank before its parent, every result is ancestor-closed, and a
    result with a greater budget holds every one with a smaller.

    Args:
        scores: float32 [R, P]; -inf or NaN: there is no candidate in this column.
        tiers: int32 [R, P], 0 before 1 and so on; not read where there is no candidate.
        parents: int64 [R, P], an earlier column of the same request, or -1 for the root; not read
            where there is no candidate.
        budget: nodes of the whole batch, >= 0.
        max_per_request: nodes of one request, >= 0.
        limit: int32 [1], the budget where it is less than `budget`, read on the device: a CUDA
            graph keeps numbers and reads memory again. `budget` is then what there is room for.

    Returns:
        columns: int64 [min(budget, R * min(max_per_request, P))], -1 behind the last chosen one,
            which is at `cu_nodes[R] - 1`. Request i's columns are those from `cu_nodes[i]` on, by
            tier, falling score, column: parents come first, and every prefix is a tree.
        cu_nodes: int32 [R + 1].

    On CUDA P is at most 4096, and the candidates are trusted to be trees: nothing is raised, and
    a child that ranks before its parent may be chosen without it.

    Raises:
        RuntimeError: a child ranks before its parent, or its parent is no candidate or not an
            earlier column (request and column are named), or shapes and dtypes do not fit.
    """
    columns, cu_nodes = implementation("select_budget", scores.is_cuda)(
        scores, tiers, parents, budget, max_per_request, limit
    )
    return columns, cu_nodes


def pack_linear(weight: Tensor) -> Tensor:
    """A linear layer's weight in the order in which `packed_linear` reads it. CPU only.

    Args:
        weight: float32 [N, K], contiguous; or bfloat16, on a processor with `avx512_bf16`.

    Returns:
        Of a float32 weight [ceil(N / p), K, p], p being some vectors of the instruction set that
        runs here: bfloat16 where every weight is one (half the memory traffic, and the same
        products), else float32. Of a bfloat16 weight [ceil(N / p), ceil(K / 2), 2 * p].

    Raises:
        RuntimeError: shape, dtype or stride does not fit, or the processor does not.
    """
    load_library()
    packed: Tensor = torch.ops.echo_vllm.pack_linear(weight)
    return packed


def packed_linear(
    x: Tensor, packed: Tensor, num_columns: int, bias: Tensor | None = None
) -> Tensor:
    """`x @ weight.T + bias` for a weight of `pack_linear`. CPU only; made for few rows.

    A row of the result does not depend on the other rows, to the last bit.

    Args:
        x: [M, K] of the weight's dtype, last dim contiguous.
        packed: of `pack_linear`, on a machine with the same instruction sets.
        num_columns: N.
        bias: None or [N], of the dtype of x.

    Returns:
        [M, N] of the dtype of x; sums are in float32.

    Raises:
        RuntimeError: shapes, dtypes or strides do not fit.
    """
    load_library()
    out: Tensor = torch.ops.echo_vllm.packed_linear(x, packed, num_columns, bias)
    return out


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """`x / sqrt(mean(x ** 2) + epsilon) * weight` for every row, of x + residual if there is one.
    CPU only.

    Rounds where torch's operators, one by one, do, and sums in their order.

    Args:
        x: float32 or bfloat16 [M, H], contiguous.
        residual: None, or like x; becomes x + residual.
        weight: [H], of the dtype of x.

    Returns:
        [M, H], of the dtype of x.

    Raises:
        RuntimeError: shapes, dtypes or strides do not fit.
    """
    load_library()
    out: Tensor = torch.ops.echo_vllm.rms_norm(x, residual, weight, epsilon)
    return out


def draw_children(
    logits: Tensor,
    temperature: Tensor | None,
    keys: Tensor,
    k: int,
    scale: float = 0.0,
    exponent: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The first k draws from the distribution q of every row, without replacement, and what they
    are worth: `trees.draws.draw_children` and `forecast.gains` in one pass. CPU only.

    Args:
        logits: float32 or bfloat16 [rows, V_draft], last dim contiguous; -inf: never drawn.
        temperature: float32 [rows], above 0; None where all are 1.
        keys: int64 [rows], of the nodes that the rows belong to.
        k: draws a row, at least 1.
        scale, exponent: a token that is drawn with probability q is accepted with probability
            scale * q ** exponent; with a scale of 0 nothing is said of worths.

    Returns:
        token_ids: int64 [rows, k]; -1 where q has no more tokens, as in a row with NaN, with plus
            infinity, or without a finite logit.
        logprobs: float32 [rows, k], of q; -inf where there is no token.
        child_keys: int64 [rows, k].
        probs: float32 [rows, V_draft], q; NaN in a row that has none.
        gains, reaches: float32 [rows, k], the probability that the child is the one that is
            accepted, before and after it is drawn; [rows, 0] with a scale of 0.

    Raises:
        RuntimeError: shapes, dtypes or strides do not fit.
    """
    load_library()
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    found = torch.ops.echo_vllm.draw_children(logits, temperature, keys, k, scale, exponent)
    return found
