# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Decides the recorded steps once more, as they were, and compares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from echo_vllm.forecast.drafter_profile import DrafterProfile
from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.offline.trace.recorded import STAND_IN, RecordedDrafter
from echo_vllm.policies import DraftBatch, DraftPolicy, make_policy, parse_section
from echo_vllm.trace_format import TraceHeader, TraceStep


@dataclass(frozen=True)
class ExactReport:
    """What became of deciding recorded steps again.

    Attributes:
        steps: steps that were decided again.
        incomplete: steps that could not be, because a request that was drafted for was never
            verified (it ended meanwhile), and so is not in the trace.
        equal: requests with the recorded selection.
        cut: requests of whose selection the engine verified only the first nodes.
        different: requests with another selection.
        first: the first difference, in words; None without one.
    """

    steps: int = 0
    incomplete: int = 0
    equal: int = 0
    cut: int = 0
    different: int = 0
    first: str | None = None

    @property
    def agrees(self) -> bool:
        return self.different == 0


def recorded_policy(header: TraceHeader, profile: DrafterProfile | None = None) -> DraftPolicy:
    """The policy that the trace was recorded with.

    Args:
        header: of the trace.
        profile: that the engine had; a trace names no file.
    """
    config = parse_section(dict(header.echo), num_speculative_tokens=header.num_speculative_tokens)
    return make_policy(config, header.num_speculative_tokens, profile)


def replay_exact(steps: Iterable[TraceStep], policy: DraftPolicy) -> ExactReport:
    """Give `policy` what it was given, step by step, and compare what it selects.

    Args:
        steps: of the trace.
        policy: normally `recorded_policy`.
    """
    done = incomplete = equal = cut = different = 0
    first: str | None = None
    for step in steps:
        batch = _recorded_batch(step)
        if batch.num_requests != len(step.requests):
            incomplete += 1
            continue
        done += 1
        chosen = _decide(step, policy, batch)
        for request, own in zip(step.requests, chosen, strict=True):
            size = len(request.selected)
            if own == list(request.selected):
                equal += 1
            elif size < len(own) and own[:size] == list(request.selected):
                cut += 1
            else:
                different += 1
                first = first or (
                    f"step {step.step}, request {request.id}: {own} was selected, the trace has "
                    f"{list(request.selected)} (a candidate {STAND_IN} is not in the trace)"
                )
    return ExactReport(done, incomplete, equal, cut, different, first)


def _decide(step: TraceStep, policy: DraftPolicy, batch: DraftBatch) -> list[list[int]]:
    if not any(request.num_candidates for request in step.requests):
        return [[] for _ in step.requests]
    drafter = RecordedDrafter(step.requests, policy.column_ranks)
    if policy.num_ranks > drafter.num_ranks or policy.max_depth < drafter.max_depth:
        return [[STAND_IN] for _ in step.requests]  # another policy drafted this
    return drafter.draft(policy, batch, np.arange(len(step.requests))).selected()


def _recorded_batch(step: TraceStep) -> DraftBatch:
    """What the policy was told, as far as the trace says it."""
    values = dict(step.plan or DraftPlan().to_dict())
    told = values.pop("batch", None) or {
        "num_requests": len(step.requests),
        "num_decoding": step.decoding,
        "probes": [],
    }
    limits = told.get("depth_limits")
    return DraftBatch(
        num_requests=told["num_requests"],
        num_decoding=told["num_decoding"],
        plan=DraftPlan.from_dict(values),
        probes=torch.tensor(told["probes"], dtype=torch.int64),
        depth_limits=None if limits is None else torch.tensor(limits, dtype=torch.int64),
    )
