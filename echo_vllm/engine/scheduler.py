# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""vLLM's scheduler, told that drafts are ragged trees."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from echo_vllm.engine.stats import StepStats


class EchoScheduler(Scheduler):
    """The stock scheduler without draft padding, and with the trees' stats passed on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # With a lookup table vLLM does not pad new requests with placeholder drafts, which have
        # no tree; the table itself leaves N as it is.
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.scheduler_config.max_num_seqs + 1)
        self._step_stats: StepStats | None = None

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        self._step_stats = model_runner_output.echo_stats
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and self._step_stats is not None:
            stats.echo_stats = self._step_stats.to_dict()
        self._step_stats = None
        return stats
