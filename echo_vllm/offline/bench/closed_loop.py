# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Runs prompts with a fixed number of requests in flight, and says what that took.

`run_closed_loop` drives an engine of this process; `offline.bench.server` does the same
over HTTP. Both clock what a client sees with `Stopwatch` and count by the metrics that vLLM
publishes.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_request_ids = itertools.count()

GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Its multiples modulo 1 spread more evenly than those of any other number."""


@dataclass(frozen=True)
class Job:
    """Prompts as token ids, `concurrency` of them in flight, `length` tokens generated for each.

    With `ignore_eos` every request generates all of them, so that configurations do equal work.
    `keep_outputs` asks for the generated tokens too.
    """

    prompts: list[list[int]]
    concurrency: int
    max_tokens: int
    temperature: float = 0.0
    ignore_eos: bool = True
    keep_outputs: bool = False
    spread: float = 0.0

    def length(self, request: int) -> int:
        """The most tokens that a request, by its number, generates.

        Between `1 - spread` and `1 + spread` times `max_tokens`, evenly over any run of numbers,
        and the same for every configuration. Requests of one length would end together as long
        as no draft is accepted, and their successors' prompts would share forwards.
        """
        share = 1 - self.spread + 2 * self.spread * (request * GOLDEN_RATIO % 1.0)
        return max(1, round(self.max_tokens * share))


@dataclass(frozen=True)
class Latency:
    """What a client waited for, in seconds, over the requests of one run.

    Attributes:
        ttft_p50, ttft_p99: from sending a request to its first token.
        itl_p50, itl_p99: between two arrivals of one request; speculation lets several tokens
            arrive at once, which count as one arrival, as in vLLM's own benchmark.
        tpot_p50: a request's mean time a token after the first; the median over requests.
    """

    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    tpot_p50: float


@dataclass(frozen=True)
class Run:
    """What one job took.

    Attributes:
        seconds: wall time from the first request to the last token.
        cpu_seconds: CPU time of the worker's processes meanwhile, all threads.
        tokens: generated tokens.
        decode_tokens: generated tokens without the first of each request, which prefill gives.
        request_steps: engine steps that gave them, counted once for each request in the step.
        verified: draft tokens that the target verified.
        accepted: draft tokens that it accepted.
        stages: seconds by stage in the full decoding steps, those with all requests in flight and
            no prefill among them, if the engine is instrumented (`echo_vllm.offline.bench.timers`).
        full_steps: how many such steps `stages` covers.
        drafts: trees or chains that were verified.
        preemptions: requests that lost their cache for want of room; figures are doubtful then.
        starved: drafts that got no node because others paid better, once a request and step.
        draft_seconds, verify_seconds: as the configuration counts them itself, if it does.
        latency: as clients saw it.
        outputs: token ids by prompt, if the job keeps them.
    """

    seconds: float
    cpu_seconds: float
    tokens: int
    decode_tokens: int
    request_steps: int
    verified: int
    accepted: int
    stages: dict[str, float] = field(default_factory=dict)
    full_steps: int = 0
    drafts: int = 0
    preemptions: int = 0
    starved: int = 0
    draft_seconds: float | None = None
    verify_seconds: float | None = None
    latency: Latency | None = None
    outputs: list[list[int]] = field(default_factory=list)


class Counters:
    """The engine's own counters at one moment, summed over labels."""

    NAMES = (
        ("drafts", "vllm:spec_decode_num_drafts"),
        ("verified", "vllm:spec_decode_num_draft_tokens"),
        ("accepted", "vllm:spec_decode_num_accepted_tokens"),
        ("preemptions", "vllm:num_preemptions"),
        ("starved", "vllm:echo_starved_requests"),
        ("draft_seconds", "vllm:echo_draft_seconds"),
        ("verify_seconds", "vllm:echo_verify_seconds"),
    )

    def __init__(self, families: Iterable[Any]) -> None:
        """Read the families of a Prometheus registry or page."""
        fields = {f"{metric}_total": name for name, metric in self.NAMES}
        self.values: dict[str, float] = {}
        for family in families:
            for sample in family.samples:
                if name := fields.get(sample.name):
                    self.values[name] = self.values.get(name, 0.0) + sample.value

    def since(self, before: Counters) -> dict[str, Any]:
        """Fields of a `Run`; times stay None where the engine does not count them."""
        counts = {name: value - before.values.get(name, 0.0) for name, value in self.values.items()}
        times = {name: counts.get(name) for name in ("draft_seconds", "verify_seconds")}
        whole = ("drafts", "verified", "accepted", "preemptions", "starved")
        return times | {name: round(counts.get(name, 0)) for name in whole}


class Stopwatch:
    """Clocks arrivals of tokens, request by request."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._sent: dict[int, float] = {}
        self._arrivals: dict[int, list[float]] = {}
        self.outputs: dict[int, list[int]] = {}

    def send(self, request: int) -> None:
        """A request is sent now."""
        self._sent[request] = self._clock()
        self._arrivals[request] = []
        self.outputs[request] = []

    def receive(self, request: int, token_ids: Sequence[int]) -> None:
        """Tokens of a request arrive now."""
        if token_ids:
            self._arrivals[request].append(self._clock())
            self.outputs[request].extend(token_ids)

    @property
    def tokens(self) -> int:
        """Tokens that have arrived."""
        return sum(map(len, self.outputs.values()))

    @property
    def decode_tokens(self) -> int:
        """Those of them that are not a request's first."""
        return self.tokens - sum(map(bool, self.outputs.values()))

    def latency(self) -> Latency | None:
        """None if nothing has arrived."""
        known = {request: times for request, times in self._arrivals.items() if times}
        if not known:
            return None
        first = [times[0] - self._sent[request] for request, times in known.items()]
        gaps = [b - a for times in known.values() for a, b in itertools.pairwise(times)]
        each = [
            (times[-1] - times[0]) / (len(self.outputs[request]) - 1)
            for request, times in known.items()
            if len(times) > 1
        ]
        return Latency(
            percentile(first, 50),
            percentile(first, 99),
            percentile(gaps, 50),
            percentile(gaps, 99),
            statistics.median(each or [0.0]),
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between ranks; 0 without values."""
    return float(np.percentile(values, percent)) if len(values) else 0.0


def run_closed_loop(
    engine: Any, job: Job, on_step: Callable[[bool], None] = lambda is_full: None
) -> Run:
    """Run `job` on a `vllm.LLMEngine` that is idle.

    A request that ends is replaced at once, as by clients that each wait for their answer.
    `on_step` is called after every step, with whether all requests in flight were decoding in it.
    """
    from prometheus_client import REGISTRY
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    waiting = list(enumerate(job.prompts))[::-1]
    before = Counters(REGISTRY.collect())
    watch = Stopwatch()
    numbers: dict[str, int] = {}
    in_flight = request_steps = 0
    started, cpu_started = time.perf_counter(), time.process_time()
    while waiting or in_flight:
        while waiting and in_flight < job.concurrency:
            number, ids = waiting.pop()
            request_id = f"bench-{next(_request_ids)}"
            numbers[request_id] = number
            params = SamplingParams(
                temperature=job.temperature,
                max_tokens=job.length(number),
                ignore_eos=job.ignore_eos,
                output_kind=RequestOutputKind.DELTA,
            )
            watch.send(number)
            engine.add_request(request_id, {"prompt_token_ids": ids}, params)
            in_flight += 1
        outputs = engine.step()
        decoding = sum(bool(watch.outputs[numbers[output.request_id]]) for output in outputs)
        on_step(decoding == job.concurrency)
        request_steps += decoding
        for output in outputs:
            watch.receive(numbers[output.request_id], output.outputs[0].token_ids)
            in_flight -= output.finished
    return Run(
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
        tokens=watch.tokens,
        decode_tokens=watch.decode_tokens,
        request_steps=request_steps,
        latency=watch.latency(),
        outputs=[watch.outputs[i] for i in range(len(job.prompts))] if job.keep_outputs else [],
        **Counters(REGISTRY.collect()).since(before),
    )
