# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""One step of decoding with draft trees, on vLLM's Model Runner V2.

The step is vLLM's own, with another speculator and another verifier. What is overridden is what
assumes a chain: positions, which follow the depth once the slots are fixed, and the attention
metadata. All rows are sampled in one launch. vLLM keys the noise of a draw by seed and position, so
every row on the accepted path is drawn as plain decoding would draw it there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import is_global_first_rank
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

from echo_vllm import ops
from echo_vllm.forecast import StepCost
from echo_vllm.policies import Observation, draws_of
from echo_vllm.step.attention.backend import builders_of
from echo_vllm.step.attention.tree import VerificationRows
from echo_vllm.step.clock import StepMarks, marks_on
from echo_vllm.step.commit import commit_paths
from echo_vllm.step.grammar import AllowedTree
from echo_vllm.step.tracing import TraceRecorder
from echo_vllm.step.v2.budget import TreeBudget, drafting_of, num_nodes_of, plan_of, probes_of
from echo_vllm.step.v2.drafter import TreeSpeculator
from echo_vllm.step.v2.grammar import (
    TreesToHost,
    awaits_trees,
    followed_of,
    trees_of,
    write_allowed,
)
from echo_vllm.step.v2.graphs import TreeGraphs, holds_trees
from echo_vllm.step.v2.outputs import OutputWithNotes, StepNotes
from echo_vllm.step.v2.paths import PathSampler
from echo_vllm.step.v2.state import (
    ScheduledTrees,
    TreeSlots,
    VerificationBuffers,
    policy_of,
    scheduled_trees,
)
from echo_vllm.step.v2.tracing import TraceNotes
from echo_vllm.transfer import upload
from echo_vllm.trees.pool import NO_CANDIDATE

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as _Runner
else:
    _Runner = object


class TreeVerifier:
    """Takes the place of vLLM's rejection sampler.

    Args:
        sampler: vLLM's plain sampler.
        runner: whose trees are verified and whose caches the accepted paths move in.
    """

    enable_adaptive_verification = False
    """vLLM's warm-up asks; it is the sampler's part of it that is meant."""

    def __init__(self, sampler: Sampler, runner: EchoRunnerV2Mixin) -> None:
        assert runner.speculator is not None
        self.sampler = PathSampler(
            sampler, runner.policy.max_depth, runner.tree_slots, runner.speculator.drawn
        )
        self.runner = runner

    def __call__(self, logits: torch.Tensor, input_batch: InputBatch, *args: Any) -> SamplerOutput:
        """Sample every row of `logits` [L, vocab], walk, and commit; nothing waits.

        Returns:
            sampled_token_ids [R, D + 1]: the accepted drafts of each request and one token more.
        """
        trees = self.runner.trees
        assert trees is not None
        output = self.sampler(logits, input_batch, trees)
        sampled = output.sampled_token_ids.flatten()
        accepted, num_accepted = ops.accept_path(
            sampled, trees.token_ids, trees.parents, trees.cu_nodes, self.runner.policy.max_depth
        )
        rows = input_batch.cu_num_logits[:-1].unsqueeze(1) + accepted.clamp(min=0)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            num_accepted + 1,
            input_batch.seq_lens[: input_batch.num_reqs],
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.runner.req_states.prefill_len.gpu,
        )
        trees.accepted_rows = accepted
        self._note(input_batch, trees, num_accepted)
        self.runner.commit(input_batch, trees)
        rows = rows.to(torch.int64)
        output.sampled_token_ids = sampled[rows]
        if output.logprobs_tensors is not None:
            output.logprobs_tensors = _logprobs_of(output.logprobs_tensors, rows)
        output.num_sampled, output.num_rejected = num_sampled, num_rejected
        return output

    def _note(self, batch: InputBatch, trees: ScheduledTrees, num_accepted: torch.Tensor) -> None:
        """What the policy wants to know of the verification, of each kind of candidates."""
        policy, drawn = self.runner.policy, self.runner.speculator.drawn
        scores, depths, sizes = trees.path_logprobs, trees.depths, trees.cu_nodes.diff()
        draws = np.zeros(batch.num_reqs, np.bool_)
        if drawn is not None:
            draws = drawn.draws(batch.idx_mapping_np)
        # What a grammar forces says nothing about the head.
        rewritten = self.runner.rewritten
        forced = [req_id in rewritten and rewritten[req_id].has_forced for req_id in batch.req_ids]

        def of(chosen: NDArray[np.bool_]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            if chosen.all():
                return scores, depths, num_accepted
            own = upload(torch.from_numpy(chosen), scores.device)
            of_nodes = own.repeat_interleave(sizes, output_size=len(scores))
            return (
                scores.masked_fill(~of_nodes, NO_CANDIDATE),
                depths,
                num_accepted.masked_fill(~own, 0),
            )

        if draws.any():
            trees.drawn_notes = policy.notes_of_verified_drawn(*of(draws))
        trees.notes = policy.notes_of_verified(*of(~draws & ~np.array(forced)))


def _logprobs_of(tensors: LogprobsTensors, rows: torch.Tensor) -> LogprobsTensors:
    """Of all rows of a batch those of the accepted paths, `rows` [R, D + 1], as vLLM takes them: a
    request's one behind the other, of which as many count as it has tokens."""
    num_reqs, width = rows.shape
    places = rows.flatten()
    return LogprobsTensors(
        tensors.logprob_token_ids[places],
        tensors.logprobs[places],
        tensors.selected_token_ranks[places],
        cu_num_generated_tokens=list(range(0, (num_reqs + 1) * width, width)),
    )


class EchoRunnerV2Mixin(_Runner):
    """The overrides that turn a V2 model runner into one that verifies trees."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.policy = policy_of(vllm_config)
        max_reqs = vllm_config.scheduler_config.max_num_seqs
        self.tree_slots = TreeSlots(max_reqs, self.policy.max_nodes, device)
        max_rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.tree_buffers = VerificationBuffers(max_rows, self.policy.max_nodes, device)
        self._in_graph = False
        """Whether the batch runs in a full graph with trees."""
        self.trees: ScheduledTrees | None = None
        """Of the batch between its scheduling and its drafting."""
        self.cost: StepCost | None = None
        """Measured at start-up; reported once to the scheduler, which keeps it true."""
        self._make_marks = marks_on(device)
        self._marks: StepMarks | None = None
        """Of this step, or of the last one."""
        self._marks_before: StepMarks | None = None
        self._notes: StepNotes | None = None
        """Of the last step, if the policy shares a budget out, or a trace is kept."""
        self.recorder = TraceRecorder.of(vllm_config) if is_global_first_rank() else None
        self._untold: deque[StepNotes] = deque(maxlen=4)
        """Of the last steps, more than can be on their way at once."""

        def init_speculator(config: VllmConfig, device: torch.device, _: Any) -> TreeSpeculator:
            return TreeSpeculator(config, device, self.policy, self.tree_slots)

        self._held: SchedulerOutput | None = None
        """The batch that waits for the masks of its trees."""
        self.rewritten: Mapping[str, AllowedTree] = {}
        """Of this batch: request -> its tree as a grammar has left it."""

        # Building vLLM's own first and replacing it would allocate its buffers twice.
        with patch.object(model_runner, "init_speculator", init_speculator):
            super().__init__(vllm_config, device)
        self.draft_tokens_handler = TreesToHost(self.tree_slots, device)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        assert self.sampler is not None
        assert self.speculator is not None
        section = self.speculative_config.echo
        if draws_of(section):
            states = self.sampler.sampling_states
            self.speculator.draw_by(section.candidates, states, self.vocab_size)
        self.rejection_sampler = TreeVerifier(self.sampler, self)

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        super().profile_run(*args, **kwargs)
        assert self.speculator is not None
        with torch.inference_mode():
            self.speculator.profile_level()

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        with patch.object(model_runner, "ModelCudaGraphManager", self._make_graphs):
            super().initialize_kv_cache(*args, **kwargs)
        if self.policy.has_order:
            # Set here, because vLLM makes one for its own chains alone.
            self.adaptive_verification = TreeBudget(
                self.tree_slots, self.req_states, self.input_buffers.query_start_loc
            )

    def _make_graphs(self, *args: Any, **kwargs: Any) -> TreeGraphs:
        """The manager of the target's graphs, once there are the groups of its attention."""
        support = min(
            builder.get_stock_cudagraph_support(self.vllm_config, group.kv_cache_spec).value
            for group, builder in builders_of(self.attn_groups)
        )
        # Chains need no other attention than the stock one, where that takes rows of any number.
        if not self.policy.are_chains or support < AttentionCGSupport.ALWAYS.value:
            for _, builder in builders_of(self.attn_groups):
                builder.rows_to_capture = self.tree_buffers.hold_roots
        kwargs["varlen_decode"] = True
        return TreeGraphs(
            *args,
            has_plain=support >= AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE.value,
            **kwargs,
        )

    def _remove_request(self, req_id: str) -> bool:
        """What the drafter has not seen yet of a request goes through it first: the blocks that the
        request gives back may be found in the prefix cache."""
        if self.speculator is not None:
            self.speculator.leaves(self.req_states.req_id_to_index.get(req_id))
        return super()._remove_request(req_id)

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().add_requests(scheduler_output)
        drawn = None if self.speculator is None else self.speculator.drawn
        if drawn is None:
            return
        for request in scheduler_output.scheduled_new_reqs:
            if request.sampling_params is not None:
                slot = self.req_states.req_id_to_index[request.req_id]
                drawn.begin(slot, request.sampling_params)

    def gather_batch_req_state(self, scheduler_output: SchedulerOutput, dummy_run: bool) -> Any:
        if not dummy_run:
            self._marks_before, self._marks = self._marks, self._make_marks()
            self._marks.begun.record()
            assert self.speculator is not None
            self.speculator.plan = plan_of(scheduler_output)
            self.speculator.drafting_for = drafting_of(scheduler_output)
            self.speculator.probes = probes_of(scheduler_output)
            self.speculator.marks = self._marks
            self.speculator.keeps_candidates = self.recorder is not None
            self.draft_tokens_handler.followed = followed_of(scheduler_output)
            if isinstance(self.adaptive_verification, TreeBudget):
                self.adaptive_verification.num_nodes = num_nodes_of(scheduler_output)
        return super().gather_batch_req_state(scheduler_output, dummy_run)

    def prepare_inputs(
        self,
        scheduler_output: SchedulerOutput,
        batch_req_state: Any,
        batch_desc: BatchExecutionDescriptor,
        *args: Any,
        **kwargs: Any,
    ) -> InputBatch:
        self._in_graph = holds_trees(batch_desc) and any(
            builder.rows_to_capture is not None for _, builder in builders_of(self.attn_groups)
        )
        return super().prepare_inputs(
            scheduler_output, batch_req_state, batch_desc, *args, **kwargs
        )

    def prepare_attn(self, input_batch: InputBatch) -> Any:
        """Slots by the order of the rows, which vLLM computes, then positions by the depth."""
        result = super().prepare_attn(input_batch)
        num_nodes = input_batch.num_draft_tokens_per_req
        if num_nodes is None or not input_batch.num_draft_tokens:
            if self._in_graph:
                num_rows = input_batch.num_tokens_after_padding
                self._announce(self.tree_buffers.hold_roots(input_batch.query_start_loc, num_rows))
            return result
        # A tree stands behind one committed token, so that its root is its request's first row.
        is_tree = num_nodes > 0
        assert (input_batch.num_scheduled_tokens[is_tree] == num_nodes[is_tree] + 1).all()
        self.trees = trees = scheduled_trees(
            self.tree_slots,
            self.tree_buffers,
            self.req_states.draft_tokens,
            input_batch,
            are_causal=self.policy.are_chains and not self._in_graph,
            in_graph=self._in_graph,
        )
        if trees.rows is not None:
            # Padding has no depth and no root.
            seen = input_batch.num_reqs if self._in_graph else trees.num_trees
            row_start, depths = trees.rows.row_start[: seen + 1], trees.rows.depths
            positions = input_batch.positions[: len(depths)]
            trees.causal_positions = positions.clone()
            base = positions[row_start[:-1].to(torch.int64)]
            sizes = row_start.diff()
            positions.copy_(depths + base.repeat_interleave(sizes, output_size=len(depths)))
        self._announce(trees.rows)
        return result

    def _announce(self, rows: VerificationRows | None) -> None:
        """Tell the builders of attention metadata which rows of the next batch are trees."""
        for _, builder in builders_of(self.attn_groups):
            builder.verification = rows

    def sample(
        self, hidden_states: torch.Tensor, input_batch: InputBatch, *args: Any, **kwargs: Any
    ) -> Any:
        """vLLM's, with the logits shown to a policy that wants them, before a grammar's mask."""
        if not self.policy.wants_logits:
            return super().sample(hidden_states, input_batch, *args, **kwargs)
        compute = self.model.compute_logits

        def shown(states: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = compute(states)
            tokens = input_batch.input_ids[input_batch.logits_indices]
            self.policy.observe_logits(tokens, logits)
            return logits

        with patch.object(self.model, "compute_logits", shown):
            return super().sample(hidden_states, input_batch, *args, **kwargs)

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """vLLM's; where a grammar has yet to follow the batch's trees, `sample_tokens` does it."""
        self.rewritten = {}
        if awaits_trees(scheduler_output):
            self._held = scheduler_output
            return None
        return super().execute_model(scheduler_output, *args, **kwargs)

    @torch.inference_mode()
    def _execute_held(self, grammar_output: GrammarOutput | None) -> None:
        """Run the batch that has waited, with its trees as they are allowed."""
        held, self._held = self._held, None
        if held is None:
            return
        self.rewritten = trees = trees_of(grammar_output)
        if trees:
            write_allowed(
                self.tree_slots,
                self.req_states.draft_tokens,
                [self.req_states.req_id_to_index[req_id] for req_id in trees],
                list(trees.values()),
            )
        output = super().execute_model(held)
        assert output is None, "a batch with trees samples"

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        self._execute_held(grammar_output)
        assert self.speculator is not None
        self.speculator.verified = trees = self.trees
        state = self.execute_model_state
        try:
            output = super().sample_tokens(grammar_output)
        finally:
            self._announce(None)
            self.trees = None
        if (self.policy.has_order or self.recorder is not None) and state is not None:
            output = self._with_notes(output, state.input_batch, trees)
        return output

    def _with_notes(
        self, output: Any, input_batch: InputBatch, trees: ScheduledTrees | None
    ) -> Any:
        """`output`, and with it what the step before this one left to learn."""
        assert self.speculator is not None
        assert self._marks is not None
        self._marks.drafted.record()
        drafting, self.speculator.drafting = self.speculator.drafting, None
        trace = None
        if self.recorder is not None:
            traced = None if drafting is None else drafting.traced
            trace = TraceNotes(self.recorder, input_batch, trees, traced, list(self.rewritten))
        before, self._notes = (
            self._notes,
            StepNotes(
                self.policy,
                Observation(
                    rows=input_batch.num_tokens,
                    num_nodes=input_batch.num_draft_tokens,
                    rested=trees is None and drafting is None,
                    committed=0 if drafting is None else len(drafting.req_ids),
                    level_rows=() if drafting is None else drafting.level_rows,
                ),
                verified=() if trees is None else trees.notes,
                verified_drawn=() if trees is None else trees.drawn_notes,
                drafting=drafting,
                trace=trace,
                marks=self._marks,
                before=self._marks_before,
                main_stream=self.main_stream,
                copy_stream=self.output_copy_stream,
            ),
        )
        self._notes.cost, self.cost = self.cost, None
        if self.recorder is not None:
            self._untold.append(self._notes)
        return output if before is None else OutputWithNotes(output, before)

    def end_trace(self) -> None:
        """Write what the last steps have left, which no output brings any more."""
        if self._untold:
            torch.accelerator.synchronize()
        for notes in self._untold:
            notes.record()

    def commit(self, input_batch: InputBatch, trees: ScheduledTrees) -> None:
        """Move the accepted paths' keys and values to where a chain would have left them."""
        if trees.rows is None:
            return
        assert trees.accepted_rows is not None
        assert self.speculator is not None
        commit_paths(
            trees.accepted_rows[: trees.num_trees, 1:].to(torch.int64),
            trees.rows.row_start[: trees.num_trees].to(torch.int64),
            slot_mappings=self.block_tables.slot_mappings[: len(self.attn_groups)],
            attn_groups=self.attn_groups,
            layers=self.compilation_config.static_forward_context,
            drafter=self.speculator.draft_attn_layer_names,
        )
