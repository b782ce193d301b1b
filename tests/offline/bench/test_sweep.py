# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The order of runs, who is alive when, and what is left to run, with pretended workers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from echo_vllm.offline.bench import sweep as sweep_module
from echo_vllm.offline.bench.closed_loop import Job, Run
from echo_vllm.offline.bench.configurations import PLAIN, Configuration
from echo_vllm.offline.bench.engine_process import EngineError, EngineOptions
from echo_vllm.offline.bench.fleet import Fleet, workers_that_fit
from echo_vllm.offline.bench.sweep import Cell, Plan, Sweep
from echo_vllm.offline.bench.tables import Sample

NAMES = ["plain", "a", "b"]
CONFIGURATIONS = (PLAIN, Configuration("a", {}), Configuration("b", {}))
OPTIONS = EngineOptions("model", "float32", max_num_seqs=4, threads=1)


class Pretended:
    """A worker that notes what happens to it; `broken` ones fail at their first job."""

    alive: list[str]
    most: int
    events: list[str]
    jobs: list[tuple[str, Job]]
    broken: set[str]

    @classmethod
    def reset(cls) -> None:
        cls.alive, cls.events, cls.jobs, cls.broken, cls.most = [], [], [], set(), 0

    def __init__(self, configuration: Configuration, log: Path) -> None:
        self.name, self.log = configuration.name, log
        self.alive.append(self.name)
        type(self).most = max(self.most, len(self.alive))
        self.events.append(f"start {self.name}")

    def wait_ready(self) -> None:
        self.events.append(f"ready {self.name}")

    def run(self, job: Job) -> Run:
        if self.name in self.broken:
            raise EngineError("out of luck")
        self.jobs.append((self.name, job))
        return Run(1.0, 1.0, 10, 9, 9, 0, 0)

    def hang_up(self) -> None:
        self.events.append(f"hang up {self.name}")

    def stop(self) -> None:
        self.alive.remove(self.name)
        self.events.append(f"stop {self.name}")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    Pretended.reset()


class Words:
    """A tokenizer: one token a word, one more for the place where the assistant begins."""

    def __init__(self, model: str) -> None: ...

    def encode(self, messages: Sequence[str]) -> list[int]:
        return [len(word) for text in messages for word in text.split()] + [0]


def run(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    plan: Plan,
    done: set[Cell] = frozenset(),  # type: ignore[assignment]
    keep_alive: int = 3,
    conversations: Sequence[list[str]] = (["one two"], ["three"]),
) -> tuple[list[Sample], dict[str, str]]:
    monkeypatch.setattr(sweep_module, "Chat", Words)
    monkeypatch.setattr(sweep_module, "launcher", lambda kind, options: Pretended)
    samples: list[Sample] = []
    sweep = Sweep(plan, OPTIONS, "server", conversations, keep_alive, folder)
    return samples, sweep.run(samples.append, done)


def cells(samples: Sequence[Sample]) -> list[Cell]:
    return [(s.configuration, s.load, s.temperature, s.round) for s in samples]


PLAN = Plan(CONFIGURATIONS, (1, 4), (0.0, 1.0), rounds=2, max_tokens=8)
ALL = list(itertools.product(NAMES, (1, 4), (0.0, 1.0), (0, 1)))


def test_every_cell_runs_once_and_nothing_is_left_alive(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    samples, failures = run(monkeypatch, tmp_path, PLAN)
    assert sorted(cells(samples)) == sorted(ALL)
    assert (failures, Pretended.alive) == ({}, [])
    assert sum(event.startswith("start") for event in Pretended.events) == 3


def test_configurations_take_turns_in_a_shifting_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    samples, _ = run(monkeypatch, tmp_path, PLAN)
    rows = [list(row) for _, row in itertools.groupby(samples, lambda s: (s.round, s.load))]
    for row in rows:
        assert {s.configuration for s in row} == set(NAMES)
    first = [row[0].configuration for row in rows]
    assert first[:3] == ["plain", "a", "b"]


def test_a_row_runs_the_same_prompts_and_another_round_takes_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    conversations = [[f"{'word ' * i}"] for i in range(1, 9)]
    plan = Plan(CONFIGURATIONS[:2], (1,), rounds=2, max_tokens=8)
    run(monkeypatch, tmp_path, plan, conversations=conversations)
    jobs = [job for _, job in Pretended.jobs if job.max_tokens == 8]
    assert jobs[0] == jobs[1]
    assert jobs[2] == jobs[3]
    assert not set(map(tuple, jobs[0].prompts)) & set(map(tuple, jobs[2].prompts))


@pytest.mark.parametrize("keep_alive", [1, 2])
def test_no_more_workers_are_alive_than_fit(
    keep_alive: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    samples, _ = run(monkeypatch, tmp_path, PLAN, keep_alive=keep_alive)
    assert sorted(cells(samples)) == sorted(ALL)
    assert Pretended.most == keep_alive
    # The second round begins with what the first one ended with.
    starts = sum(event.startswith("start") for event in Pretended.events)
    assert starts == 3 + (3 - keep_alive)


def test_a_failed_configuration_is_not_asked_again_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Pretended.broken = {"a"}
    samples, failures = run(monkeypatch, tmp_path, PLAN)
    assert failures == {"a": "out of luck"}
    assert {s.configuration for s in samples} == {"plain", "b"}
    assert Pretended.events.count("start a") == 1
    assert Pretended.alive == []


def test_what_is_done_is_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    samples, _ = run(monkeypatch, tmp_path, PLAN, done=set(ALL))
    assert (samples, Pretended.events) == ([], [])


def test_plain_runs_again_beside_what_is_missing() -> None:
    missing = PLAN.missing(set(ALL) - {("b", 4, 0.0, 1)})
    assert missing == {(4, 0.0, 1): ["plain", "b"]}
    ((group, order),) = PLAN.runs(missing, 3)
    assert group == ["plain", "b"]
    assert sorted(order) == [("b", 4, 0.0, 1), ("plain", 4, 0.0, 1)]


def test_a_chat_is_held_to_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    talk = [["first turn", "second"], ["alone"]]
    plan = Plan(CONFIGURATIONS, (2,), rounds=1, max_tokens=8, chats_per_client=2)
    run(monkeypatch, tmp_path, plan, conversations=talk)
    jobs = [job for _, job in Pretended.jobs if job.max_tokens == 8]
    assert len(jobs) == 3
    for job in jobs:
        assert job.turns == talk * 2
        assert job.prompts == [[5, 4, 0], [5, 0]] * 2
        assert (job.room, job.ignore_eos, job.open_loop) == (OPTIONS.max_model_len, False, False)


def test_at_a_rate_requests_arrive_for_a_while_in_the_same_way_for_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = Plan(CONFIGURATIONS, (0.5, 2.0), rounds=2, max_tokens=8, arrival_seconds=10)
    samples, _ = run(monkeypatch, tmp_path, plan)
    assert {s.load for s in samples} == {0.5, 2.0}
    jobs = [job for _, job in Pretended.jobs if job.open_loop]
    assert {(job.load, len(job.prompts)) for job in jobs} == {(0.5, 5), (2.0, 20)}
    assert {(job.seed, job.load) for job in jobs} == set(itertools.product((0, 1), (0.5, 2.0)))
    # Warmed up in a closed loop, with as many at once as there may be.
    assert {job.load for _, job in Pretended.jobs if not job.open_loop} == {OPTIONS.max_num_seqs}


def test_prompts_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no prompt has at most 2040 tokens"):
        run(monkeypatch, tmp_path, PLAN, conversations=[["word " * 2041]])


def test_an_interrupt_stops_every_worker(tmp_path: Path) -> None:
    def work() -> None:
        with Fleet(CONFIGURATIONS, Pretended, tmp_path / "logs", keep_alive=3) as fleet:
            fleet.prepare(NAMES)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert Pretended.alive == []
    # All are asked before the first is waited for.
    assert Pretended.events[-6:-3] == [f"hang up {name}" for name in NAMES]


def test_at_least_one_worker_fits() -> None:
    huge = EngineOptions("model", "float32", 4, 1, kv_cache_bytes=1 << 60)
    assert workers_that_fit("in-process", huge) == 1
    # A server is three processes.
    assert 1 <= workers_that_fit("server", OPTIONS) <= workers_that_fit("in-process", OPTIONS)
