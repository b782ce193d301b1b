# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The workers of one benchmark: started when needed, kept while they fit, stopped together.

A worker is an engine in a process of its own or a server. All that fit in memory stay alive and
take turns; an idle one takes no CPU time.
"""

from __future__ import annotations

import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import psutil

from echo_vllm.offline.bench.closed_loop import Job, Run
from echo_vllm.offline.bench.configurations import Configuration
from echo_vllm.offline.bench.engine_process import EngineError, EngineOptions, EngineProcess
from echo_vllm.offline.bench.server import ServerProcess

Kind = Literal["server", "in-process"]
WORKER_BYTES: dict[Kind, int] = {"server": 5 << 29, "in-process": 5 << 28}
"""Memory of a worker beside its weights and its KV cache: vLLM, torch and what they import, which a
server holds three times (front end, engine core, worker)."""
SPARE_BYTES = 2 << 30

T = TypeVar("T")


class Worker(Protocol):
    """What a benchmark needs of an engine, wherever it lives."""

    name: str
    log: Path

    def wait_ready(self) -> None: ...
    def run(self, job: Job) -> Run: ...
    def hang_up(self) -> None: ...
    def stop(self) -> None: ...


Launch = Callable[[Configuration, Path], Worker]


def launcher(kind: Kind, options: EngineOptions) -> Launch:
    """What starts a worker of a kind: (configuration, log file) -> worker."""
    make: type[ServerProcess] | type[EngineProcess]
    make = ServerProcess if kind == "server" else EngineProcess
    return lambda configuration, log: make(configuration, options, log)


def workers_that_fit(kind: Kind, options: EngineOptions) -> int:
    """How many workers of a kind the free memory holds, at least one."""
    weights = sum(path.stat().st_size for path in Path(options.model).glob("*.safetensors"))
    if options.dtype == "float32":
        weights *= 2  # Files are mostly in 16 bits.
    each = WORKER_BYTES[kind] + weights + options.kv_cache_bytes
    available = int(psutil.virtual_memory().available)
    return max(1, (available - SPARE_BYTES) // each)


def exit_on_sigterm() -> None:
    """Let a polite kill unwind the program as ctrl-C does, so that it stops its workers."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


class Fleet:
    """Workers by name. Use as a context manager: leaving it stops every process.

    Attributes:
        failures: configuration -> why it was given up.
    """

    def __init__(
        self,
        configurations: Sequence[Configuration],
        launch: Launch,
        logs: Path,
        *,
        keep_alive: int,
        start_at_once: int = 1,
        warm_up: Sequence[Job] = (),
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
            configurations: of all workers.
            launch: starts one.
            logs: the folder of their logs, `<name>.log`.
            keep_alive: the most workers alive at a time.
            start_at_once: the most workers that start at a time.
            warm_up: jobs that a new worker runs before anything counts.
            say: told what is going on, for a progress line.
        """
        self.failures: dict[str, str] = {}
        self._configurations = {c.name: c for c in configurations}
        self._launch = launch
        self._logs = logs
        self._keep_alive = keep_alive
        self._start_at_once = start_at_once
        self._warm_up = warm_up
        self._say = say
        self._alive: dict[str, Worker] = {}

    def __enter__(self) -> Fleet:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *exception: object) -> None:
        with _signals_ignored():  # A second ctrl-C would leave processes behind.
            for worker in self._alive.values():
                worker.hang_up()
            for worker in self._alive.values():
                worker.stop()

    def prepare(self, names: Sequence[str]) -> None:
        """Have these workers alive and warm; others are stopped where there is no room for them.

        Args:
            names: at most `keep_alive` of them.
        """
        missing = deque(n for n in names if n not in self._alive and n not in self.failures)
        fresh = list(missing)
        not_needed = [name for name in self._alive if name not in names]
        starting: deque[str] = deque()
        while missing or starting:
            while missing and len(starting) < self._start_at_once:
                if len(self._alive) >= self._keep_alive:
                    self._alive.pop(not_needed.pop(0)).stop()
                name = missing.popleft()
                log = self._logs / f"{name}.log"
                self._alive[name] = self._launch(self._configurations[name], log)
                starting.append(name)
            name = starting.popleft()
            self._say(f"starting {name}")
            self._attempt(name, lambda worker: worker.wait_ready())
        for name in fresh:
            for job in self._warm_up:
                self._say(f"warming up {name}")
                self.run(name, job)

    def run(self, name: str, job: Job) -> Run | None:
        """Run a job on a prepared worker; None if it has failed, now or before."""
        return self._attempt(name, lambda worker: worker.run(job))

    def _attempt(self, name: str, action: Callable[[Worker], T]) -> T | None:
        """Let a worker do something; one that fails is stopped and not asked again."""
        if name in self.failures:
            return None
        try:
            return action(self._alive[name])
        except EngineError as error:
            self.failures[name] = str(error)
            self._alive.pop(name).stop()
            return None


@contextmanager
def _signals_ignored() -> Iterator[None]:
    kept = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
