# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Every operator of `echo_vllm.ops` in plain torch, written to be obviously right.

The tests compare the kernels with these, and `ECHO_VLLM_OPS=reference` runs the whole engine on
them. They loop over requests and rows in Python: nothing here is meant to be fast.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from echo_vllm.ops.rules import AcceptRule

BITS_PER_WORD = 64


def key_offsets(layout: str, block_size: int, head_size: int) -> Tensor:
    """Where K of (token, dim) lies in one (block, kv head) region: int64 [block_size, head_size].

    Raises ValueError for a layout that has no such region.
    """
    token = torch.arange(block_size)[:, None]
    dim = torch.arange(head_size)[None, :]
    if layout in ("vec", "vec16"):
        return dim * block_size + token
    if layout == "amx":
        return token // 16 * 16 * head_size + dim // 2 * 32 + token % 16 * 2 + dim % 2
    raise ValueError(f"layout must be one of vec, vec16, amx, got {layout!r}")


def value_offsets(layout: str, block_size: int, head_size: int) -> Tensor:
    """Where V of (token, dim) lies inside one (block, kv head) region; see `key_offsets`."""
    token = torch.arange(block_size)[:, None]
    dim = torch.arange(head_size)[None, :]
    if layout in ("vec", "vec16"):
        return token * head_size + dim
    if layout == "amx":
        return dim // 16 * 16 * block_size + token // 2 * 32 + dim % 16 * 2 + token % 2
    raise ValueError(f"layout must be one of vec, vec16, amx, got {layout!r}")


def gather_context(
    key_cache: Tensor, value_cache: Tensor, blocks: Tensor, length: int, layout: str
) -> tuple[Tensor, Tensor]:
    """K and V of the first `length` tokens of a request: [length, num_kv_heads, head_size] each."""
    block_ids = blocks.long()
    if layout == "nhd":
        key = key_cache[block_ids].flatten(0, 1)[:length]
        value = value_cache[block_ids].flatten(0, 1)[:length]
        return key, value
    block_size, head_size = key_cache.shape[2:]
    gathered = []
    for cache, offsets in (
        (key_cache, key_offsets(layout, block_size, head_size)),
        (value_cache, value_offsets(layout, block_size, head_size)),
    ):
        regions = cache[block_ids].flatten(2)  # [blocks, kv heads, block_size * head_size]
        tokens = regions[:, :, offsets]  # [blocks, kv heads, block_size, head_size]
        gathered.append(tokens.transpose(1, 2).flatten(0, 1)[:length])
    return gathered[0], gathered[1]


def mask_bits(mask: Tensor, length: int) -> Tensor:
    """The first `length` bits of each row of an int64 [rows, words] mask: bool [rows, length]."""
    column = torch.arange(length, device=mask.device)
    words = mask[:, column // BITS_PER_WORD]
    return (words >> (column % BITS_PER_WORD)) & 1 != 0


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
    """See `echo_vllm.ops.tree_attention`. Computes in float64 where the input is float32."""
    accumulate = torch.float64 if query.dtype == torch.float32 else torch.float32
    block_size = key_cache.shape[1 if layout == "nhd" else 2]
    group = query.shape[1] // suffix_key.shape[1]
    for request in range(context_lens.shape[0]):
        first_mask_row, end_mask_row = row_start[request : request + 2].tolist()
        rows = end_mask_row - first_mask_row
        if rows == 0:
            continue
        first_row = int(query_start[request])
        context = int(context_lens[request])
        start, length = int(suffix_start[request]), int(suffix_len[request])
        num_blocks = -(-context // block_size)
        context_key, context_value = gather_context(
            key_cache, value_cache, block_table[request, :num_blocks], context, layout
        )
        own = slice(start, start + length)
        key = torch.cat([context_key.to(accumulate) * k_scale, suffix_key[own].to(accumulate)])
        value = torch.cat(
            [context_value.to(accumulate) * v_scale, suffix_value[own].to(accumulate)]
        )

        visible = torch.ones(rows, context + length, dtype=torch.bool, device=query.device)
        if sliding_window > 0:
            position = positions[first_row : first_row + rows, None]
            token = torch.arange(context, device=query.device)
            visible[:, :context] = token > position - sliding_window
        visible[:, context:] = mask_bits(mask[first_mask_row:end_mask_row], length)

        # [kv heads, group, rows, D] x [kv heads, 1, keys, D]
        q = query[first_row : first_row + rows].to(accumulate)
        q = q.view(rows, -1, group, q.shape[-1])
        k = key.permute(1, 0, 2)[:, None]
        scores = q.permute(1, 2, 0, 3) @ k.transpose(-1, -2) * scale
        if softcap > 0:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~visible, float("-inf"))
        against = scores
        if sinks is not None:  # one more score in every row's softmax, and nothing behind it
            sink = sinks.to(accumulate).view(-1, group, 1, 1).expand(*scores.shape[:3], 1)
            against = torch.cat([scores, sink], -1)
        # A row that sees nothing gives zeros. What no row sees may be unwritten memory.
        weights = torch.softmax(against, -1)[..., : scores.shape[-1]].nan_to_num(0.0)
        v = value.permute(1, 0, 2)[:, None]
        v = v.masked_fill(~visible.any(0)[:, None], 0.0)
        result = (weights @ v).permute(2, 0, 1, 3).flatten(1, 2)
        out[first_row : first_row + rows] = result.to(out.dtype)
        if lse is not None:
            lse[:, first_row : first_row + rows] = scores.logsumexp(-1).flatten(0, 1).to(lse.dtype)


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
    """See `echo_vllm.ops.suffix_attention`: tree attention whose requests have no context."""
    nothing = query.new_zeros((0, 1, *suffix_key.shape[1:]))
    tree_attention(
        query=query,
        key_cache=nothing,
        value_cache=nothing,
        block_table=suffix_len.new_zeros((suffix_len.shape[0], 0)),
        context_lens=torch.zeros_like(suffix_len),
        query_start=query_start,
        row_start=row_start,
        suffix_key=suffix_key,
        suffix_value=suffix_value,
        suffix_start=suffix_start,
        suffix_len=suffix_len,
        mask=mask,
        positions=suffix_len.long(),  # not read: there is no window
        scale=scale,
        softcap=softcap,
        sliding_window=-1,
        layout="nhd",
        out=out,
        lse=lse,
    )


def merge_partials(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention to a union of disjoint sets of keys from the attention to each.

    Args:
        parts: (output [..., D], LSE [...]) of each set, floating point. An LSE of -inf: the row
            saw nothing, and its output is not read.

    Returns:
        output [..., D] and LSE [...] in float32 or wider; zeros and -inf where all LSEs are -inf.
    """
    lses = torch.stack([lse.to(torch.promote_types(lse.dtype, torch.float32)) for _, lse in parts])
    top = lses.amax(0)
    weights = torch.exp(lses - top.masked_fill(top == float("-inf"), 0.0))
    total = weights.sum(0)
    merged = torch.zeros(parts[0][0].shape, dtype=lses.dtype, device=lses.device)
    for (output, _), weight in zip(parts, weights, strict=True):
        share = (weight / total)[..., None]
        merged += (output * share).masked_fill(weight[..., None] == 0, 0.0)
    return merged, torch.log(total) + top


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
    """See `echo_vllm.ops.merge_attention`."""
    starts = row_start.tolist()
    for request, (begin, end) in enumerate(itertools.pairwise(starts)):
        first = int(query_start[request])
        own = slice(first, first + end - begin)
        merged, merged_lse = merge_partials(
            [
                # +inf is what FlashAttention 2 writes for a row that saw nothing.
                (part[own], of_part[:, own].T.masked_fill(of_part[:, own].T.isposinf(), -math.inf))
                for part, of_part in ((prefix_out, prefix_lse), (suffix_out, suffix_lse))
            ]
        )
        out[own] = merged.to(out.dtype)
        if lse is not None:
            lse[:, own] = merged_lse.T


def commit_kv(
    kv_caches: list[Tensor], src_slots: Tensor, dst_slots: Tensor, block_size: int, layout: str
) -> None:
    """See `echo_vllm.ops.commit_kv`."""
    moves = [
        (src, dst)
        for src, dst in zip(src_slots.tolist(), dst_slots.tolist(), strict=True)
        if src >= 0 and dst >= 0
    ]
    for kv_cache in kv_caches:
        num_blocks, num_kv_heads, _, row = kv_cache.shape
        if layout in ("nhd", "hnd"):
            rows = [kv_cache[src // block_size, :, src % block_size].clone() for src, _ in moves]
            for (_, dst), held_row in zip(moves, rows, strict=True):
                kv_cache[dst // block_size, :, dst % block_size] = held_row
            continue
        head_size = row // 2
        # [blocks, kv heads, K or V, block_size * head_size], a view
        regions = kv_cache.view(num_blocks, num_kv_heads, 2, block_size * head_size)
        for which, offsets in (
            (0, key_offsets(layout, block_size, head_size)),
            (1, value_offsets(layout, block_size, head_size)),
        ):
            region = regions[:, :, which]
            held = [
                region[src // block_size][:, offsets[src % block_size]].clone() for src, _ in moves
            ]
            for (_, dst), tokens in zip(moves, held, strict=True):
                region[dst // block_size][:, offsets[dst % block_size]] = tokens


def build_super_tree(parents: Tensor, cu_nodes: Tensor, num_words: int) -> tuple[Tensor, Tensor]:
    """See `echo_vllm.ops.build_super_tree`."""
    mask_rows: list[list[int]] = []
    depths: list[int] = []
    bounds = cu_nodes.tolist()
    for begin, end in itertools.pairwise(bounds):
        ancestors_of_root = 1  # bit 0: the root sees itself
        rows = [ancestors_of_root]
        depth = [0]
        for node, parent in enumerate(parents[begin:end].tolist()):
            rows.append(rows[parent + 1] | 1 << (node + 1))
            depth.append(depth[parent + 1] + 1)
        if end - begin + 1 > num_words * BITS_PER_WORD:
            raise RuntimeError(
                f"build_super_tree: {end - begin + 1} rows do not fit {num_words} words"
            )
        mask_rows += [[_signed_word(row, word) for word in range(num_words)] for row in rows]
        depths += depth
    mask = torch.tensor(mask_rows, dtype=torch.int64).reshape(len(depths), num_words)
    return mask.to(parents.device), torch.tensor(depths, dtype=torch.int32, device=parents.device)


def _signed_word(bits: int, word: int) -> int:
    unsigned = bits >> (word * BITS_PER_WORD) & (1 << BITS_PER_WORD) - 1
    return unsigned - (1 << BITS_PER_WORD) if unsigned >> (BITS_PER_WORD - 1) else unsigned


def accept_path(
    sampled: Tensor, token_ids: Tensor, parents: Tensor, cu_nodes: Tensor, max_depth: int
) -> tuple[Tensor, Tensor]:
    """See `echo_vllm.ops.accept_path`."""
    bounds = cu_nodes.tolist()
    accepted_rows = torch.full((len(bounds) - 1, max_depth + 1), -1, dtype=torch.int32)
    num_accepted = torch.zeros(len(bounds) - 1, dtype=torch.int32)
    for request, (begin, end) in enumerate(itertools.pairwise(bounds)):
        targets = sampled[begin + request : end + request + 1].tolist()
        child = {
            (parent + 1, token): node + 1
            for node, (parent, token) in enumerate(
                zip(parents[begin:end].tolist(), token_ids[begin:end].tolist(), strict=True)
            )
        }
        path = [0]
        while len(path) <= max_depth and (path[-1], targets[path[-1]]) in child:
            path.append(child[path[-1], targets[path[-1]]])
        accepted_rows[request, : len(path)] = torch.tensor(path, dtype=torch.int32)
        num_accepted[request] = len(path) - 1
    return accepted_rows.to(parents.device), num_accepted.to(parents.device)


def rejection(p: Tensor, q: Tensor, tokens: Sequence[int]) -> tuple[list[float], Tensor]:
    """Recursive rejection at one row, as the textbook has it.

    Args:
        p: float64 [V], the target's distribution.
        q: float64 [V], the draft's, from which `tokens` were drawn without replacement.
        tokens: in the order of drawing; one that q cannot have drawn is never accepted.

    Returns:
        per token the probability that it is accepted where the ones before it are rejected, and
        float64 [V], the distribution of the token where all are.
    """
    residual, left = p / p.sum(), q.clone()
    accepted: list[float] = []
    for token in tokens:
        if left[token] <= 0:
            accepted.append(0.0)
            continue
        draft = left / left.sum()
        accepted.append(min(1.0, float(residual[token] / draft[token])))
        rest = (residual - draft).clamp(min=0.0)
        # Nothing is left where the two are equal: this rejection happens by rounding only.
        residual = rest / rest.sum() if float(rest.sum()) > 0 else residual
        left[token] = 0.0
    return accepted, residual


def _sample(distribution: Tensor, uniform: float) -> int:
    """The first token at which the sum from the left passes `uniform`."""
    support = distribution.nonzero().flatten().tolist()
    through = distribution.cumsum(0)
    passed = [token for token in support if float(through[token]) > uniform * float(through[-1])]
    return int((passed or support)[0 if passed else -1])


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
    """See `echo_vllm.ops.sample_path`. Computes in float64."""
    bounds, device = cu_nodes.tolist(), parents.device
    paths = torch.full((len(bounds) - 1, max_depth + 1), -1, dtype=torch.int32)
    last_tokens = torch.full((len(bounds) - 1,), -1, dtype=torch.int32)
    ids = torch.arange(target_logits.shape[1], device=device) if draft_ids is None else draft_ids
    for request, (begin, end) in enumerate(itertools.pairwise(bounds)):
        first, rule = begin + request, AcceptRule(int(rules[request]))
        tokens, above = token_ids[begin:end].tolist(), parents[begin:end].tolist()
        uniform = uniforms[first : end + request + 1].tolist()
        path = [0]
        while True:
            row, logits_row = path[-1], int(target_rows[first + path[-1]])
            if logits_row < 0:
                break
            children = [node for node, parent in enumerate(above) if parent == row - 1]
            if len(path) > max_depth:
                children = []
            logits = target_logits[logits_row].double()
            if temperatures is not None and rule is not AcceptRule.GREEDY:
                logits /= float(temperatures[request])
            p = torch.softmax(logits, 0)
            nothing_is_allowed = bool(p.isnan().any())
            if rule is not AcceptRule.DRAWN or nothing_is_allowed:
                greedy = rule is AcceptRule.GREEDY or nothing_is_allowed
                token = int((logits == logits.max()).nonzero()[0]) if greedy else 0
                token = token if greedy else _sample(p, uniform[row])
                accepted = next((node for node in children if tokens[node] == token), None)
            else:
                q = torch.zeros_like(p)
                if (draft_row := int(draft_rows[first + row])) >= 0:
                    known = ids >= 0
                    q[known] = draft_probs[draft_row].double()[ids[known].long()]
                chances, residual = rejection(p, q, [tokens[node] for node in children])
                accepted = next(
                    (
                        node
                        for node, chance in zip(children, chances, strict=True)
                        if uniform[node + 1] < chance
                    ),
                    None,
                )
                token = _sample(residual, uniform[0]) if accepted is None else -1
            if accepted is None:
                last_tokens[request] = token
                break
            path.append(accepted + 1)
        paths[request, : len(path)] = torch.tensor(path, dtype=torch.int32)
    num_accepted = ((paths >= 0).sum(1) - 1).to(torch.int32)
    return paths.to(device), num_accepted.to(device), last_tokens.to(device)


def select_budget(
    scores: Tensor,
    tiers: Tensor,
    parents: Tensor,
    budget: int,
    max_per_request: int,
    limit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `echo_vllm.ops.select_budget`."""
    for name, count in (("budget", budget), ("max_per_request", max_per_request)):
        if count < 0:
            raise RuntimeError(f"select_budget: {name} must be >= 0, got {count}")
    candidates: list[tuple[int, float, int, int]] = []  # tier, -score, request, column
    for request, row in enumerate(scores.tolist()):
        own: list[tuple[int, float, int, int]] = []
        rank: dict[int, tuple[int, float]] = {-1: (-(2**31), -math.inf)}  # column -> its rank
        for column, score in enumerate(row):
            if math.isnan(score) or score == -math.inf:
                continue
            parent, tier = int(parents[request, column]), int(tiers[request, column])
            where = f"column {column} of request {request}"
            if not -1 <= parent < column:
                raise RuntimeError(
                    f"select_budget: the parent of {where} must be -1 (the root) or an earlier "
                    f"column, got {parent}"
                )
            if parent not in rank:
                raise RuntimeError(
                    f"select_budget: {where} has a score, but its parent, column {parent}, has none"
                )
            rank[column] = (tier, -score)
            if rank[column] < rank[parent]:
                raise RuntimeError(
                    f"select_budget: {where} ranks before its parent, column {parent}"
                )
            own.append((tier, -score, request, column))
        candidates += sorted(own)[:max_per_request]
    now = budget if limit is None else min(budget, max(0, int(limit)))
    kept = sorted(candidates)[:now]
    trees = [[node[3] for node in kept if node[2] == request] for request in range(len(scores))]
    cu_nodes = torch.zeros(len(trees) + 1, dtype=torch.int32)
    cu_nodes[1:] = torch.tensor([len(tree) for tree in trees], dtype=torch.int32).cumsum(0)
    columns = torch.full((min(budget, len(trees) * min(max_per_request, scores.shape[1])),), -1)
    chosen = [column for tree in trees for column in tree]
    columns[: len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
    return columns.to(scores.device), cu_nodes.to(scores.device)
