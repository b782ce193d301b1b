# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""How what a step leaves to learn comes to the scheduler without anybody waiting for it.

A drafting ends after its step's tokens are on their way to the host, so what is to be known of the
step goes with the tokens of the step behind it: the sizes of its trees, what the policy noted of
verification and drafting, and its times. They are copied on the stream that copies tokens: where
the later tokens have arrived, they have, and the device has passed the step's marks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.gpu.async_utils import async_copy_to_np, stream

from echo_vllm.forecast import StepCost
from echo_vllm.policies import DraftPolicy, Observation
from echo_vllm.step.clock import StepMarks
from echo_vllm.step.v2.drafter import Drafting
from echo_vllm.step.v2.tracing import TraceNotes


@dataclass
class Heard:
    """What the scheduler's process learns of one step, with the output of the next.

    Attributes:
        sizes: request -> nodes that were drafted for it, for those that have any.
        step: for the policy.
        cost: what start-up measured, with the first step.
    """

    sizes: dict[str, int]
    step: Observation
    cost: StepCost | None = None


class StepNotes:
    """What a step leaves to learn, on its way to the host.

    Args:
        policy: the worker's.
        step: what the host knows of it.
        verified, verified_drawn: the policy's notes of the verification, on the device.
        drafting: at the end of the step, if there was one.
        trace: what a trace is told, if one is kept.
        marks, before: of this step and of the one before it.
        main_stream, copy_stream: the step's, and the one that copies its tokens.
    """

    def __init__(
        self,
        policy: DraftPolicy,
        step: Observation,
        *,
        verified: Sequence[torch.Tensor],
        verified_drawn: Sequence[torch.Tensor],
        drafting: Drafting | None,
        trace: TraceNotes | None,
        marks: StepMarks,
        before: StepMarks | None,
        main_stream: Any,
        copy_stream: Any,
    ) -> None:
        self._policy, self._step, self._trace = policy, step, trace
        self._marks, self._before = marks, before
        self._req_ids = [] if drafting is None else drafting.req_ids
        sizes = () if drafting is None else (drafting.sizes,)
        of_both = ((), ()) if drafting is None else (drafting.notes, drafting.drawn_notes)
        # Kept, as the copies read them on another stream.
        self._there = (verified, verified_drawn, sizes, *of_both)
        self.cost: StepCost | None = None
        with stream(copy_stream, main_stream):
            copy_stream.wait_stream(main_stream)
            self._here = [[async_copy_to_np(note) for note in notes] for notes in self._there]
            if trace is not None:
                trace.copy()

    def record(self) -> None:
        """Tell the trace, once: what is here is whole, and all steps before are told."""
        trace, self._trace = self._trace, None
        if trace is not None:
            verify_s, draft_s, _ = self._marks.seconds(self._before)
            trace.record(verify_s, draft_s, self._step.level_rows)

    def arrived(self) -> Heard:
        """Once the tokens of a later step are here."""
        verify_s, draft_s, other_s = self._marks.seconds(self._before)
        self.record()
        verified, verified_drawn, sizes, drafted, drawn = self._here
        step = replace(
            self._step,
            verify_s=verify_s,
            draft_s=draft_s,
            other_s=None if self._before is None else other_s,
            report=self._policy.report_of_notes(verified, drafted),
            drawn_report=self._policy.report_of_drawn_notes(verified_drawn, drawn),
        )
        by_request = zip(
            self._req_ids, (int(size) for size in itertools.chain(*sizes)), strict=True
        )
        return Heard({req_id: size for req_id, size in by_request if size}, step, self.cost)


class OutputWithNotes(AsyncModelRunnerOutput):
    """A step's output that brings along, as `echo_heard`, what the step before it left."""

    def __init__(self, output: AsyncModelRunnerOutput, notes: StepNotes) -> None:
        self._output = output
        self._notes = notes

    def get_output(self) -> Any:
        result: Any = self._output.get_output()
        result.echo_heard = self._notes.arrived()
        return result

    def get_kv_connector_output(self) -> Any:
        """Asked for by vLLM 0.33.0."""
        return self._output.get_kv_connector_output()


def heard_with(model_runner_output: Any) -> Heard | None:
    """What came with an output; None for nothing."""
    return getattr(model_runner_output, "echo_heard", None)
