# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""vLLM's scheduler, told that drafts are ragged trees, and the place of all timing decisions.

Every step it tells its policy what comes next (`Load`) and attaches the policy's `DraftPlan` to its
output (as the attribute `echo_plan`). Step times and the plan's consequences come back in the
worker's stats, and the policy learns from them. There is one scheduler and there may be many
ranks, so ranks never disagree.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from echo_vllm.config import MAX_DEPTH, Candidates
from echo_vllm.forecast import StepCost
from echo_vllm.forecast.forecaster import Kind
from echo_vllm.forecast.plan import DraftPlan, Load
from echo_vllm.forecast.turnover import Turnover
from echo_vllm.policies import Observation, draws_of, make_policy
from echo_vllm.startup.profiles import find_profile
from echo_vllm.step.acceptance_watch import AcceptanceWatch
from echo_vllm.step.clock import LONGEST_GAP_S
from echo_vllm.step.drafts import Drafts
from echo_vllm.step.drawn import is_drawn
from echo_vllm.step.grammar import AllowedTree, allow, masks_of, takes_trees
from echo_vllm.step.stats import StepStats


def trimmed(sizes: Sequence[int], budget: int) -> list[int]:
    """How much of each draft to keep so that all have at most `budget` nodes: the longest are cut
    first, to one length; what is left over by that goes to the first of them."""
    cap = max(sizes, default=0)
    while cap > 0 and sum(min(size, cap) for size in sizes) > budget:
        cap -= 1
    spare = max(0, budget) - sum(min(size, cap) for size in sizes)
    kept = []
    for size in sizes:
        more = int(size > cap and spare > 0)
        kept.append(min(size, cap + more))
        spare -= more
    return kept


class EchoScheduler(Scheduler):
    """The stock scheduler without draft padding, with a budget, a plan, and the trees' stats."""

    drafts_come_with_output = True
    """Asked by the patched engine core, which else sends a message of its own for the drafts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # With a lookup table vLLM does not pad new requests with placeholder drafts, which have
        # no tree; the table itself leaves N as it is.
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.scheduler_config.max_num_seqs + 1)
        self._step_stats: StepStats | None = None
        self._budget = 0
        self._watch = AcceptanceWatch(self.vllm_config.speculative_config.model)
        self._verified: list[tuple[Any, int]] = []
        """Of the step's trees, in their order: the request, and its tokens before the step."""
        spec = self.vllm_config.speculative_config
        self._waiting = 0
        self._allowed: dict[str, AllowedTree] = {}
        """Of running requests with a grammar and a draft."""
        self._turnover = Turnover()
        self._lasts: dict[str, int] = {}
        """See `_last`."""
        self._kinds: dict[str, Kind | None] = {}
        """See `_kind`."""
        profile = find_profile(spec.echo, spec.model, spec.revision)
        self._policy = make_policy(spec.echo, spec.num_speculative_tokens, profile)
        self._candidates: Candidates = "best"
        if draws_of(spec.echo):
            self._candidates = spec.echo.candidates
            self._allocate = self.kv_cache_manager.allocate_slots
            self.kv_cache_manager.allocate_slots = self._allocate_for_any_draft

    def _allocate_for_any_draft(
        self, request: Any, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        """As many blocks for a request that decodes as its largest draft would take.

        Else a request might be preempted, and its draft dropped, because of how many nodes were
        drawn for it, which depends on what they are: drawn candidates would lose what makes them
        exact (docs/drawn.md).
        """
        unused = 1 + self.num_spec_tokens - num_new_tokens
        if unused > 0 and self._kind(request) == "drawn":
            kwargs["num_lookahead_tokens"] = kwargs.get("num_lookahead_tokens", 0) + unused
        return self._allocate(request, num_new_tokens, *args, **kwargs)

    @property
    def num_lookahead_tokens(self) -> int:
        """Slots reserved beyond the rows of a step: none, because drafts get no slot before they
        are scheduled, and those of the rows (1 + nodes) are reserved with the rows."""
        return 0

    @num_lookahead_tokens.setter
    def num_lookahead_tokens(self, value: int) -> None:
        """vLLM's constructor sets one for each token that its own drafters write ahead."""

    # ---- Before the step ----

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._trim_drafts()
        output = super().schedule(*args, **kwargs)
        for req_id in output.finished_req_ids:
            self._allowed.pop(req_id, None)
        output.echo_allowed = {
            req_id: self._allowed[req_id].without_masks(len(tokens))
            for req_id, tokens in output.scheduled_spec_decode_tokens.items()
            if req_id in self._allowed
        }
        output.echo_plan = self._policy.plan(self._load(output))
        return output

    def _trim_drafts(self) -> None:
        """Keep the batch's budget when drafts of different steps meet.

        A policy keeps it for the requests that it drafts for together. A request that was not
        scheduled meanwhile still has its older draft, and the first draft of an engine is made
        before anybody knows what a forward costs. Whatever the policy, every running request keeps
        a row, and half of the remaining rows of a step are for prompts that are being read: without
        drafts they would have all of them.
        """
        prompts = decoding = 0
        for request in self.running:
            left = request.num_tokens - request.num_computed_tokens
            prompts += left if left > 1 else 0
            decoding += left <= 1
        room = max(0, self.max_num_scheduled_tokens - len(self.running))
        budget = room - min(prompts, room // 2)
        limit = self._policy.batch_limit(Load(decoding, prompts))
        if limit is not None:
            budget = min(budget, limit)
        self._budget = max(0, budget)
        sizes = [len(request.spec_token_ids) for request in self.running]
        if sum(sizes) <= budget:
            return
        for request, kept in zip(self.running, trimmed(sizes, budget), strict=True):
            if kept < len(request.spec_token_ids):
                request.spec_token_ids = request.spec_token_ids[:kept]

    def _load(self, output: Any) -> Load:
        """What the policy is told for the drafting at the end of this step."""
        num_decoding, prefill_tokens = self._next_load(output)
        self._turnover.step(len(output.scheduled_new_reqs))
        # Plain numbers: in the cold caches behind a forward array operations take longer.
        left, by_depth = [], [0] * (1 + MAX_DEPTH)
        kinds: dict[Kind | None, int] = dict.fromkeys(("best", "drawn", None), 0)
        for request in self.running:
            last, there = self._last(request), request.num_tokens
            left.append(abs(last) - there)
            if last > 0 and there <= request.num_computed_tokens:
                # This step's token is not there yet, and after a path comes a bonus token.
                levels = min(max(0, last - there - 2), MAX_DEPTH)
                by_depth[levels] += 1
                if levels:
                    kinds[self._kind(request)] += 1
        at_least = tuple(itertools.accumulate(by_depth[:0:-1]))[::-1]
        return Load(
            num_decoding,
            prefill_tokens,
            waiting=self._waiting,
            num_reading=len(self.running) - num_decoding,
            num_drafting=at_least,
            num_sampled=kinds["best"],
            num_drawn=kinds["drawn"],
            ahead=self._turnover.ahead(left, len(self.waiting), self.max_num_running_reqs),
        )

    def _last(self, request: Any) -> int:
        """Tokens, prompt and answer, that a request may have; negative if it takes no trees."""
        last = self._lasts.get(request.request_id)
        if last is None:
            prompt = request.num_prompt_tokens
            last = prompt + min(request.max_tokens, self.max_model_len - prompt)
            if request.resumable:  # More input may come.
                return -last
            self._lasts[request.request_id] = (
                last if takes_trees(request.sampling_params) else -last
            )
        return self._lasts[request.request_id]

    def _kind(self, request: Any) -> Kind | None:
        """Of the candidates of a request with a temperature; None without one."""
        kind = self._kinds.get(request.request_id, ...)
        if kind is ...:
            params = request.sampling_params
            kind = None
            if params.temperature > 0:
                kind = "drawn" if is_drawn(params, self._candidates) else "best"
            self._kinds[request.request_id] = kind
        return kind

    def _next_load(self, output: Any) -> tuple[int, int]:
        """Requests that the next step will decode, and prompt tokens that it will prefill.

        A prompt that still waits after `output` was scheduled will be read in the next step if it
        was the step's tokens that ran out; what else keeps it waiting (no free block, no place in
        the batch, a grammar that is being compiled) will as a rule do so again.
        """
        prefill = decoding = 0
        for request in self.running:
            left = request.num_tokens - request.num_computed_tokens
            if left > 0:
                prefill += left
            else:
                decoding += 1
        free = self.scheduler_config.max_num_seqs - len(self.running)
        if output.total_num_scheduled_tokens < self.max_num_scheduled_tokens:
            free = 0
        for request in self.waiting:
            if free <= 0:
                break
            free -= 1
            prefill += request.num_tokens - request.num_computed_tokens
        room = max(0, self.scheduler_config.max_num_batched_tokens - decoding)
        return decoding, min(prefill, room)

    # ---- After the step ----

    def _take_drafts(self, token_ids: DraftTokenIds) -> None:
        """Take the drafts over, but none of a session whose input is still coming, because where
        such a request stops within an accepted path vLLM goes on as if the rest of the path
        belonged to it."""
        for req_id, tokens in zip(token_ids.req_ids, token_ids.draft_token_ids, strict=True):
            request = self.requests.get(req_id)
            if request is not None and not request.is_finished():
                goes_on = not (request.is_prefill_chunk or request.resumable)
                request.spec_token_ids = tokens if goes_on else []

    def _follow_grammars(self, req_ids: Iterable[str], parents: dict[str, list[int]]) -> None:
        """Leave in the drafts of `req_ids` what their grammars allow, and add what they force.

        Args:
            parents: of the requests that have a draft and a grammar; see `Drafts`.
        """
        for req_id in req_ids:
            self._allowed.pop(req_id, None)
            request = self.requests.get(req_id)
            if request is None or request.is_finished() or request.is_prefill_chunk:
                continue
            if not request.use_structured_output or (last := self._last(request)) < 0:
                continue
            tokens = request.spec_token_ids
            tree = allow(
                self.structured_output_manager,
                request,
                tokens,
                parents[req_id] if tokens else (),
                max_nodes=self.num_spec_tokens,
                # Also what the back ends can roll back.
                max_depth=min(self.num_spec_tokens, last - request.num_tokens - 1),
            )
            if tree.nodes or tokens:
                self._allowed[req_id] = tree
                request.spec_token_ids = tree.token_ids

    def get_grammar_bitmask(self, scheduler_output: Any) -> GrammarOutput | None:
        """vLLM's masks, and for every node of a tree the mask behind its own path."""
        if not (req_ids := scheduler_output.echo_allowed.keys()):
            return super().get_grammar_bitmask(scheduler_output)
        trees = {req_id: self._allowed[req_id] for req_id in req_ids}
        return masks_of(super().get_grammar_bitmask, scheduler_output, trees)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        self._step_stats = model_runner_output.echo_stats
        if self._step_stats is not None:
            self._describe(self._step_stats, scheduler_output.echo_plan)
            self._learn(self._step_stats)
            scheduled = scheduler_output.scheduled_spec_decode_tokens
            ids = [id for id in model_runner_output.req_ids if scheduled.get(id)]
            trees = scheduler_output.echo_allowed
            # What a grammar forces says nothing about the head.
            self._watch.observe(
                [
                    accepted
                    for id, accepted in zip(ids, self._step_stats.accepted, strict=True)
                    if id not in trees or not trees[id].has_forced
                ]
            )
            requests = [self.requests.get(id) for id in ids]
            self._verified = [(r, 0 if r is None else r.num_output_tokens) for r in requests]
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        drafts: Drafts | None = model_runner_output.echo_drafts
        if drafts is not None:
            self._take_drafts(drafts.token_ids)
        if scheduler_output.has_structured_output_requests:
            parents = {} if drafts is None else drafts.parents
            self._follow_grammars(scheduler_output.num_scheduled_tokens, parents)
        return outputs

    def _describe(self, stats: StepStats, plan: DraftPlan) -> None:
        """What metrics say about the decisions, before anything is learnt from the step."""
        stats.plan_depth, stats.plan_price = plan.max_depth, plan.price
        stats.plan_rows = plan.max_rows or 0.0
        stats.expected = [
            sum(of_kinds)
            for of_kinds in itertools.zip_longest(
                *(
                    (report or {}).get("predicted", [])
                    for report in (stats.report, stats.sampled_report, stats.drawn_report)
                ),
                fillvalue=0.0,
            )
        ]
        gap = stats.idle_s if stats.idle_s < LONGEST_GAP_S else 0.0
        stats.spent_s = stats.verify_s + stats.draft_s + gap
        costs = self._policy.costs()
        if costs is not None and stats.cost is None and stats.rows:
            cost = costs.trees if stats.nodes else costs.plain
            predicted = cost.verify(stats.rows) + (cost.other if gap else 0.0)
            if stats.committed:
                predicted += cost.draft(stats.level_rows, stats.committed)
            stats.predicted_s = float(predicted)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        if request.status is not RequestStatus.FINISHED_ABORTED:
            used = request.num_output_tokens
            self._turnover.ended(used, abs(self._last(request)) - request.num_prompt_tokens)
        self._lasts.pop(request.request_id, None)
        self._kinds.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def _learn(self, stats: StepStats) -> None:
        self._waiting = stats.waiting
        step = Observation(
            report=stats.report,
            sampled_report=stats.sampled_report,
            drawn_report=stats.drawn_report,
        )
        if stats.cost is not None:  # The first step, which is like no other.
            self._policy.set_cost(StepCost.from_dict(stats.cost))
        else:
            step = replace(
                step,
                rows=stats.rows,
                num_nodes=sum(stats.nodes),
                rested=stats.rested,
                verify_s=stats.verify_s,
                other_s=stats.idle_s if stats.idle_s < LONGEST_GAP_S else None,
                draft_s=stats.draft_s,
                committed=stats.committed,
                level_rows=stats.level_rows,
            )
        self._policy.observe(step)
        # The front end needs none of them.
        stats.cost = stats.report = stats.sampled_report = stats.drawn_report = None

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's statistics and ours, both of the tokens that requests really got.

        vLLM counts a path before it looks for what ends the request inside of it.
        """
        stats = super().make_stats(*args, **kwargs)
        step, self._step_stats = self._step_stats, None
        verified, self._verified = self._verified, []
        if stats is None or step is None:
            return stats
        emitted = [0 if r is None else r.num_output_tokens - before for r, before in verified]
        step.accepted = [count - 1 for count in emitted]
        # A request that was aborted meanwhile got nothing.
        for name in ("nodes", "depths", "widths", "accepted"):
            values = zip(getattr(step, name), emitted, strict=True)
            setattr(step, name, [value for value, count in values if count > 0])
        stats.spec_decoding_stats = None
        if step.nodes:
            stats.spec_decoding_stats = SpecDecodingStats.new(self.num_spec_tokens)
            for nodes, accepted in zip(step.nodes, step.accepted, strict=True):
                stats.spec_decoding_stats.observe_draft(nodes, accepted)
        step.budget = min(self._budget, len(step.nodes) * self.num_spec_tokens)
        stats.echo_stats = step.to_dict()
        return stats
