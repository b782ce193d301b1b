# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Holds chats with a fixed number of them in flight, and says what that took.

`run_closed_loop` drives an engine of this process; `offline.bench.server` does the same
over HTTP. Both clock what a client sees with `Stopwatch` and count by the metrics that vLLM
publishes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from echo_vllm.conversations import Chat, next_turn

if TYPE_CHECKING:
    from echo_vllm.offline.engine import LocalEngine

_request_ids = itertools.count()

GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Its multiples modulo 1 spread more evenly than those of any other number."""

Request = tuple[int, int]
"""Number of the chat in its job, and of its turn, from 0."""


@dataclass(frozen=True)
class Job:
    """Chats to hold, and how.

    Attributes:
        prompts: token ids of the first turn of each chat.
        load: chats in flight; with `seconds` the requests that arrive a second, at random.
        max_tokens: of an answer, on average over requests.
        turns: the user's turns of each chat; none where the chats have one turn.
        room: tokens of a request, prompt and answer; a chat ends before a turn that has none.
        temperature: 0 is greedy.
        ignore_eos: whether every answer has all of its tokens, so that all configurations do equal
            work; otherwise answers end by themselves.
        spread: how far, as a share, a request's `max_tokens` may be from the average.
        open_loop: whether requests arrive at a rate, whatever is in flight.
        seed: of the arrivals.
        tpot_ms: a request counts as good with at most so many milliseconds a token.
    """

    prompts: list[list[int]]
    load: float
    max_tokens: int
    turns: list[list[str]] = field(default_factory=list)
    room: int = 1 << 30
    temperature: float = 0.0
    ignore_eos: bool = False
    spread: float = 0.0
    open_loop: bool = False
    seed: int = 0
    tpot_ms: float = 100.0

    def length(self, request: Request) -> int:
        """The most tokens that a request generates.

        Between `1 - spread` and `1 + spread` times `max_tokens`, evenly over any run of chats,
        and the same for every configuration. Requests of one length would end together as long
        as no draft is accepted, and their successors' prompts would share forwards.
        """
        share = 1 - self.spread + 2 * self.spread * (sum(request) * GOLDEN_RATIO % 1.0)
        return max(1, round(self.max_tokens * share))

    def following(
        self, request: Request, answers: Sequence[str], chat: Chat
    ) -> tuple[Request, list[int]] | None:
        """The request that continues a chat and its prompt, or None if the chat is at its end.

        Args:
            request: that has just been answered.
            answers: of the chat so far.
            chat: of the model.
        """
        number, turn = request[0], request[1] + 1
        if not self.turns or turn >= len(self.turns[number]):
            return None
        prompt = chat.encode(next_turn(self.turns[number], answers))
        following = (number, turn)
        return (following, prompt) if len(prompt) + self.length(following) <= self.room else None


@dataclass(frozen=True)
class Latency:
    """What a client waited for, in seconds, over the requests of one run.

    Attributes:
        ttft_p50, ttft_p99: from sending a request to its first token.
        itl_p50, itl_p99: between two arrivals of one request; speculation lets several tokens
            arrive at once, which count as one arrival, as in vLLM's own benchmark.
        tpot_p50, tpot_p99: a request's mean time a token after the first, over requests.
    """

    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    tpot_p50: float
    tpot_p99: float


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
            no prefill among them, if the engine has clocks (`benchmarks.timers`).
        full_steps: how many such steps `stages` covers.
        drafts: trees or chains that were verified.
        preemptions: requests that lost their cache for want of room; figures are doubtful then.
        starved: drafts that got no node because others paid better, once a request and step.
        draft_seconds, verify_seconds: as the configuration counts them itself, if it does.
        latency: as clients saw it.
        goodput: good requests a second, in an open loop.
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
    goodput: float | None = None

    @property
    def speed(self) -> float:
        """What is compared: tokens a second of all requests; in an open loop, where the arrivals
        set those, of the median request after its first."""
        if self.goodput is not None and self.latency is not None and self.latency.tpot_p50 > 0:
            return 1 / self.latency.tpot_p50
        return self.tokens / self.seconds


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
        self._sent: dict[Request, float] = {}
        self._arrivals: dict[Request, list[float]] = {}
        self.outputs: dict[Request, list[int]] = {}

    def send(self, request: Request) -> None:
        """A request is sent now."""
        self._sent[request] = self._clock()
        self._arrivals[request] = []
        self.outputs[request] = []

    def receive(self, request: Request, token_ids: Sequence[int]) -> None:
        """Tokens of a request arrive now."""
        if token_ids:
            self._arrivals[request].append(self._clock())
            self.outputs[request].extend(token_ids)

    def answers(self, request: Request, chat: Chat) -> list[str]:
        """The answers to a chat, up to the one to this request."""
        number, last = request
        return [chat.decode(self.outputs[number, turn]) for turn in range(last + 1)]

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
        figures = (percentile(times, p) for times in (first, gaps, each) for p in (50, 99))
        return Latency(*figures)


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between ranks; 0 without values."""
    return float(np.percentile(values, percent)) if len(values) else 0.0


def run_closed_loop(
    local: LocalEngine, job: Job, on_step: Callable[[bool], None] = lambda is_full: None
) -> Run:
    """Run `job` on an engine that is idle, with an empty prefix cache.

    A chat goes on as soon as its last turn is answered, and one that ends is replaced at once, as
    by clients that each wait for their answer. `on_step` is called after every step, with whether
    all requests in flight were decoding in it.
    """
    from prometheus_client import REGISTRY
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = local.engine
    engine.reset_prefix_cache()
    waiting: Iterator[tuple[Request, list[int]]] = (
        ((number, 0), ids) for number, ids in enumerate(job.prompts)
    )
    before = Counters(REGISTRY.collect())
    watch = Stopwatch()
    running: dict[str, Request] = {}
    request_steps = 0

    def begin(following: tuple[Request, list[int]] | None) -> bool:
        if following is None:
            return False
        request, ids = following
        name = f"bench-{next(_request_ids)}"
        params = SamplingParams(
            temperature=job.temperature,
            max_tokens=job.length(request),
            ignore_eos=job.ignore_eos,
            output_kind=RequestOutputKind.DELTA,
        )
        running[name] = request
        watch.send(request)
        engine.add_request(name, {"prompt_token_ids": ids}, params)
        return True

    started, cpu_started = time.perf_counter(), time.process_time()
    while True:
        while len(running) < job.load and begin(next(waiting, None)):
            pass
        if not running:
            break
        outputs = engine.step()
        decoding = sum(bool(watch.outputs[running[output.request_id]]) for output in outputs)
        on_step(decoding == job.load)
        request_steps += decoding
        for output in outputs:
            request = running[output.request_id]
            watch.receive(request, output.outputs[0].token_ids)
            if output.finished:
                del running[output.request_id]
                if job.turns:
                    chat = local.chat
                    begin(job.following(request, watch.answers(request, chat), chat))
    return Run(
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
        tokens=watch.tokens,
        decode_tokens=watch.decode_tokens,
        request_steps=request_steps,
        latency=watch.latency(),
        **Counters(REGISTRY.collect()).since(before),
    )
