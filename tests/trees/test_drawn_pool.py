# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The pool of drawn candidates: what it gives out, in which order, and that its cuts are sound."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from echo_vllm import ops
from echo_vllm.ops import AcceptRule
from echo_vllm.trees.drawn import NO_SLOT, DrawnPool, OpenLevel, Survival
from echo_vllm.trees.draws import Draws, Sampling, draw_children, root_keys
from echo_vllm.trees.forest import ROOT, DraftForest
from tests.trees.guesses import expected_gains, guess_target, reaches_of
from tests.trees.test_drawn_exactness import Tree, World, children_of, error, prefix_of, shape

VOCAB = 30


def grow(
    pool: DrawnPool, width: int, k: int, widths: torch.Tensor | None, generator: torch.Generator
) -> OpenLevel:
    """One level of random distributions; all slots unless `widths` says how many."""
    roots = torch.full((pool.num_requests, 1), ROOT)
    parents = pool.deepest().best(width) if pool.depth else roots
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
        _, best, _ = pool.best(torch.arange(requests), 1)
        assert torch.equal(pool.first_scores(), best.flatten())
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
        part = slice(begin + request, begin + request + own)
        whole_part = slice(of_all + request, of_all + request + own)
        assert torch.equal(numbers[part], all_numbers[whole_part])
        parents = {parent for _, parent, _ in nodes_of(fewer, request)}
        for row in range(own):
            expected = all_rows[whole_part][row] if row - 1 in parents else -1
            assert rows[part][row] == expected, "a row without children needs no distribution"


def nodes_of(forest: DraftForest, request: int) -> list[tuple[int, int, float]]:
    own = slice(*forest.cu_nodes[request : request + 2].tolist())
    fields = (forest.token_ids, forest.parents, forest.path_logprobs)
    return list(zip(*(x[own].tolist() for x in fields), strict=True))


def test_an_open_level_knows_nothing_of_its_children() -> None:
    """Whoever decides about slots cannot see what will be in them."""
    names = {field.name for field in dataclasses.fields(OpenLevel)}
    assert names == {"depth", "parents", "reaches", "expected", "worths"}
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


def verified_by(
    pool: DrawnPool, forest: DraftForest
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draft rows, uniforms and q, as `ops.sample_path` wants them."""
    rows, numbers = pool.rows_of(forest)
    used, places = np.unique(rows[rows >= 0].numpy(), return_inverse=True)
    rows[rows >= 0] = torch.from_numpy(places)
    return rows.to(torch.int32), numbers, pool.draft_probs(torch.from_numpy(used))


def test_a_forest_goes_through_verification() -> None:
    """From draws to accepted tokens: with the target equal to q nothing is ever rejected."""
    generator = torch.Generator().manual_seed(3)
    pool = DrawnPool(root_keys(torch.arange(3), torch.arange(3)))
    for _ in range(2):
        grow(pool, 1, 2, None, generator)
    forest = pool.take(100, 100)
    rows, numbers, probs = verified_by(pool, forest)
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
        parents = torch.full((requests, 1), ROOT) if first else pool.deepest().best(1)
        # Row 0 is what follows the root, row 1 + t what follows token t.
        rows = torch.zeros_like(parents) if first else 1 + pool.tokens_of(parents)
        draws = draw_children(drafter[rows.flatten()], k, pool.keys_of(parents).flatten(), options)
        guess = guess_target(draws.probs, lambda logq: 0.7 * logq.exp() ** 0.6)
        gains = expected_gains(draws.probs, guess, k).view(requests, 1, k)
        level = pool.open(parents, gains)
        reaches = reaches_of(draws.probs, guess, draws.token_ids)
        pool.fill(level, torch.full((requests, 1), k), draws, draws.token_ids, reaches)
    forest = pool.take(requests * 3, 3)
    draft_rows, numbers, probs = verified_by(pool, forest)
    sizes = forest.cu_nodes.diff().long() + 1
    starts = forest.cu_nodes[:-1].long() + torch.arange(requests)
    is_root = torch.zeros(len(numbers), dtype=torch.bool)
    is_root[starts] = True
    which = torch.zeros(len(numbers), dtype=torch.int32)
    which[~is_root] = 1 + forest.token_ids
    rows, counts, last = ops.sample_path(
        target, which, probs, draft_rows, None,
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


Frontier = Callable[[DrawnPool], torch.Tensor]


def all_of_them(pool: DrawnPool) -> torch.Tensor:
    return torch.tensor([[0, 1]]).expand(pool.num_requests, -1)


def most_promising(pool: DrawnPool) -> torch.Tensor:
    return pool.deepest().best(1)


def pool_of(
    world: World,
    tree: Tree,
    others: list[float],
    frontier: Frontier = all_of_them,
    survival: Survival | None = None,
    power: float = 0.6,
) -> DrawnPool:
    """The pool of two levels that drew `tree` for its first request: two children of the root, and
    one of each of those that `frontier` names. Further requests have one node each, whose worth is
    given. The target is thought to be like q to the `power`."""
    requests = 1 + len(others)
    pool = DrawnPool(torch.arange(requests), survival)
    nodes = [-1]  # of the tree, per parent of the level that is drawn
    for depth, k in ((1, 2), (2, 1)):
        if depth == 1:
            parents = torch.full((requests, 1), ROOT)
        else:
            parents = frontier(pool)
            nodes = [children_of(tree, -1)[column] for column in parents[0].tolist()]
        q = torch.stack([world.q(prefix_of(tree, node)) for node in nodes])
        ids = torch.tensor([[tree[child][1] for child in children_of(tree, n)] for n in nodes])
        guess = q**power / (q**power).sum(1, keepdim=True)
        gains = expected_gains(q, guess, k).unsqueeze(0).repeat(requests, 1, 1)
        for request, worth in enumerate(others, 1):
            gains[request] = 0.0
            if depth == 1:
                gains[request, 0, 0] = worth
        level = pool.open(parents, gains)
        rows = requests * len(nodes)
        draws = Draws(
            ids.repeat(requests, 1), torch.zeros(rows, k), torch.zeros(rows, k).long(), q.float()
        )
        reaches = reaches_of(q, guess, ids).repeat(requests, 1)
        pool.fill(level, torch.full(parents.shape, k), draws, draws.token_ids, reaches)
    return pool


def cut_by(
    cut: Cut,
    others: list[float],
    frontier: Frontier = all_of_them,
    survival: Survival | None = None,
    power: float = 0.6,
) -> Callable[[World, Tree], Tree]:
    """What is left of a drawn tree, as verification sees it."""

    def after(world: World, tree: Tree) -> Tree:
        pool = pool_of(world, tree, others, frontier, survival, power)
        return tuple((parent, token) for token, parent, _ in nodes_of(cut(pool), 0))

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


def steeper(scores: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
    """A calibration whose curves cross: deeper slots are worth more than the drafter thinks."""
    return (scores * torch.where(depths == 1, 2.0, 0.3)).exp()


@pytest.mark.parametrize("survival", [None, steeper], ids=["as-expected", "calibrated"])
@pytest.mark.parametrize("power", [0.6, -0.5])
@pytest.mark.parametrize("budget", [1, 2, 3])
def test_children_under_the_most_promising_nodes_are_sound(
    budget: int, power: float, survival: Survival | None
) -> None:
    """The second child of the root must not stay because its own token promises much."""
    for seed in (0, 3, 8, 9):
        after = cut_by(lambda pool: pool.take(budget, 3), [], most_promising, survival, power)
        assert error(World(3, seed), TWO_LEVELS, 2, after=after) < 1e-9


@pytest.mark.parametrize("floor", [0, 1, 2])
def test_a_floor_that_is_known_beforehand_is_sound(floor: int) -> None:
    def cut(pool: DrawnPool) -> DraftForest:
        forest = pool.take(4, 4, 0.9, torch.tensor([floor]))
        assert forest.num_nodes >= floor
        return forest

    for seed in range(3):
        assert error(World(3, seed), TWO_LEVELS, 2, after=cut_by(cut, [])) < 1e-9


@pytest.mark.parametrize("gate", [0.1, 0.3, 0.5])
def test_a_gate_on_the_best_promise_is_sound(gate: float) -> None:
    """A request that fails it ends there: its second level is left out."""

    def cut(pool: DrawnPool) -> DraftForest:
        best = float(pool._promises[0, 1:3].max())
        if best <= gate:
            pool._worths[:, 3:] = NO_SLOT
        return pool.take(2, 4)

    for seed in range(6):
        assert error(World(3, seed), TWO_LEVELS, 2, after=cut_by(cut, [])) < 1e-9


def test_choosing_parents_by_what_their_tokens_alone_say_is_not_sound() -> None:
    """An unlikely token would leave its place among the parents to another one, whose child then
    takes the unlikely token's place in the forest."""

    def by_reach(pool: DrawnPool) -> torch.Tensor:
        return pool._reaches[:, 1:3].argsort(dim=1, descending=True, stable=True)[:, :1]

    after = cut_by(lambda pool: pool.take(2, 3), [], by_reach, power=-0.5)
    assert error(World(3, 9), TWO_LEVELS, 2, after=after) > 1e-2


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


def test_who_stops_leaves_the_frontier_and_changes_nothing_for_others() -> None:
    """A level of some requests is drawn as if the others were not there."""
    alone, beside = (
        DrawnPool(root_keys(torch.tensor(seeds), torch.zeros(len(seeds)).long()))
        for seeds in ([7], [3, 7])
    )
    logits = 2 * torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    for pool in (alone, beside):
        last = pool.num_requests - 1
        for depth in range(2):
            if depth == 1:
                pool.go_on(torch.tensor([last]))
            own = len(pool.active)
            parents = pool.deepest().best(2) if depth else torch.full((own, 1), ROOT)
            rows = torch.cat([logits[:1]] * own) if depth == 0 else logits[1:]
            keys = pool.keys_of(parents).flatten()
            draws = draw_children(rows, 2, keys, Sampling(torch.ones(len(rows))))
            guess = draws.probs.double() ** 0.7
            guess /= guess.sum(1, keepdim=True)
            gains = expected_gains(draws.probs, guess, 2).view(own, -1, 2)
            reaches = reaches_of(draws.probs, guess, draws.token_ids)
            level = pool.open(parents, gains)
            widths = torch.full(parents.shape, 2)
            pool.fill(level, widths, draws, draws.token_ids, reaches)
    forest = beside.take(99, 99)
    assert forest.cu_nodes.tolist()[1] == 2, "the first request ended after one level"
    assert nodes_of(alone.take(99, 99), 0) == nodes_of(forest, 1)
    assert beside.deepest().requests.tolist() == [1]


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
