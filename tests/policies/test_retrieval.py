# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The table of successors, the trees that are read from it, and how they join drafted trees."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_vllm.policies.retrieval import MISSING, RankTemplate, SuccessorTable, fill
from echo_vllm.trees.forest import ROOT, DraftForest
from tests.policies.test_policies import paths_of

VOCAB = 12


def logits_of(seed: int, rows: int) -> torch.Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def full_table(seed: int = 0, num_ranks: int = 4) -> SuccessorTable:
    table = SuccessorTable(VOCAB, num_ranks)
    table.observe(torch.arange(VOCAB), logits_of(seed, VOCAB))
    return table


def template_paths(template: RankTemplate) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for parent, rank in zip(template.parents, template.ranks, strict=True):
        paths.append((*(paths[parent] if parent != ROOT else ()), rank))
    return paths


@given(num_nodes=st.integers(0, 80), max_depth=st.integers(1, 6), num_ranks=st.integers(1, 8))
def test_a_template_is_a_tree_of_different_paths_level_by_level(
    num_nodes: int, max_depth: int, num_ranks: int
) -> None:
    template = RankTemplate.best(num_nodes, max_depth, num_ranks)
    there_are = sum(num_ranks**depth for depth in range(1, max_depth + 1))
    assert template.num_nodes == min(num_nodes, there_are)
    paths = template_paths(template)
    assert len(set(paths)) == len(paths)
    for depth, level in enumerate(template.levels, 1):
        assert level.stop > level.start
        assert {len(path) for path in paths[level]} == {depth}
    assert sum(level.stop - level.start for level in template.levels) == len(paths)


def test_a_template_goes_deep_where_ranks_are_low() -> None:
    paths = template_paths(RankTemplate.best(16, 6))
    assert (0, 0, 0) in paths
    assert max(len(path) for path in paths if path[0] == 0) > max(
        len(path) for path in paths if path[0] == 3
    )


def test_the_table_has_the_targets_best_successors_and_their_logprobs() -> None:
    logits = logits_of(1, 3)
    before = logits.clone()
    table = SuccessorTable(VOCAB, 4)
    table.observe(torch.tensor([5, 2, 5]), logits)
    assert torch.equal(logits, before)
    tokens, scores = table.walk(
        torch.tensor([5, 2, 0]), RankTemplate((ROOT,) * 4, (0, 1, 2, 3), (0, 4))
    )
    # Of the two rows with token 5 the last one counts.
    for row, source in ((0, 2), (1, 1)):
        wanted = logits[source].log_softmax(0).topk(4)
        assert tokens[row].tolist() == wanted.indices.tolist()
        torch.testing.assert_close(scores[row], wanted.values)
    assert (scores[2] == MISSING).all()


def test_masked_tokens_are_missing() -> None:
    """A grammar's mask leaves two tokens; the other ranks are no candidates."""
    logits = logits_of(1, 1)
    logits[0, 2:] = -math.inf
    table = SuccessorTable(VOCAB, 4)
    table.observe(torch.tensor([3]), logits)
    tokens, scores = table.walk(torch.tensor([3]), RankTemplate.best(20, 2, 4))
    known = tokens[0][scores[0] > MISSING]
    assert set(known.tolist()) == {0, 1}


def test_a_walk_follows_the_table() -> None:
    table = full_table()
    template = RankTemplate.best(30, 4, 4)
    tokens, scores = table.walk(torch.tensor([7, 3]), template)
    best = {
        token: logits_of(0, VOCAB)[token].log_softmax(0).topk(4, dim=0) for token in range(VOCAB)
    }
    for row, root in enumerate((7, 3)):
        for node, path in enumerate(template_paths(template)):
            token, score = root, 0.0
            for rank in path:
                score += float(best[token].values[rank])
                token = int(best[token].indices[rank])
            assert int(tokens[row, node]) == token
            assert float(scores[row, node]) == pytest.approx(score, abs=1e-4)


def drafted(seed: int, sizes: list[int]) -> DraftForest:
    """Random trees in which no parent has a token twice and no path gains by growing."""
    draw = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(most, (1,), generator=draw))

    tokens: list[list[int]] = []
    parents: list[list[int]] = []
    scores: list[list[float]] = []
    for size in sizes:
        tree: list[tuple[int, int, float]] = []
        while len(tree) < size:
            parent = number(len(tree) + 1) - 1
            token = number(VOCAB)
            if any((p, t) == (parent, token) for p, t, _ in tree):
                continue
            above = 0.0 if parent == ROOT else tree[parent][2]
            tree.append((parent, token, above - 0.5 * number(4)))
        parents.append([p for p, _, _ in tree])
        tokens.append([t for _, t, _ in tree])
        scores.append([s for _, _, s in tree])
    return DraftForest.from_parents(tokens, parents, scores)


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    limit=st.integers(9, 24),
    seed=st.integers(0, 10_000),
    known=st.integers(0, VOCAB),
)
def test_filling_keeps_the_drafted_trees_and_adds_the_best_retrieved_paths(
    sizes: list[int], limit: int, seed: int, known: int
) -> None:
    forest = drafted(seed, sizes)
    table = SuccessorTable(VOCAB, 4)
    table.observe(torch.arange(known), logits_of(seed, known))
    template = RankTemplate.best(2 * limit, 4, 4)
    roots = torch.arange(len(sizes)) % VOCAB
    tokens, scores = table.walk(roots, template)
    filled = fill(forest, tokens, scores, template, limit)
    filled.validate(max_nodes=limit, max_depth=max(9, 4))
    # The drafted trees are the first nodes, as they were.
    head = filled.prefix(forest.cu_nodes.diff())
    assert head.trees() == forest.trees()
    assert torch.equal(head.path_logprobs, forest.path_logprobs)
    for row, (own, found) in enumerate(zip(paths_of(forest), paths_of(filled), strict=True)):
        retrieved: dict[tuple[int, ...], float] = {}
        for node, ranks in enumerate(template_paths(template)):
            if scores[row, node] == MISSING:
                continue
            walk, parent = [int(tokens[row, node])], template.parents[node]
            while parent != ROOT:
                walk.append(int(tokens[row, parent]))
                parent = template.parents[parent]
            path = tuple(reversed(walk))
            assert len(path) == len(ranks)
            above = {**own, **retrieved, (): 0.0}[path[:-1]]
            if path not in own:
                retrieved[path] = min(float(scores[row, node]), above)
        free = limit - len(own)
        added = {path: score for path, score in found.items() if path not in own}
        assert added.items() <= retrieved.items()
        assert len(added) == min(free, len(retrieved))
        left_out = [score for path, score in retrieved.items() if path not in added]
        assert not left_out or not added or min(added.values()) >= max(left_out)


def test_a_retrieved_path_goes_on_from_a_drafted_node() -> None:
    """Drafted: root -> 4 -> 6. Retrieved: root -> 4 -> 9 and root -> 8: 4 is not there twice."""
    forest = DraftForest.from_parents([[4, 6]], [[ROOT, 0]], [[-0.1, -0.4]])
    template = RankTemplate((ROOT, ROOT, 0), (0, 1, 0), (0, 2, 3))
    scores = torch.tensor([[-0.05, -2.0, -0.07]])
    filled = fill(forest, torch.tensor([[4, 8, 9]]), scores, template, 8)
    assert filled.trees() == [([4, 6, 9, 8], [ROOT, 0, 0, ROOT])]
    # The path of 9 is no more probable than that of the 4 above it.
    assert filled.path_logprobs.tolist() == pytest.approx([-0.1, -0.4, -0.1, -2.0])
    assert filled.depths.tolist() == [1, 2, 2, 1]


def test_an_empty_batch_stays_empty() -> None:
    template = RankTemplate.best(4, 2, 4)
    tokens, scores = full_table().walk(torch.empty(0, dtype=torch.int64), template)
    assert fill(DraftForest.empty(0), tokens, scores, template, 4).num_requests == 0
