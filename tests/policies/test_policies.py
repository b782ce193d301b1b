# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Policies against a drafter that is a table, and against enumeration."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_vllm.policies import DraftBatch, DraftPolicy, make_policy, parse_section
from echo_vllm.trees.forest import ROOT, DraftForest
from echo_vllm.trees.pool import CandidatePool

VOCAB = 40


@functools.cache
def table_drafter(seed: int, request: int, path: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities [VOCAB] of the next token after `path`: a fixed random function."""
    generator = torch.Generator().manual_seed(hash((seed, request, path)) % 2**31)
    return torch.log_softmax(2 * torch.randn(VOCAB, generator=generator), dim=0)


def grow(
    policy: DraftPolicy,
    num_requests: int,
    seed: int,
    batch: DraftBatch | None = None,
    *,
    compacts: bool = True,
    pool: CandidatePool | None = None,
) -> CandidatePool:
    """Run the drafter's loop with the table in place of the network; as there, a request leaves at
    its own depth limit."""
    batch = DraftBatch.of(num_requests) if batch is None else batch
    if pool is None:
        pool = CandidatePool.empty(num_requests, compacts=compacts)
    paths: list[list[tuple[int, ...]]] = [[] for _ in range(num_requests)]
    for _, expansion, active in policy.levels(pool, batch):
        tokens, logprobs = [], []
        for i, r in enumerate(active.tolist()):
            columns = [None] if expansion.frontier is None else expansion.frontier[i].tolist()
            rows = [
                table_drafter(seed, r, () if c is None else paths[r][c]).topk(policy.num_ranks)
                for c in columns
            ]
            tokens.append(torch.stack([row.indices for row in rows]))
            logprobs.append(torch.stack([row.values for row in rows]))
        first = pool.num_columns
        pool.grow(expansion, torch.stack(tokens), torch.stack(logprobs))
        for r in range(num_requests):
            for column in range(first, pool.num_columns):
                if pool.path_logprobs[r, column] == -math.inf:
                    paths[r].append(())
                    continue
                parent = int(pool.parents[r, column])
                above = () if parent == ROOT else paths[r][parent]
                paths[r].append((*above, int(pool.token_ids[r, column])))
    return pool


def policy_of(num_nodes: int, **section: object) -> DraftPolicy:
    config = parse_section(section, num_speculative_tokens=num_nodes)
    return make_policy(config, num_nodes)


def paths_of(forest: DraftForest) -> list[dict[tuple[int, ...], float]]:
    """Per request: path of token ids -> path log-probability."""
    found = []
    scores = forest.path_logprobs.tolist()
    for start, (tokens, parents) in zip(forest.cu_nodes.tolist(), forest.trees(), strict=False):
        own: list[tuple[int, ...]] = []
        for node, parent in enumerate(parents):
            own.append((*(own[parent] if parent != ROOT else ()), tokens[node]))
        found.append({path: scores[start + i] for i, path in enumerate(own)})
    return found


@settings(max_examples=40, deadline=None)
@given(
    requests=st.integers(1, 3),
    depth=st.integers(1, 5),
    k=st.integers(1, 4),
    data=st.data(),
)
def test_topn_keeps_the_invariants_and_exactly_n_nodes(
    requests: int, depth: int, k: int, data: st.DataObject
) -> None:
    size = data.draw(st.integers(depth if k == 1 else 1, k + (depth - 1) * k * k))
    depth = min(depth, size)
    policy = policy_of(size, policy="topn", max_depth=depth, top_k=k)
    forest = policy.select(grow(policy, requests, seed=7), DraftBatch.of(requests))
    forest.validate(max_nodes=size, max_depth=depth)
    assert forest.cu_nodes.diff().tolist() == [size] * requests
    for start in forest.cu_nodes.tolist()[:-1]:
        scores = forest.path_logprobs[start : start + size]
        assert (scores.diff() <= 0).all(), "nodes must come by falling path score"


def test_topn_with_a_wide_beam_is_the_true_best_set() -> None:
    """With a frontier as wide as the level, no candidate is missed: compare with enumeration."""
    k, depth, size = 3, 2, 7
    policy = policy_of(size, policy="topn", max_depth=depth, top_k=k)
    (found,) = paths_of(policy.select(grow(policy, 1, seed=3), DraftBatch.of(1)))
    best = table_drafter(3, 0, ()).topk(k)
    every: dict[tuple[int, ...], float] = {}
    for token, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        every[(token,)] = score
        below = table_drafter(3, 0, (token,)).topk(k)
        for child, more in zip(below.indices.tolist(), below.values.tolist(), strict=True):
            every[(token, child)] = score + more
    wanted = dict(sorted(every.items(), key=lambda item: -item[1])[:size])
    assert found.keys() == wanted.keys()
    assert all(math.isclose(found[p], wanted[p], rel_tol=1e-5) for p in wanted)


def test_chain_is_the_greedy_path() -> None:
    policy = policy_of(5, policy="chain")
    forest = policy.select(grow(policy, 2, seed=1), DraftBatch.of(2))
    forest.validate(max_nodes=5, max_depth=5)
    for request, (tokens, parents) in enumerate(forest.trees()):
        assert parents == [ROOT, 0, 1, 2, 3]
        for depth in range(5):
            wanted = table_drafter(1, request, tuple(tokens[:depth])).argmax()
            assert tokens[depth] == int(wanted)


@settings(max_examples=30, deadline=None)
@given(st.sets(st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple), max_size=8))
def test_static_drafts_exactly_its_shape(drawn: set[tuple[int, ...]]) -> None:
    shape = {path[:n] for path in drawn | {(0,)} for n in range(1, len(path) + 1)}
    policy = policy_of(len(shape), policy="static", tree=[list(path) for path in shape])
    forest = policy.select(grow(policy, 2, seed=5), DraftBatch.of(2))
    forest.validate(max_nodes=len(shape), max_depth=3)
    for request, found in enumerate(paths_of(forest)):
        wanted = set()
        for path in shape:
            tokens: tuple[int, ...] = ()
            for rank in path:
                best = table_drafter(5, request, tokens).topk(3)
                tokens = (*tokens, int(best.indices[rank]))
            wanted.add(tokens)
        assert found.keys() == wanted


def test_a_forest_does_not_depend_on_the_other_requests() -> None:
    policy = policy_of(12, policy="topn", max_depth=4, top_k=3)
    together = paths_of(policy.select(grow(policy, 3, seed=11), DraftBatch.of(3)))
    alone = paths_of(policy.select(grow(policy, 1, seed=11), DraftBatch.of(1)))
    assert together[0] == alone[0]


def test_ties_fall_to_the_earlier_candidate() -> None:
    policy = policy_of(3, policy="topn", max_depth=2, top_k=2)
    pool = CandidatePool.empty(1)
    even = torch.full((1, 1, 2), math.log(0.5))
    batch = DraftBatch.of(1)
    first = policy.expand(1, pool, batch)
    assert first is not None
    pool.grow(first, torch.tensor([[[4, 9]]]), even)
    expansion = policy.expand(2, pool, batch)
    assert expansion is not None
    assert expansion.frontier is not None
    assert expansion.frontier.tolist() == [[0, 1]]
    pool.grow(expansion, torch.tensor([[[1, 2], [3, 4]]]), torch.zeros(1, 2, 2))
    tokens, parents = policy.select(pool, DraftBatch.of(1)).trees()[0]
    # All six paths have probability 1/2: parents first, then level order.
    assert tokens == [4, 9, 1]
    assert parents == [ROOT, ROOT, 0]


def test_every_frontier_row_is_counted_in_max_frontier() -> None:
    for policy in (
        policy_of(4, policy="chain"),
        policy_of(6, policy="topn", max_depth=3, top_k=2),
        policy_of(4, policy="static", tree=[[0], [1], [0, 0], [1, 0]]),
    ):
        pool = CandidatePool.empty(1)
        tokens = itertools.count()
        for depth in range(1, policy.max_depth + 1):
            expansion = policy.expand(depth, pool, DraftBatch.of(1))
            assert expansion is not None
            width = 1 if expansion.frontier is None else expansion.frontier.shape[1]
            assert width <= policy.max_frontier
            ids = torch.tensor([next(tokens) for _ in range(width * policy.num_ranks)])
            shape = (1, width, policy.num_ranks)
            pool.grow(expansion, ids.view(shape), torch.full(shape, -0.1))
