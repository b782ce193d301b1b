# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Clocks, counters, and the HTTP client, without a server."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from echo_vllm.conversations import Chat
from echo_vllm.offline.bench import open_loop, server
from echo_vllm.offline.bench.closed_loop import Counters, Job, Stopwatch, percentile
from echo_vllm.offline.bench.configurations import PLAIN, Configuration
from echo_vllm.offline.bench.engine_process import ClosedLoop, EngineError, EngineOptions
from echo_vllm.offline.bench.open_loop import bench_command, run_open_loop, write_prompts
from echo_vllm.offline.bench.server import ServerProcess, server_command, session_cpu_seconds
from echo_vllm.offline.engine import LocalEngine
from tests.training.targets import make_llama

FIRST = (0, 0)
OPTIONS = EngineOptions("some/model", "float32", max_num_seqs=4, threads=1)


def test_lengths_spread_evenly_around_the_given_one() -> None:
    job = Job([], 1, 48, spread=0.5)
    lengths = [job.length((number, 0)) for number in range(64)]
    assert min(lengths) >= 24
    assert max(lengths) <= 72
    for start in range(0, 64, 16):
        assert sum(lengths[start : start + 16]) == pytest.approx(16 * 48, rel=0.1)
    assert job.length((0, 1)) != job.length((0, 0))
    assert {Job([], 1, 48).length((number, 0)) for number in range(64)} == {48}


def test_percentiles_lie_between_ranks() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([0.0, 1.0], 99) == pytest.approx(0.99)
    assert percentile([], 50) == 0.0


def test_tokens_that_arrive_together_are_one_gap() -> None:
    times = iter([0.0, 1.0, 1.5, 2.5, 3.0])
    watch = Stopwatch(clock=lambda: next(times))
    watch.send(FIRST)
    watch.receive(FIRST, [7])
    watch.receive(FIRST, [8, 9, 10])
    watch.receive(FIRST, [])  # Says nothing, so it is no arrival.
    watch.receive(FIRST, [11])
    latency = watch.latency()
    assert latency is not None
    assert (latency.ttft_p50, latency.itl_p50) == (1.0, 0.75)
    assert latency.tpot_p50 == latency.tpot_p99 == pytest.approx(1.5 / 4)
    assert (watch.tokens, watch.decode_tokens) == (5, 4)


def test_a_run_without_tokens_has_no_latency() -> None:
    watch = Stopwatch()
    watch.send(FIRST)
    assert watch.latency() is None
    assert (watch.tokens, watch.decode_tokens) == (0, 0)


def test_counters_are_differences_summed_over_labels() -> None:
    registry = CollectorRegistry()
    drafts = Counter("vllm:spec_decode_num_drafts", "d", ["engine"], registry=registry)
    seconds = Counter("vllm:echo_draft_seconds", "s", registry=registry)
    drafts.labels("0").inc(5)
    before = Counters(registry.collect())
    drafts.labels("0").inc(2)
    drafts.labels("1").inc(1)
    seconds.inc(0.25)
    found = Counters(registry.collect()).since(before)
    assert (found["drafts"], found["verified"], found["draft_seconds"]) == (3, 0, 0.25)
    assert found["verify_seconds"] is None


class Words:
    """A tokenizer: a token a word, its length, and one more where the assistant begins."""

    def encode(self, messages: Sequence[str]) -> list[int]:
        return [len(word) for text in messages for word in text.split()] + [0]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join("x" * token for token in ids)


WORDS = cast(Chat, Words())


def hold(handler: Any, job: Job) -> Stopwatch:
    async def run() -> Stopwatch:
        watch = Stopwatch()
        transport = httpx.MockTransport(handler)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            chat = WORDS if job.turns else None
            await server._client(http, job, iter(enumerate(job.prompts)), watch, chat)
        return watch

    return asyncio.run(run())


def answering(bodies: list[dict[str, Any]]) -> Any:
    """A server that always answers with tokens 1, 2, 3, and what it is asked."""

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        lines = [{"choices": [{"text": "a", "token_ids": ids}]} for ids in ([1], [2, 3])]
        lines.append({"choices": []})
        text = "".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n"
        return httpx.Response(200, text=text)

    return handler


def test_a_client_reads_token_ids_from_the_stream() -> None:
    bodies: list[dict[str, Any]] = []
    watch = hold(answering(bodies), Job([[5, 6], [7]], 1, 3, temperature=1.0, ignore_eos=True))
    assert watch.outputs == {(0, 0): [1, 2, 3], (1, 0): [1, 2, 3]}
    assert [body["prompt"] for body in bodies] == [[5, 6], [7]]
    assert (bodies[0]["temperature"], bodies[0]["ignore_eos"]) == (1.0, True)


def test_the_next_turn_of_a_chat_follows_the_answer_to_the_one_before() -> None:
    bodies: list[dict[str, Any]] = []
    job = Job([[3, 0], [4, 0]], 1, 3, turns=[["one", "three", "no"], ["four"]])
    watch = hold(answering(bodies), job)
    # "one", the answer of one, two and three letters, "three", and so on.
    answer = [1, 2, 3]
    assert [body["prompt"] for body in bodies] == [
        [3, 0],
        [3, *answer, 5, 0],
        [3, *answer, 5, *answer, 2, 0],
        [4, 0],
    ]
    assert list(watch.outputs) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert (watch.tokens, watch.decode_tokens) == (12, 8)


def test_a_chat_ends_before_a_turn_that_has_no_room() -> None:
    bodies: list[dict[str, Any]] = []
    job = Job([[3, 0]], 1, 3, turns=[["one", "three", "no"]], room=9)
    hold(answering(bodies), job)
    assert [len(body["prompt"]) for body in bodies] == [2, 6]


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx.Response(400, text="too long"), "answered 400: too long"),
        (httpx.Response(200, text='data: {"error": {"message": "no"}}\n\n'), 'reports .*"no"'),
    ],
)
def test_an_error_of_the_server_ends_the_job(response: httpx.Response, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        hold(lambda request: response, Job([[1]], 1, 3))


def test_the_server_has_vllms_prefix_cache_and_the_configuration_as_json() -> None:
    command = server_command(Configuration("x", {"method": "ngram"}), OPTIONS, 81)
    assert not any("prefix-caching" in word for word in command)
    assert json.loads(command[command.index("--speculative-config") + 1]) == {"method": "ngram"}
    assert "--speculative-config" not in server_command(PLAIN, OPTIONS, 81)


def pretend(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(server, "server_command", lambda *_: [sys.executable, "-c", script])


def test_a_server_that_does_not_start_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch, "print('no such model'); raise SystemExit(3)")
    process = ServerProcess(PLAIN, OPTIONS, tmp_path / "log")
    with pytest.raises(EngineError, match=r"ended with 3; .* ends with: no such model"):
        process.wait_ready()
    process.stop()


def test_stopping_a_server_ends_its_children_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A leader that ends when asked, and a child in a group of its own that does not listen.
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    pretend(
        monkeypatch,
        "import subprocess, sys, time; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], process_group=0); "
        "print(p.pid, flush=True); time.sleep(60)",
    )
    process = ServerProcess(PLAIN, OPTIONS, tmp_path / "log")
    while not (text := (tmp_path / "log").read_text()).strip():
        time.sleep(0.05)
    process.stop()
    pid = int(text.split()[0])
    for _ in range(100):  # Until it is reaped by whoever inherited it.
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the server's child lives on")


def test_cpu_time_of_a_session_is_that_of_its_processes() -> None:
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        spent = session_cpu_seconds(process.pid)
        process.communicate(b"\n")
    assert spent >= 0.25
    assert session_cpu_seconds(process.pid) == 0.0


RESULT = {
    "duration": 20.0,
    "completed": 8,
    "failed": 0,
    "total_output_tokens": 400,
    "request_goodput": 0.3,
    **{f"p{p}_{name}_ms": float(p) for name in ("ttft", "itl", "tpot") for p in (50, 99)},
}


def test_an_open_loop_is_vllms_own_benchmark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = Job([[1]], 0.5, 8, turns=[["What?", "And?"]], open_loop=True, seed=3, tpot_ms=40)
    data, result = tmp_path / "data.jsonl", tmp_path / "result.json"
    command = bench_command("http://x:1", "bench", "some/model", job, data, result)
    options = dict(itertools.pairwise(command))
    assert options["--request-rate"] == "0.5"
    assert options["--goodput"] == "tpot:40"
    assert options["--seed"] == "3"
    assert "--ignore-eos" not in command
    write_prompts(job, data)
    assert json.loads(data.read_text()) == {"prompt": "What?", "output_tokens": 8}

    def script(code: str) -> None:
        monkeypatch.setattr(
            open_loop, "bench_command", lambda *given: [sys.executable, "-c", code, str(given[-1])]
        )

    write = f"import sys; open(sys.argv[1], 'w').write({json.dumps(RESULT)!r})"
    script(write)
    run = run_open_loop("http://x:1", "bench", "m", job, tmp_path / "log")
    assert (run.tokens, run.decode_tokens, run.goodput) == (400, 392, 0.3)
    assert run.latency is not None
    assert (run.latency.tpot_p50, run.latency.tpot_p99) == (0.05, 0.099)
    assert run.speed == pytest.approx(20)  # Of the median request; the rate is given.
    script(write.replace('"failed": 0', '"failed": 2'))
    with pytest.raises(EngineError, match="2 of 1 requests failed"):
        run_open_loop("http://x:1", "bench", "m", job, tmp_path / "log")
    script("raise SystemExit(4)")
    with pytest.raises(EngineError, match="vllm bench serve ended with 4; see"):
        run_open_loop("http://x:1", "bench", "m", job, tmp_path / "log")


@pytest.mark.full
def test_chats_in_process_go_on_and_their_beginning_is_in_the_prefix_cache(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 2}
    options |= {"block_size": 32, "disable_log_stats": False}
    turns = [[" ".join(f"w{(7 * i + j) % 50}" for j in range(40)), "w1", "w2"] for i in range(3)]
    with LocalEngine(make_llama(tmp_path / "target"), **options) as local:
        prompts = [local.chat.encode(chat[:1]) for chat in turns]
        job = Job(prompts, 2, 12, turns=turns, ignore_eos=True, room=256)
        run = ClosedLoop(job).run(local)
        assert (run.tokens, run.decode_tokens) == (9 * 12, 9 * 11)
        hits = local.counters()["prefix_cache_hits"]
        assert hits >= 6 * 32
        # Another run finds nothing of this one.
        ClosedLoop(replace(job, turns=[])).run(local)
        assert local.counters()["prefix_cache_hits"] == hits
