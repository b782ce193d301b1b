# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""How steps of two engines are paired, and that what is called a rest drafts nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.rest_cost import Times, measure, table
from benchmarks.steps import Decode, Read, Stop
from echo_vllm.conversations import Question
from echo_vllm.offline.bench.configurations import built_in
from echo_vllm.offline.engine import LocalEngine
from tests.engine.tiny import make_head, make_target


class Machine:
    """Gets slower with every step that any engine makes."""

    pace = 1.0


class Paced:
    """An engine whose steps take `cost` times what the machine's take at the moment."""

    def __init__(self, name: str, cost: float, log: list[str]) -> None:
        self.name, self.cost, self.log = name, cost, log

    def do(self, task: Any) -> Any:
        self.log.append(f"{self.name} {type(task).__name__}")
        Machine.pace *= 1.003
        if isinstance(task, Read):
            self.prompts = task.prompts
            return 2 * self.cost * Machine.pace
        if isinstance(task, Decode):
            return [self.cost * Machine.pace] * (task.steps - 1) + [99.0]  # One is disturbed.
        return None


def test_a_machine_that_gets_slower_does_not_show_in_the_ratio() -> None:
    log: list[str] = []
    engines = [Paced("plain", 1.0, log), Paced("rest", 1.05, log)]
    times = measure(engines, [[i] for i in range(5)], 3, rounds=4, blocks=2, block=5, temperature=0)
    decoding, reading = times["rest"].over(times["plain"])
    assert (decoding.count, reading.count) == (8, 4)
    assert decoding.middle == pytest.approx(1.05, rel=4e-3)
    assert reading.middle == pytest.approx(1.05, rel=4e-3)
    assert times["plain"].decoding[-1] > 1.05 * times["plain"].decoding[0]
    assert engines[0].prompts == engines[1].prompts == [[4], [0], [1]]  # Of the last round.
    blocks = [entry for entry in log if "Decode" in entry]
    assert blocks[2:6] == ["plain Decode", "rest Decode", "rest Decode", "plain Decode"]
    assert log[-2:] == ["rest Stop", "plain Stop"]


def test_the_table_has_a_row_for_either_kind_of_step() -> None:
    plain, rest = Times([1.0, 1.0], [1.0, 2.0]), Times([1.1, 1.1], [1.0, 2.0])
    lines = table({8: {"plain": plain, "rest": rest}}).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["engine", "step that", "8 requests"]
    assert rows[2:] == [["rest", "decodes", "1.00"], ["rest", "reads the prompts", "1.10"]]


@pytest.mark.full
def test_an_engine_at_rest_says_the_same_and_drafts_nothing(tmp_path: Path) -> None:
    target, head = make_target(tmp_path / "target"), make_head(tmp_path / "head")
    prompts = [[2 + i, 3, 4, 5] for i in range(6)]
    options: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 4,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
    }
    answers: dict[str, dict[str, list[int]]] = {}
    for name in ("plain", "rest", "auto-rest"):
        spec = built_in(head)[name].speculation
        with LocalEngine(target, speculative_config=spec, **options) as local:
            found = answers[name] = {}

            def keep(question: Question, ids: list[int], stopped: bool) -> None:
                found[question.name] = ids  # noqa: B023 - it is called at once

            local.answer((Question(str(i), ids, 40) for i, ids in enumerate(prompts)), keep)
            assert local.counters().get("spec_decode_num_draft_tokens", 0) == 0
            # And the tasks of the clock run on it.
            assert Read(prompts[:4]).run(local) > 0
            assert len(Decode(3).run(local)) == 3
            Stop(4).run(local)
            assert not local.engine.has_unfinished_requests()
    assert answers["rest"] == answers["auto-rest"] == answers["plain"]
    assert len(answers["plain"]) == 6
