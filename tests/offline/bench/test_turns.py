# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""How engines take turns, what is counted, and that clients stand still in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.steps import Begin, Turn
from benchmarks.turns import Speeds, measure, table
from echo_vllm.offline.bench.closed_loop import Job
from echo_vllm.offline.bench.configurations import built_in
from echo_vllm.offline.engine import LocalEngine
from tests.engine.tiny import make_head, make_target

PACE_FALLS = 0.98
"""Of any engine's speed from one turn to the next."""


class Paced:
    """An engine that makes `speed` tokens a second, times what the machine allows at the moment."""

    pace = 1.0

    def __init__(self, name: str, speed: float, log: list[str]) -> None:
        self.name, self.speed, self.log = name, speed, log

    def do(self, task: Any) -> Any:
        self.log.append(f"{self.name} {type(task).__name__}")
        if not isinstance(task, Turn):
            return None
        Paced.pace *= PACE_FALLS
        return round(1e6 * self.speed * Paced.pace * task.seconds), task.seconds, 10


def test_a_machine_that_gets_slower_does_not_show_in_the_ratio() -> None:
    log: list[str] = []
    engines = [Paced("plain", 1.0, log), Paced("auto", 1.2, log), Paced("rest", 1.1, log)]
    found = measure(engines, Job([[1]], 4, 8), warm_up=1, pairs=4, pair=3, turn=0.5)
    assert found["auto"].over(found["plain"]).middle == pytest.approx(1.2, rel=0.01)
    assert found["auto"].over(found["rest"]).middle == pytest.approx(1.2 / 1.1, rel=0.01)
    assert found["plain"].tokens[-1] < 0.7 * found["plain"].tokens[0]
    assert [len(found["plain"].tokens), sum(found["plain"].steps)] == [4, 4 * 3 * 10]
    assert log[:3] == ["plain Begin", "auto Begin", "rest Begin"]
    # Whoever was first in a turn is last in the next one.
    assert log[3:9] == [f"{n} Turn" for n in ("plain", "auto", "rest", "auto", "rest", "plain")]


def test_the_table_holds_auto_against_the_best_of_each_load() -> None:
    def speeds(*tokens: int) -> Speeds:
        return Speeds(list(tokens), [1.0] * len(tokens), [1] * len(tokens))

    found = {
        1: {"plain": speeds(10, 20), "chain-k1": speeds(20, 40), "auto": speeds(30, 60)},
        8: {"plain": speeds(100, 50), "chain-k1": speeds(50, 25), "auto": speeds(100, 50)},
    }
    lines = table(found).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["engine", "over", "1 requests", "8 requests", "all"]
    assert rows[2:] == [
        ["chain-k1", "plain", "2.00", "0.50", "1.00"],
        ["auto", "plain", "3.00", "1.00", "1.73"],
        # Plain decoding is fixed as well, and the best where drafting loses.
        ["auto", "best fixed", "1.50 (chain-k1)", "1.00 (plain)", ""],
    ]


@pytest.mark.full
def test_clients_wait_between_turns_and_are_replaced_when_answered(tmp_path: Path) -> None:
    target, head = make_target(tmp_path / "target"), make_head(tmp_path / "head")
    spec = built_in(head)["chain-k1"].speculation
    options: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 4,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
    }
    with LocalEngine(target, speculative_config=spec, **options) as local:
        engine = local.engine
        Begin(Job([[2, 3, 4], [5, 6, 7]], 3, 8)).run(local)
        for _ in range(3):
            tokens, seconds, steps = Turn(0.5).run(local)
            assert tokens > 3 * 8 * 2, "answers end, and others begin"
            assert seconds >= 0.5
            assert steps > 8
            assert 0 < engine.get_num_unfinished_requests() <= 3
        Begin(Job([[2, 3, 4]], 1, 8)).run(local)
        assert engine.get_num_unfinished_requests() == 0, "what ran is given up"
        assert Turn(0.1).run(local)[0] > 0
        Begin(Job([[2, 3, 4]], 1, 8)).run(local)
