# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Verified trees of drawn candidates give the target's distribution, to 1e-9, by enumeration.

All draws of a tree, with their probabilities, and for each of them all verdicts are gone through in
float64; what verification accepts is `reference.rejection`, which the kernels are held to elsewhere
(tests/ops/test_sample_path.py). Strategies may look at all that was drawn before a slot. Bugs
planted in the rule or in the strategy must not give the distribution.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from echo_vllm.ops import reference

Prefix = tuple[int, ...]
Node = tuple[int, int]  # parent (-1: the root), token
Tree = tuple[Node, ...]
Strategy = Callable[["World", Tree], int | None]  # the parent of the next slot; None: no more
Rejection = Callable[[Tensor, Tensor, Sequence[int]], tuple[list[float], Tensor]]


@dataclass(frozen=True)
class World:
    """A target and a drafter over a small vocabulary: any distribution after any prefix."""

    vocab: int
    seed: int
    zeros: bool = False

    @cache  # noqa: B019 (lives as long as a test)
    def distribution(self, who: str, prefix: Prefix) -> Tensor:
        """float64 [V]; with `zeros` some tokens are impossible, as top-k and top-p make them."""
        number = sum((token + 1) * 31**i for i, token in enumerate(prefix))
        generator = torch.Generator().manual_seed(1000 * self.seed + 7 * number + len(who))
        logits = 1.5 * torch.randn(self.vocab, generator=generator, dtype=torch.float64)
        if self.zeros:
            gone = torch.rand(self.vocab, generator=generator) < 0.35
            gone[int(logits.argmax())] = False
            logits[gone] = float("-inf")
        return torch.softmax(logits, 0)

    def p(self, prefix: Prefix) -> Tensor:
        return self.distribution("target", prefix)

    def q(self, prefix: Prefix) -> Tensor:
        return self.distribution("drafter", prefix)


def prefix_of(tree: Tree, node: int) -> Prefix:
    if node < 0:
        return ()
    return (*prefix_of(tree, tree[node][0]), tree[node][1])


def children_of(tree: Tree, node: int) -> list[int]:
    return [child for child, (parent, _) in enumerate(tree) if parent == node]


def draws(
    world: World, strategy: Strategy, tree: Tree = (), *, replacement: bool = False
) -> list[tuple[Tree, float]]:
    """Every tree that the strategy can end up with, and its probability."""
    parent = strategy(world, tree)
    if parent is None:
        return [(tree, 1.0)]
    q = world.q(prefix_of(tree, parent)).clone()
    if not replacement:
        for child in children_of(tree, parent):
            q[tree[child][1]] = 0.0
    if float(q.sum()) <= 0:  # the drafter has no more tokens there
        return [(tree, 1.0)]
    q /= q.sum()
    found: list[tuple[Tree, float]] = []
    for token in q.nonzero().flatten().tolist():
        rest = draws(world, strategy, (*tree, (parent, token)), replacement=replacement)
        found += [(whole, float(q[token]) * chance) for whole, chance in rest]
    return found


def verdicts(
    world: World, tree: Tree, rejection: Rejection, heat: float
) -> list[tuple[Prefix, float]]:
    """Every output of one verification, accepted tokens and the last one, with its probability."""
    found: list[tuple[Prefix, float]] = []
    pending = [(-1, 1.0)]
    while pending:
        node, reach = pending.pop()
        prefix = prefix_of(tree, node)
        children = children_of(tree, node)
        q = world.q(prefix) ** (1 / heat)
        tokens = [tree[child][1] for child in children]
        chances, last = rejection(world.p(prefix), q / q.sum(), tokens)
        for child, chance in zip(children, chances, strict=True):
            pending.append((child, reach * chance))
            reach *= 1 - chance
        found += [((*prefix, t), reach * float(last[t])) for t in range(world.vocab)]
    return found


def output(
    world: World,
    strategy: Strategy,
    length: int,
    *,
    rejection: Rejection = reference.rejection,
    replacement: bool = False,
    heat: float = 1.0,
    after: Callable[[World, Tree], Tree] = lambda _, tree: tree,
) -> dict[Prefix, float]:
    """The distribution of the first `length` tokens; what verification leaves out of them is plain
    decoding's."""
    joint: dict[Prefix, float] = defaultdict(float)
    for tree, weight in draws(world, strategy, replacement=replacement):
        for tokens, chance in verdicts(world, after(world, tree), rejection, heat):
            for rest in itertools.product(range(world.vocab), repeat=max(0, length - len(tokens))):
                whole, p = tokens[:length], weight * chance
                for token in rest:
                    p *= float(world.p(whole)[token])
                    whole = (*whole, token)
                joint[whole] += p
    return joint


def error(world: World, strategy: Strategy, length: int, **planted: object) -> float:
    """The greatest difference from the target's own distribution of the first tokens."""
    joint = output(world, strategy, length, **planted)  # type: ignore[arg-type]
    worst = 0.0
    for tokens in itertools.product(range(world.vocab), repeat=length):
        p = 1.0
        for i, token in enumerate(tokens):
            p *= float(world.p(tokens[:i])[token])
        worst = max(worst, abs(joint.get(tokens, 0.0) - p))
    return worst


def shape(*parents: int) -> Strategy:
    """A fixed tree, slot by slot."""
    return lambda _, tree: parents[len(tree)] if len(tree) < len(parents) else None


def by_what_was_drawn(world: World, tree: Tree) -> int | None:
    """Depth under a sure child, else a second child; then one more under whoever is likelier."""
    if not tree:
        return -1
    first = float(world.q(())[tree[0][1]])
    if len(tree) == 1:
        return 0 if first > 0.4 else -1
    if len(tree) == 2:
        return max((0, 1), key=lambda n: float(world.q(prefix_of(tree, tree[n][0]))[tree[n][1]]))
    return None


def last_slot_by_another_branch(world: World, tree: Tree) -> int | None:
    """Whether the root gets a second child follows from what was drawn below the first."""
    if len(tree) < 2:
        return len(tree) - 1
    if len(tree) == 2:
        return -1 if tree[1][1] == 0 else None
    return None


STRATEGIES: dict[str, tuple[Strategy, int]] = {  # with the tokens to look at
    "nothing": (shape(), 2),
    "one": (shape(-1), 2),
    "chain": (shape(-1, 0, 1), 3),
    "wide": (shape(-1, -1, -1), 2),
    "full": (shape(-1, -1, 0, 0, 1), 2),
    "ragged": (shape(-1, 0, -1, 0), 2),
    "level by level": (shape(-1, -1, 0, 1), 2),
    "by what was drawn": (by_what_was_drawn, 3),
    "by another branch": (last_slot_by_another_branch, 2),
}


@pytest.mark.parametrize("zeros", [False, True], ids=["all-tokens", "truncated"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_output_is_the_targets(name: str, zeros: bool) -> None:
    strategy, length = STRATEGIES[name]
    for seed in range(3):
        assert error(World(3, seed, zeros), strategy, length) < 1e-9


def test_more_children_than_tokens_are_as_exact() -> None:
    assert error(World(3, 5), shape(-1, -1, -1, -1, 0), 2) < 1e-9


@given(seed=st.integers(0, 10_000), parents=st.lists(st.integers(-1, 2), max_size=3))
@settings(max_examples=25, deadline=None)
def test_any_small_tree_of_any_world(seed: int, parents: list[int]) -> None:
    legal = [min(parent, slot - 1) for slot, parent in enumerate(parents)]
    assert error(World(3, seed, seed % 2 == 0), shape(*legal), 2) < 1e-9


def test_equal_distributions_accept_the_first_child_always() -> None:
    p = World(4, 0).p(())
    for token in range(4):
        chances, _ = reference.rejection(p, p, [token])
        assert chances == [1.0]


# Planted bugs.


def without_an_update(p: Tensor, q: Tensor, tokens: Sequence[int]) -> tuple[list[float], Tensor]:
    """Every child is held against the target itself, not against what is left of it."""
    chances, left = [], q.clone()
    for token in tokens:
        chances.append(min(1.0, float(p[token] / (left / left.sum())[token])))
        left[token] = 0.0
    return chances, p


def last_residual_not_updated(
    p: Tensor, q: Tensor, tokens: Sequence[int]
) -> tuple[list[float], Tensor]:
    """The last rejection does not count: the last token comes from the residual before it."""
    chances, last = reference.rejection(p, q, tokens)
    return chances, reference.rejection(p, q, tokens[:-1])[1] if tokens else last


def with_replacement(p: Tensor, q: Tensor, tokens: Sequence[int]) -> tuple[list[float], Tensor]:
    """Drawing and verification disagree on whether a drawn token is taken out of q."""
    residual, chances = p, []
    for token in tokens:
        chances.append(min(1.0, float(residual[token] / q[token])))
        rest = (residual - q).clamp(min=0.0)
        residual = rest / rest.sum() if float(rest.sum()) > 0 else residual
    return chances, residual


def drop_unlikely(world: World, tree: Tree) -> Tree:
    """Keeps a node by its own score, with all below it: `topn`'s rerank over drawn candidates."""
    kept: list[int] = []
    for node, (parent, token) in enumerate(tree):
        likely = float(world.q(prefix_of(tree, parent))[token]) > 0.3
        if likely and (parent < 0 or parent in kept):
            kept.append(node)
    place = {node: i for i, node in enumerate(kept)} | {-1: -1}
    return tuple((place[tree[node][0]], tree[node][1]) for node in kept)


def sort_siblings(world: World, tree: Tree) -> Tree:
    """A child's slot depends on the child: the likelier of two siblings is verified first."""
    if [parent for parent, _ in tree] != [-1, -1]:
        return tree
    q = world.q(())
    return tuple(sorted(tree, key=lambda node: -float(q[node[1]])))


def merged(p: Tensor, q: Tensor, tokens: Sequence[int]) -> tuple[list[float], Tensor]:
    """A token that came twice is verified twice, the second time as the draw it seems to be."""
    residual, left, chances = p, q.clone(), []
    for token in tokens:
        draft = left / left.sum()
        weight = float(draft[token]) or float(q[token])
        chances.append(min(1.0, float(p[token]) / weight))
        rest = (residual - draft).clamp(min=0.0)
        residual = rest / rest.sum() if float(rest.sum()) > 0 else residual
        left[token] = 0.0
    return chances, residual


BUGS: dict[str, dict[str, object]] = {
    "no residual is updated": {"rejection": without_an_update},
    "the last residual is not updated": {"rejection": last_residual_not_updated},
    "a draw with replacement, verified as one without": {
        "replacement": True,
        "rejection": merged,
    },
    "a draw without replacement, verified as one with": {"rejection": with_replacement},
    "a node dropped by its own score": {"after": drop_unlikely},
    "a q of the wrong temperature": {"heat": 1.3},
    "a slot that depends on the child": {"after": sort_siblings},
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str) -> None:
    worlds = [World(4, seed) for seed in range(4)]
    assert max(error(world, shape(-1, -1), 2) for world in worlds) < 1e-9
    assert max(error(world, shape(-1, -1), 2, **BUGS[bug]) for world in worlds) > 1e-2


@pytest.mark.parametrize("parents", [(-1, -1), (-1, -1, -1, 0)])
def test_a_token_that_came_twice_costs_a_slot_but_not_exactness(parents: tuple[int, ...]) -> None:
    """Passed over, it is a child that was not drawn, which follows from its siblings alone."""
    for seed in range(3):
        assert error(World(3, seed), shape(*parents), 2, replacement=True) < 1e-9


def test_drawing_deeper_before_a_sibling_only_looks_like_the_trap() -> None:
    """Whether x_1 gets a child may follow from x_1; whether x_1 stays may not."""

    def deeper_if_likely(world: World, tree: Tree) -> int | None:
        if not tree:
            return -1
        return 0 if len(tree) == 1 and float(world.q(())[tree[0][1]]) > 0.3 else None

    for seed in range(5):
        assert error(World(4, seed), deeper_if_likely, 2) < 1e-9
