# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The forest's ancestor mask and the walk along the target's tokens, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_PER_PROGRAM = 32
NODES_PER_STEP = 128


@triton.jit(do_not_specialize=["num_requests", "num_rows"])
def _super_tree_kernel(
    parents,
    cu_nodes,
    mask,
    depths,
    num_requests,
    num_rows,
    num_words,
    REQUESTS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Each row walks up to its root; a program has ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    candidate = tl.arange(0, REQUESTS)
    is_request = candidate < num_requests
    first_row = tl.load(cu_nodes + candidate, mask=is_request, other=0) + candidate
    begun = (first_row[None, :] <= row[:, None]) & is_request[None, :]
    request = tl.sum(begun.to(tl.int32), 1) - 1
    first_node = tl.load(cu_nodes + request)
    ancestor = row - first_node - request - 1
    # Rows behind the last request belong to padded parents: no bits, depth 0.
    exists = (row < num_rows) & (ancestor < tl.load(cu_nodes + request + 1) - first_node)
    ancestor = tl.where(exists, ancestor, -1)

    word = tl.arange(0, WORDS)
    one = tl.full([ROWS, WORDS], 1, tl.int64)
    bits = tl.where(exists[:, None] & (word == 0)[None, :], one, 0)
    depth = tl.zeros([ROWS], tl.int32)
    while tl.max(ancestor, 0) >= 0:
        walks = ancestor >= 0
        bit = ancestor + 1
        here = walks[:, None] & (word[None, :] == (bit // 64)[:, None])
        bits |= tl.where(here, one << (bit % 64).to(tl.int64)[:, None], 0)
        depth += walks.to(tl.int32)
        parent = tl.load(parents + first_node + ancestor, mask=walks, other=-1)
        # A parent comes before its child; anything else would never end.
        ancestor = tl.where(parent < ancestor, parent, -1)
    in_mask = (row < num_rows)[:, None] & (word < num_words)[None, :]
    tl.store(mask + row.to(tl.int64)[:, None] * num_words + word[None, :], bits, mask=in_mask)
    tl.store(depths + row, depth, mask=row < num_rows)


def build_super_tree(parents: Tensor, cu_nodes: Tensor, num_words: int) -> tuple[Tensor, Tensor]:
    """See `echo_vllm.ops.build_super_tree`.

    Parents may be padded: rows behind the last request's get no bits and depth 0. Bits that do not
    fit the words are dropped.
    """
    check_forest("build_super_tree", parents, cu_nodes)
    if num_words < 1:
        raise RuntimeError(f"build_super_tree: num_words must be >= 1, got {num_words}")
    num_requests = cu_nodes.shape[0] - 1
    num_rows = parents.shape[0] + num_requests
    if num_requests == 0:
        return parents.new_zeros((num_rows, num_words), dtype=torch.int64), parents.new_zeros(
            num_rows
        )
    mask = parents.new_empty((num_rows, num_words), dtype=torch.int64)
    depths = parents.new_empty(num_rows)
    _super_tree_kernel[(triton.cdiv(num_rows, ROWS_PER_PROGRAM),)](
        parents,
        cu_nodes,
        mask,
        depths,
        num_requests,
        num_rows,
        num_words,
        REQUESTS=triton.next_power_of_2(num_requests),
        ROWS=ROWS_PER_PROGRAM,
        WORDS=triton.next_power_of_2(num_words),
        num_warps=4,
    )
    return mask, depths


@triton.jit(do_not_specialize=["max_depth"])
def _accept_kernel(
    sampled,
    token_ids,
    parents,
    cu_nodes,
    accepted_rows,
    num_accepted,
    max_depth,
    NODES: tl.constexpr,
):
    """One request descends; every step looks at all nodes behind the row it has reached."""
    request = tl.program_id(0)
    first_node = tl.load(cu_nodes + request)
    num_nodes = tl.load(cu_nodes + request + 1) - first_node
    path = accepted_rows + request.to(tl.int64) * (max_depth + 1)
    tl.store(path, 0)
    row = first_node * 0  # -1 once no child holds the token
    count = first_node * 0
    for depth in range(1, max_depth + 1):
        target = tl.load(sampled + first_node + request + row, mask=row >= 0, other=0)
        child = num_nodes
        # A node's row is its index + 1, so the children of `row` start at node `row`.
        for start in range(tl.where(row >= 0, row, num_nodes), num_nodes, NODES):
            node = start + tl.arange(0, NODES)
            exists = node < num_nodes
            parent = tl.load(parents + first_node + node, mask=exists, other=-2)
            token = tl.load(token_ids + first_node + node, mask=exists, other=0)
            found = exists & (parent == row - 1) & (token == target)
            child = tl.minimum(child, tl.min(tl.where(found, node, num_nodes), 0))
        row = tl.where(child < num_nodes, child + 1, -1)
        count += (row >= 0).to(tl.int32)
        tl.store(path + depth, row)
    tl.store(num_accepted + request, count)


def accept_path(
    sampled: Tensor, token_ids: Tensor, parents: Tensor, cu_nodes: Tensor, max_depth: int
) -> tuple[Tensor, Tensor]:
    """See `echo_vllm.ops.accept_path`. Parents and token ids may be padded."""
    check_forest("accept_path", parents, cu_nodes)
    if max_depth < 0:
        raise RuntimeError(f"accept_path: max_depth must be >= 0, got {max_depth}")
    num_requests = cu_nodes.shape[0] - 1
    if sampled.dtype != torch.int64 or sampled.shape != (parents.shape[0] + num_requests,):
        raise RuntimeError(
            f"accept_path: sampled must be int64 [{parents.shape[0] + num_requests}], got "
            f"{sampled.dtype} {list(sampled.shape)}"
        )
    if token_ids.dtype not in (torch.int32, torch.int64) or token_ids.shape != parents.shape:
        raise RuntimeError(
            f"accept_path: token_ids must be int32 or int64 {list(parents.shape)}, got "
            f"{token_ids.dtype} {list(token_ids.shape)}"
        )
    accepted_rows = parents.new_empty((num_requests, max_depth + 1))
    num_accepted = parents.new_empty(num_requests)
    if num_requests:
        _accept_kernel[(num_requests,)](
            sampled.contiguous(),
            token_ids.contiguous(),
            parents,
            cu_nodes,
            accepted_rows,
            num_accepted,
            max_depth,
            NODES=NODES_PER_STEP,
            num_warps=1,
        )
    return accepted_rows, num_accepted


def check_forest(op: str, parents: Tensor, cu_nodes: Tensor) -> None:
    """Raises RuntimeError where the two are not the vectors of a forest."""
    for name, tensor in (("parents", parents), ("cu_nodes", cu_nodes)):
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise RuntimeError(
                f"{op}: {name} must be a contiguous int32 vector, got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    if cu_nodes.shape[0] == 0:
        raise RuntimeError(f"{op}: cu_nodes must hold at least the 0 it starts with")
