# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The forest keeps its invariants, and its operations keep them too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from echo_vllm.trees.forest import ROOT, DraftForest


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 12) -> tuple[list[int], list[int], list[float]]:
    """Token ids, parents and path scores of one valid tree."""
    tokens: list[int] = []
    parents: list[int] = []
    scores: list[float] = []
    used: set[tuple[int, int]] = set()
    for node in range(draw(st.integers(0, max_nodes))):
        parent = draw(st.integers(ROOT, node - 1))
        token = draw(st.integers(0, 50))
        if (parent, token) in used:
            token = 100 + node
        used.add((parent, token))
        above = 0.0 if parent == ROOT else scores[parent]
        tokens.append(token)
        parents.append(parent)
        scores.append(above - draw(st.floats(0.0, 4.0, width=32)))
    return tokens, parents, scores


@st.composite
def forests(draw: st.DrawFn) -> DraftForest:
    drawn = draw(st.lists(trees(), min_size=1, max_size=4))
    return DraftForest.from_parents(*zip(*drawn, strict=True))


@given(forests())
def test_a_built_forest_is_valid_and_gives_its_trees_back(forest: DraftForest) -> None:
    forest.validate(max_nodes=12, max_depth=12)
    again = DraftForest.from_parents(*zip(*forest.trees(), strict=True))
    assert again.trees() == forest.trees()
    assert again.depths.tolist() == forest.depths.tolist()


@given(forests(), st.data())
def test_any_prefix_of_every_tree_is_a_valid_forest(
    forest: DraftForest, data: st.DataObject
) -> None:
    sizes = forest.cu_nodes.diff().tolist()
    kept = [data.draw(st.integers(0, size)) for size in sizes]
    prefix = forest.prefix(torch.tensor(kept))
    prefix.validate(max_nodes=12, max_depth=12)
    assert prefix.trees() == [
        (tokens[:n], parents[:n]) for (tokens, parents), n in zip(forest.trees(), kept, strict=True)
    ]


@given(forests(), st.data())
def test_keep_reindexes_parents_and_refuses_orphans(
    forest: DraftForest, data: st.DataObject
) -> None:
    mask = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=forest.num_nodes, max_size=forest.num_nodes)),
        dtype=torch.bool,
    )
    cu = forest.cu_nodes.tolist()
    paths, kept_paths, orphan = [], [], False
    for (tokens, parents), start in zip(forest.trees(), cu, strict=False):
        own: list[tuple[int, ...]] = []
        for node, parent in enumerate(parents):
            own.append((*(own[parent] if parent != ROOT else ()), tokens[node]))
            keep = bool(mask[start + node])
            orphan |= keep and parent != ROOT and not bool(mask[start + parent])
        paths.append(own)
        kept_paths.append([p for node, p in enumerate(own) if mask[start + node]])
    if orphan:
        with pytest.raises(ValueError, match="ancestor"):
            forest.keep(mask)
        return
    kept = forest.keep(mask)
    kept.validate(max_nodes=12, max_depth=12)
    found = []
    for tokens, parents in kept.trees():
        own = []
        for node, parent in enumerate(parents):
            own.append((*(own[parent] if parent != ROOT else ()), tokens[node]))
        found.append(own)
    assert found == kept_paths


@pytest.mark.parametrize(
    ("tokens", "parents", "scores", "message"),
    [
        ([5, 6], [ROOT, 1], [0.0, 0.0], "does not precede"),
        ([5, 6], [ROOT, -2], [0.0, 0.0], "does not precede"),
        ([5, 5], [ROOT, ROOT], [-1.0, -1.0], "twice under one parent"),
        ([5, 6], [ROOT, 0], [-1.0, -0.5], "rises"),
        ([5], [ROOT], [0.5], "rises"),
        ([5, 6, 7], [ROOT, 0, 1], [0.0, 0.0, 0.0], "depth 3 is over 2"),
        ([1, 2, 3, 4], [ROOT] * 4, [0.0] * 4, "4 nodes, over 3"),
    ],
)
def test_validate_names_what_is_broken(
    tokens: list[int], parents: list[int], scores: list[float], message: str
) -> None:
    # A parent that does not precede its node has no depth yet: build around `from_parents`.
    forest = DraftForest(
        token_ids=torch.tensor(tokens, dtype=torch.int32),
        parents=torch.tensor(parents, dtype=torch.int32),
        depths=torch.tensor([1 if p == ROOT else p + 2 for p in parents], dtype=torch.int32),
        path_logprobs=torch.tensor(scores),
        cu_nodes=torch.tensor([0, len(tokens)], dtype=torch.int32),
    )
    with pytest.raises(ValueError, match=message):
        forest.validate(max_nodes=3, max_depth=2)
