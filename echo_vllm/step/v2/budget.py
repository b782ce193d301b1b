# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Who gets the nodes of a batch, on the device, in the place of vLLM's adaptive verification.

The scheduler decides how many nodes a batch verifies in all (`num_nodes_of`) and the most that each
request may have, its placeholders. Everything that the host makes, shapes and bounds, follows from
these. Which requests the nodes go to is decided from their trees' scores, when the batch is
prepared, and the numbers never come to the host: they are differences of the batch's bounds
(`query_start_loc`, `cu_num_logits`). Their sum is the host's number, always: a request that lacks
nodes has rows that fill it up, which are served last.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.spec_decode import adaptive_verification
from vllm.v1.worker.gpu.spec_decode.adaptive_verification import AdaptiveVerificationManager

from echo_vllm import ops
from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.step.v2.state import TreeSlots
from echo_vllm.trees.pool import NO_CANDIDATE

Ints = NDArray[np.int32]

UNLIMITED = 1 << 30


def tell(
    scheduler_output: SchedulerOutput,
    plan: DraftPlan,
    num_nodes: int,
    drafting: Collection[str],
    probes: Collection[str],
) -> None:
    """Attach what the scheduler decided for the batch: the plan of the drafting at the end of the
    step, the requests that it is for and which of them are its probes, and the nodes that all trees
    of the batch have."""
    scheduler_output.echo_plan = plan
    scheduler_output.echo_nodes = num_nodes
    scheduler_output.echo_drafting = drafting
    scheduler_output.echo_probes = probes


def plan_of(scheduler_output: SchedulerOutput) -> DraftPlan:
    """The plan of a batch; vLLM's warm-up makes batches without one."""
    return getattr(scheduler_output, "echo_plan", DraftPlan())


def drafting_of(scheduler_output: SchedulerOutput) -> Collection[str] | None:
    """The requests that are drafted for at the end of a batch; None for all, in vLLM's warm-up."""
    return getattr(scheduler_output, "echo_drafting", None)


def probes_of(scheduler_output: SchedulerOutput) -> Collection[str]:
    """The requests of a batch that are probes of the plan."""
    return getattr(scheduler_output, "echo_probes", ())


def num_nodes_of(scheduler_output: SchedulerOutput) -> int:
    """Nodes that all trees of a batch have; never more than its placeholders."""
    placeholders = sum(map(len, scheduler_output.scheduled_spec_decode_tokens.values()))
    return min(placeholders, getattr(scheduler_output, "echo_nodes", UNLIMITED))


class TreeBudget(AdaptiveVerificationManager):
    """vLLM's manager, which cuts chains by confidence, with trees and a number that is given.

    Args:
        slots: the trees of all requests.
        req_states, query_start_loc: vLLM's.
    """

    def __init__(self, slots: TreeSlots, req_states: Any, query_start_loc: torch.Tensor) -> None:
        super().__init__(req_states, query_start_loc, num_bonus_tokens=1, max_total_logits=0)
        self.slots = slots
        self.num_nodes = 0
        """Set by the runner, of the batch that is prepared next."""
        self._limit = torch.zeros(1, dtype=torch.int32, device=query_start_loc.device)

    def get_num_tokens(
        self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]
    ) -> int:
        """Rows of the batch: one for each token that is not a draft, and `num_nodes`."""
        drafts = {req_id: len(draft_tokens.get(req_id, ())) for req_id in num_tokens_per_req}
        others = {req_id: num_tokens_per_req[req_id] - drafts[req_id] for req_id in drafts}
        self._batch_budget = drafts, others, self.num_nodes
        return sum(others.values()) + self.num_nodes

    def compact_batch(
        self,
        num_draft_tokens_per_req: Ints,
        num_scheduled_tokens: Ints,
        cu_num_logits_np: Ints,
    ) -> tuple[Ints, Ints]:
        """Rows and bounds for the host, with equal parts of the nodes for all trees."""
        rows, _ = super().compact_batch(
            num_draft_tokens_per_req, num_scheduled_tokens, cu_num_logits_np
        )
        nodes = rows - (num_scheduled_tokens - num_draft_tokens_per_req)
        bounds = np.zeros_like(cu_num_logits_np)
        np.cumsum(nodes + 1, out=bounds[1:])
        return rows, bounds

    def reallocate_drafts(self, *args: Any, **kwargs: Any) -> Any:
        """The batch's bounds on the device, by who gets nodes; what it returns is the release's."""
        with patch.object(
            adaptive_verification, "_assign_draft_token_budget_compiled", self._assign
        ):
            return super().reallocate_drafts(*args, **kwargs)

    def _assign(
        self,
        _: torch.Tensor,
        request_slots: torch.Tensor,
        capacities: torch.Tensor,
        num_nodes: int,
        most: int,
    ) -> None:
        """Turn the most nodes of each request, `capacities` [R] int32, into how many it gets."""
        self._limit.fill_(num_nodes)
        places = torch.arange(most, device=capacities.device)
        scores = self.slots.scores[request_slots]
        scores = scores.masked_fill(places >= capacities.unsqueeze(1), NO_CANDIDATE)
        _, bounds = ops.select_budget(
            scores,
            self.slots.tiers[request_slots],
            self.slots.parents[request_slots].to(torch.int64),
            len(request_slots) * most,
            most,
            self._limit,
        )
        capacities.copy_(bounds.diff())

    def add_request(self, req_idx: int) -> None:
        """A slot's tree is written before the scheduler gives its request rows for one."""

    def record_confidences(self, confidence_probs: Any, input_batch: Any) -> None:
        """The trees' scores are in their slots already."""

    def batches_to_profile(self, capture_sizes: list[int]) -> Any:
        """None: costs are nothing to a budget that is given."""
        return ()

    def set_initial_cost_curves(self, samples: Any) -> None:
        """There are none."""
