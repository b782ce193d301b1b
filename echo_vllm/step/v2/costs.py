# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The forwards of Model Runner V2 that start-up times, for `startup.measure`.

The target's is a dummy run of vLLM's, in the graph that a step of so many rows runs in, and with it
the drafter's first forward, which every step but a rest has. Levels are run without attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from vllm.config import CUDAGraphMode

from echo_vllm.ops.argmax import argmax_of_rows
from echo_vllm.startup.measure import Forwards

if TYPE_CHECKING:
    from echo_vllm.step.v2.runner import EchoRunnerV2Mixin


@contextmanager
def forwards_of(runner: EchoRunnerV2Mixin) -> Iterator[Forwards]:
    """Each runs a forward of so many rows, with what follows it in a step."""
    drafter, manager = runner.speculator, runner.cudagraph_manager
    assert drafter is not None
    num_ranks = runner.policy.num_ranks
    most = runner.max_num_tokens
    # Different tokens, because a mixture of experts sends equal ones to the same experts.
    token_ids = torch.arange(most, device=runner.device) * 7919 % runner.vocab_size
    positions = torch.zeros(most, dtype=torch.int64, device=runner.device)

    def target(rows: int) -> None:
        hidden, _ = runner._dummy_run(rows, randomize_inputs=True)
        argmax_of_rows(runner.model.compute_logits(hidden[:rows]))
        torch.accelerator.synchronize()

    def draft(rows: int) -> None:
        output, _ = drafter.run_level(
            token_ids[:rows], positions[:rows], drafter.hidden_states[:rows], None
        )
        drafter.top_tokens(output, num_ranks)
        torch.accelerator.synchronize()

    def catch_up(rows: int) -> None:
        drafter.top_tokens(drafter.hidden_states[:rows], num_ranks)
        torch.accelerator.synchronize()

    sizes: list[int] = []
    if manager is not None and manager.cudagraph_mode is not CUDAGraphMode.NONE:
        sizes = manager.captured_token_counts()
    with torch.inference_mode():
        yield Forwards(target, draft, catch_up, target_sizes=sizes)
