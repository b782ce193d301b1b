# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Runs prompts through an engine with a fixed number of requests in flight."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_request_ids = itertools.count()


@dataclass(frozen=True)
class Job:
    """Prompts as token ids, `concurrency` of them in flight, `max_tokens` generated for each."""

    prompts: list[list[int]]
    concurrency: int
    max_tokens: int


@dataclass(frozen=True)
class Run:
    """What one job took.

    Attributes:
        seconds: wall time from the first request to the last token.
        cpu_seconds: CPU time of the engine's process meanwhile, all threads.
        tokens: generated tokens.
        decode_tokens: generated tokens without the first of each request, which prefill gives.
        request_steps: engine steps that gave them, counted once for each request in the step.
        verified: draft tokens that the target verified.
        accepted: draft tokens that it accepted.
        stages: seconds by stage in the full decoding steps, those with all requests in flight and
            no prefill among them, if the engine is instrumented (`benchmarks.timers`).
        full_steps: how many such steps `stages` covers.
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


def run_closed_loop(
    engine: Any, job: Job, on_step: Callable[[bool], None] = lambda is_full: None
) -> Run:
    """Run `job` on a `vllm.LLMEngine` that is idle.

    A request that ends is replaced at once, as by clients that each wait for their answer.
    `on_step` is called after every step, with whether all requests in flight were decoding in it.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=job.max_tokens,
        ignore_eos=True,  # Each configuration generates the same number of tokens.
        output_kind=RequestOutputKind.DELTA,
    )
    waiting = [{"prompt_token_ids": ids} for ids in reversed(job.prompts)]
    drafted_before = _draft_counters(engine)
    seen: set[str] = set()
    in_flight = tokens = decode_tokens = request_steps = 0
    started, cpu_started = time.perf_counter(), time.process_time()
    while waiting or in_flight:
        while waiting and in_flight < job.concurrency:
            engine.add_request(f"bench-{next(_request_ids)}", waiting.pop(), params)
            in_flight += 1
        outputs = engine.step()
        decoding = sum(output.request_id in seen for output in outputs)
        on_step(decoding == job.concurrency)
        for output in outputs:
            new = len(output.outputs[0].token_ids)
            tokens += new
            if output.request_id in seen:
                decode_tokens += new
                request_steps += 1
            seen.add(output.request_id)
            in_flight -= output.finished
    seconds = time.perf_counter() - started
    cpu_seconds = time.process_time() - cpu_started
    verified, accepted = (
        after - before
        for after, before in zip(_draft_counters(engine), drafted_before, strict=True)
    )
    return Run(seconds, cpu_seconds, tokens, decode_tokens, request_steps, verified, accepted)


def _draft_counters(engine: Any) -> tuple[int, int]:
    """Draft tokens verified and accepted since the engine started, 0 without speculation."""
    values = {
        metric.name: getattr(metric, "value", 0)
        for metric in engine.get_metrics()
        if metric.name.startswith("vllm:spec_decode")
    }
    return (
        int(values.get("vllm:spec_decode_num_draft_tokens", 0)),
        int(values.get("vllm:spec_decode_num_accepted_tokens", 0)),
    )
