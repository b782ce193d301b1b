# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""select_budget against the reference, against brute force, and against what it promises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from echo_vllm import ops
from echo_vllm.ops import reference

NONE = -math.inf


@dataclass
class Pool:
    """Candidates of a batch, as the operator takes them."""

    scores: Tensor
    tiers: Tensor
    parents: Tensor

    @property
    def num_requests(self) -> int:
        return self.scores.shape[0]

    def select(self, budget: int, max_per_request: int = 1 << 40) -> list[list[int]]:
        """The chosen columns of every request, in their order."""
        columns, cu_nodes = ops.select_budget(
            self.scores, self.tiers, self.parents, budget, max_per_request
        )
        size = min(budget, self.num_requests * min(max_per_request, self.scores.shape[1]))
        assert columns.shape == (size,), "the size must not depend on the scores"
        assert (columns[int(cu_nodes[-1]) :] == -1).all()
        return [columns[a:b].tolist() for a, b in itertools.pairwise(cu_nodes.tolist())]

    def permuted(self, order: list[int]) -> Pool:
        return Pool(self.scores[order], self.tiers[order], self.parents[order])


@st.composite
def pools(draw: st.DrawFn, max_requests: int = 5, max_columns: int = 12, ties: bool = True) -> Pool:
    requests = draw(st.integers(0, max_requests))
    columns = draw(st.integers(0, max_columns))
    seed = draw(st.integers(0, 2**32 - 1))
    steps = draw(st.sampled_from([2, 5, 10**6])) if ties else 10**9
    generator = torch.Generator().manual_seed(seed)

    def dice(sides: int) -> int:
        return int(torch.randint(sides, (), generator=generator))

    scores = torch.full((requests, columns), NONE)
    tiers = torch.zeros(requests, columns, dtype=torch.int32)
    parents = torch.full((requests, columns), -1, dtype=torch.int64)
    for request in range(requests):
        alive = [-1]
        for column in range(columns):
            tiers[request, column] = dice(3) - 1  # also where there is no candidate
            parents[request, column] = dice(99)
            if dice(5) == 0:
                scores[request, column] = (NONE, math.nan)[dice(2)]
                continue
            parent = alive[dice(len(alive))]
            above, tier = (0.0, -1)
            if parent >= 0:
                above, tier = float(scores[request, parent]), int(tiers[request, parent])
            score = above - dice(steps) / steps
            if parent >= 0 and dice(4) == 0:
                tier, score = tier + 1 + dice(2), score + dice(steps)  # a worse tier, any score
            scores[request, column] = score
            tiers[request, column] = tier
            parents[request, column] = parent
            alive.append(column)
    return Pool(scores, tiers, parents)


@settings(max_examples=200, deadline=None)
@given(pool=pools(), budget=st.integers(0, 70), cap=st.integers(0, 14))
def test_kernel_and_reference_agree(pool: Pool, budget: int, cap: int) -> None:
    arguments = (pool.scores, pool.tiers, pool.parents, budget, cap)
    for found, wanted in zip(
        ops.select_budget(*arguments), reference.select_budget(*arguments), strict=True
    ):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


@settings(max_examples=100, deadline=None)
@given(pool=pools(), budget=st.integers(0, 70), cap=st.integers(0, 14), limit=st.integers(-2, 90))
@pytest.mark.parametrize("select", [ops.select_budget, reference.select_budget])
def test_a_limit_in_memory_is_a_budget_in_a_result_of_the_same_size(
    select: Callable[..., tuple[Tensor, Tensor]], pool: Pool, budget: int, cap: int, limit: int
) -> None:
    there = torch.tensor([limit], dtype=torch.int32)
    arguments = (pool.scores, pool.tiers, pool.parents)
    columns, bounds = select(*arguments, budget, cap, there)
    wanted, wanted_bounds = select(*arguments, min(budget, max(0, limit)), cap)
    assert torch.equal(bounds, wanted_bounds)
    assert len(columns) == len(select(*arguments, budget, cap)[0])
    assert torch.equal(columns[: len(wanted)], wanted)
    assert (columns[len(wanted) :] == -1).all()


@settings(max_examples=100, deadline=None)
@given(pool=pools(), budget=st.integers(0, 70), cap=st.integers(0, 14))
def test_budgets_are_never_exceeded_and_never_left_unused(
    pool: Pool, budget: int, cap: int
) -> None:
    chosen = pool.select(budget, cap)
    assert all(len(tree) <= cap for tree in chosen)
    available = sum(min(cap, int((row > NONE).sum())) for row in pool.scores)
    assert sum(map(len, chosen)) == min(budget, available)


@settings(max_examples=100, deadline=None)
@given(pool=pools(), budget=st.integers(0, 70), cap=st.integers(0, 14))
def test_every_prefix_of_a_tree_is_a_tree(pool: Pool, budget: int, cap: int) -> None:
    for request, tree in enumerate(pool.select(budget, cap)):
        assert len(set(tree)) == len(tree)
        for place, column in enumerate(tree):
            assert float(pool.scores[request, column]) > NONE
            assert int(pool.parents[request, column]) in [-1, *tree[:place]]
        ranks = [(int(pool.tiers[request, c]), -float(pool.scores[request, c]), c) for c in tree]
        assert ranks == sorted(ranks)


@settings(max_examples=60, deadline=None)
@given(pool=pools(), cap=st.integers(0, 14))
def test_more_budget_is_a_superset(pool: Pool, cap: int) -> None:
    before = pool.select(0, cap)
    assert all(tree == [] for tree in before)
    for budget in range(1, 62):
        now = pool.select(budget, cap)
        for old, new in zip(before, now, strict=True):
            # The additions may come anywhere in the order of the tree.
            assert [column for column in new if column in set(old)] == old
        before = now


@settings(max_examples=100, deadline=None)
@given(pool=pools(ties=False), budget=st.integers(0, 70), data=st.data())
def test_without_ties_the_order_of_requests_changes_nothing(
    pool: Pool, budget: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(pool.num_requests)))
    there = pool.select(budget, 5)
    assert pool.permuted(order).select(budget, 5) == [there[request] for request in order]


@settings(max_examples=100, deadline=None)
@given(pool=pools(), budget=st.integers(0, 70), data=st.data())
def test_the_order_of_requests_decides_nothing_but_the_last_tie(
    pool: Pool, budget: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(pool.num_requests)))
    permuted = pool.permuted(order)

    def ranks(pool: Pool, chosen: list[list[int]]) -> list[tuple[int, float]]:
        return sorted(
            (int(pool.tiers[r, c]), -float(pool.scores[r, c]))
            for r, tree in enumerate(chosen)
            for c in tree
        )

    here, there = pool.select(budget), permuted.select(budget)
    assert ranks(pool, here) == ranks(permuted, there)
    if not ranks(pool, here):
        return
    last = ranks(pool, here)[-1]
    for request, tree in zip(order, there, strict=True):
        differing = set(tree) ^ set(here[request])
        assert all(
            (int(pool.tiers[request, c]), -float(pool.scores[request, c])) == last
            for c in differing
        )


@settings(max_examples=60, deadline=None)
@given(pool=pools(max_requests=3, max_columns=4), budget=st.integers(0, 8), cap=st.integers(0, 4))
def test_the_choice_is_the_best_of_all_forests(pool: Pool, budget: int, cap: int) -> None:
    """In one tier: no ancestor-closed choice within both limits holds more probability."""
    one_tier = Pool(pool.scores.clamp(max=0.0), torch.zeros_like(pool.tiers), pool.parents)
    for row, parents in zip(one_tier.scores, pool.parents, strict=True):
        for column in range(len(row)):  # restore what the tiers allowed: falling scores
            if row[column] > NONE and parents[column] >= 0:
                row[column] = min(row[column], row[parents[column]])
    nodes = (one_tier.scores > NONE).nonzero().tolist()

    def value(forest: list[list[int]]) -> float:
        return sum(
            math.exp(float(one_tier.scores[r, c])) for r, tree in enumerate(forest) for c in tree
        )

    best = 0.0
    for size in range(min(budget, len(nodes)) + 1):
        for chosen in itertools.combinations(nodes, size):
            forest = [[c for r, c in chosen if r == request] for request in range(len(pool.scores))]
            closed = all(
                int(pool.parents[r, c]) in [-1, *tree]
                for r, tree in enumerate(forest)
                for c in tree
            )
            if closed and all(len(tree) <= cap for tree in forest):
                best = max(best, value(forest))
    assert value(one_tier.select(budget, cap)) == pytest.approx(best)


def test_a_worked_example() -> None:
    pool = Pool(
        scores=torch.tensor([[-0.1, -2.0, -0.3, -2.5], [-0.4, -0.5, -0.9, NONE]]),
        tiers=torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.int32),
        parents=torch.tensor([[-1, -1, 0, 0], [-1, -1, 1, 7]]),
    )
    assert pool.select(4) == [[0, 2], [0, 1]]
    assert pool.select(6) == [[0, 2, 1], [0, 1, 2]]
    assert pool.select(6, max_per_request=2) == [[0, 2], [0, 1]]
    assert pool.select(0) == [[], []]


def test_equal_candidates_fall_to_the_first_request_and_column() -> None:
    pool = Pool(
        scores=torch.tensor([[0.0, -0.0, 0.0], [0.0, 0.0, -0.0]]),
        tiers=torch.zeros(2, 3, dtype=torch.int32),
        parents=torch.full((2, 3), -1),
    )
    assert pool.select(4) == [[0, 1, 2], [0]]
    assert pool.select(4, max_per_request=2) == [[0, 1], [0, 1]]


def test_tiers_come_before_scores_over_their_whole_range() -> None:
    lowest, highest = -(2**31), 2**31 - 1
    pool = Pool(
        scores=torch.tensor([[math.inf, 3e38, 1e-45, -1e-45, -3e38]]),
        tiers=torch.tensor([[highest, 1, -1, lowest, lowest]], dtype=torch.int32),
        parents=torch.full((1, 5), -1),
    )
    assert pool.select(9) == [[3, 4, 2, 1, 0]]


def test_rows_may_be_part_of_a_larger_tensor() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.rand(3, 9, generator=generator)
    tiers = torch.zeros(3, 9, dtype=torch.int32)
    parents = torch.full((3, 9), -1)
    part = Pool(wide[:, 2:7], tiers[:, 2:7], parents[:, 2:7])
    assert part.select(8) == Pool(wide[:, 2:7].clone(), part.tiers, part.parents).select(8)


def test_a_large_batch_is_selected_as_by_sorting() -> None:
    """512 requests of 64 candidates: the sizes that no Python reference should be asked for."""
    generator = torch.Generator().manual_seed(1)
    scores = -torch.rand(512, 64, generator=generator)
    pool = Pool(scores, torch.zeros(512, 64, dtype=torch.int32), torch.full((512, 64), -1))
    chosen = pool.select(3000)
    best = scores.flatten().argsort(descending=True, stable=True)[:3000]
    wanted: list[list[int]] = [[] for _ in range(512)]
    for index in best.tolist():
        wanted[index // 64].append(index % 64)
    assert chosen == wanted


@pytest.mark.parametrize(
    ("scores", "tiers", "parents", "message"),
    [
        ([-0.5, -0.4], [0, 0], [-1, 0], "column 1 of request 1 .*ranks before its parent"),
        ([-0.5, -0.9], [1, 0], [-1, 0], "column 1 of request 1 .*ranks before its parent"),
        ([-0.5, -0.9], [0, 0], [-1, 1], "parent of column 1 of request 1 must be .*, got 1"),
        ([-0.5, -0.9], [0, 0], [-2, 0], "parent of column 0 of request 1 must be .*, got -2"),
        ([NONE, -0.9], [0, 0], [-1, 0], "column 1 of request 1 has a score, but .* column 0"),
        ([math.nan, -0.9], [0, 0], [-1, 0], "column 1 of request 1 has a score, but"),
    ],
)
@pytest.mark.parametrize("select", [ops.select_budget, reference.select_budget])
def test_what_is_not_a_tree_is_refused(
    scores: list[float], tiers: list[int], parents: list[int], message: str, select: object
) -> None:
    assert callable(select)
    with pytest.raises(RuntimeError, match=message):
        select(
            torch.tensor([[-0.1, -0.2], scores]),
            torch.tensor([[0, 0], tiers], dtype=torch.int32),
            torch.tensor([[-1, -1], parents]),
            1,
            1,
        )


def test_bad_arguments_are_refused() -> None:
    scores, parents = torch.zeros(2, 3), torch.full((2, 3), -1)
    tiers = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="budget must be >= 0, got -1"):
        ops.select_budget(scores, tiers, parents, -1, 1)
    with pytest.raises(RuntimeError, match="max_per_request must be >= 0, got -1"):
        ops.select_budget(scores, tiers, parents, 1, -1)
    with pytest.raises(RuntimeError, match="limit must be Int, got Long"):
        ops.select_budget(scores, tiers, parents, 1, 1, torch.tensor([1]))
    with pytest.raises(RuntimeError, match=r"limit.shape\[0\] must be 1"):
        ops.select_budget(scores, tiers, parents, 1, 1, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="scores must be Float, got Double"):
        ops.select_budget(scores.double(), tiers, parents, 1, 1)
    with pytest.raises(RuntimeError, match="tiers must be Int, got Long"):
        ops.select_budget(scores, tiers.long(), parents, 1, 1)
    with pytest.raises(RuntimeError, match=r"parents.shape\[1\] must be 3"):
        ops.select_budget(scores, tiers, parents[:, :2], 1, 1)
    with pytest.raises(RuntimeError, match="the last dimension of scores must be contiguous"):
        ops.select_budget(torch.zeros(3, 2).t(), tiers, parents, 1, 1)
