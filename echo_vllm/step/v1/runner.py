# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""One step of decoding with draft trees, on vLLM's V1 model runner.

`EchoRunnerMixin` overrides the few methods of the runner that assume a chain: the order of the
batch, positions, attention metadata, sampling, and drafting. The step is otherwise vLLM's.
The runner keeps the parents of what it drafted; the scheduler carries the tokens only, as a list
whose every prefix is a tree.

On a GPU the host waits twice in a step, once for what was accepted and once for what was drafted:
V1 needs both lists on the host. `echo_vllm.transfer` has both transfers, and everything between
them is on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import is_global_first_rank
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.outputs import ModelRunnerOutput, SamplerOutput
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from echo_vllm import ops
from echo_vllm.forecast import StepCost
from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.policies import DraftBatch, make_policy
from echo_vllm.policies.base import MAX_WAITING
from echo_vllm.startup.profiles import find_profile
from echo_vllm.step.attention.tree import VerificationRows, num_mask_words
from echo_vllm.step.clock import clock_of
from echo_vllm.step.stats import StepStats
from echo_vllm.step.tracing import TraceRecorder
from echo_vllm.step.v1.drafter import EchoProposer, Requests
from echo_vllm.step.verification import Verdict, verify
from echo_vllm.transfer import upload
from echo_vllm.trees.forest import DraftForest, is_chain

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Runner
else:
    _Runner = object


MAX_MOVES = 8192
"""Slots that one call of `ops.commit_kv` moves on a GPU at most."""


@dataclass(frozen=True)
class DraftTree:
    """What the runner remembers of a request's last draft."""

    token_ids: list[int]
    parents: list[int]
    path_logprobs: list[float]
    is_chain: bool


NO_TREE = DraftTree([], [], [], True)


@dataclass
class Step:
    """The verification of one scheduled batch.

    Attributes:
        forest: the trees as scheduled, one a request of the batch, maybe empty; on the host.
        rows: the requests that attention must treat as trees, None if there are none.
        query_start: [R + 1] int64, first row of each request.
        logits_rows: [n], on the device, the rows that logits are computed for: the last committed
            one of each request and those of its nodes behind it.
        verdict: set by sampling; on the host.
    """

    forest: DraftForest
    rows: VerificationRows | None
    query_start: np.ndarray
    logits_rows: torch.Tensor
    verdict: Verdict | None = None


class EchoRunnerMixin(_Runner):
    """The overrides that turn a V1 model runner into one that verifies trees."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        spec = self.speculative_config
        policy = make_policy(
            spec.echo, spec.num_speculative_tokens, find_profile(spec.echo, spec.model)
        )
        self.drafter = EchoProposer(vllm_config, device, self, policy)
        # vLLM drops min-p and logit bias under speculation because its rejection sampler cannot
        # apply them; the walk samples with the plain sampler, which can.
        self.input_batch.logitsprocs = LogitsProcessors(
            processor(vllm_config, device, PIN_MEMORY) for processor in BUILTIN_LOGITS_PROCESSORS
        )
        self.draft_trees: dict[str, DraftTree] = {}
        self.step: Step | None = None
        self.plan = DraftPlan()
        self.clock = clock_of(device)
        self.cost: StepCost | None = None
        """Measured at start-up; reported once to the scheduler, which keeps it true."""
        self.recorder = TraceRecorder.of(vllm_config) if is_global_first_rank() else None
        # Only where the drafter may be skipped is it worth holding tokens back from it.
        self.may_skip_drafter = policy.may_rest

    # ---- Before the forward: batch order, positions, attention ----

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        # The scheduler puts it there; see EchoScheduler.
        self.plan = getattr(scheduler_output, "echo_plan", None) or DraftPlan()
        self.clock.begin()
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        for req_id in scheduler_output.finished_req_ids:
            self.draft_trees.pop(req_id, None)
        if self.may_skip_drafter:
            self._update_backlog(scheduler_output)
        return super()._update_states(scheduler_output)

    def _update_backlog(self, scheduler_output: SchedulerOutput) -> None:
        """Tell the drafter's backlog which blocks changed hands since the last step."""
        backlog, block_size = self.drafter.backlog, self.drafter.block_size
        gid = self.drafter.kv_cache_gid
        ended = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        # A new request that is known is the next part of a session's input.
        begun = {new.req_id for new in scheduler_output.scheduled_new_reqs}
        for req_id in ended | begun:
            if req_id in self.requests:
                blocks = torch.tensor(self.requests[req_id].block_ids[gid])
                backlog.forget(req_id, blocks, block_size)
        for new in scheduler_output.scheduled_new_reqs:
            cached = new.num_computed_tokens // block_size
            blocks = new.block_ids[gid]
            backlog.begin(new.req_id, blocks[:cached], blocks[cached:])
        running = scheduler_output.scheduled_cached_reqs
        for req_id, blocks, num_computed in zip(
            running.req_ids, running.new_block_ids, running.num_computed_tokens, strict=True
        ):
            if blocks is None:
                continue
            if req_id in running.resumed_req_ids:
                cached = num_computed // block_size
                backlog.begin(req_id, blocks[gid][:cached], blocks[gid][cached:])
            else:
                backlog.allocate(blocks[gid])

    def _scheduled_tree(self, req_id: str, scheduled: dict[str, list[int]]) -> DraftTree:
        """What is verified for a request in this step."""
        tokens = scheduled.get(req_id)
        if not tokens:
            return NO_TREE
        tree = self.draft_trees[req_id]
        size = len(tokens)
        if tree.token_ids[:size] != tokens:
            raise RuntimeError(
                f"request {req_id}: the scheduled draft is not a prefix of the drafted tree"
            )
        if len(tree.token_ids) == size:
            return tree
        parents = tree.parents[:size]
        return DraftTree(
            tokens, parents, tree.path_logprobs[:size], tree.is_chain or is_chain(parents)
        )

    def _may_reorder_batch(self, scheduler_output: SchedulerOutput) -> None:
        """Requests with trees come first, so that each kernel gets one contiguous batch."""
        super()._may_reorder_batch(scheduler_output)
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        if not scheduled:
            return
        causal = [self._scheduled_tree(r, scheduled).is_chain for r in self.input_batch.req_ids]
        first, last = 0, len(causal) - 1
        while True:
            while first < last and not causal[first]:
                first += 1
            while first < last and causal[last]:
                last -= 1
            if first >= last:
                return
            self.input_batch.swap_states(first, last)
            causal[first], causal[last] = causal[last], causal[first]

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray
    ) -> Any:
        result = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        trees = [self._scheduled_tree(r, scheduled) for r in self.input_batch.req_ids]
        forest = DraftForest.from_parents(
            [tree.token_ids for tree in trees],
            [tree.parents for tree in trees],
            [tree.path_logprobs for tree in trees],
        )
        query_start = np.concatenate([[0], np.cumsum(num_scheduled_tokens, dtype=np.int64)])
        num_trees = next((i for i, tree in enumerate(trees) if tree.is_chain), len(trees))
        rows = self._tree_rows(forest, num_trees) if num_trees else None
        if rows is not None:
            # Slots follow the order of the rows, positions the depth in the tree.
            base = self.num_computed_tokens[:num_trees].to(torch.int64)
            self.positions[: rows.num_rows] = rows.depths + torch.repeat_interleave(
                base, rows.row_start.diff(), output_size=rows.num_rows
            )
        self.step = Step(forest, rows, query_start, logits_rows=result[0])
        return result

    def _tree_rows(self, forest: DraftForest, num_trees: int) -> VerificationRows:
        cu_nodes = forest.cu_nodes[: num_trees + 1]
        num_nodes = int(cu_nodes[-1])
        words = num_mask_words(1 + int(cu_nodes.diff().max()))
        row_start = cu_nodes + torch.arange(num_trees + 1, dtype=torch.int32)
        packed = torch.cat([forest.parents[:num_nodes], cu_nodes, row_start])
        parts = [num_nodes, num_trees + 1, num_trees + 1]
        parents, cu_nodes, row_start = upload(packed, self.device).split(parts)
        mask, depths = ops.build_super_tree(parents, cu_nodes, words)
        return VerificationRows(num_trees, num_nodes + num_trees, row_start, depths, mask)

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        builders = [group.get_metadata_builder() for groups in self.attn_groups for group in groups]
        # A dummy run builds metadata without a step.
        rows = self.step.rows if self.step is not None and self.step.verdict is None else None
        for builder in builders:
            builder.verification = rows
        try:
            return super()._build_attention_metadata(*args, **kwargs)
        finally:
            for builder in builders:
                builder.verification = None

    # ---- After the forward: sample, accept, commit ----

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        state, policy = self.execute_model_state, self.drafter.policy
        if policy.wants_logits and self.step is not None and state is not None:
            # A grammar's mask is written into them next.
            policy.observe_logits(self.input_ids.gpu[self.step.logits_rows], state.logits)
        output = super().sample_tokens(grammar_output)
        self.clock.end()
        if self.recorder is not None:
            self.recorder.write(self.clock.verify_s)
        if isinstance(output, ModelRunnerOutput) and self.step is not None:
            assert self.step.verdict is not None
            output.echo_stats = self._stats(self.step)
        self.step = None
        return output

    def _stats(self, step: Step) -> StepStats:
        assert step.verdict is not None
        stats = StepStats.of(step.forest, step.verdict.num_accepted.tolist())
        stats.rows = int(step.query_start[-1])
        stats.verify_s, stats.idle_s = self.clock.verify_s, self.clock.idle_s
        report = self.drafter.report
        if self.clock.draft_s is not None:  # Otherwise there is no time to learn from.
            stats.draft_s = self.clock.draft_s
            stats.committed, stats.level_rows = report.committed, report.level_rows
        stats.waiting = len(self.drafter.backlog)
        if report.forest is not None:
            sizes = report.forest.cu_nodes.diff()
            stats.starved = int((sizes == 0).sum())
        stats.report = self.drafter.policy.report(
            verified=step.forest,
            num_accepted=step.verdict.num_accepted,
            pool=report.pool,
            probes=report.probes,
        )
        if self.cost is not None:
            stats.cost, self.cost = self.cost.to_dict(), None
        return stats

    def _sample(
        self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None
    ) -> SamplerOutput:
        if self.step is None:  # A dummy run.
            return super()._sample(logits, spec_decode_metadata)
        assert logits is not None
        num_reqs = self.input_batch.num_reqs
        # Its holder counts draft tokens to find a request's row; the walk gives it one row each.
        holder = self.input_batch.thinking_budget_state_holder
        if holder is not None:
            holder.in_spec_mode = False
        verdict = verify(
            self.sampler,
            logits,
            self.step.forest,
            self.input_batch.sampling_metadata,
            self.input_batch.req_output_token_ids[:num_reqs],
            self.discard_request_mask.np[:num_reqs],
        )
        self._commit(self.step, verdict)
        self.step.verdict = verdict.on_host()
        if self.recorder is not None:
            self.recorder.verified(
                self.input_batch.req_ids,
                self.step.forest,
                self.step.verdict.accepted_rows.numpy(),
                self.step.verdict.num_accepted.numpy(),
                rows=int(self.step.query_start[-1]),
                decoding=int((~self.discard_request_mask.np[:num_reqs]).sum()),
            )
        return self.step.verdict.sampler_output

    def _commit(self, step: Step, verdict: Verdict) -> None:
        """Move the accepted paths' keys and values to where a chain would have left them.

        All places of all paths are asked for, whatever was accepted, so that nobody has to know;
        `ops.commit_kv` skips the negative slots of those that have nothing to move.
        """
        if step.rows is None:
            return
        accepted = verdict.accepted_rows[: step.rows.num_requests, 1:]
        if accepted.device.type == "cpu" and not (accepted > 0).any():
            return
        accepted = upload(accepted, self.device).to(torch.int64)
        places = torch.arange(1, accepted.shape[1] + 1, device=accepted.device)
        first = self.query_start_loc.gpu[: len(accepted)].to(torch.int64).unsqueeze(1)
        moves = (accepted > 0) & (accepted != places)
        source = (first + accepted.clamp(min=0)).flatten()
        target = (first + torch.where(moves, places, 0)).flatten()
        stay = ~moves.flatten()
        # Requests share no slots, so they may be moved in several calls.
        part = max(1, MAX_MOVES // max(1, accepted.shape[1])) * accepted.shape[1]
        for gid, groups in enumerate(self.attn_groups):
            slots = self.input_batch.block_table[gid].slot_mapping.gpu
            sources = slots[source].masked_fill(stay, -1)
            targets = slots[target].masked_fill(stay, -1)
            for group in groups:
                for start in range(0, len(sources), part):
                    stop = start + part
                    self._commit_group(group, sources[start:stop], targets[start:stop])

    def _commit_group(self, group: Any, source: torch.Tensor, target: torch.Tensor) -> None:
        draft_layers = self.drafter._draft_attn_layer_names
        context = self.compilation_config.static_forward_context
        layers = [context[name] for name in group.layer_names if name not in draft_layers]
        if layers:
            caches = [layer.kv_cache for layer in layers]
            ops.commit_kv(caches, source, target, caches[0].shape[2], self._kv_layout(layers[0]))

    def _kv_layout(self, layer: Any) -> str:
        """The layout of a layer's paged cache, by its name in `ops.commit_kv`."""
        raise NotImplementedError

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        # vLLM lets partial prefills draw and then rewinds their generators, which CPU generators
        # cannot do. The walk lets only requests that generate draw, so nothing is to be rewound.
        generators = self.input_batch.generators
        self.input_batch.generators = {}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            self.input_batch.generators = generators

    # ---- Draft ----

    def _input_fits_in_drafter(self, common_attn_metadata: CommonAttentionMetadata | None) -> bool:
        # Decided for each request in `_wants_drafts`, not for the batch.
        return common_attn_metadata is not None

    def propose_draft_token_ids(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: torch.Tensor | list[list[int]],
        sampling_metadata: Any,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        spec_decode_metadata: SpecDecodeMetadata | None,
        common_attn_metadata: CommonAttentionMetadata,
        slot_mappings: Any,
    ) -> list[list[int]]:
        """Draft a tree for every request that can use one; returns the trees' tokens."""
        assert isinstance(sampled_token_ids, list)
        self.clock.verified()
        step = self.step
        assert step is not None
        assert step.verdict is not None
        num_drafts = step.forest.cu_nodes.diff().tolist()
        cad, chain_rows = self.drafter.prepare_inputs(
            common_attn_metadata, sampled_token_ids, num_drafts
        )
        rows = self._committed_rows(step, cad, chain_rows)
        if self.use_aux_hidden_state_outputs:
            assert aux_hidden_states is not None
            features = torch.cat([h[rows] for h in aux_hidden_states], dim=-1)
        else:
            features = hidden_states[rows]
        req_ids = self.input_batch.req_ids
        wanting = [
            i for i, r in enumerate(req_ids) if self._wants_drafts(r, bool(sampled_token_ids[i]))
        ]
        requests, batch = self._what_to_draft(wanting, sampled_token_ids, cad)
        forest = self.drafter.propose_forest(
            token_ids=self.input_ids.gpu[rows],
            positions=self.positions[rows],
            hidden_states=features,
            next_token_ids=self.drafter.prepare_next_token_ids_cpu(
                sampled_token_ids,
                self.requests,
                self.input_batch,
                scheduler_output.num_scheduled_tokens,
            ),
            requests=requests,
            batch=batch,
            common_attn_metadata=cad,
        )
        drafts: list[list[int]] = [[] for _ in req_ids]
        scores = forest.path_logprobs.tolist()
        bounds = pairwise(forest.cu_nodes.tolist())
        for i, (tokens, parents), (start, stop) in zip(
            requests.drafting, forest.trees(), bounds, strict=True
        ):
            drafts[i] = tokens
            self.draft_trees[req_ids[i]] = DraftTree(
                tokens, parents, scores[start:stop], is_chain(parents)
            )
        self.clock.drafted(waited=bool(requests.drafting))
        if self.recorder is not None:
            self.recorder.drafted(
                [req_ids[i] for i in requests.drafting],
                [int(cad.seq_lens_cpu_upper_bound[i]) for i in requests.drafting],
                self.drafter.report,
                batch,
                self.clock.draft_s or 0.0,
            )
        return drafts

    def _what_to_draft(
        self, wanting: list[int], sampled_token_ids: list[list[int]], cad: CommonAttentionMetadata
    ) -> tuple[Requests, DraftBatch]:
        """Which requests draft, and which only keep the drafter's cache up to date."""
        req_ids, plan, backlog = self.input_batch.req_ids, self.plan, self.drafter.backlog
        num_decoding = sum(map(bool, sampled_token_ids))
        if not self.may_skip_drafter:
            requests = Requests(req_ids, list(range(len(req_ids))), wanting)
            return requests, DraftBatch(len(wanting), num_decoding, plan)
        able = [i for i in wanting if backlog.can_draft(req_ids[i])]
        probes = plan.probed(len(able))
        if plan.max_depth == 0:
            able = [able[i] for i in probes]
            probes = list(range(len(able)))
        drafting = set(able)
        updating = []
        lengths = cad.query_start_loc_cpu.diff().tolist()
        assert cad.seq_lens_cpu_upper_bound is not None
        ends = cad.seq_lens_cpu_upper_bound.tolist()
        # While the drafter rests, short prompts wait too: a request that ends before it drafts
        # never costs the drafter anything. Not where other requests may hit their blocks, which
        # the drafter would never have seen.
        may_wait = 0
        if (
            plan.max_depth == 0
            and not self.cache_config.enable_prefix_caching
            and len(backlog) < MAX_WAITING
        ):
            may_wait = backlog.limit // 2
        drafting_or_due = drafting | set(self._due(wanting, drafting))
        for i, req_id in enumerate(req_ids):
            # Other prompts go through the drafter at once: all of their features would be too much
            # to keep. More tokens than a path can accept are a prompt's, or a resumed request's.
            request = self.requests[req_id]
            is_prefill = (
                ends[i] - lengths[i] < request.num_prompt_tokens
                or lengths[i] > self.drafter.policy.max_depth + 1
            )
            if i in drafting_or_due or (
                is_prefill and not backlog.waits(req_id) and request.num_tokens > may_wait
            ):
                updating.append(i)
        batch = DraftBatch(len(able), num_decoding, plan, torch.tensor(probes, dtype=torch.int64))
        return Requests(req_ids, updating, able), batch

    def _due(self, wanting: list[int], drafting: set[int]) -> list[int]:
        """Requests of `wanting` that do not draft now and whose backlog is nearly as long as it may
        be: a few of them catch up in each step, so that they can draft when it pays again."""
        backlog, req_ids = self.drafter.backlog, self.input_batch.req_ids
        lengths = [(backlog.length(req_ids[i]), i) for i in wanting if i not in drafting]
        due = sorted(
            (item for item in lengths if 8 * item[0] >= 7 * backlog.limit > 0), reverse=True
        )
        return [i for _, i in due[: -(-len(req_ids) // 64)]]

    def _committed_rows(
        self, step: Step, cad: CommonAttentionMetadata, chain_rows: torch.Tensor
    ) -> torch.Tensor:
        """Rows of this forward whose tokens are now committed.

        `chain_rows` are the rows as if every accepted path were the first rows of its request.
        """
        if step.rows is None:
            return chain_rows
        assert step.verdict is not None
        n = step.rows.num_requests
        accepted = step.verdict.accepted_rows[:n].to(torch.int64)
        rows = accepted + torch.from_numpy(step.query_start[:n]).unsqueeze(1)
        # Requests with trees come first here too, each with the rows of its path.
        paths = upload(rows[accepted >= 0], chain_rows.device)
        return torch.cat([paths, chain_rows[len(paths) :]])

    def _wants_drafts(self, req_id: str, has_token: bool) -> bool:
        """Whether a tree for this request can be verified in the next step."""
        request = self.requests[req_id]
        params = request.sampling_params
        if not has_token or params is None:
            return False
        if params.structured_outputs is not None or params.thinking_token_budget is not None:
            return False
        left = (params.max_tokens or self.max_model_len) - len(request.output_token_ids)
        if left <= 1:  # The bonus token alone finishes the request.
            return False
        return request.num_tokens + self.drafter.policy.max_depth <= self.drafter.max_draft_len
