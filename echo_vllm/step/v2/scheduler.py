# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""vLLM's schedulers for Model Runner V2, told how many nodes a request's next tree has.

They hand out rows, never tokens: a draft is a list of placeholders, which the worker fills from the
request's slot. Asynchronously, what is decided here is one or two steps older than what it meets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from echo_vllm.step.v2.state import fixed_policy

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Scheduler
else:
    _Scheduler = object


class FixedTreesMixin(_Scheduler):
    """Every request that can have a tree gets rows for the same number of nodes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        num_nodes = fixed_policy(self.vllm_config).num_nodes
        # The table keeps vLLM from padding new requests with placeholders that have no tree.
        self.dynamic_sd_lookup = [num_nodes] * (self.scheduler_config.max_num_seqs + 1)

    def _can_have_tree(self, request: Request) -> bool:
        """Whether rows that stand for different futures of a request can be sampled at once."""
        params = request.sampling_params
        if params is None or request.resumable:
            return False
        depends_on_path = (
            params.structured_outputs is not None
            or params.thinking_token_budget is not None
            or params.logprobs is not None
            or bool(params.bad_words)
            or (params.presence_penalty, params.frequency_penalty) != (0, 0)
            or params.repetition_penalty != 1
        )
        # What is in flight counts as generated, because it may be.
        left = request.max_tokens - request.num_output_tokens
        return not depends_on_path and left > 1

    def _drop_drafts(self, req_ids: Any) -> None:
        for req_id in req_ids:
            request = self.requests.get(req_id)
            if request is not None and request.spec_token_ids and not self._can_have_tree(request):
                request.spec_token_ids = []


class EchoSchedulerV2(FixedTreesMixin, Scheduler):
    """Synchronous: the drafts of a step are known to be there before the next is scheduled."""

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        super().update_draft_token_ids(draft_token_ids)
        self._drop_drafts(draft_token_ids.req_ids)


class EchoAsyncSchedulerV2(FixedTreesMixin, AsyncScheduler):
    """Asynchronous: placeholders are handed out while the step that fills them still runs."""

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        super()._update_after_schedule(scheduler_output)
        self._drop_drafts(scheduler_output.num_scheduled_tokens)
