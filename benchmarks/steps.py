# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Single steps of an engine, on the clock: tasks for an `EngineProcess`.

`Read`, then any number of `Decode`, then `Stop`. Between two of them the engine waits with its
requests in place, so that two engines can take turns within one batch. `Answer` is a batch from its
beginning to its end.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from echo_vllm.offline.engine import LocalEngine

MOST_TOKENS = 1 << 20


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
