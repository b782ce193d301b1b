# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`graft`: what is pruned, and what fills the place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.policies import DraftBatch
from echo_vllm.policies.graft import GraftPolicy, kept_share
from echo_vllm.policies.retrieval import MISSING
from echo_vllm.trees.pool import CandidatePool
from tests.policies.test_policies import VOCAB, grow, paths_of, policy_of


def graft(num_nodes: int, **section: Any) -> GraftPolicy:
    policy = policy_of(num_nodes, policy="graft", **section)
    assert isinstance(policy, GraftPolicy)
    return policy


def knowing(policy: GraftPolicy, seed: int = 0) -> GraftPolicy:
    """The policy after it has seen every token once."""
    logits = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))
    policy.observe_logits(torch.arange(VOCAB), 2 * logits)
    return policy


def test_shares_are_the_papers_and_rise() -> None:
    assert [round(60 * kept_share(depth)) for depth in (1, 2, 6, 9)] == [8, 24, 40, 40]
    assert 24 < 60 * kept_share(4) < 40


@settings(max_examples=60)
@given(
    requests=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    num_nodes=st.integers(4, 20),
    gates=st.dictionaries(st.sampled_from("1234"), st.floats(0, 0.9), max_size=3),
    k_max=st.none() | st.integers(0, 60),
    prefill=st.integers(0, 9),
    compacts=st.booleans(),
)
def test_trees_are_whole_and_full(
    requests: int,
    seed: int,
    num_nodes: int,
    gates: dict[str, float],
    k_max: int | None,
    prefill: int,
    compacts: bool,
) -> None:
    policy = graft(num_nodes, max_depth=4, top_k=2, width=4, gates=gates, k_max=k_max)
    batch = DraftBatch(requests, requests, DraftPlan(prefill_tokens=prefill))
    pool = grow(policy, requests, seed, batch, compacts=compacts)
    limit = policy.limit(batch)
    pruned = policy.select(pool, batch)
    pruned.validate(max_nodes=limit, max_depth=4)
    reached = pool.first_of_levels().sum(1).tolist()
    for size, depth in zip(pruned.cu_nodes.diff().tolist(), reached, strict=True):
        there = 4 + max(0, depth - 1) * 8
        share = 1.0 if depth == 4 else kept_share(depth)
        assert size == min(math.ceil(share * limit - 1e-6), there)
    if k_max is not None:
        assert limit * requests <= max(0, k_max - prefill)
    # With a table and roots, every tree has all its nodes, the drafted ones first.
    knowing(policy, seed)
    pool.roots = torch.arange(requests) % VOCAB
    forest = policy.select(pool, batch)
    forest.validate(max_nodes=limit, max_depth=4)
    assert forest.cu_nodes.diff().tolist() == [limit] * requests
    assert forest.prefix(pruned.cu_nodes.diff()).trees() == pruned.trees()


@settings(max_examples=60)
@given(
    requests=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    num_nodes=st.integers(4, 20),
    known=st.integers(0, VOCAB),
    gates=st.dictionaries(st.sampled_from("123"), st.floats(0, 0.9), max_size=3),
)
def test_trees_that_the_host_never_sees_are_the_same(
    requests: int, seed: int, num_nodes: int, known: int, gates: dict[str, float]
) -> None:
    policy = graft(num_nodes, max_depth=3, top_k=2, width=4, gates=gates)
    batch = DraftBatch.of(requests)
    pool = CandidatePool.empty_unseen(requests)
    pool = grow(policy, requests, seed, batch, pool=pool)
    pool.roots = torch.arange(requests) % VOCAB
    if known:
        logits = torch.randn(known, VOCAB, generator=torch.Generator().manual_seed(seed))
        policy.observe_logits(torch.arange(known), 2 * logits)
    forest, trees = policy.select(pool, batch), policy.ranked(pool, batch)
    assert trees.sizes.tolist() == forest.cu_nodes.diff().tolist()
    is_node = torch.arange(trees.tiers.shape[1]) < trees.sizes.unsqueeze(1)
    for name in ("token_ids", "parents", "depths", "path_logprobs"):
        assert getattr(trees, name)[is_node].tolist() == getattr(forest, name).tolist(), name


def test_without_a_gate_that_fires_it_is_the_topn_tree() -> None:
    topn = policy_of(16, policy="topn", max_depth=4, top_k=4)
    policy = knowing(graft(16, max_depth=4, top_k=4, width=4, gates={"1": 0.0}))
    for seed in range(5):
        pool = grow(policy, 2, seed)
        pool.roots = torch.tensor([1, 2])
        ours = policy.select(pool, DraftBatch.of(2))
        wanted = topn.select(grow(topn, 2, seed), DraftBatch.of(2))
        assert paths_of(ours) == paths_of(wanted)


def test_the_unsure_stop_and_the_sure_go_on() -> None:
    policy = graft(6, max_depth=3, top_k=1, width=2, gates={"1": 0.5})
    pool, batch = CandidatePool.empty(2), DraftBatch.of(2)
    logprobs = torch.tensor([[[0.9, 0.05]], [[0.4, 0.35]]]).log()
    first = policy.expand(1, pool, batch)
    assert first is not None
    pool.grow(first, torch.tensor([[[1, 2]], [[3, 4]]]), logprobs)
    second = policy.expand(2, pool, batch)
    assert second is not None
    assert second.requests is not None
    assert second.requests.tolist() == [0]


@pytest.mark.parametrize(("num_nodes", "max_depth"), [(1, 1), (8, 3), (256, 8)])
def test_a_vocabulary_may_be_smaller_than_the_tables_ranks(num_nodes: int, max_depth: int) -> None:
    policy = graft(num_nodes, max_depth=max_depth, top_k=8, width=8)
    said = torch.tensor([[0.0, 3.0, 1.0]]).expand(3, -1)
    policy.observe_logits(torch.arange(3), said)
    assert policy.table is not None
    tokens, scores = policy.table.walk(torch.tensor([2]), policy.template)
    there = sum(3**depth for depth in range(1, max_depth + 1))
    found = tokens[scores > MISSING]
    assert 0 < len(found) <= min(2 * num_nodes, there)
    assert set(found.tolist()) <= {0, 1, 2}
    assert int(tokens[0, 0]) == 1
