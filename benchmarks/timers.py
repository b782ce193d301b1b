# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Clocks around the stages of a decoding step, put on a live engine from outside.

The product carries no timers: its methods, and vLLM's, are wrapped on the objects of one engine.
A stage's time excludes the stages that run inside it, so the stages of a step add up to it.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from echo_vllm.offline.bench.closed_loop import Job, Run, run_closed_loop
from echo_vllm.offline.bench.engine_process import EngineProcess
from echo_vllm.offline.engine import LocalEngine

FRONT_END = "front end"
STAGES = {
    "target forward": "the target's layers and its language-model head",
    "draft forward": "the drafter's layers, all levels",
    "draft head": "the drafter's language-model head and the choice of its best tokens",
    "draft rest": "inputs and attention metadata of every level, building and cutting the trees",
    "sample, accept": "sampling a token for every row and the walk along the accepted path",
    "commit": "moving the accepted path's keys and values into place",
    "runner rest": "batch state, input tensors, attention metadata, bookkeeping",
    "scheduler": "scheduling, and the update of requests with what was sampled",
    FRONT_END: "detokenizing, statistics, the engine's own loop",
}


@dataclass(frozen=True)
class _Place:
    """A method to wrap: `path` from the engine's parts to the object, `method`, its stage."""

    path: str
    method: str
    stage: str


_PLACES = [
    _Place("scheduler", "schedule", "scheduler"),
    _Place("scheduler", "update_from_output", "scheduler"),
    _Place("scheduler", "update_draft_token_ids", "scheduler"),
    _Place("runner", "execute_model", "runner rest"),
    _Place("runner", "sample_tokens", "runner rest"),
    _Place("runner", "_model_forward", "target forward"),
    _Place("runner.model", "compute_logits", "target forward"),
    _Place("runner", "_sample", "sample, accept"),
    _Place("runner", "_commit", "commit"),
    _Place("runner", "propose_draft_token_ids", "draft rest"),
    _Place("runner.drafter.model", "forward", "draft forward"),
    _Place("runner.drafter.model", "combine_hidden_states", "draft forward"),
    _Place("runner.drafter.model", "compute_logits", "draft head"),
    _Place("runner.drafter.model.logits_processor", "get_top_k_tokens", "draft head"),
]


class StageTimers:
    """Exclusive time by stage, for the steps in which every request in flight decodes."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._stack = [FRONT_END]
        self._since = clock()
        self._step: dict[str, float] = defaultdict(float)
        self._kept: dict[str, float] = defaultdict(float)
        self._steps = 0

    @classmethod
    def install(cls, local: LocalEngine) -> StageTimers:
        """Wrap the methods of an engine; those that it lacks are left out."""
        timers = cls()
        parts = {"scheduler": local.scheduler, "runner": local.runner}
        for place in _PLACES:
            first, *rest = place.path.split(".")
            owner = functools.reduce(lambda o, name: getattr(o, name, None), rest, parts[first])
            if hasattr(owner, place.method):
                wrapped = timers._wrap(getattr(owner, place.method), place.stage)
                setattr(owner, place.method, wrapped)
        return timers

    def run(self, local: LocalEngine, job: Job) -> Run:
        """Run a job; its `stages` are filled."""
        self._kept.clear()
        self._steps = 0
        self._cut()
        self._step.clear()
        run = run_closed_loop(local, job, self._end_step)
        return replace(run, stages=dict(self._kept), full_steps=self._steps)

    def _end_step(self, is_full: bool) -> None:
        self._cut()
        if is_full:
            self._steps += 1
            for stage, seconds in self._step.items():
                self._kept[stage] += seconds
        self._step.clear()

    def _cut(self) -> None:
        """Book the time since the last cut to the stage that is running."""
        now = self._clock()
        self._step[self._stack[-1]] += now - self._since
        self._since = now

    def _wrap(self, method: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._cut()
            self._stack.append(stage)
            try:
                return method(*args, **kwargs)
            finally:
                self._cut()
                self._stack.pop()

        return timed


@functools.cache
def _timers_of(local: LocalEngine) -> StageTimers:
    return StageTimers.install(local)


@dataclass(frozen=True)
class TimedLoop:
    """The task of a `Job`, with clocks around the stages of its steps."""

    job: Job

    def run(self, local: LocalEngine) -> Run:
        return _timers_of(local).run(local, self.job)


class TimedProcess(EngineProcess):
    """An engine whose runs have `stages`."""

    def run(self, job: Job) -> Run:
        return self.do(TimedLoop(job))
