# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""One step of decoding with draft trees, on vLLM's V1 model runner.

`EchoRunnerMixin` overrides the few methods of the runner that assume a chain: the order of the
batch, positions, attention metadata, sampling, and drafting. The step is otherwise vLLM's.
The runner keeps what it drafted (`TreeStore`); the scheduler carries the tokens only, as a list
whose every prefix is a tree.

A step in which nothing is verified and nothing will be drafted *rests*: it is vLLM's own step of
plain decoding, and one copy of the new tokens' features (`FeatureRing`).

On a GPU the host waits twice in a step with trees, once for what was accepted and once for what was
drafted: V1 needs both lists on the host. `echo_vllm.transfer` has both transfers, and everything
between them is on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import is_global_first_rank
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.outputs import ModelRunnerOutput, SamplerOutput
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from echo_vllm import ops
from echo_vllm.forecast import StepCost
from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.ops.argmax import argmax_of_rows
from echo_vllm.ops.token_mask import forbid_
from echo_vllm.policies import DraftBatch, draws_of, make_policy
from echo_vllm.startup.measure import feature_size
from echo_vllm.startup.profiles import find_profile
from echo_vllm.step.attention.tree import VerificationRows, num_mask_words
from echo_vllm.step.clock import clock_of
from echo_vllm.step.commit import commit_paths
from echo_vllm.step.drafts import Drafts
from echo_vllm.step.drawn import DrawnRequests
from echo_vllm.step.stats import StepStats
from echo_vllm.step.tracing import TraceRecorder
from echo_vllm.step.v1.drafter import CatchUpRows, EchoProposer
from echo_vllm.step.v1.drawn import draw_trees
from echo_vllm.step.v1.slots import RequestSlots
from echo_vllm.step.v1.window import WINDOW, DrafterWindow, FeatureRing
from echo_vllm.step.verification import Verdict, verify
from echo_vllm.transfer import upload
from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.store import Ints, TreeStore, owners

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Runner
else:
    _Runner = object


@dataclass
class Step:
    """The scheduled batch of R requests.

    Attributes:
        slots: [R], of the requests.
        begins: [R], position of each request's first row.
        query_start: [R + 1], first row of each request.
        forest: the trees as scheduled, one a request, maybe empty; on the host. A request's nodes
            are its last rows.
        rows: the requests that attention must treat as trees, None if there are none.
        logits_rows: [n], on the device, the rows that logits are computed for: the last committed
            one of each request and those of its nodes behind it.
        verdict: set by sampling; on the host.
    """

    slots: Ints
    begins: Ints
    query_start: Ints
    forest: DraftForest
    rows: VerificationRows | None
    logits_rows: torch.Tensor
    verdict: Verdict | None = None

    @property
    def sizes(self) -> Ints:
        """[R] nodes of each request."""
        return self.forest.cu_nodes.diff().numpy().astype(np.int64)

    def committed(self) -> Committed:
        """What is committed now that the verdict is there."""
        assert self.verdict is not None
        accepted = self.verdict.num_accepted.numpy()
        counts = self.query_start[1:] - self.query_start[:-1] - self.sizes + accepted
        owner, place = owners(counts)
        rows = self.query_start[owner] + place
        if self.rows is not None:
            # Requests with trees come first, each with the rows of its path.
            n = self.rows.num_requests
            path = self.verdict.accepted_rows[:n].numpy()
            of_path = (path + self.query_start[:n, None])[path >= 0]
            rows[: len(of_path)] = of_path
        return Committed(rows, owner, self.begins[owner] + place, counts, self.begins + counts)


@dataclass(frozen=True)
class Committed:
    """The n tokens of a step, request after request, that belong to their requests now.

    Attributes:
        rows, owners, positions: [n] the rows of the forward that hold them, the requests, and where
            in these they stand.
        counts, stops: [R] tokens of each request, and the position behind its last one.
    """

    rows: Ints
    owners: Ints
    positions: Ints
    counts: Ints
    stops: Ints


@dataclass(frozen=True)
class CaughtUp:
    """Requests [U] whose drafter cache is up to date.

    Attributes:
        output, above: see `EchoProposer.catch_up`.
        lengths: [U] tokens that each sees of the paged cache.
        stops: [U] position behind the last of them.
        block_table: [U, max blocks] int32, of what is seen, on the device.
        roots: [U] the token at each `stops`, which a tree grows from.
    """

    output: torch.Tensor
    above: torch.Tensor
    lengths: Ints
    stops: Ints
    block_table: torch.Tensor
    roots: NDArray[np.int32]


class EchoRunnerMixin(_Runner):
    """The overrides that turn a V1 model runner into one that verifies trees."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.speculative_config: Any
        spec = self.speculative_config
        profile = find_profile(spec.echo, spec.model, spec.revision)
        policy = make_policy(spec.echo, spec.num_speculative_tokens, profile)
        self.drafter = EchoProposer(vllm_config, device, self, policy)
        # vLLM drops min-p and logit bias under speculation because its rejection sampler cannot
        # apply them; the walk samples with the plain sampler, which can.
        self.input_batch.logitsprocs = LogitsProcessors(
            processor(vllm_config, device, PIN_MEMORY) for processor in BUILTIN_LOGITS_PROCESSORS
        )
        self.slots = RequestSlots(self.max_num_reqs)
        self.trees = TreeStore(self.max_num_reqs, spec.num_speculative_tokens)
        self.drawn: DrawnRequests | None = None
        if draws_of(spec.echo):
            self.drawn = DrawnRequests(
                self.max_num_reqs, spec.num_speculative_tokens, spec.echo.candidates
            )
        self.grammar_parents: dict[str, list[int]] = {}
        """Of the last drafting, for the scheduler; see `Drafts`."""
        self.forced: list[int] = []
        """Slots whose trees of this step have nodes that a grammar forces."""
        self.step: Step | None = None
        self.plan = DraftPlan()
        self.clock = clock_of(device)
        self.cost: StepCost | None = None
        """Measured at start-up; reported once to the scheduler, which keeps it true."""
        self.recorder = TraceRecorder.of(vllm_config) if is_global_first_rank() else None
        self.draws_at_once = device.type != "cpu"
        """Whether tokens are drawn for rows that the walk may not reach: on a GPU that saves
        waiting, on a CPU it costs more than it saves."""
        # Only a drafter that may rest has anything to catch up with.
        self.may_rest = policy.may_rest
        self.ring: FeatureRing | None = None
        self.window: DrafterWindow | None = None
        self.rests = False

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if self.may_rest:  # Before vLLM looks at what memory is left for the paged cache.
            hidden_size = self.model_config.get_hidden_size()
            self.ring = FeatureRing(
                self.max_num_reqs,
                WINDOW + (self.cache_config.block_size or 16),
                num_layers=feature_size(self) // hidden_size,
                hidden_size=hidden_size,
                dtype=self.dtype,
                device=self.device,
            )

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if self.may_rest:
            self.window = DrafterWindow(
                self.max_num_reqs, kv_cache_config.num_blocks, self.drafter.block_size, WINDOW
            )
            assert self.ring is not None
            assert self.ring.capacity >= self.window.capacity

    def _dummy_sampler_run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cpu":
            # Logits of whole trees, so that vLLM's memory profile knows of them.
            most = self.max_num_reqs * (1 + self.num_spec_tokens)
            rows = min(self.max_num_tokens, most)
            self.model.compute_logits(hidden_states.new_zeros(rows, hidden_states.shape[1]))
        return super()._dummy_sampler_run(hidden_states)

    # ---- Before the forward: batch order, positions, attention ----

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        # The scheduler puts it there; see EchoScheduler.
        self.plan = getattr(scheduler_output, "echo_plan", None) or DraftPlan()
        self.clock.begin()
        has_prompts = scheduler_output.total_num_scheduled_tokens > len(
            scheduler_output.num_scheduled_tokens
        )
        self.rests = (
            self.may_rest
            and self.plan.max_depth == 0
            and not self.plan.probes
            and not (self.plan.reads_prompts and has_prompts)
            and not scheduler_output.scheduled_spec_decode_tokens
            and self.recorder is None
        )
        with self._plain_decoding(self.rests):
            return super().execute_model(scheduler_output, *args, **kwargs)

    @contextmanager
    def _plain_decoding(self, is_plain: bool) -> Iterator[None]:
        """Lets vLLM's code take this step for one without speculation."""
        spec = self.speculative_config
        if is_plain:
            self.speculative_config = None
        try:
            yield
        finally:
            self.speculative_config = spec

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        for req_id in scheduler_output.finished_req_ids:
            self._end(req_id)
        for req_id in scheduler_output.preempted_req_ids or ():
            self._end(req_id)
        # What their grammars made of the trees.
        self.forced.clear()
        for req_id, tree in getattr(scheduler_output, "echo_allowed", {}).items():
            slot = int(self.slots.of([req_id])[0])
            self.trees.replace(slot, tree.nodes, tree.token_ids, tree.parents)
            if tree.has_forced:
                self.forced.append(slot)
            if self.recorder is not None:  # A trace holds what a policy decided.
                self.recorder.forget(req_id)
        for new in scheduler_output.scheduled_new_reqs:
            params, blocks = new.sampling_params, new.block_ids
            self._begin(new.req_id, params, new.prompt_len, blocks, new.num_computed_tokens)
        running = scheduler_output.scheduled_cached_reqs
        for req_id, blocks, num_computed in zip(
            running.req_ids, running.new_block_ids, running.num_computed_tokens, strict=True
        ):
            if req_id not in self.slots:  # It was preempted.
                state = self.requests[req_id]
                assert blocks is not None
                self._begin(
                    req_id, state.sampling_params, state.num_prompt_tokens, blocks, num_computed
                )
            elif blocks is not None and self.window is not None:
                self.window.allocate(blocks[self.drafter.kv_cache_gid])
        return super()._update_states(scheduler_output)

    def _end(self, req_id: str) -> None:
        """A request ended or was preempted."""
        if self.drawn is not None and req_id in self.slots:
            self.drawn.end(int(self.slots.of([req_id])[0]))
        self.slots.end(req_id)

    def _begin(
        self, req_id: str, params: Any, num_prompt: int, blocks: Any, num_computed: int
    ) -> None:
        """A request starts, starts again, or is the next part of a session's input."""
        goes_on = req_id in self.slots
        slot = self.slots.begin(
            req_id,
            params,
            num_prompt=num_prompt,
            max_len=self.max_model_len,
            batch=self.input_batch.req_id_to_index,
        )
        if self.drawn is not None:
            self.drawn.begin(slot, params)
        if self.window is None:
            return
        own = blocks[self.drafter.kv_cache_gid]
        if goes_on:
            self.window.rewind(slot, num_computed)
            self.window.allocate(own[-(-num_computed // self.drafter.block_size) :])
        else:
            self.window.begin(slot, own, num_computed)

    def _draft_sizes(self, scheduled: dict[str, list[int]]) -> Ints:
        """[R] nodes that are verified for each request of the batch."""
        req_ids = self.input_batch.req_ids
        sizes = (len(scheduled[r]) if r in scheduled else 0 for r in req_ids)
        return np.fromiter(sizes, np.int64, len(req_ids))

    def _may_reorder_batch(self, scheduler_output: SchedulerOutput) -> None:
        """Requests with trees come first, so that each kernel gets one contiguous batch."""
        super()._may_reorder_batch(scheduler_output)
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        if not scheduled:
            return
        req_ids = self.input_batch.req_ids
        counts = np.array([scheduler_output.num_scheduled_tokens[r] for r in req_ids])
        sizes = self._draft_sizes(scheduled)
        is_tree = self._are_trees(self.slots.of(req_ids), sizes, counts)
        num_trees = int(is_tree.sum())
        early = np.flatnonzero(~is_tree[:num_trees])
        late = num_trees + np.flatnonzero(is_tree[num_trees:])
        for first, last in zip(early.tolist(), late.tolist(), strict=True):
            self.input_batch.swap_states(first, last)

    def _are_trees(self, slots: Ints, sizes: Ints, counts: Ints) -> NDArray[np.bool_]:
        """[R] bool, whose rows go to tree attention, in a batch with drafts of `sizes` nodes and
        `counts` rows in all.

        A GPU's stock kernel is the faster one for chains. A CPU's is not, and two calls a layer
        take longer than one, so all go there that read no prompt.
        """
        if self.device.type == "cpu":
            return counts == 1 + sizes
        return ~self.trees.are_chains(slots, sizes)

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: NDArray[np.int32]
    ) -> Any:
        result = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        num_reqs = len(num_scheduled_tokens)
        slots = self.slots.of(self.input_batch.req_ids)
        query_start = np.zeros(num_reqs + 1, np.int64)
        np.cumsum(num_scheduled_tokens, out=query_start[1:])
        begins = self.input_batch.num_computed_tokens_cpu[:num_reqs].astype(np.int64)
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        forest, rows = DraftForest.empty(num_reqs), None
        if scheduled:
            sizes = self._draft_sizes(scheduled)
            forest = self.trees.take(slots, sizes)
            self._check_tokens(forest, sizes, query_start)
            num_trees = int(self._are_trees(slots, sizes, np.diff(query_start)).sum())
            rows = self._tree_rows(forest, num_trees) if num_trees else None
        if rows is not None:
            # Slots follow the order of the rows, positions the depth in the tree.
            n, each = rows.num_rows, rows.row_start.diff()
            base = self.num_computed_tokens[: rows.num_requests].to(torch.int64)
            self.positions[:n] = rows.depths + base.repeat_interleave(each, output_size=n)
            if self.uses_mrope:  # The root's own, as much further in every dimension.
                found = self.mrope_positions.gpu
                base = found[:, rows.row_start[:-1].to(torch.int64)]
                found[:, :n] = rows.depths + base.repeat_interleave(each, 1, output_size=n)
        self.step = Step(slots, begins, query_start, forest, rows, logits_rows=result[0])
        return result

    def _check_tokens(self, forest: DraftForest, sizes: Ints, query_start: Ints) -> None:
        """Whether the scheduler sent back what was drafted: each request's last rows."""
        owner, place = owners(sizes)
        rows = (query_start[1:] - sizes)[owner] + place
        if not np.array_equal(self.input_ids.np[rows], forest.token_ids.numpy()):
            raise RuntimeError("a scheduled draft is not a prefix of the drafted tree")

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
        # A dummy run builds metadata without a step.
        rows = self.step.rows if self.step is not None and self.step.verdict is None else None
        if rows is None:
            return super()._build_attention_metadata(*args, **kwargs)
        builders = [group.get_metadata_builder() for groups in self.attn_groups for group in groups]
        for builder in builders:
            builder.verification = rows
        try:
            return super()._build_attention_metadata(*args, **kwargs)
        finally:
            for builder in builders:
                builder.verification = None

    # ---- After the forward: sample, accept, commit ----

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        step, state, policy = self.step, self.execute_model_state, self.drafter.policy
        if step is not None and state is not None:
            if policy.wants_logits:  # A grammar's mask is written into them next.
                policy.observe_logits(self.input_ids.gpu[step.logits_rows], state.logits)
            if self.rests:
                layers = self._layers(state.hidden_states, state.aux_hidden_states)
                self._keep_features(step, layers)
        if grammar_output is not None and state is not None and state.logits.is_cpu:
            self._mask(state.logits, state.scheduler_output, grammar_output)
            grammar_output = None
        with self._plain_decoding(self.rests):
            output = super().sample_tokens(grammar_output)
        self.clock.end()
        if self.recorder is not None:
            self.recorder.write(self.clock.verify_s)
        if isinstance(output, ModelRunnerOutput) and step is not None:
            output.echo_stats = self._stats(step)
            # They go with the output; the engine core need not ask for them.
            if (token_ids := self.take_draft_token_ids()) is not None:
                output.echo_drafts = Drafts(token_ids, self.grammar_parents)
            self._draft_token_req_ids = None
        self.step = None
        return output

    def _mask(
        self, logits: torch.Tensor, scheduled: SchedulerOutput, grammar_output: GrammarOutput
    ) -> None:
        """What vLLM does with a step's masks, faster; `logits` [rows, V], on the host."""
        drafts = scheduled.scheduled_spec_decode_tokens
        stops = np.cumsum(1 + self._draft_sizes(drafts)).tolist()
        ends = dict(zip(self.input_batch.req_ids, stops, strict=True))
        start = 0
        for req_id in grammar_output.structured_output_request_ids:
            count = 1 + len(drafts.get(req_id, ()))
            if req_id in ends:
                rows = logits[ends[req_id] - count : ends[req_id]]
                forbid_(rows, grammar_output.grammar_bitmask[start : start + count])
            start += count

    def _layers(
        self, hidden_states: torch.Tensor, aux_hidden_states: list[torch.Tensor] | None
    ) -> Sequence[torch.Tensor]:
        """The hidden states that the drafter reads, [rows, hidden] each."""
        if not self.use_aux_hidden_state_outputs:
            return [hidden_states]
        assert aux_hidden_states is not None
        return aux_hidden_states

    def _keep_features(self, step: Step, layers: Sequence[torch.Tensor]) -> None:
        """All rows of a step without trees go to the ring, the last ones of a prompt."""
        assert self.ring is not None
        counts = step.query_start[1:] - step.query_start[:-1]
        if counts.max() == 1:
            self.ring.put(layers, step.slots, step.begins, None)
            return
        owner, place = owners(counts)
        rows = np.flatnonzero(place >= counts[owner] - self.ring.capacity)
        owner = owner[rows]
        self.ring.put(layers, step.slots[owner], step.begins[owner] + place[rows], rows)

    def _stats(self, step: Step) -> StepStats:
        verdict = step.verdict
        stats = StepStats()
        if verdict is not None and step.forest.num_nodes:
            stats = StepStats.of(step.forest, verdict.num_accepted.numpy())
        stats.rows = int(step.query_start[-1])
        stats.verify_s, stats.idle_s = self.clock.verify_s, self.clock.idle_s
        stats.beyond_head = int(self.drafter.beyond(step.begins + 1).sum())
        if self.window is not None:
            stops = step.begins + step.query_start[1:] - step.query_start[:-1]
            able = self.slots.may_draft[step.slots]
            stats.waiting = self.window.num_behind(step.slots[able], stops[able])
        if self.cost is not None:
            stats.cost, self.cost = self.cost.to_dict(), None
        stats.rested = self.rests
        if self.rests:
            return stats
        report, policy = self.drafter.report, self.drafter.policy
        if self.clock.draft_s is not None:  # Otherwise there is no time to learn from.
            stats.draft_s = self.clock.draft_s
            stats.committed, stats.level_rows = report.committed, report.level_rows
        if report.forest is not None:
            stats.starved = int((report.forest.cu_nodes.diff() == 0).sum())
        if verdict is not None:
            draws, is_random = self._draws(step.slots), self.slots.is_random[step.slots]
            # What is known of one kind of trees does not hold for another, nor for what a grammar
            # forced.
            own = ~np.isin(step.slots, self.forced)
            accepted = verdict.num_accepted

            def told(report_of: Callable[..., Any], kind: NDArray[np.bool_], **drafted: Any) -> Any:
                of_kind = torch.from_numpy(own & kind)
                return report_of(
                    verified=_trees_where(step.forest, of_kind),
                    num_accepted=accepted.masked_fill(~of_kind, 0),
                    **drafted,
                )

            best = {"pool": report.pool, "probes": report.probes}
            drawn = {"pool": report.drawn_pool, "probes": report.drawn_probes}
            stats.report = told(policy.report, ~draws & ~is_random, **best)
            if (sampled := ~draws & is_random).any():
                stats.sampled_report = told(policy.report, sampled, **best | {"pool": None})
            if draws.any() or report.drawn_pool is not None:
                stats.drawn_report = told(policy.report_drawn, draws, **drawn)
        return stats

    def _sample(
        self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None
    ) -> SamplerOutput:
        step = self.step
        if step is None:  # A dummy run.
            return super()._sample(logits, spec_decode_metadata)
        assert logits is not None
        num_reqs = self.input_batch.num_reqs
        # Its holder counts draft tokens to find a request's row; here every request has one.
        holder = self.input_batch.thinking_budget_state_holder
        if holder is not None:
            holder.in_spec_mode = False
        skipped = self.discard_request_mask.np[:num_reqs]
        by_level, is_random = self.slots.by_level[step.slots], self.slots.is_random[step.slots]
        sampling = self.input_batch.sampling_metadata
        if self.rests and not (by_level | is_random).any():
            tokens = argmax_of_rows(logits).to(torch.int32).unsqueeze(1)
            return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=None)
        # Plain sampling would draw for partial prefills too, from generators that must not move.
        if self.rests and not (skipped.any() and sampling.generators):
            return self.sampler(logits=logits, sampling_metadata=sampling)
        if not self.draws_at_once:
            by_level = by_level | is_random
        drawn = judged = self._draws(step.slots)
        judge = None
        positions = step.begins + step.query_start[1:] - step.query_start[:-1] - step.sizes
        if drawn.any():
            assert self.drawn is not None
            judged = drawn & self.drawn.by_level[step.slots]
            drawn = drawn & ~judged
            offsets = self.drafter.draft_offsets
            judge = self.drawn.judge(sampling, step.slots, positions, offsets)
        verdict = verify(
            self.sampler,
            logits,
            step.forest,
            sampling,
            self.input_batch.req_output_token_ids[:num_reqs],
            skipped | drawn,
            by_level | drawn,
            is_random,
            judge,
            judged,
        )
        if (drawn & ~skipped).any():
            assert self.drawn is not None
            verdict = self.drawn.verify(
                verdict,
                logits,
                step.forest,
                sampling,
                step.slots,
                positions,
                np.flatnonzero(drawn & ~skipped),
                self.drafter.draft_offsets,
            )
        for slot in step.slots[(drawn | judged) & ~skipped].tolist():
            assert self.drawn is not None
            self.drawn.end(slot)  # Else q would be kept until the slot is used again.
        if self.rests:
            return verdict.sampler_output
        self._commit(step, verdict)
        step.verdict = verdict.on_host()
        if self.recorder is not None:
            self.recorder.verified(
                self.input_batch.req_ids,
                step.forest,
                step.verdict.accepted_rows.numpy(),
                step.verdict.num_accepted.numpy(),
                rows=int(step.query_start[-1]),
                decoding=int((~skipped).sum()),
            )
        return step.verdict.sampler_output

    def _draws(self, slots: Ints) -> NDArray[np.bool_]:
        """[R] bool, the requests whose candidates are drawn."""
        return np.zeros(len(slots), np.bool_) if self.drawn is None else self.drawn.draws[slots]

    def _commit(self, step: Step, verdict: Verdict) -> None:
        """Move the accepted paths' keys and values to where a chain would have left them."""
        if step.rows is None:
            return
        accepted = verdict.accepted_rows[: step.rows.num_requests, 1:]
        places = torch.arange(1, 1 + accepted.shape[1])
        if accepted.device.type == "cpu" and not (accepted > places).any():
            return  # No row stands further back than it belongs.
        tables = self.input_batch.block_table
        commit_paths(
            upload(accepted, self.device).to(torch.int64),
            self.query_start_loc.gpu[: len(accepted)].to(torch.int64),
            slot_mappings=[tables[i].slot_mapping.gpu for i in range(len(self.attn_groups))],
            attn_groups=self.attn_groups,
            layers=self.compilation_config.static_forward_context,
            drafter=self.drafter._draft_attn_layer_names,
        )

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
        # Decided for each request in `_what_to_draft`, not for the batch.
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
        self.clock.verified()
        step = self.step
        assert step is not None
        layers = self._layers(hidden_states, aux_hidden_states)
        committed = step.committed()
        drafting, updating, batch = self._what_to_draft(step, committed)
        updates = np.flatnonzero(updating)
        forest = DraftForest.empty(0)
        self.drafter.start()
        if len(updates):
            state = self._catch_up(step, committed, updates, layers)
            if len(drafting):
                forest = self._draft(state, step.slots[updates], drafting, updates, batch)
        if self.ring is not None and not updating.all():
            stay = ~updating[committed.owners]
            stay &= committed.positions >= committed.stops[committed.owners] - self.ring.capacity
            self.ring.put(
                layers,
                step.slots[committed.owners[stay]],
                committed.positions[stay],
                committed.rows[stay],
            )
        drafts: list[list[int]] = [[] for _ in self.input_batch.req_ids]
        self.grammar_parents = {}
        has_grammar = self.slots.has_grammar[step.slots]
        tokens = forest.token_ids.tolist()
        for i, (start, stop) in zip(
            drafting.tolist(), itertools.pairwise(forest.cu_nodes.tolist()), strict=True
        ):
            drafts[i] = tokens[start:stop]
            if has_grammar[i]:
                parents = forest.parents[start:stop].tolist()
                self.grammar_parents[self.input_batch.req_ids[i]] = parents
        self.trees.put(step.slots[drafting], forest)
        self.clock.drafted(waited=bool(len(drafting)))
        if self.recorder is not None:
            self.recorder.drafted(
                [self.input_batch.req_ids[i] for i in drafting.tolist()],
                committed.stops[drafting].tolist(),
                self.drafter.report,
                batch,
                self.clock.draft_s or 0.0,
            )
        return drafts

    def _what_to_draft(
        self, step: Step, committed: Committed
    ) -> tuple[Ints, NDArray[np.bool_], DraftBatch]:
        """Requests that draft, [R] bool which of all bring the drafter's cache up to date, and what
        the policy is told."""
        plan, policy = self.plan, self.drafter.policy
        decodes = ~self.discard_request_mask.np[: len(step.slots)]
        num_tokens = committed.stops + 1
        # Of a path only what a request may still emit before its bonus token is of use.
        limits = np.minimum(
            self.slots.last_token[step.slots] - num_tokens - 1,
            self.drafter.max_draft_len - num_tokens,
        )
        may_draft = self.slots.may_draft[step.slots]
        drafting = np.flatnonzero(decodes & may_draft & (limits > 0))
        # A probe shows what full depth brings, so it needs room for it.
        full = np.flatnonzero(limits[drafting] >= policy.max_depth)
        probes = full[plan.probed(len(full))]
        if plan.max_depth == 0:
            drafting, probes = drafting[probes], np.arange(len(probes))
        updating = np.zeros(len(step.slots), np.bool_)
        updating[drafting] = True
        if not self.may_rest:
            updating[:] = True
        elif plan.reads_prompts:
            prompts = self.input_batch.num_prompt_tokens[: len(step.slots)]
            reads = (step.begins < prompts) | (committed.counts > policy.max_depth + 1)
            updating |= may_draft & reads
        updating &= ~self.drafter.beyond(step.begins)
        batch = DraftBatch(
            len(drafting),
            int(decodes.sum()),
            plan,
            torch.from_numpy(probes),
            torch.from_numpy(limits[drafting]),
        )
        return drafting, updating, batch

    def _catch_up(
        self,
        step: Step,
        committed: Committed,
        updates: Ints,
        layers: Sequence[torch.Tensor],
    ) -> CaughtUp:
        """Pass through the drafter what the requests `updates` [U] of the batch have committed, now
        and since they did so last."""
        slots, stops = step.slots[updates], committed.stops[updates]
        firsts = begins = step.begins[updates]
        if self.window is not None:
            firsts = self.window.firsts(slots, begins, stops)
        owner, place = owners(stops - firsts)
        positions = firsts[owner] + place
        features = self._features(step, committed, updates, owner, positions, layers)
        tables = self.input_batch.block_table[self.drafter.kv_cache_gid].block_table
        table_on_host = tables.np[updates]
        table = tables.gpu[: len(step.slots)]
        if len(updates) < len(step.slots):
            table = table[upload(torch.from_numpy(updates), self.device)]
        lengths = stops
        if self.window is not None:
            self.window.seen(slots, firsts, stops, table_on_host)
            lengths = stops - self.window.skipped_blocks(slots) * self.drafter.block_size
            table = self.window.compact(table, slots)
        tokens, size = self.input_batch.token_ids_cpu, self.drafter.block_size
        blocks = table_on_host[owner, positions // size].astype(np.int64)
        rows = CatchUpRows(
            counts=stops - firsts,
            token_ids=tokens[updates[owner], positions + 1].astype(np.int64),
            positions=positions,
            slot_mapping=blocks * size + positions % size,
            lengths=lengths,
        )
        output, above = self.drafter.catch_up(rows, features, table)
        return CaughtUp(output, above, lengths, stops, table, tokens[updates, stops])

    def _features(
        self,
        step: Step,
        committed: Committed,
        updates: Ints,
        owner: Ints,
        positions: Ints,
        layers: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """[n, target features] at `positions` [n] of the requests `updates[owner]`: of this step's
        rows, or kept in the ring."""
        start = np.cumsum(committed.counts) - committed.counts
        place = positions - step.begins[updates][owner]
        now = place >= 0
        rows = committed.rows[(start[updates][owner] + place)[now]]
        is_all = len(rows) == int(step.query_start[-1])  # rows ascend, so they are in their order
        if is_all:
            new = torch.cat([layer[: len(rows)] for layer in layers], dim=-1)
        else:
            index = upload(torch.from_numpy(rows), self.device)
            new = torch.cat([layer[index] for layer in layers], dim=-1)
        if now.all():
            return new
        assert self.ring is not None
        old = self.ring.take(step.slots[updates][owner[~now]], positions[~now])
        features = new.new_empty(len(positions), new.shape[1])
        features[upload(torch.from_numpy(np.flatnonzero(now)), self.device)] = new
        features[upload(torch.from_numpy(np.flatnonzero(~now)), self.device)] = old
        return features

    def _draft(
        self, state: CaughtUp, slots: Ints, drafting: Ints, updates: Ints, batch: DraftBatch
    ) -> DraftForest:
        """Trees for the requests `drafting` [R] of the batch, out of the `updates` [U] that caught
        up, whose slots are `slots` [U]."""
        place = np.searchsorted(updates, drafting)
        drawn = self._draws(slots[place])
        if not drawn.any():
            return self._draft_best(state, place, batch)
        assert self.drawn is not None
        drawing, others = np.flatnonzero(drawn), np.flatnonzero(~drawn)
        # Both are known before anything is drawn.
        policy = self.drafter.policy
        cut, drawn_rows = policy.drawn_cut(batch), policy.drawn_rows(batch, len(drawing))
        arguments = self._of_requests(state, place[drawing])
        arguments.pop("roots")
        slots, positions = slots[place[drawing]], state.stops[place[drawing]] + 1
        of_drawing, report = batch.of_some(drawing), self.drafter.report
        pool, forest = draw_trees(
            self.drafter,
            **arguments,
            root_keys=self.drawn.root_keys(slots, positions, self.device),
            sampling=self.drawn.sampling(slots, self.device),
            batch=of_drawing,
            cut=cut,
        )
        self.drawn.put(slots, pool, forest)
        report.drawn_pool, report.drawn_probes = pool, of_drawing.probes
        report.drawn_places = torch.from_numpy(drawing)
        if len(others):
            of_others = batch.of_some(others, other_nodes=drawn_rows)
            best = self._draft_best(state, place[others], of_others)
            forest = DraftForest.joined(
                [(torch.from_numpy(drawing), forest), (torch.from_numpy(others), best)]
            )
        report.forest = forest
        return forest

    def _draft_best(self, state: CaughtUp, place: Ints, batch: DraftBatch) -> DraftForest:
        """Trees of the best candidates for the requests at `place` [R] of those that caught up."""
        return self.drafter.draft_trees(**self._of_requests(state, place), batch=batch)

    def _of_requests(self, state: CaughtUp, place: Ints) -> dict[str, torch.Tensor]:
        """What a drafting of the requests at `place` [R] begins with."""
        host = np.stack(
            [values[place] for values in (state.lengths, state.stops, state.roots)],
            dtype=np.int32,
            casting="unsafe",
        )
        lengths, stops, roots = upload(torch.from_numpy(host), self.device)
        output, above, table = state.output, state.above, state.block_table
        if len(place) < len(output):
            index = upload(torch.from_numpy(place), self.device)
            output, above, table = output[index], above[index], table[index]
        return {
            "output": output,
            "features": above,
            "context_lens": lengths,
            "last_positions": stops - 1,
            "block_table": table,
            "roots": roots,
        }


def _trees_where(forest: DraftForest, mask: torch.Tensor) -> DraftForest:
    """The forest with the trees of those requests alone for which `mask` ([R] bool) is set."""
    if mask.all():
        return forest
    return forest.prefix(forest.cu_nodes.diff().masked_fill(~mask, 0))
