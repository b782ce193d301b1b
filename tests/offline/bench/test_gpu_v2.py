# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What `benchmarks.gpu_v2` keeps, whatever happens to the engines and the time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_v2 import Cell, Run, groups, parse, table
from benchmarks.steps import Answer
from echo_vllm.offline.bench.configurations import PLAIN, Configuration
from echo_vllm.offline.bench.engine_process import EngineError

PROMPTS = [[1, 2]] * 4


class Engine:
    """Answers at once; fails from a task on."""

    def __init__(self, name: str, works: int = 1000) -> None:
        self.name, self.works = name, works
        self.tasks: list[Answer] = []

    def do(self, task: Answer) -> dict[str, float]:
        self.tasks.append(task)
        if len(self.tasks) > self.works:
            raise EngineError("it broke")
        count = len(task.prompts)
        return {"tokens": 10.0 * count, "seconds": 0.5, "steps": 10}


def measured(tmp_path: Path, engines: list[Engine], seconds: float) -> tuple[Run, Any]:
    out = tmp_path / "out.json"
    options = parse(["--requests", "1,4", "--rounds", "2", "--out", str(out)])
    run = Run(options, time.monotonic() + seconds)
    run.measure(engines, PROMPTS)  # type: ignore[arg-type]
    run.keep()
    return run, json.loads(out.read_text())


def test_every_load_is_measured_in_every_round(tmp_path: Path) -> None:
    engines = [Engine("plain"), Engine("auto")]
    run, kept = measured(tmp_path, engines, 100)
    assert [(c.engine, c.requests, c.round) for c in run.cells] == [
        (name, load, number) for number in (0, 1) for load in (1, 4) for name in ("plain", "auto")
    ]
    assert kept["cells"][0]["tokens"] == 10
    assert kept["failed"] == {}
    # The first time at a load is not the one that counts.
    assert [task.max_tokens for task in engines[0].tasks] == [8, 128, 8, 128, 128, 128]


def test_an_engine_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    _, kept = measured(tmp_path, [Engine("plain"), Engine("auto", works=2)], 100)
    assert kept["failed"] == {"auto": "it broke"}
    names = [cell["engine"] for cell in kept["cells"]]
    assert names.count("plain") == 4
    assert names.count("auto") == 1


def test_nothing_starts_when_the_time_is_up(tmp_path: Path) -> None:
    engine = Engine("plain")
    _, kept = measured(tmp_path, [engine], 0)
    assert engine.tasks == kept["cells"] == []


def test_the_table_says_speed_ratio_and_step() -> None:
    cells = [
        Cell("plain", 4, 0, tokens=40, seconds=0.4, steps=10),
        Cell("auto", 4, 0, tokens=120, seconds=0.6, steps=10),
    ]
    text = table(cells)
    assert "100 (1.00), 40.00 ms, 1.00" in text
    assert "200 (2.00), 60.00 ms, 3.00" in text


def test_engines_start_as_many_at_once_as_there_is_room_for() -> None:
    some = [Configuration(str(i), None) for i in range(5)]
    assert [len(group) for group in groups([PLAIN, *some], 4)] == [4, 2]
