# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Two tensor-parallel ranks on Model Runner V2: plain V2's tokens, and the same trees on both.

No rank tells another what it drafted or accepted, so both must come to the same trees.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.engines import echo
from tests.engine.ranks import Result, Task, decode, on_two_ranks
from tests.engine.test_exactness import POLICIES
from tests.engine.test_tensor_parallel import VOCAB
from tests.engine.tiny import Shape, make_head, make_target

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, shape = tmp_path_factory.mktemp("even-headed"), Shape(vocab=VOCAB)
    return make_target(folder / "target", shape), make_head(folder / "head", shape)


@pytest.fixture(scope="module")
def task(models: tuple[Path, Path]) -> Task:
    """On one rank, without speculation."""
    draw = random.Random(3)
    prompts = [[draw.randrange(2, VOCAB) for _ in range(draw.randrange(1, 40))] for _ in range(4)]
    return Task(str(models[0]), None, 1, prompts, 12)


@pytest.fixture(scope="module")
def plain(task: Task) -> Result:
    return decode(task)


def test_two_ranks_give_the_tokens_of_plain_decoding_from_the_same_trees(
    models: tuple[Path, Path],
    task: Task,
    plain: Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shared budget, which both ranks give to the same requests."""
    # vLLM compiles how ranks look their tokens up, and Inductor finds no GPU behind Triton.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    num_nodes, section = POLICIES["echo-16"]
    found = on_two_ranks(replace(task, speculation=echo(models[1], num_nodes, **section)), tmp_path)
    assert found.greedy == plain.greedy
    assert found.sampled == plain.sampled
    first, second = found.drafts
    assert len(first) > 10
    assert first == second
    assert found.counters["spec_decode_num_accepted_tokens"] > 0
