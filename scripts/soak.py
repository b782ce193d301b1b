# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Hours of mixed traffic against a real server, and what must be true afterwards.

    python -m scripts.soak --hours 1 [--output benchmarks/results/soak]

Streams, aborts, tools, long prompts, n > 1, seeds, grammars and bad requests, at a load that
changes every 20 seconds, with a KV cache so small that requests are preempted. After a quarter of
the time the server is killed at work and started again. At the end: no 5xx, greedy answers as at
the start, no block in use, memory flat, and the policy still decides. Status 1 says what was not
so. `make soak HOURS=1`; with `--plain` the same traffic meets a server without speculation, to
compare its memory with.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from scipy import stats

from tests.conftest import DEMO_TARGET, ROOT, Server, start_server
from tests.engine.prompts import project_prompts
from tests.server import kinds
from tests.server.conftest import ENV, MAX_MODEL_LEN, MODEL
from tests.server.metrics import Metrics, wait_until_idle

LOADS = (1, 4, 16, 8, 2, 24)
LOAD_S = 20.0
SAMPLE_S = 2.0
CYCLE_S = LOAD_S * len(LOADS)
"""After this long the loads come again; the memory of a cycle is the mean over it."""

FIRST_LIFE = 0.25
"""Share of the time after which the server is killed."""

WARM_UP = 0.25
"""Share of a server's life that its memory may grow in: pools, caches, compiled code."""

FLAT_MB_PER_HOUR = 100.0
"""More growth than that, with the lower end of its interval above 0 as well, is a leak."""

SPECULATION = ("--speculative-config", "examples/echo.json")
ARGUMENTS = (
    *("--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN)),
    *("--max-num-seqs", "16", "--enforce-eager", "--block-size", "32"),
    *("--num-gpu-blocks-override", "48"),  # 1536 tokens, of which one long prompt takes two thirds.
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"warm": {"type": "boolean"}},
            "required": ["warm"],
            "additionalProperties": False,
        },
    },
}
BAD = (
    {"model": "nobody"},
    {"max_tokens": -1},
    {"temperature": -2},
    {"top_p": 7},
    {"prompt": "word " * 4 * MAX_MODEL_LEN},
    {"n": 0},
    {"logprobs": 1000},
)


async def tools(client: openai.AsyncOpenAI, prompt: str) -> str:
    messages: Any = [{"role": "user", "content": prompt}]
    choice: Any = random.choice(["auto", {"type": "function", "function": {"name": "weather"}}])
    await client.chat.completions.create(
        model=MODEL,
        messages=messages,
        tools=[TOOL],  # type: ignore[list-item]
        tool_choice=choice,
        temperature=0,
        max_tokens=24,
    )
    return "whole"


async def bad(client: openai.AsyncOpenAI, prompt: str) -> str:
    """A request that must be refused, as the client's fault."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 4, **random.choice(BAD)}
    try:
        await client.post("/completions", body=body, cast_to=httpx.Response)
    except openai.APIStatusError as error:
        if error.status_code < 500:
            return "refused"
        raise
    raise AssertionError(f"accepted: {str(body)[:80]}")


async def given_up(client: openai.AsyncOpenAI, prompt: str) -> str:
    return await kinds.stream(client, prompt, stop_after=random.randint(1, 30))


KINDS = [*kinds.KINDS, (tools, 2), (bad, 2), (given_up, 4)]


@dataclass
class Report:
    """What happened.

    Attributes:
        ended: how requests ended, by kind.
        faults: what must not be, each once with how often.
        memory: per life of the server, per cycle of the loads, the mean MB of each process.
        counted: counters of the server, over all its lives.
    """

    ended: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    memory: list[list[dict[str, float]]] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)

    def slope(self) -> tuple[float, float]:
        """MB an hour and half its 95 % interval, of all lives behind their warm-up together.

        A sample is a cycle, not a reading: neighbouring readings say the same thing twice.
        """
        times, sizes = [], []
        for life in self.memory:
            y = np.array([sum(cycle.values()) for cycle in life[math.ceil(WARM_UP * len(life)) :]])
            if len(y) >= 2:
                t = np.arange(len(y))
                times.append(t - t.mean())
                sizes.append(y - y.mean())
        free = sum(map(len, times)) - len(times) - 1
        if free < 1:
            return 0.0, math.inf
        fit = stats.linregress(np.concatenate(times) * CYCLE_S / 3600, np.concatenate(sizes))
        return float(fit.slope), float(fit.stderr) * float(stats.t.ppf(0.975, free))


def resident_mb(pid: int) -> dict[str, float]:
    """Of a process and all below it, by name; pages that they share count for each."""
    found: dict[str, float] = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        leader = psutil.Process(pid)
        for process in [leader, *leader.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                name = process.name()
                found[name] = found.get(name, 0.0) + process.memory_info().rss / 2**20
    return found


async def traffic(server: Server, seconds: float, report: Report) -> None:
    """Requests of all kinds until `seconds` are over; waits for the last of them."""
    begin = time.monotonic()
    life: list[dict[str, float]] = []
    report.memory.append(life)
    prompts = project_prompts()
    functions, weights = zip(*KINDS, strict=True)
    over = asyncio.Event()

    async def client_number(number: int, client: openai.AsyncOpenAI) -> None:
        while not over.is_set():
            load = LOADS[int((time.monotonic() - begin) / LOAD_S) % len(LOADS)]
            if number >= load:
                await asyncio.sleep(0.5)
                continue
            [kind] = random.choices(functions, weights)
            try:
                ended = await kind(client, random.choice(prompts))
                report.ended[f"{kind.__name__}: {ended}"] += 1
            except openai.APIStatusError as error:
                report.faults[f"{kind.__name__}: status {error.status_code}"] += 1
            except (openai.APIError, AssertionError) as error:
                reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
                report.faults[f"{kind.__name__}: {reason}"] += 1

    async def sample_memory() -> None:
        readings: list[dict[str, float]] = []
        while not over.is_set():
            await asyncio.sleep(SAMPLE_S)
            readings.append(resident_mb(server.process.pid))
            if (time.monotonic() - begin) // CYCLE_S > len(life):
                mean = {
                    name: float(np.mean([reading.get(name, 0.0) for reading in readings]))
                    for name in readings[-1]
                }
                life.append(mean)
                readings.clear()
                print(
                    f"{len(life) * CYCLE_S / 60:.0f} minutes: {report.ended.total()} requests, "
                    f"{report.faults.total()} faults, "
                    + ", ".join(f"{name} {used:.0f} MB" for name, used in mean.items()),
                    flush=True,
                )

    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600
    ) as client:
        tasks = [asyncio.create_task(client_number(i, client)) for i in range(max(LOADS))]
        tasks.append(asyncio.create_task(sample_memory()))
        await asyncio.sleep(seconds)
        over.set()
        await asyncio.gather(*tasks)


async def killed(server: Server) -> list[str]:
    """Kill the server while it streams, as a machine does that loses its power; returns how the
    streams ended, which must be in an error, and soon."""
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        begun = asyncio.Event()

        async def stream(prompt: str) -> str:
            try:
                chunks = await client.completions.create(
                    model=MODEL,
                    prompt=prompt,
                    max_tokens=600,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                async for _ in chunks:
                    begun.set()
            except (openai.APIError, httpx.HTTPError):
                return "error"
            return "whole"

        streams = [asyncio.create_task(stream(prompt)) for prompt in project_prompts()[:2]]
        await asyncio.wait_for(begun.wait(), 60)
        os.killpg(server.process.pid, signal.SIGKILL)
        return await asyncio.gather(*streams)


def greedy_answers(server: Server) -> list[str]:
    """Of some prompts, one after the other on an idle server."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600) as client:
        return [
            client.completions.create(model=MODEL, prompt=prompt, max_tokens=32, temperature=0)
            .choices[0]
            .text
            for prompt in project_prompts()[:6]
        ]


COUNTERS = ("generation_tokens", "num_preemptions")
OF_SPECULATION = ("echo_trees", "echo_accepted_tokens", "echo_steps", "echo_resting_steps")


def soak(hours: float, folder: Path, *, is_plain: bool = False) -> dict[str, Any]:
    """Run it, with speculation or without; the result, with what was wrong in `wrong`."""
    report, wrong = Report(), []
    first: list[str] = []
    arguments = ARGUMENTS if is_plain else (*SPECULATION, *ARGUMENTS)
    for life, share in ((1, FIRST_LIFE), (2, 1 - FIRST_LIFE)):
        log = folder / f"server-{life}.log"
        try:
            server = start_server(DEMO_TARGET, arguments, ENV, log, timeout_s=600)
        except pytest.fail.Exception:
            wrong.append(f"the server does not start in life {life}: {log}")
            break
        try:
            answers = greedy_answers(server)
            first = first or answers
            if answers != first:
                wrong.append(f"life {life} begins with other greedy answers")
            asyncio.run(traffic(server, hours * 3600 * share, report))
            if server.process.poll() is not None:
                wrong.append(f"the server died in life {life}: {log}")
                break
            metrics = wait_until_idle(server)  # No request, and no block in use.
            before = metrics
            if greedy_answers(server) != first:
                wrong.append(f"greedy answers changed in life {life}")
            metrics = Metrics.read(server)
            for name in COUNTERS if is_plain else COUNTERS + OF_SPECULATION:
                report.counted[name] += int(metrics.total(f"{name}_total"))
            if not is_plain and (metrics - before).total("echo_steps_total") <= 0:
                wrong.append(f"no step was reported at the end of life {life}")
            if life == 1 and (ended := asyncio.run(killed(server))) != ["error"] * len(ended):
                wrong.append(f"streams of a killed server ended as {ended}")
        except (AssertionError, TimeoutError) as error:
            wrong.append((str(error) or repr(error)).splitlines()[0])
        finally:
            server.stop()
    wrong += [f"{count} x {fault}" for fault, count in report.faults.items()]
    if not report.counted["num_preemptions"]:
        wrong.append("no request was preempted")
    if not (is_plain or report.counted["echo_trees"]):
        wrong.append("no tree was verified")
    slope, half = report.slope()
    if slope - half > 0 and slope > FLAT_MB_PER_HOUR:
        wrong.append(f"memory grows by {slope:.0f} +- {half:.0f} MB an hour")
    cycles = [
        [{name: round(used) for name, used in cycle.items()} for cycle in life]
        for life in report.memory
    ]
    return {
        "hours": hours,
        "requests": sum(report.ended.values()),
        "ended": dict(sorted(report.ended.items())),
        "counted": dict(report.counted),
        "memory_mb_per_hour": {"slope": round(slope, 1), "half_of_95_percent": round(half, 1)},
        "memory_mb": cycles,
        "wrong": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--plain", action="store_true", help="without speculation")
    parser.add_argument("--output", type=Path, help="OUTPUT.json, beside what is printed")
    options = parser.parse_args()
    random.seed(0)
    os.chdir(ROOT)
    folder = Path(tempfile.mkdtemp(prefix="echo-soak-"))
    print(f"logs in {folder}", flush=True)
    result = soak(options.hours, folder, is_plain=options.plain)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
