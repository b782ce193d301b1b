# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The pool of drawn candidates: what it gives out, in which order, and that its cuts are sound."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from echo_vllm import ops
from echo_vllm.forecast.gains import expected_gains, guess_target, reaches_of
from echo_vllm.ops import AcceptRule
from echo_vllm.trees.drawn import NO_SLOT, DrawnPool, OpenLevel
from echo_vllm.trees.draws import Draws, Sampling, draw_children, root_keys
from echo_vllm.trees.forest import ROOT, DraftForest
from tests.trees.test_drawn_exactness import Tree, World, children_of, error, prefix_of, shape

VOCAB = 30


def grow(
    pool: DrawnPool, width: int, k: int, widths: torch.Tensor | None, generator: torch.Generator
) -> OpenLevel:
    """One level of random distributions; all slots unless `widths` says how many."""
    roots = torch.full((pool.num_requests, 1), ROOT)
    parents = pool.best_parents(width) if pool.depth else roots
    shape = parents.shape
    logits = 2 * torch.randn(shape.numel(), VOCAB, generator=generator)
    sampling = Sampling(torch.ones(shape.numel()))
    draws = draw_children(logits, k, pool.keys_of(parents).flatten(), sampling)
    guess = draws.probs.double() ** 0.7
    guess /= guess.sum(1, keepdim=True)
    level = pool.open(parents, expected_gains(draws.probs, guess, k).view(*shape, k))
    if widths is None:
        widths = torch.full(shape, k)
    reaches = reaches_of(draws.probs, guess, draws.token_ids)
    pool.fill(level, widths, draws, draws.token_ids, reaches)
    return level


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_forests_are_trees_in_the_order_of_drawing(data: st.DataObject) -> None:
    requests, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    pool = DrawnPool(root_keys(torch.arange(requests), torch.full((requests,), seed)))
    k = data.draw(st.integers(1, 3))
    for _ in range(data.draw(st.integers(1, 3))):
        width = 1 if not pool.depth else min(2, k)
        widths = torch.randint(0, k + 1, (requests, width), generator=generator)
        level = grow(pool, 2, k, widths, generator)
        assert (level.worths.diff(dim=2) <= 0).all()
        assert ((level.reaches >= 0) & (level.reaches <= 1)).all()
    budget, cap = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 8))
    forest = pool.take(budget, cap)
    forest.validate(max_nodes=cap, max_depth=3)
    assert forest.num_nodes <= budget
    full = pool.take(10_000, 10_000)
    for request in range(requests):
        kept, whole = (nodes_of(f, request) for f in (forest, full))
        assert kept == whole[: len(kept)], "a smaller budget is a prefix"
        scores = [score for *_, score in kept]
        assert scores == sorted(scores, reverse=True)
    fewer = forest.prefix(forest.cu_nodes.diff() // 2)
    rows, numbers = pool.rows_of(fewer)
    all_rows, all_numbers = pool.rows_of(forest)
    for request in range(requests):
        own = int(fewer.cu_nodes[request + 1] - fewer.cu_nodes[request]) + 1
        begin, of_all = int(fewer.cu_nodes[request]), int(forest.cu_nodes[request])
        for part, whole_rows in ((rows, all_rows), (numbers, all_numbers)):
            first, second = begin + request, of_all + request
            assert torch.equal(part[first : first + own], whole_rows[second : second + own])


def nodes_of(forest: DraftForest, request: int) -> list[tuple[int, int, float]]:
    own = slice(*forest.cu_nodes[request : request + 2].tolist())
    fields = (forest.token_ids, forest.parents, forest.path_logprobs)
    return list(zip(*(x[own].tolist() for x in fields), strict=True))


def test_an_open_level_knows_nothing_of_its_children() -> None:
    """Whoever decides about slots cannot see what will be in them."""
    names = {field.name for field in dataclasses.fields(OpenLevel)}
    assert names == {"depth", "parents", "reaches", "worths"}
    levels = []
    for seed in (1, 2):  # the same distributions, other draws
        pool = DrawnPool(root_keys(torch.tensor([seed]), torch.tensor([0])))
        levels.append(grow(pool, 1, 3, None, torch.Generator().manual_seed(0)))
        assert pool.take(9, 9).num_nodes == 3
    assert torch.equal(levels[0].worths, levels[1].worths)


def test_levels_are_opened_and_filled_in_turn() -> None:
    pool = DrawnPool(root_keys(torch.tensor([1]), torch.tensor([0])))
    generator = torch.Generator().manual_seed(0)
    level = grow(pool, 1, 2, None, generator)
    with pytest.raises(ValueError, match="only the level opened last can be filled, which is 2"):
        pool.fill(level, torch.ones(1, 1), *[None] * 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parents must be columns 0 to 1 of the deepest level"):
        pool.open(torch.tensor([[ROOT]]), torch.ones(1, 1, 2))
    again = pool.open(torch.tensor([[0]]), torch.ones(1, 1, 2))
    draws = draw_children(torch.zeros(2, VOCAB), 2, torch.arange(2), Sampling(torch.ones(2)))
    with pytest.raises(ValueError, match=r"draws must be \[1, 2\], got \[2, 2\]"):
        pool.fill(again, torch.ones(1, 1), draws, draws.token_ids, torch.ones(2, 2))


def test_a_forest_goes_through_verification() -> None:
    """From draws to accepted tokens: with the target equal to q nothing is ever rejected."""
    generator = torch.Generator().manual_seed(3)
    pool = DrawnPool(root_keys(torch.arange(3), torch.arange(3)))
    for _ in range(2):
        grow(pool, 1, 2, None, generator)
    forest = pool.take(100, 100)
    rows, numbers = pool.rows_of(forest)
    probs = pool.draft_probs()
    logits = torch.zeros(len(rows), VOCAB)
    logits[rows >= 0] = probs[rows[rows >= 0].long()].log()
    accepted, counts, _ = ops.sample_path(
        logits,
        torch.arange(len(rows), dtype=torch.int32),
        probs,
        rows,
        None,
        torch.full((3,), AcceptRule.DRAWN, dtype=torch.int32),
        numbers,
        forest.token_ids,
        forest.parents,
        forest.cu_nodes,
        4,
    )
    assert (counts >= 1).all()
    assert (accepted[:, 1] == 1).all(), "the first child of the root is the first draw"


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("top_k", [None, 3])
def test_drawn_and_verified_tokens_have_the_targets_distribution(
    temperature: float, top_k: int | None
) -> None:
    """Everything at once, with its own random numbers: keys, draws, budget, uniforms, kernel.

    A batch of equal requests with trees of three nodes; the next two tokens, by chi-square.
    """
    requests, vocab = 20_000, 5
    generator = torch.Generator().manual_seed(5)
    logits = 1.5 * torch.randn(1 + vocab, vocab, generator=generator)
    target = logits / temperature
    if top_k is not None:
        target = target.masked_fill(target < target.topk(top_k).values[:, -1:], float("-inf"))
    drafter = logits / 2 + torch.randn(1 + vocab, vocab, generator=generator)
    options = Sampling(
        torch.full((requests,), temperature),
        None if top_k is None else torch.full((requests,), top_k),
    )
    pool = DrawnPool(root_keys(torch.arange(requests), torch.full((requests,), 17)))
    for k in (2, 1):
        first = not pool.depth
        parents = torch.full((requests, 1), ROOT) if first else pool.best_parents(1)
        # Row 0 is what follows the root, row 1 + t what follows token t.
        rows = torch.zeros_like(parents) if first else 1 + pool.tokens_of(parents)
        draws = draw_children(drafter[rows.flatten()], k, pool.keys_of(parents).flatten(), options)
        guess = guess_target(draws.probs, lambda logq: 0.7 * logq.exp() ** 0.6)
        gains = expected_gains(draws.probs, guess, k).view(requests, 1, k)
        level = pool.open(parents, gains)
        reaches = reaches_of(draws.probs, guess, draws.token_ids)
        pool.fill(level, torch.full((requests, 1), k), draws, draws.token_ids, reaches)
    forest = pool.take(requests * 3, 3)
    draft_rows, numbers = pool.rows_of(forest)
    sizes = forest.cu_nodes.diff().long() + 1
    starts = forest.cu_nodes[:-1].long() + torch.arange(requests)
    is_root = torch.zeros(len(numbers), dtype=torch.bool)
    is_root[starts] = True
    which = torch.zeros(len(numbers), dtype=torch.int32)
    which[~is_root] = 1 + forest.token_ids
    rows, counts, last = ops.sample_path(
        target, which, pool.draft_probs(), draft_rows, None,
        torch.full((requests,), AcceptRule.DRAWN, dtype=torch.int32),
        numbers, forest.token_ids, forest.parents, forest.cu_nodes, 2,
    )  # fmt: skip
    assert (sizes == 4).float().mean() > 0.9
    tokens = torch.full((len(numbers),), -1, dtype=torch.int32)
    tokens[~is_root] = forest.token_ids
    p = torch.softmax(target.double(), 1)
    joint = torch.zeros(vocab, vocab)
    path = tokens[(starts.unsqueeze(1) + rows.clamp(min=0)).flatten()].view(rows.shape)
    one = torch.where(counts >= 1, path[:, 1], last).long()
    plain = torch.multinomial(p[1 + one], 1, generator=generator).squeeze(1)
    known = torch.where(counts >= 2, path[:, 2], last).long()
    two = torch.where(counts >= 1, known, plain)
    joint.index_put_((one, two), torch.ones(requests), accumulate=True)
    expected = (p[0].unsqueeze(1) * p[1:]).flatten() * requests
    possible = expected > 0
    assert not joint.flatten()[~possible].any()
    result = chisquare(joint.flatten()[possible].numpy(), expected[possible].numpy())
    assert result.pvalue > 0.001
    assert (counts >= 1).float().mean() > 0.5, "drawn children are accepted often"


# The pool's own cuts, held against the target by enumeration.

Cut = Callable[[DrawnPool], DraftForest]


def pool_of(world: World, tree: Tree, others: list[float]) -> tuple[DrawnPool, list[int]]:
    """The pool of two levels that drew `tree` for its first request: two children of the root, and
    one of each of them. Further requests have one node each, whose worth is given.

    Returns it and the column of each of the tree's nodes.
    """
    requests = 1 + len(others)
    pool = DrawnPool(torch.arange(requests))
    columns: list[int] = []
    for parents, k in ((torch.full((requests, 1), ROOT), 2), (torch.tensor([[0, 1]]), 1)):
        parents = parents.expand(requests, -1)
        probs, tokens, nodes = [], [], []
        for parent in parents[0].tolist():
            node = -1 if parent == ROOT else columns.index(parent)
            probs.append(world.q(prefix_of(tree, node)))
            nodes += children_of(tree, node)
            tokens.append([tree[child][1] for child in children_of(tree, node)])
        q, ids = torch.stack(probs), torch.tensor(tokens)
        guess = q**0.6 / (q**0.6).sum(1, keepdim=True)
        gains = expected_gains(q, guess, k).unsqueeze(0).repeat(requests, 1, 1)
        for request, worth in enumerate(others, 1):
            gains[request] = 0.0
            if len(columns) == 0:
                gains[request, 0, 0] = worth
        level = pool.open(parents, gains)
        rows = requests * len(probs)
        draws = Draws(
            ids.repeat(requests, 1), torch.zeros(rows, k), torch.zeros(rows, k).long(), q.float()
        )
        reaches = reaches_of(q, guess, ids).repeat(requests, 1)
        pool.fill(level, torch.full(parents.shape, k), draws, draws.token_ids, reaches)
        columns += range(len(columns), len(columns) + len(nodes))
    return pool, columns


def cut_by(cut: Cut, others: list[float]) -> Callable[[World, Tree], Tree]:
    """What is left of a drawn tree, as verification sees it."""

    def after(world: World, tree: Tree) -> Tree:
        pool, _ = pool_of(world, tree, others)
        nodes = nodes_of(cut(pool), 0)
        return tuple((parent, token) for token, parent, _ in nodes)

    return after


# A second sibling is drawn before the first one's child, as levels are drawn.
TWO_LEVELS = shape(-1, -1, 0, 1)


@pytest.mark.parametrize("others", [[], [0.3, 0.15]], ids=["alone", "among others"])
@pytest.mark.parametrize("budget", [0, 1, 2, 3, 4])
def test_a_budget_that_is_known_beforehand_is_sound(budget: int, others: list[float]) -> None:
    for seed in range(3):
        after = cut_by(lambda pool: pool.take(budget, 4), others)
        assert error(World(3, seed), TWO_LEVELS, 2, after=after) < 1e-9


@pytest.mark.parametrize("least", [0.05, 0.2, 0.4])
def test_a_price_that_is_known_beforehand_is_sound(least: float) -> None:
    for seed in range(3):
        after = cut_by(lambda pool: pool.take(9, 4, least_worth=least), [])
        assert error(World(3, seed), TWO_LEVELS, 2, after=after) < 1e-9


def test_cuts_that_look_at_what_they_cut_are_not() -> None:
    def by_own_score(pool: DrawnPool) -> DraftForest:
        pool._worths = pool._worths.where(pool._reaches > 0.9, NO_SLOT)
        return pool.take(4, 4)

    def budget_of_this_block(pool: DrawnPool) -> DraftForest:
        """No nodes where the slot below the first node promises little."""
        return pool.take(4 if float(pool._worths[0, 3]) > 0.85 else 0, 4)

    for cut in (by_own_score, budget_of_this_block):
        errors = [error(World(3, s), TWO_LEVELS, 2, after=cut_by(cut, [])) for s in range(6)]
        assert max(errors) > 1e-3, cut.__name__


def test_widths_cut_in_the_order_of_drawing() -> None:
    for parents, width in itertools.product((1, 2), (0, 1, 2)):
        pool = DrawnPool(root_keys(torch.tensor([5]), torch.tensor([5])))
        generator = torch.Generator().manual_seed(1)
        grow(pool, 1, 2, None, generator)
        whole = DrawnPool(root_keys(torch.tensor([5]), torch.tensor([5])))
        grow(whole, 1, 2, None, torch.Generator().manual_seed(1))
        state = generator.get_state()
        grow(pool, parents, 2, torch.full((1, parents), width), generator)
        generator.set_state(state)
        grow(whole, parents, 2, None, generator)
        some, every = (f.take(99, 99) for f in (pool, whole))
        assert some.num_nodes <= 2 + parents * width
        kept, all_of_them = (
            {(token, worth) for token, _, worth in nodes_of(f, 0)} for f in (some, every)
        )
        assert kept <= all_of_them
