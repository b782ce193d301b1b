# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The walk that samples from the target's logits, by recursive rejection where children were drawn.

The arithmetic is that of csrc/common/rejection.h: after the rejections so far a token weighs
max(p - scale * q, 0), so a program needs no memory beyond its registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from echo_vllm.ops.rules import AcceptRule
from echo_vllm.ops.triton_kernels.forest import check_forest

TOKENS_PER_STEP = 2048

_GREEDY = tl.constexpr(int(AcceptRule.GREEDY))
_BEST = tl.constexpr(int(AcceptRule.BEST))
_DRAWN = tl.constexpr(int(AcceptRule.DRAWN))


@triton.jit
def _draft_weights(draft, draft_ids, tokens, inside, HAS_IDS: tl.constexpr):
    ids = tl.load(draft_ids + tokens, mask=inside, other=-1) if HAS_IDS else tokens
    return tl.load(draft + ids, mask=inside & (ids >= 0), other=0.0)


@triton.jit
def _weights(
    logits,
    draft,
    draft_ids,
    tokens,
    vocab,
    top,
    scale,
    sharpness,
    IS_TOP: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    """What tokens weigh: 1 for those of the greatest logit, or what is left of
    exp((logit - top) * sharpness)."""
    inside = tokens < vocab
    values = tl.load(logits + tokens, mask=inside, other=float("-inf"))
    if IS_TOP:
        return tl.where(inside & (values == top), 1.0, 0.0)
    rejected = tl.where(inside, scale, 0.0) > 0
    q = _draft_weights(draft, draft_ids, tokens, rejected, HAS_IDS)
    return tl.maximum(tl.exp((values - top) * sharpness) - scale * q, 0.0)


@triton.jit
def _sum(
    logits,
    draft,
    draft_ids,
    vocab,
    top,
    scale,
    sharpness,
    HAS_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        weights = _weights(
            logits, draft, draft_ids, tokens, vocab, top, scale, sharpness, False, HAS_IDS
        )
        total += weights.to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _sample(
    logits,
    draft,
    draft_ids,
    vocab,
    top,
    scale,
    sharpness,
    place,
    IS_TOP: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first token at which the sum from the left passes `place`; the last one with any weight
    where rounding leaves none; 0 where nothing has."""
    before = place * 0.0
    found = vocab
    last = vocab * 0
    for start in range(0, vocab, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        weights = _weights(
            logits, draft, draft_ids, tokens, vocab, top, scale, sharpness, IS_TOP, HAS_IDS
        )
        wide = weights.to(tl.float64)
        through = before + tl.cumsum(wide, 0)
        passed = (weights > 0) & (through > place)
        found = tl.minimum(found, tl.min(tl.where(passed, tokens, vocab), 0))
        last = tl.maximum(last, tl.max(tl.where(weights > 0, tokens, 0), 0))
        before += tl.sum(wide, 0)
    return tl.where(found < vocab, found, last)


@triton.jit
def _child_with(parents, token_ids, num_nodes, row, token):
    """The child of `row` that holds `token`, as a row, or -1."""
    child = row * 0 - 1
    for node in range(row, num_nodes):
        is_child = tl.load(parents + node) == row - 1
        if is_child & (tl.load(token_ids + node) == token) & (child < 0):
            child = node + 1
    return child


@triton.jit(do_not_specialize=["vocab", "draft_vocab", "max_depth"])
def _sample_path_kernel(
    target_logits,
    target_rows,
    draft_probs,
    draft_rows,
    draft_ids,
    rules,
    temperatures,
    uniforms,
    token_ids,
    parents,
    cu_nodes,
    accepted_rows,
    num_accepted,
    last_tokens,
    vocab,
    draft_vocab,
    target_stride,
    draft_stride,
    max_depth,
    HAS_IDS: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One request's walk."""
    request = tl.program_id(0)
    first_node = tl.load(cu_nodes + request)
    num_nodes = tl.load(cu_nodes + request + 1) - first_node
    first_row = first_node + request
    parents += first_node
    token_ids += first_node
    uniforms += first_row
    rule = tl.load(rules + request)
    sharpness = 1.0 / (tl.load(temperatures + request) if HAS_TEMPERATURES else 1.0)
    path = accepted_rows + request.to(tl.int64) * (max_depth + 1)
    tl.store(path, 0)
    row = first_node * 0
    count = first_node * 0
    last = first_node * 0 - 1
    walks = first_node >= 0
    while walks:
        target_row = tl.load(target_rows + first_row + row)
        last = row * 0 - 1
        child = row * 0 - 1
        if target_row >= 0:
            logits = target_logits + target_row.to(tl.int64) * target_stride
            best = tl.full([BLOCK], float("-inf"), tl.float32)
            for start in range(0, vocab, BLOCK):
                tokens = start + tl.arange(0, BLOCK)
                values = tl.load(logits + tokens, mask=tokens < vocab, other=float("-inf"))
                best = tl.maximum(best, values)
            top = tl.max(best, 0)
            scale = top * 0.0
            is_greedy = (rule == _GREEDY) | (tl.abs(top) == float("inf"))
            if is_greedy:
                zero = tl.full([], 0.0, tl.float64)
                last = _sample(
                    logits,
                    draft_probs,
                    draft_ids,
                    vocab,
                    top,
                    top,
                    sharpness,
                    zero,
                    True,
                    HAS_IDS,
                    BLOCK,
                )
                child = _child_with(parents, token_ids, num_nodes, row, last)
            else:
                total = _sum(
                    logits, draft_probs, draft_ids, vocab, top, scale, sharpness, HAS_IDS, BLOCK
                )
                draft_row = tl.load(draft_rows + first_row + row)
                rejects = (rule == _DRAWN) & (draft_row >= 0) & (count < max_depth)
                draft_row = tl.where(rejects, draft_row, 0).to(tl.int64)
                draft = draft_probs + draft_row * draft_stride
                if rejects:
                    left = tl.zeros([BLOCK], tl.float64)
                    for start in range(0, draft_vocab, BLOCK):
                        ids = start + tl.arange(0, BLOCK)
                        q = tl.load(draft + ids, mask=ids < draft_vocab, other=0.0)
                        left += q.to(tl.float64)
                    draft_left = tl.sum(left, 0)
                    goes_on = row >= 0
                    for node in range(row, num_nodes):
                        if goes_on & (tl.load(parents + node) == row - 1):
                            token = tl.load(token_ids + node)
                            weight = _draft_weights(draft, draft_ids, token, row >= 0, HAS_IDS)
                            value = tl.load(logits + token)
                            mine = tl.exp((value - top) * sharpness) - scale * weight
                            mine = tl.maximum(mine, 0.0)
                            wide = weight.to(tl.float64)
                            divisor = tl.maximum(draft_left, wide)
                            uniform = tl.load(uniforms + node + 1)
                            if weight > 0:
                                if uniform * (wide / divisor) * total < mine.to(tl.float64):
                                    child = node + 1
                                    goes_on = row < 0
                                else:
                                    after = (scale.to(tl.float64) + total / divisor).to(tl.float32)
                                    rest = _sum(
                                        logits,
                                        draft,
                                        draft_ids,
                                        vocab,
                                        top,
                                        after,
                                        sharpness,
                                        HAS_IDS,
                                        BLOCK,
                                    )
                                    if rest > 0:
                                        scale = after
                                        total = rest
                                        draft_left = tl.maximum(draft_left - wide, 0.0)
                                    else:  # r_j and q_j differ by rounding only
                                        goes_on = row < 0
                if child < 0:
                    own = tl.where(rule == _BEST, row, 0)
                    place = tl.load(uniforms + own) * total
                    last = _sample(
                        logits,
                        draft,
                        draft_ids,
                        vocab,
                        top,
                        scale,
                        sharpness,
                        place,
                        False,
                        HAS_IDS,
                        BLOCK,
                    )
                    if rule == _BEST:
                        child = _child_with(parents, token_ids, num_nodes, row, last)
        walks = (child > 0) & (count < max_depth)
        if walks:
            count += 1
            row = child
            tl.store(path + count, row)
    for depth in range(count + 1, max_depth + 1):
        tl.store(path + depth, -1)
    tl.store(num_accepted + request, count)
    tl.store(last_tokens + request, last)


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
    """See `echo_vllm.ops.sample_path`."""
    op = "sample_path"
    check_forest(op, parents, cu_nodes)
    if max_depth < 0:
        raise RuntimeError(f"{op}: max_depth must be >= 0, got {max_depth}")
    for name, matrix in (("target_logits", target_logits), ("draft_probs", draft_probs)):
        if matrix.dtype != torch.float32 or matrix.dim() != 2 or matrix.stride(1) != 1:
            raise RuntimeError(
                f"{op}: {name} must be a float32 matrix whose last dimension is contiguous, got "
                f"{matrix.dtype} {list(matrix.shape)}"
            )
    num_requests, vocab = cu_nodes.shape[0] - 1, target_logits.shape[1]
    num_rows = parents.shape[0] + num_requests
    vectors = [
        ("target_rows", target_rows, torch.int32, num_rows),
        ("draft_rows", draft_rows, torch.int32, num_rows),
        ("rules", rules, torch.int32, num_requests),
        ("uniforms", uniforms, torch.float64, num_rows),
        ("token_ids", token_ids, torch.int32, parents.shape[0]),
    ]
    if temperatures is not None:
        vectors.append(("temperatures", temperatures, torch.float32, num_requests))
    if draft_ids is not None:
        vectors.append(("draft_ids", draft_ids, torch.int32, vocab))
    elif draft_probs.shape[0] and draft_probs.shape[1] != vocab:
        raise RuntimeError(
            f"{op}: without draft_ids the vocabularies must be one, got {draft_probs.shape[1]} "
            f"columns of draft_probs for {vocab} of target_logits"
        )
    for name, vector, dtype, size in vectors:
        if vector.dtype != dtype or vector.shape != (size,) or not vector.is_contiguous():
            raise RuntimeError(
                f"{op}: {name} must be a contiguous {dtype} [{size}], got {vector.dtype} "
                f"{list(vector.shape)}"
            )
    accepted_rows = parents.new_empty((num_requests, max_depth + 1))
    num_accepted = parents.new_empty(num_requests)
    last_tokens = parents.new_empty(num_requests)
    if num_requests:
        _sample_path_kernel[(num_requests,)](
            target_logits,
            target_rows,
            draft_probs,
            draft_rows,
            rules if draft_ids is None else draft_ids,
            rules,
            rules if temperatures is None else temperatures,
            uniforms,
            token_ids,
            parents,
            cu_nodes,
            accepted_rows,
            num_accepted,
            last_tokens,
            vocab,
            draft_probs.shape[1],
            target_logits.stride(0),
            draft_probs.stride(0),
            max_depth,
            HAS_IDS=draft_ids is not None,
            HAS_TEMPERATURES=temperatures is not None,
            BLOCK=TOKENS_PER_STEP,
            num_warps=8,
        )
    return accepted_rows, num_accepted, last_tokens
