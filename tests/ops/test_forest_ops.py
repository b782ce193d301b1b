# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""build_super_tree and accept_path against the reference and against their definitions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from echo_vllm import ops
from echo_vllm.ops import reference

Tree = list[tuple[int, int]]  # (parent, token) of every node


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 150) -> Tree:
    """A tree in which no two siblings share a token."""
    parents: list[int] = []
    shape = draw(st.sampled_from(["any", "chain", "star"]))
    for node in range(draw(st.integers(0, max_nodes))):
        lowest = {"any": -1, "chain": node - 1, "star": -1}[shape]
        highest = {"any": node - 1, "chain": node - 1, "star": -1}[shape]
        parents.append(draw(st.integers(lowest, highest)))
    siblings: dict[int, int] = {}
    tree = []
    for parent in parents:
        siblings[parent] = siblings.get(parent, 0) + 1
        tree.append((parent, 3 * siblings[parent] % 7 + 7 * (siblings[parent] // 7)))
    return tree


def flat(forest: list[Tree]) -> tuple[Tensor, Tensor, Tensor]:
    """parents, token_ids, cu_nodes"""
    bounds = [0]
    for tree in forest:
        bounds.append(bounds[-1] + len(tree))
    nodes = [node for tree in forest for node in tree]
    parents = torch.tensor([parent for parent, _ in nodes], dtype=torch.int32)
    tokens = torch.tensor([token for _, token in nodes], dtype=torch.int32)
    return parents, tokens, torch.tensor(bounds, dtype=torch.int32)


@given(forest=st.lists(trees(), max_size=4))
@settings(max_examples=60, deadline=None)
def test_mask_bits_are_the_ancestors(forest: list[Tree]) -> None:
    parents, _, cu_nodes = flat(forest)
    num_words = max((len(tree) // 64 + 1 for tree in forest), default=1)
    mask, depths = ops.build_super_tree(parents, cu_nodes, num_words)
    expected_mask, expected_depths = reference.build_super_tree(parents, cu_nodes, num_words)
    assert torch.equal(mask, expected_mask)
    assert torch.equal(depths, expected_depths)
    for request, tree in enumerate(forest):
        first = int(cu_nodes[request]) + request
        bits = reference.mask_bits(mask[first : first + len(tree) + 1], len(tree) + 1)
        assert bits[:, 0].all(), "every row sees the root"
        assert torch.equal(bits.sum(1) - 1, depths[first : first + len(tree) + 1])
        for node, (parent, _) in enumerate(tree):
            of_parent = bits[parent + 1].clone()
            of_parent[node + 1] = True
            assert torch.equal(bits[node + 1], of_parent)


@given(forest=st.lists(trees(60), min_size=1, max_size=4), data=st.data())
@settings(max_examples=100, deadline=None)
def test_accepted_path_follows_the_samples(forest: list[Tree], data: st.DataObject) -> None:
    parents, token_ids, cu_nodes = flat(forest)
    # Sample mostly a child's token, so that paths are long.
    sampled: list[int] = []
    for tree in forest:
        for row in range(len(tree) + 1):
            children = [token for parent, token in tree if parent + 1 == row]
            sampled.append(data.draw(st.sampled_from([*children, *children, 1000])))
    targets = torch.tensor(sampled)
    max_depth = data.draw(st.integers(0, 60))
    token_dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    arguments = (targets, token_ids.to(token_dtype), parents, cu_nodes, max_depth)
    rows, counts = ops.accept_path(*arguments)
    expected_rows, expected_counts = reference.accept_path(*arguments)
    assert torch.equal(rows, expected_rows)
    assert torch.equal(counts, expected_counts)
    for request, tree in enumerate(forest):
        path = rows[request, : int(counts[request]) + 1].tolist()
        own = sampled[int(cu_nodes[request]) + request :]
        assert path[0] == 0
        for above, row in itertools.pairwise(path):
            assert tree[row - 1] == (above - 1, own[above])
        assert (rows[request, len(path) :] == -1).all()
        if len(path) <= max_depth:
            assert (path[-1] - 1, own[path[-1]]) not in tree, "the walk stopped early"


def test_trees_without_nodes_have_a_root() -> None:
    parents = torch.empty(0, dtype=torch.int32)
    cu_nodes = torch.zeros(3, dtype=torch.int32)
    mask, depths = ops.build_super_tree(parents, cu_nodes, 1)
    assert mask.tolist() == [[1], [1]]
    assert depths.tolist() == [0, 0]
    rows, counts = ops.accept_path(torch.tensor([5, 6]), parents, parents, cu_nodes, 2)
    assert rows.tolist() == [[0, -1, -1], [0, -1, -1]]
    assert counts.tolist() == [0, 0]


def test_the_64th_bit_is_a_bit_like_any_other() -> None:
    parents = torch.arange(-1, 127, dtype=torch.int32)  # a chain of 128 nodes
    mask, _ = ops.build_super_tree(parents, torch.tensor([0, 128], dtype=torch.int32), 3)
    assert mask[63].tolist() == [-1, 0, 0]
    assert mask[64].tolist() == [-1, 1, 0]
    assert mask[127].tolist() == [-1, -1, 0]
    assert mask[128].tolist() == [-1, -1, 1]


@pytest.mark.parametrize(
    ("parents", "bounds", "words", "message"),
    [
        ([-1, 1], [0, 2], 1, "the parent of node 1 of request 0 must be -1"),
        ([-1, -2], [0, 2], 1, "the parent of node 1 of request 0 must be -1"),
        ([-1, 0], [0, 1], 1, "cu_nodes must run from 0 to the 2 nodes"),
        ([-1, 0], [0, 3, 2], 1, "cu_nodes must not fall"),
        (list(range(-1, 63)), [0, 64], 1, "need 2 words, but num_words is 1"),
        ([-1], [0, 1], 0, "num_words must be >= 1"),
    ],
)
def test_what_is_not_a_forest_is_refused(
    parents: list[int], bounds: list[int], words: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.build_super_tree(
            torch.tensor(parents, dtype=torch.int32),
            torch.tensor(bounds, dtype=torch.int32),
            words,
        )
