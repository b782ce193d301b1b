# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""vLLM's schedulers for Model Runner V2, told how many nodes a request's next tree may have.

They hand out rows, never tokens: a draft is a list of placeholders, which the worker fills from the
request's slot. How many nodes all trees of a batch have is decided here as well, from the batch
itself; who gets them is decided on the device (`budget.py`), within each one's placeholders.
Asynchronously, what is decided here is one or two steps older than what it meets.

The policy of this process learns from finished steps what their outputs bring (`outputs.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from echo_vllm.config import Candidates
from echo_vllm.forecast.plan import DraftPlan, Load
from echo_vllm.policies import Observation, draws_of
from echo_vllm.step.clock import LONGEST_GAP_S
from echo_vllm.step.drawn import is_drawn
from echo_vllm.step.grammar import AllowedTree, allow, masks_of, takes_trees
from echo_vllm.step.scheduler import trimmed
from echo_vllm.step.v2.budget import num_nodes_of, tell
from echo_vllm.step.v2.grammar import attach_trees, drafted_of, tell_followed
from echo_vllm.step.v2.outputs import Heard, heard_with
from echo_vllm.step.v2.state import policy_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Scheduler
else:
    _Scheduler = object


class UnseenTreesMixin(_Scheduler):
    """Gives requests rows for trees that this process never sees, but for those of requests with a
    grammar, which it follows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._policy = policy_of(self.vllm_config)
        # The table keeps vLLM from padding new requests with placeholders that have no tree.
        most = [self._policy.num_nodes] * (self.scheduler_config.max_num_seqs + 1)
        self.dynamic_sd_lookup = most
        self._num_nodes = 0
        """Of the batch whose output is processed."""
        self._sizes: dict[str, int] = {}
        """Request -> nodes of the last tree of it that is known here."""
        self._plan = DraftPlan()
        self._drafting: set[str] = set()
        section = self.vllm_config.speculative_config.echo
        self._candidates: Candidates = section.candidates if draws_of(section) else "best"
        self._drawn: dict[str, bool] = {}
        """See `_draws`."""
        self._fresh: set[str] = set()
        """Requests that the last step with any rows drafts for: of their trees nothing has been
        heard yet."""
        self._allowed: dict[str, AllowedTree] = {}
        """What grammars have left of trees, until their masks are made."""
        self._probes: list[str] = []
        """Of the drafting at the end of the step scheduled last: who gets a tree, and who of these
        are its probes."""

    # ---- Before the step ----

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._drop_stale_trees()
        self._limit_drafts()
        output = super().schedule(*args, **kwargs)
        for req_id in output.finished_req_ids:
            self._allowed.pop(req_id, None)
            self._drawn.pop(req_id, None)
        return output

    def _drop_stale_trees(self) -> None:
        """Take placeholders from requests whose drawn tree the step after its drafting did not
        verify.

        Of such a tree something may have been heard by now, and nothing that is decided about it
        may follow from what was drawn (docs/drawn.md).
        """
        for request in self.running:
            if not request.spec_token_ids or request.request_id in self._fresh:
                continue
            if self._draws(request):
                request.spec_token_ids = []

    def _limit_drafts(self) -> None:
        """Leave requests as many placeholders as the batch has room for.

        vLLM takes each of them for a row. Every running request keeps a row and, while prompts are
        read, so do half of the others; then placeholders are no more than the nodes that the trees
        will have, too. Without prompts they only bound what a request may get of these.
        """
        prompts = decoding = 0
        for request in self.running:
            left = self._left_to_read(request)
            prompts += left if left > 1 else 0
            decoding += left <= 1
        seats = self.scheduler_config.max_num_seqs - len(self.running)
        for request, _ in zip(self.waiting, range(seats), strict=False):
            prompts += self._left_to_read(request)
        room = max(0, self.max_num_scheduled_tokens - len(self.running))
        budget = room - min(prompts, room // 2)
        able = sum(bool(request.spec_token_ids) for request in self.running)
        load = Load(decoding, min(prompts, room), num_drafting=(able,))
        of_one = self._policy.request_limit(load)
        sizes = [min(of_one, len(request.spec_token_ids)) for request in self.running]
        if prompts:
            of_requests = zip((request.request_id for request in self.running), sizes, strict=True)
            most = {req_id: size for req_id, size in of_requests if size}
            budget = min(budget, self._num_nodes_of(load, most))
        for request, kept in zip(self.running, trimmed(sizes, budget), strict=True):
            if kept < len(request.spec_token_ids):
                request.spec_token_ids = request.spec_token_ids[:kept]

    @staticmethod
    def _left_to_read(request: Request) -> int:
        """Tokens that a request's next rows stand for, beside its draft; 1 where it decodes."""
        return request.num_tokens + request.num_output_placeholders - request.num_computed_tokens

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Decide how many nodes the batch verifies, and what is drafted at its end."""
        drafts = scheduler_output.scheduled_spec_decode_tokens
        others = [
            count - len(drafts.get(req_id, ()))
            for req_id, count in scheduler_output.num_scheduled_tokens.items()
        ]
        # One row alone may also be the end of a prompt; for what there is room for it is the same.
        decoding = others.count(1)
        load = Load(decoding, sum(others) - decoding)
        most = {req_id: len(tokens) for req_id, tokens in drafts.items()}
        num_nodes = self._num_nodes_of(load, most)
        load, able = self._next_load(scheduler_output)
        self._plan = plan = self._policy.plan(load)
        here = [name for name in able if name in scheduler_output.num_scheduled_tokens]
        self._probes = [here[i] for i in plan.probed(len(here))]
        self._drafting = set(self._probes if plan.max_depth == 0 else here)
        if scheduler_output.num_scheduled_tokens:
            self._fresh = self._drafting
        if not self._drafting:
            scheduler_output.num_spec_tokens_to_schedule = 0
        tell(scheduler_output, plan, num_nodes, self._drafting, self._probes)
        followed, awaited = map(self._with_grammar, (self._drafting, drafts))
        tell_followed(scheduler_output, followed, awaited)
        super()._update_after_schedule(scheduler_output)

    def _num_nodes_of(self, load: Load, most: dict[str, int]) -> int:
        """Nodes of a batch of `load` whose requests may have `most` nodes each: no more than their
        trees have, for all that is known, which would be rows for nothing."""
        sizes = [min(n, self._sizes.get(req_id, n)) for req_id, n in most.items()]
        num_probes = len(most.keys() & self._probes)
        return self._policy.num_nodes_of(load, sizes, self._plan, num_probes)

    def _next_load(self, scheduler_output: SchedulerOutput) -> tuple[Load, list[str]]:
        """What the step after a batch has to do, as if all that the batch drafts were accepted, and
        which requests may have a tree in it."""
        prompts = decoding = reading = num_drawn = 0
        able = []
        for request in self.running:
            count = scheduler_output.num_scheduled_tokens.get(request.request_id, 0)
            left = self._left_to_read(request) - count
            if left > 0:
                prompts += left
                reading += 1
            else:
                decoding += 1
                if self._can_have_tree(request):
                    able.append(request.request_id)
                    num_drawn += self._draws(request)
        load = Load(
            decoding,
            prompts,
            num_reading=reading,
            num_drafting=(len(able),),
            num_drawn=num_drawn,
        )
        return load, able

    def _draws(self, request: Request) -> bool:
        """Whether a request's candidates are drawn, or would be if there was a seat
        (`DrawnSlots`)."""
        if self._candidates == "best":
            return False
        found = self._drawn.get(request.request_id)
        if found is None:
            found = is_drawn(request.sampling_params, self._candidates)
            self._drawn[request.request_id] = found
        return found

    def _can_have_tree(self, request: Request) -> bool:
        """Whether rows that stand for different futures of a request can be sampled at once."""
        params = request.sampling_params
        if params is None or request.resumable:
            return False
        if not takes_trees(params):
            return False
        # What is in flight counts as generated, because it may be.
        left: int = request.max_tokens - request.num_output_tokens
        return left > 1

    def _drop_drafts(self, req_ids: Iterable[str]) -> None:
        """Take placeholders from those that the step scheduled last drafts no tree for."""
        for req_id in req_ids:
            request = self.requests.get(req_id)
            if request is None or not request.spec_token_ids:
                continue
            if req_id not in self._drafting or not self._can_have_tree(request):
                request.spec_token_ids = []

    # ---- Between two steps, where a request has a grammar ----

    def _with_grammar(self, req_ids: Iterable[str]) -> list[str]:
        """Those of `req_ids` that have one."""
        return [req_id for req_id in req_ids if self.requests[req_id].use_structured_output]

    def _follow(self, req_id: str, drafted: tuple[list[int], list[int]], max_nodes: int) -> int:
        """Follow the tokens and parents of a request's tree with its grammar, whose state is that
        of the tree's root; returns how many nodes it has then."""
        most = min(self._policy.max_depth, self.num_spec_tokens)
        self._allowed[req_id] = tree = allow(
            self.structured_output_manager,
            self.requests[req_id],
            *drafted,
            max_nodes=max_nodes,
            # No deeper than what is drafted, which the back ends can roll back, too; nothing is
            # forced in a chain, which would have to stay one.
            max_depth=0 if self._policy.are_chains else most,
        )
        return len(tree.nodes)

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """vLLM's masks, with those of trees, and what is allowed of these."""
        drafts = scheduler_output.scheduled_spec_decode_tokens
        followed = {x: self._allowed.pop(x) for x in drafts if x in self._allowed}
        output = masks_of(super().get_grammar_bitmask, scheduler_output, followed)
        if output is not None:
            # Of a tree that was not followed, because its request was left out of the step behind
            # its drafting, nothing is left.
            trees = {
                x: followed.get(x, AllowedTree()).without_masks(len(drafts[x]))
                for x in output.structured_output_request_ids
                if x in drafts
            }
            attach_trees(output, trees)
        return output

    # ---- After the step ----

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: Any
    ) -> Any:
        self._num_nodes = num_nodes_of(scheduler_output)
        # Where nothing is shared out, what is heard is a trace's alone.
        heard = heard_with(model_runner_output) if self._policy.has_order else None
        self._sizes = {} if heard is None else heard.sizes
        if heard is not None:
            self._learn(heard)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _learn(self, heard: Heard) -> None:
        step = heard.step
        if heard.cost is not None:  # The first step, which is like no other.
            self._policy.set_cost(heard.cost)
            step = Observation(report=step.report)
        elif step.other_s is not None and step.other_s > LONGEST_GAP_S:
            step = replace(step, other_s=None)
        self._policy.observe(step)

    def make_stats(self, spec_decoding_stats: Any = None, *args: Any, **kwargs: Any) -> Any:
        """vLLM's statistics, with the nodes that were verified in place of the placeholders."""
        if spec_decoding_stats is not None:
            drafted = min(spec_decoding_stats.num_draft_tokens, self._num_nodes)
            spec_decoding_stats.num_draft_tokens = drafted
        return super().make_stats(spec_decoding_stats, *args, **kwargs)


class EchoSchedulerV2(UnseenTreesMixin, Scheduler):
    """Synchronous: the drafts of a step are known to be there before the next is scheduled."""

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        super().update_draft_token_ids(draft_token_ids)
        for req_id, drafted in drafted_of(draft_token_ids).items():
            request = self.requests.get(req_id)
            if request is None or request.is_finished() or request.is_prefill_chunk:
                continue
            size = self._follow(req_id, drafted, self.num_spec_tokens)
            request.spec_token_ids = [-1] * size
        self._drop_drafts(draft_token_ids.req_ids)


class EchoAsyncSchedulerV2(UnseenTreesMixin, AsyncScheduler):
    """Asynchronous: placeholders are handed out while the step that fills them still runs."""

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        self._drop_drafts(scheduler_output.num_scheduled_tokens)

    def update_draft_token_ids_in_output(
        self, draft_token_ids: Any, scheduler_output: SchedulerOutput
    ) -> None:
        """The trees of a batch that waits for its masks have come; its placeholders stay."""
        drafts = scheduler_output.scheduled_spec_decode_tokens
        for req_id, drafted in drafted_of(draft_token_ids).items():
            request = self.requests.get(req_id)
            if req_id in drafts and request is not None and not request.is_finished():
                self._follow(req_id, drafted, len(drafts[req_id]))
