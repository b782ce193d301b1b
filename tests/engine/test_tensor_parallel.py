# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Two tensor-parallel ranks on a CPU: the same tokens, and the same trees on both ranks.

No rank tells another what it drafted or accepted, so both must come to the same trees.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.engine.engines import echo
from tests.engine.ranks import Result, Task, decode, on_two_ranks
from tests.engine.tiny import Shape, make_head, make_target

pytestmark = pytest.mark.full

# vLLM pads these to 64, so that 32 live on the first rank and 8 on the second.
VOCAB = 40
ON_FIRST_RANK = 32


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A speculating engine on one rank."""
    folder = tmp_path_factory.mktemp("even-headed")
    shape = Shape(vocab=VOCAB)
    target = make_target(folder / "target", shape)
    head = make_head(folder / "head", shape)
    draw = random.Random(3)
    prompts = [[draw.randrange(2, VOCAB) for _ in range(draw.randrange(1, 60))] for _ in range(16)]
    spec = echo(head, 16, policy="topn", max_depth=4, top_k=4)
    return Task(str(target), spec, 1, prompts, 24)


@pytest.fixture(scope="module")
def plain(task: Task) -> Result:
    """One rank, without speculation."""
    return decode(replace(task, speculation=None))


@pytest.fixture(scope="module")
def one_rank(task: Task) -> Result:
    return decode(task)


@pytest.fixture(scope="module")
def two_ranks(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return on_two_ranks(task, tmp_path_factory.mktemp("two-ranks"))


def test_greedy_tokens_are_those_of_one_rank_without_speculation(
    plain: Result, two_ranks: Result
) -> None:
    assert two_ranks.greedy == plain.greedy


def test_seeded_tokens_are_those_of_one_rank_without_speculation(
    plain: Result, two_ranks: Result
) -> None:
    assert two_ranks.sampled == plain.sampled


def test_both_ranks_make_the_same_trees(two_ranks: Result) -> None:
    first, second = two_ranks.drafts
    assert len(first) > 40
    assert first == second
    # The best tokens come from both ranks' parts of the vocabulary.
    drafted = {token for trees in first for tokens, _ in trees for token in tokens}
    assert min(drafted) < ON_FIRST_RANK <= max(drafted)


def test_both_ranks_draw_the_same_trees(two_ranks: Result) -> None:
    first, second = two_ranks.drawn
    assert len(first) > 10
    assert first == second


def test_as_much_is_accepted_as_on_one_rank(one_rank: Result, two_ranks: Result) -> None:
    assert one_rank.counters["spec_decode_num_accepted_tokens"] > 50
    for name, value in one_rank.counters.items():
        if "seconds" not in name:  # Those are each run's own.
            assert two_ranks.counters[name] == value, name
