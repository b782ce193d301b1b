# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Clocks, counters, and the HTTP client, without a server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from echo_vllm.offline.bench import server
from echo_vllm.offline.bench.closed_loop import Counters, Job, Stopwatch, percentile
from echo_vllm.offline.bench.configurations import PLAIN, Configuration
from echo_vllm.offline.bench.engine_process import EngineError, EngineOptions
from echo_vllm.offline.bench.server import ServerProcess, server_command, session_cpu_seconds

OPTIONS = EngineOptions("some/model", "float32", max_num_seqs=4, threads=1)


def test_lengths_spread_evenly_around_the_given_one() -> None:
    job = Job([], 1, 48, spread=0.5)
    lengths = [job.length(number) for number in range(64)]
    assert min(lengths) >= 24
    assert max(lengths) <= 72
    for start in range(0, 64, 16):
        assert sum(lengths[start : start + 16]) == pytest.approx(16 * 48, rel=0.1)
    assert {Job([], 1, 48).length(number) for number in range(64)} == {48}


def test_percentiles_lie_between_ranks() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([0.0, 1.0], 99) == pytest.approx(0.99)
    assert percentile([], 50) == 0.0


def test_tokens_that_arrive_together_are_one_gap() -> None:
    times = iter([0.0, 1.0, 1.5, 2.5, 3.0])
    watch = Stopwatch(clock=lambda: next(times))
    watch.send(0)
    watch.receive(0, [7])
    watch.receive(0, [8, 9, 10])
    watch.receive(0, [])  # Says nothing, so it is no arrival.
    watch.receive(0, [11])
    latency = watch.latency()
    assert latency is not None
    assert (latency.ttft_p50, latency.itl_p50) == (1.0, 0.75)
    assert latency.tpot_p50 == pytest.approx(1.5 / 4)
    assert (watch.tokens, watch.decode_tokens) == (5, 4)


def test_a_run_without_tokens_has_no_latency() -> None:
    watch = Stopwatch()
    watch.send(0)
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


def chat(handler: Any, job: Job) -> Stopwatch:
    async def run() -> Stopwatch:
        watch = Stopwatch()
        transport = httpx.MockTransport(handler)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            await server._client(http, job, iter(enumerate(job.prompts)), watch)
        return watch

    return asyncio.run(run())


def test_a_client_reads_token_ids_from_the_stream() -> None:
    bodies = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        lines = [{"choices": [{"text": "a", "token_ids": ids}]} for ids in ([1], [2, 3])]
        lines.append({"choices": []})
        text = "".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n"
        return httpx.Response(200, text=text)

    watch = chat(handler, Job([[5, 6], [7]], 1, 3, temperature=1.0))
    assert watch.outputs == {0: [1, 2, 3], 1: [1, 2, 3]}
    assert [body["prompt"] for body in bodies] == [[5, 6], [7]]
    assert (bodies[0]["temperature"], bodies[0]["ignore_eos"]) == (1.0, True)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx.Response(400, text="too long"), "answered 400: too long"),
        (httpx.Response(200, text='data: {"error": {"message": "no"}}\n\n'), 'reports .*"no"'),
    ],
)
def test_an_error_of_the_server_ends_the_job(response: httpx.Response, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        chat(lambda request: response, Job([[1]], 1, 3))


def test_the_server_has_no_prefix_cache_and_the_configuration_as_json() -> None:
    command = server_command(Configuration("x", {"method": "ngram"}), OPTIONS, 81)
    assert "--no-enable-prefix-caching" in command
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
