# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""One `vllm serve` and its clients: what `engine_process` does, over HTTP, as users have it.

The server is vLLM's own program with vLLM's own settings, except that it uses all cores, and
forgets its prefix cache between two jobs. It runs in a session of its own and writes a log file of
its own; `stop` ends every process of that session. Jobs in a closed loop are done here, because
chats go on with what was answered; an open loop is that of `vllm bench serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from echo_vllm.conversations import Chat
from echo_vllm.offline.bench.closed_loop import Counters, Job, Request, Run, Stopwatch
from echo_vllm.offline.bench.configurations import Configuration
from echo_vllm.offline.bench.engine_process import (
    START_TIMEOUT_S,
    TASK_TIMEOUT_S,
    EngineError,
    EngineOptions,
    common_environment,
)
from echo_vllm.offline.bench.open_loop import run_open_loop

NAME = "bench"
GRACE_S = 15.0


class ServerProcess:
    """A server, and as many clients as a job has requests in flight."""

    def __init__(self, configuration: Configuration, options: EngineOptions, log: Path) -> None:
        """Start the process; `wait_ready` waits until it answers."""
        self.name = configuration.name
        self.log = log
        self._model = options.model
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                server_command(configuration, options, port),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | server_environment(options),
                # Ctrl-C is for the parent, which then stops its children one by one.
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Wait until /health answers.

        Raises:
            EngineError: it does not and will not.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise self._has_ended()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            time.sleep(0.5)
        raise EngineError(f"no answer in {START_TIMEOUT_S:.0f} s; see {self.log}")

    def run(self, job: Job) -> Run:
        """Run a job to its end.

        Raises:
            EngineError: the job failed; the server is not to be used again.
        """
        try:
            return asyncio.run(asyncio.wait_for(self._run(job), TASK_TIMEOUT_S))
        except TimeoutError:
            raise EngineError(f"no end in {TASK_TIMEOUT_S:.0f} s; see {self.log}") from None
        except httpx.TransportError as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
                raise self._has_ended() from None
            raise EngineError(f"{type(error).__name__} ({error}); see {self.log}") from None

    def hang_up(self) -> None:
        """Ask the server to end; does not wait for it."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def stop(self) -> None:
        """End the server and all its processes: politely at first, then without asking."""
        self.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        # Workers outlive their leader when it is killed, and need not be in its process group.
        for pid in _session(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def _has_ended(self) -> EngineError:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "nothing"
        return EngineError(
            f"the server ended with {self._process.wait()}; {self.log} ends with: {last}"
        )

    @functools.cached_property
    def _chat(self) -> Chat:
        return Chat(self._model)

    async def _run(self, job: Job) -> Run:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits) as http:
            (await http.post("/reset_prefix_cache")).raise_for_status()
            before, cpu_before = await self._counters(http), session_cpu_seconds(self._process.pid)
            run = await (self._open_loop(job) if job.open_loop else self._closed_loop(http, job))
            cpu_seconds = session_cpu_seconds(self._process.pid) - cpu_before
            counts = (await self._counters(http)).since(before)
        # A step gives a request one sampled token and the accepted ones.
        steps = run.decode_tokens - counts["accepted"]
        return replace(run, cpu_seconds=cpu_seconds, request_steps=steps, **counts)

    async def _open_loop(self, job: Job) -> Run:
        log = self.log.with_suffix(".client.log")
        return await asyncio.to_thread(run_open_loop, self.url, NAME, self._model, job, log)

    async def _closed_loop(self, http: httpx.AsyncClient, job: Job) -> Run:
        watch = Stopwatch()
        chat = self._chat if job.turns else None
        started = time.perf_counter()
        waiting = iter(enumerate(job.prompts))
        clients = min(round(job.load), len(job.prompts))
        await asyncio.gather(*(_client(http, job, waiting, watch, chat) for _ in range(clients)))
        return Run(
            seconds=time.perf_counter() - started,
            cpu_seconds=0.0,
            tokens=watch.tokens,
            decode_tokens=watch.decode_tokens,
            request_steps=0,
            verified=0,
            accepted=0,
            latency=watch.latency(),
        )

    async def _counters(self, http: httpx.AsyncClient) -> Counters:
        page = (await http.get("/metrics")).text
        return Counters(text_string_to_metric_families(page))


async def _client(
    http: httpx.AsyncClient,
    job: Job,
    waiting: Iterator[tuple[int, list[int]]],
    watch: Stopwatch,
    chat: Chat | None,
) -> None:
    """Holds one chat after another; sends a turn when the one before has been answered."""
    for number, ids in waiting:
        following: tuple[Request, list[int]] | None = ((number, 0), ids)
        while following is not None:
            request, prompt = following
            watch.send(request)
            await _ask(http, job, request, prompt, watch)
            following = None
            if chat is not None:
                following = job.following(request, watch.answers(request, chat), chat)


async def _ask(
    http: httpx.AsyncClient, job: Job, request: Request, prompt: list[int], watch: Stopwatch
) -> None:
    body = {
        "model": NAME,
        "prompt": prompt,
        "max_tokens": job.length(request),
        "temperature": job.temperature,
        "ignore_eos": job.ignore_eos,
        "stream": True,
        "return_token_ids": True,
    }
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.is_error:
            reason = (await response.aread()).decode(errors="replace")
            raise EngineError(f"the server answered {response.status_code}: {reason[:200]}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                message = json.loads(line.removeprefix("data: "))
                if "error" in message:
                    raise EngineError(f"the server reports {json.dumps(message['error'])}")
                for choice in message["choices"]:
                    watch.receive(request, choice.get("token_ids") or [])


def server_command(configuration: Configuration, options: EngineOptions, port: int) -> list[str]:
    """The command line of a server."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", options.model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
    command += ["--dtype", options.dtype, "--max-model-len", str(options.max_model_len)]
    command += ["--max-num-seqs", str(options.max_num_seqs)]
    command += ["--kv-cache-memory-bytes", str(options.kv_cache_bytes)]
    command += ["--disable-uvicorn-access-log"]
    if not options.compile:
        command.append("--enforce-eager")
    if configuration.speculation is not None:
        command += ["--speculative-config", json.dumps(configuration.speculation)]
    return command


def server_environment(options: EngineOptions) -> dict[str, str]:
    """Environment variables of every server, which by itself would leave some cores idle."""
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    return common_environment(options) | {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_SERVER_DEV_MODE": "1",  # For /reset_prefix_cache.
    }


def session_cpu_seconds(session: int) -> float:
    """CPU time so far of all processes of a session that live."""
    return sum(float(process.user + process.system) for process in _session(session).values())


def _session(session: int) -> dict[int, Any]:
    """Process ids of a session, and psutil's CPU times of each so far."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session:
                found[process.pid] = process.cpu_times()
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
