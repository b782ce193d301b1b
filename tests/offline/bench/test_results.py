# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The journal, the files of a result, and the command's errors; and one real benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from echo_vllm.cli.bench import bench
from echo_vllm.offline.bench.closed_loop import Job, Latency, Run
from echo_vllm.offline.bench.configurations import PLAIN, Configuration
from echo_vllm.offline.bench.results import Journal, write_results
from echo_vllm.offline.bench.tables import Sample

SETTINGS: dict[str, Any] = {
    "model": "m",
    "dtype": "bfloat16",
    "engine": "server",
    "tokens": 8,
    "spread": 0.25,
    "ignore_eos": False,
    "open_loop": False,
    "speculation": {"plain": None, "auto": {"method": "echo"}},
}
CONFIGURATIONS = [PLAIN, *(Configuration(name, {}) for name in ("eagle3-k1", "eagle3-k2", "auto"))]


def sample(name: str, concurrency: int = 1, round: int = 0, seconds: float = 1.0) -> Sample:
    latency = Latency(0.1, 0.2, 0.01, 0.02, 0.01, 0.02)
    return Sample(name, concurrency, round, Run(seconds, 2.0, 100, 96, 96, 0, 0, latency=latency))


def journal(folder: Path, resume: bool = False, **changes: Any) -> Journal:
    return Journal(folder / "bench.jsonl", SETTINGS | changes, ["echo-vllm", "bench"], resume)


def test_a_journal_goes_on_where_it_ends(tmp_path: Path) -> None:
    first = journal(tmp_path)
    first.append(sample("plain"))
    first.append(sample("auto", 4))
    again = journal(tmp_path, resume=True)
    assert again.samples == first.samples
    assert again.done() == {("plain", 1, 0.0, 0), ("auto", 4, 0.0, 0)}
    assert (first.session, again.session) == (0, 1)
    assert "cpu" in again.sessions[0]["hardware"]


def test_a_sample_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    first = journal(tmp_path)
    first.append(sample("plain"))
    with first.path.open("a") as file:
        file.write('{"configuration": "auto", "concurr')
    again = journal(tmp_path, resume=True)
    again.append(sample("auto"))
    assert again.samples == [sample("plain"), sample("auto")]
    assert journal(tmp_path, resume=True).samples == again.samples


@pytest.mark.parametrize(
    ("resume", "changes", "message"),
    [
        (False, {}, "holds results already; go on with --resume"),
        (True, {"tokens": 9}, "tokens is 9 and was 8"),
        (True, {"speculation": {"auto": {"method": "x"}}}, "configuration 'auto' is not what it"),
    ],
)
def test_results_are_not_mixed(
    resume: bool, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    journal(tmp_path)
    with pytest.raises(ValueError, match=message):
        journal(tmp_path, resume, **changes)


def test_a_later_session_may_have_other_configurations(tmp_path: Path) -> None:
    journal(tmp_path)
    journal(tmp_path, resume=True, speculation={"plain": None, "echo": {}})


def test_results_are_json_markdown_and_a_picture(tmp_path: Path) -> None:
    kept = journal(tmp_path)
    speeds = {"plain": 1.0, "eagle3-k1": 0.8, "eagle3-k2": 1.25, "auto": 0.5}
    for number in range(2):
        for concurrency in (1, 4):
            for name, seconds in speeds.items():
                kept.append(sample(name, concurrency, number, seconds * (number + 1)))
    text = write_results(kept, CONFIGURATIONS, {"eagle3-k2": "no luck"})
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert "failed: no luck" in rows["eagle3-k2"]
    assert rows["auto"].count("2.00") == 3
    assert rows["auto / eagle3-k1"].count("1.60") == 3
    assert rows["auto / best fixed"].count("1.60 (eagle3-k1)") == 2
    assert "ratio [95 % interval] of 2 paired rounds" in text
    assert (tmp_path / "bench.md").read_text() == text
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "bench.json").read_text())
    assert len(document["samples"]) == 16
    assert document["failures"] == {"eagle3-k2": "no luck"}
    assert document["sessions"][0]["command"] == ["echo-vllm", "bench"]
    ours = next(row for row in document["summary"] if row["configuration"] == "auto")
    assert ours["speed over plain"] == pytest.approx(
        {"middle": 2.0, "low": 2.0, "high": 2.0, "count": 2}
    )
    assert str(tmp_path) not in json.dumps(document)


def test_results_of_an_open_loop_compare_the_time_per_token(tmp_path: Path) -> None:
    kept = journal(tmp_path, open_loop=True, arrival_seconds=30.0, tpot_ms=50.0)
    for number in range(3):
        for name, tpot in (("plain", 0.04), ("auto", 0.02)):
            latency = Latency(0.1, 0.2, 0.01, 0.02, tpot, 2 * tpot)
            run = Run(9.0, 2.0, 100, 96, 96, 0, 0, latency=latency, goodput=0.25)
            kept.append(Sample(name, 0.5, number, run))
    text = write_results(kept, [CONFIGURATIONS[0], CONFIGURATIONS[-1]], {})
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert "0.5 a second" in rows["configuration"]
    assert rows["auto"].count("2.00") == 2  # Of the tokens a second, which the rate sets, 1.00.
    details = [line for line in text.splitlines() if line.startswith("| 0.5 ")]
    header = [cell.strip() for cell in rows["requests a second"].split("|")]
    cells = [cell.strip() for cell in details[1].split("|")]
    assert cells[header.index("TPOT p99, ms")] == "40"
    assert cells[header.index("good requests/s")] == "0.25"
    assert "random arrivals for 30 s, good are at most 50 ms a token" in text


def call(*arguments: str) -> tuple[int, str]:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(bench)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stderr.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "topn-9"], "unknown configuration 'topn-9'"),
        (["--concurrency", "1,x"], "--concurrency must be whole numbers from 1 on"),
        (["--concurrency", "0"], "--concurrency must be whole numbers from 1 on"),
        (["--rate", "0"], "--rate must be numbers from 0.001 on"),
        (
            ["--rate", "1", "--engine", "in-process"],
            "--rate needs servers, got --engine in-process",
        ),
        (["--temperature", "nan"], "--temperature must be numbers from 0 on"),
        (["--prompts", "absent.jsonl"], "absent.jsonl cannot be read (No such file or directory)"),
    ],
)
def test_arguments_that_make_no_sense_are_one_line(arguments: list[str], message: str) -> None:
    status, line = call(".", "--drafter", ".", *arguments)
    assert status == 2
    assert line.startswith("error: ")
    assert message in line
    assert "\n" not in line


def test_an_existing_result_is_not_overwritten(tmp_path: Path) -> None:
    journal(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    output = str(tmp_path / "bench")
    status, line = call(".", "--drafter", ".", "--prompts", str(prompts), "--output", output)
    assert (status, "go on with --resume" in line) == (2, True)


@pytest.mark.full
def test_a_real_benchmark_of_two_servers(
    demo_target: Path, demo_head: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    talk = ["Name a colour.", "Why that one?"]
    prompts.write_text(f'{json.dumps({"turns": talk})}\n{{"prompt": "What is rain?"}}\n')
    command = [sys.executable, "-c", "import typer; from echo_vllm.cli.bench import bench; "]
    command[-1] += "typer.run(bench)"
    command += [str(demo_target), "--drafter", str(demo_head), "--prompts", str(prompts)]
    command += [
        "--configs",
        "plain,eagle3-k2",
        "--concurrency",
        "2",
        "--rounds",
        "1",
        "--ignore-eos",
    ]
    command += ["--threads", "1"]  # Another file's tests have the other core.
    command += [
        "--tokens",
        "8",
        "--keep-alive",
        "1",
        "--output",
        str(tmp_path / "out" / "bench"),
    ]
    here = {"VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING"}
    env = {name: value for name, value in os.environ.items() if name not in here}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "out" / "bench.json").read_text())
    runs = {s["configuration"]: s["run"] for s in document["samples"]}
    assert set(runs) == {"plain", "eagle3-k2"}
    job = Job([], load=2, max_tokens=8, spread=0.5)
    # Chats 0 and 2 have two turns, in one order or the other; all answers reach their length.
    turns = [(2, 1, 2, 1), (1, 2, 1, 2)]
    tokens = [
        sum(job.length((chat, turn)) for chat, count in enumerate(counts) for turn in range(count))
        for counts in turns
    ]
    for run in runs.values():
        assert run["tokens"] in tokens
        assert run["decode_tokens"] == run["tokens"] - 6
        assert 0 < run["latency"]["ttft_p50"] <= run["latency"]["ttft_p99"]
        assert run["preemptions"] == 0
    assert runs["plain"]["verified"] == 0
    assert runs["eagle3-k2"]["verified"] >= runs["eagle3-k2"]["accepted"] > 0
    assert "| eagle3-k2" in done.stdout
    for name in runs:
        assert (tmp_path / "out" / "bench.logs" / f"{name}.log").stat().st_size
