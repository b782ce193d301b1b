# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Two tensor-parallel ranks on a CPU: the same tokens, and the same trees on both ranks.

No rank tells another what it drafted or accepted, so both must come to the same trees.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from tests.conftest import IN_PROCESS_ENGINE, ROOT
from tests.engine.engines import echo
from tests.engine.ranks import Result, Task, decode
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
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("two ranks need two cores, and this process may use one only")
    folder = tmp_path_factory.mktemp("two-ranks")
    (folder / "task.json").write_text(json.dumps(asdict(replace(task, num_ranks=2))))
    env = {
        **os.environ,
        **IN_PROCESS_ENGINE,
        # One core a rank. vLLM's own choice could give both ranks the same one.
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores)),
    }
    run = subprocess.run(
        [
            *(sys.executable, "-m", "tests.engine.ranks"),
            *(str(folder / "task.json"), str(folder / "result.json")),
        ],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:]
    return Result(**json.loads((folder / "result.json").read_text()))


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
    assert len(first) > 20
    assert first == second


def test_as_much_is_accepted_as_on_one_rank(one_rank: Result, two_ranks: Result) -> None:
    assert one_rank.counters["spec_decode_num_accepted_tokens"] > 50
    for name, value in one_rank.counters.items():
        if "seconds" not in name:  # Those are each run's own.
            assert two_ranks.counters[name] == value, name
