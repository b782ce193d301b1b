# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Single steps of an engine, on the clock: tasks for an `EngineProcess`.

`Read`, then any number of `Decode`, then `Stop`. Between two of them the engine waits with its
requests in place, so that two engines can take turns within one batch. `Answer` is a batch from its
beginning to its end. `Begin`, then any number of `Turn`, is a closed loop of clients in pieces.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from echo_vllm.offline.bench.closed_loop import Job
from echo_vllm.offline.engine import LocalEngine

MOST_TOKENS = 1 << 20


class Engine(Protocol):
    """What is measured: an `EngineProcess`, or a test's own."""

    name: str

    def do(self, task: Any) -> Any: ...


def _name(place: int) -> str:
    return f"step-{place}"


@dataclass(frozen=True)
class Read:
    """Begin a request with each prompt (token ids), none of which is in the prefix cache."""

    prompts: list[list[int]]
    temperature: float = 0.0

    def run(self, local: LocalEngine) -> float:
        """Seconds until all have been read; of one step if they fit into one."""
        from vllm import SamplingParams

        local.engine.reset_prefix_cache()
        for place, ids in enumerate(self.prompts):
            params = SamplingParams(
                temperature=self.temperature,
                max_tokens=MOST_TOKENS,
                ignore_eos=True,
                detokenize=False,
            )
            local.engine.add_request(_name(place), {"prompt_token_ids": ids}, params)
        waiting = {_name(place) for place in range(len(self.prompts))}
        start = time.perf_counter()
        while waiting:
            waiting -= {o.request_id for o in local.engine.step() if o.outputs[0].token_ids}
        return time.perf_counter() - start


@dataclass(frozen=True)
class Decode:
    """Some steps in which all requests decode."""

    steps: int

    def run(self, local: LocalEngine) -> list[float]:
        """Seconds of each."""
        seconds = []
        for _ in range(self.steps):
            start = time.perf_counter()
            local.engine.step()
            seconds.append(time.perf_counter() - start)
        return seconds


@dataclass(frozen=True)
class Stop:
    """End all requests."""

    requests: int

    def run(self, local: LocalEngine) -> None:
        local.engine.abort_request([_name(place) for place in range(self.requests)])
        while local.engine.has_unfinished_requests():
            local.engine.step()


@dataclass(frozen=True)
class Answer:
    """A task for an engine: read all prompts, then the time until each has so many tokens more."""

    prompts: list[list[int]]
    max_tokens: int
    temperature: float

    def run(self, local: LocalEngine) -> dict[str, float]:
        """Decoding alone: from the step after the one in which the last prompt was read."""
        from vllm import SamplingParams

        local.engine.reset_prefix_cache()
        for place, ids in enumerate(self.prompts):
            params = SamplingParams(
                temperature=self.temperature,
                seed=place if self.temperature else None,
                max_tokens=self.max_tokens,
                ignore_eos=True,
                detokenize=False,
            )
            local.engine.add_request(str(place), {"prompt_token_ids": ids}, params)
        said = dict.fromkeys(map(str, range(len(self.prompts))), 0)
        while not all(said.values()):
            self._step(local, said)
        before, steps, start = sum(said.values()), 0, time.perf_counter()
        # While all are there, so that the load is what it says.
        while max(said.values()) < self.max_tokens:
            self._step(local, said)
            steps += 1
        seconds, tokens = time.perf_counter() - start, sum(said.values()) - before
        while local.engine.has_unfinished_requests():
            local.engine.step()
        return {"tokens": tokens, "seconds": seconds, "steps": steps}

    @staticmethod
    def _step(local: LocalEngine, said: dict[str, int]) -> None:
        for output in local.engine.step():
            said[output.request_id] = len(output.outputs[0].token_ids)


class Clients:
    """A closed loop that stands still between two turns."""

    def __init__(self, local: LocalEngine, job: Job) -> None:
        """Args: job: its chats' first turns, again and again, for `load` clients."""
        self._engine = local.engine
        self._job = job
        self._numbers: Iterator[int] = itertools.count()
        self._running: set[str] = set()
        self._engine.reset_prefix_cache()

    def run(self, seconds: float) -> tuple[int, float, int]:
        """Steps until so many have passed: tokens, seconds, and steps."""
        tokens = steps = 0
        start = time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            while len(self._running) < self._job.load:
                self._begin()
            for output in self._engine.step():
                tokens += len(output.outputs[0].token_ids)
                if output.finished:
                    self._running.remove(output.request_id)
            steps += 1
        return tokens, passed, steps

    def stop(self) -> None:
        """Give up what runs."""
        self._engine.abort_request(sorted(self._running))
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def _begin(self) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        number = next(self._numbers)
        prompts = self._job.prompts
        params = SamplingParams(
            temperature=self._job.temperature,
            max_tokens=self._job.length((number, 0)),
            output_kind=RequestOutputKind.DELTA,
        )
        name = f"turn-{number}"
        self._engine.add_request(name, {"prompt_token_ids": prompts[number % len(prompts)]}, params)
        self._running.add(name)


_clients: list[Clients] = []
"""Of this process's engine; at most one."""


@dataclass(frozen=True)
class Begin:
    """A new closed loop; what ran is given up."""

    job: Job

    def run(self, local: LocalEngine) -> None:
        while _clients:
            _clients.pop().stop()
        _clients.append(Clients(local, self.job))


@dataclass(frozen=True)
class Turn:
    """So many seconds of the closed loop."""

    seconds: float

    def run(self, local: LocalEngine) -> tuple[int, float, int]:
        return _clients[0].run(self.seconds)
