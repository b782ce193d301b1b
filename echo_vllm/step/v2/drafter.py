# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""EAGLE-3 drafting of trees on Model Runner V2, level by level, in shapes that the host knows.

vLLM's own first forward brings the drafter's paged cache up to date with what was accepted, over as
many rows as the target had: the accepted rows of a tree are moved to the front of its request's
rows first, so that what follows them is rejected, as in a chain. A step of plain decoding only
keeps what that forward would have read (`rests.py`). Every level is one forward over the same
number of frontier nodes for every request, from buffers that are always the same (`levels.py`). The
trees stay in their requests' slots. For which requests a level runs the scheduler says, so the host
knows it without asking: all of the batch that may have a tree, or its probes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.states import SamplingStates
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator

from echo_vllm.config import Candidates
from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.policies import DraftBatch, DraftPolicy
from echo_vllm.step.attention.backend import TreeAttentionMetadata, builders_of
from echo_vllm.step.clock import StepMarks
from echo_vllm.step.frontier import Frontier
from echo_vllm.step.v2.drawn import DrawnSlots, grow_drawn
from echo_vllm.step.v2.graphs import CatchUpGraphs, LevelGraphs
from echo_vllm.step.v2.levels import LevelBuffers
from echo_vllm.step.v2.rests import RESTS, RestedRows
from echo_vllm.step.v2.state import ScheduledTrees, TreeSlots, VerificationBuffers
from echo_vllm.step.v2.tracing import TracedDrafting
from echo_vllm.transfer import upload
from echo_vllm.trees.draws import Sampling, draw_children
from echo_vllm.trees.pool import CandidatePool
from echo_vllm.trees.ranked import RankedTrees


@dataclass
class Drafting:
    """What a step drafted.

    Attributes:
        req_ids: of the R requests that it drafted for.
        sizes: [R] int32, nodes of their trees, on the device.
        notes: for the policy of the scheduler's process.
        drawn_notes: the same of drawn candidates.
        level_rows: of each level that was a forward.
        traced: the candidates, where a trace is kept.
    """

    req_ids: list[str]
    sizes: torch.Tensor
    notes: tuple[torch.Tensor, ...]
    drawn_notes: tuple[torch.Tensor, ...] = ()
    level_rows: list[int] = field(default_factory=list)
    traced: TracedDrafting | None = None


@dataclass(frozen=True)
class Roots:
    """What the trees of R requests grow from.

    Attributes:
        output: [R, hidden], what the drafter's head reads for the first level.
        features: [R, hidden], what the children of the root take as hidden state.
        token_ids: [R] int64, the tokens that the trees grow from.
        context_lens: [R] int32, tokens in the drafter's paged cache.
        are_read: [R] bool, whether a request's prompt was read to its end; the others have no
            candidates and take nothing of what a policy shares out.
        block_tables: [R, max blocks] int32, of each cache group.
    """

    output: torch.Tensor
    features: torch.Tensor
    token_ids: torch.Tensor
    context_lens: torch.Tensor
    are_read: torch.Tensor
    block_tables: Sequence[torch.Tensor]

    def of(self, places: torch.Tensor) -> Roots:
        """Of the requests at `places` [r] int64, on the device."""
        return Roots(
            self.output[places],
            self.features[places],
            self.token_ids[places],
            self.context_lens[places],
            self.are_read[places],
            [table[places] for table in self.block_tables],
        )


class TreeSpeculator(EagleSpeculator):
    """vLLM's EAGLE-3 speculator with a tree in place of the chain.

    Args:
        policy: whose trees grow.
        slots: where the trees go.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        policy: DraftPolicy,
        slots: TreeSlots,
    ) -> None:
        super().__init__(vllm_config, device)
        self.policy = policy
        self.slots = slots
        self.verified: ScheduledTrees | None = None
        """Set by the runner: what the step that drafts has just verified."""
        self.plan = DraftPlan()
        self.drafting_for: Collection[str] | None = None
        self.probes: Collection[str] = ()
        """Set by the runner, of the step that drafts: what was decided, who gets a tree (None for
        everybody), and who its probes are."""
        self.marks: StepMarks | None = None
        """Set by the runner, of the same step."""
        self.draft_token_confidence_probs: torch.Tensor | None = None
        """vLLM's runner hands it to `TreeBudget`, which has the scores in the slots."""
        self.drafting: Drafting | None = None
        """Of the step that has just drafted; the runner takes it."""
        self.rested: RestedRows | None = None
        """What the drafter has yet to see, for a policy that may rest."""
        self.keeps_candidates = False
        """Set by the runner, of the same step: whether a trace wants them."""
        self.drawn: DrawnSlots | None = None
        """Where candidates are drawn, what their trees were drawn from."""
        self._chains = VerificationBuffers(self.max_num_tokens, policy.max_nodes, device)
        self._output = torch.zeros(
            self.max_num_reqs, self.hidden_size, dtype=self.dtype, device=device
        )
        """What the drafter's head reads for the first level."""

    def load_model(self, target_model: torch.nn.Module) -> None:
        super().load_model(target_model)
        layers = self.vllm_config.compilation_config.static_forward_context
        self.levels = LevelBuffers(
            self.policy,
            {name: layers[name] for name in sorted(self.draft_attn_layer_names)},
            max_reqs=self.max_num_reqs,
            hidden_size=self.hidden_size,
            dtype=self.dtype,
            device=self.device,
        )
        if self.policy.may_rest and self.model.model.use_aux_hidden_state:
            self.rested = RestedRows(
                min(self.max_num_tokens, RESTS * self.max_num_reqs),
                self.model.model.fc_input_size,
                self.dtype,
                self.device,
            )

    def draw_by(self, candidates: Candidates, states: SamplingStates, vocab_size: int) -> None:
        """Draw candidates, for the requests that `candidates` says, by vLLM's `states` of their
        parameters; the target has `vocab_size` tokens."""
        offsets = self.model.draft_id_to_target_id
        self.drawn = DrawnSlots(
            self.policy,
            candidates,
            states,
            vocab=vocab_size,
            draft_vocab=vocab_size if offsets is None else len(offsets),
            draft_offsets=offsets,
            device=self.device,
        )

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn(*args, **kwargs)
        self.levels.fit(self.block_tables.input_block_tables)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        config, device = self.vllm_config, self.device
        most_rows = self.num_speculative_steps + 1
        self.prefill_cudagraph_manager = CatchUpGraphs(config, device, cudagraph_mode, most_rows)
        self.level_graphs = LevelGraphs(config, device, cudagraph_mode, self.policy.level_widths())
        # The first forward is causal. Where stock attention cannot be captured with any number of
        # rows, its rows are chains, which ours takes for trees.
        for group, builder in builders_of(self.attn_groups):
            support = builder.get_stock_cudagraph_support(config, group.kv_cache_spec)
            if support is not AttentionCGSupport.ALWAYS:
                builder.rows_to_capture = self._chains.hold_chains

    def capture(self) -> None:
        # What dummy runs have left must be no place outside of what is captured.
        self.last_token_indices.zero_()
        self.idx_mapping.zero_()
        manager = self.prefill_cudagraph_manager
        assert manager is not None
        if manager.use_breakable_cg:
            manager.init_breakable_cg_runner(self.model)
        manager.capture(
            self._prefill,
            self.model_state,
            self.input_buffers,  # Rows of requests as the target's, positions of a chain.
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            progress_bar_desc="Capturing the drafter's first forward",
        )
        levels = self.levels
        self.level_graphs.capture_levels(
            lambda count, width: levels.pad(0, count, width),
            lambda count, width: levels.keep(*self._run_level_of(count, width)),
        )

    def profile_level(self) -> None:
        """Run the largest level there can be, without attention, for vLLM to see what it takes."""
        levels = self.levels
        output, _ = self.run_level(levels.token_ids, levels.positions, levels.hidden, None)
        self.top_tokens(output, self.policy.num_ranks)
        if self.drawn is not None:
            keys = torch.zeros(len(output), dtype=torch.int64, device=self.device)
            draw_children(self.logits_of(output), self.policy.drawn_ranks, keys, Sampling())

    def sample_draft(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keep what the drafter's head reads for the first level; nothing is sampled here."""
        self._output[: len(hidden_states)].copy_(hidden_states)
        return self.draft_tokens[: len(hidden_states), 0]

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        *args: Any,
        dummy_run: bool = False,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Write every request's next tree into its slot; see vLLM's speculators for the arguments.

        Returns:
            [R, N] int64, the trees' tokens.
        """
        trees, self.verified = self.verified, None
        num_reqs = input_batch.num_reqs
        wants_trees = not dummy_run and num_speculative_tokens != 0
        if not dummy_run:
            if not wants_trees and aux_hidden_states and self._may_rest(input_batch):
                self._rest(
                    input_batch, num_sampled, last_sampled, next_prefill_tokens, aux_hidden_states
                )
                self._mark_verified()
                return self.draft_tokens[:num_reqs]
            self.catch_up()
        if attn_metadata is not None:  # A profile run is without attention.
            # The target's metadata may be that of trees, and the drafter's layers share it.
            attn_metadata = self._first_metadata(input_batch, is_profile=is_profile)
        if trees is not None and trees.accepted_rows is not None:
            order = self._accepted_first(input_batch, trees.accepted_rows)
            positions = input_batch.positions
            if trees.causal_positions is not None:
                positions = positions.clone()
                positions[: len(trees.causal_positions)] = trees.causal_positions
            input_batch = replace(
                input_batch, input_ids=input_batch.input_ids[order], positions=positions
            )
            last_hidden_states = last_hidden_states[order]
            if aux_hidden_states:
                aux_hidden_states = [layer[order] for layer in aux_hidden_states]
        drafts = super().propose(
            input_batch,
            attn_metadata,
            slot_mappings,
            last_hidden_states,
            aux_hidden_states,
            num_sampled,
            num_rejected,
            last_sampled,
            next_prefill_tokens,
            *args,
            dummy_run=dummy_run,
            is_profile=is_profile,
            num_speculative_tokens=1,
            **kwargs,
        )
        if not dummy_run:
            self._mark_verified()
        if not wants_trees:
            return drafts
        roots = Roots(
            self._output[:num_reqs],
            self.hidden_states[:num_reqs].clone(),
            last_sampled.flatten()[input_batch.idx_mapping].to(torch.int64),
            input_batch.seq_lens[:num_reqs] - num_rejected,
            num_sampled > 0,
            [table[:num_reqs] for table in self.block_tables.input_block_tables],
        )
        drafts.zero_()  # vLLM marks what it does not use with -1, which is no token.
        self.drafting = self._draft(roots, input_batch, drafts)
        return drafts

    def _draft(self, roots: Roots, input_batch: InputBatch, drafts: torch.Tensor) -> Drafting:
        """Write the trees that grow from `roots`, of all requests of a batch, to the slots of those
        that get one, and their tokens to `drafts` [R, N]."""
        req_ids, policy = input_batch.req_ids, self.policy
        chosen = np.array([i for i, x in enumerate(req_ids) if self._drafts_for(x)], np.int64)
        probes = np.array([i for i, x in enumerate(chosen) if req_ids[x] in self.probes], np.int64)
        batch = DraftBatch(len(chosen), len(req_ids), self.plan, torch.from_numpy(probes))
        slots_np = input_batch.idx_mapping_np[chosen]
        draws = np.zeros(len(chosen), np.bool_)
        if self.drawn is not None:
            draws = self.drawn.draws(slots_np)
        others, drawing = np.flatnonzero(~draws), np.flatnonzero(draws)
        # Both are known before anything is drawn.
        cut, other_nodes = policy.drawn_cut(batch), policy.drawn_rows(batch, len(drawing))
        level_rows: list[int] = []
        drafted: list[RankedTrees] = []
        drawn_notes: tuple[torch.Tensor, ...] = ()
        pool, drawn_pool, of_others = None, None, batch

        def placed(part: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor, Roots]:
            places = self._upload(chosen[part])
            whole = len(part) == len(req_ids)
            slots = input_batch.idx_mapping
            return places, slots if whole else slots[places], roots if whole else roots.of(places)

        def write(places: torch.Tensor, slots: torch.Tensor, trees: RankedTrees) -> None:
            self.slots.write(slots, trees)
            drafts[places, : trees.token_ids.shape[1]] = trees.token_ids
            drafted.append(trees)

        if len(drawing):
            assert self.drawn is not None
            places, slots, own_roots = placed(drawing)
            of_drawing = batch.of_some(drawing)
            drawn_pool, level_rows = grow_drawn(
                self, self.drawn, own_roots, slots, slots_np[drawing], of_drawing
            )
            trees = policy.drawn_ranked(drawn_pool, of_drawing, cut)
            self.drawn.write(slots, slots_np[drawing], drawn_pool, trees)
            write(places, slots, trees)
            drawn_notes = policy.notes_of_drawn(drawn_pool, of_drawing.probes)
            of_others = batch.of_some(others, other_nodes=other_nodes)
        if len(others):
            places, slots, own_roots = placed(others)
            pool, rows = self._grow(own_roots, of_others)
            level_rows = level_rows + rows
            write(places, slots, policy.ranked(pool, of_others))
        together = RankedTrees.together(drafted)
        notes = policy.notes_of_drafted(pool, together, of_others.probes)
        order = np.concatenate([drawing, others])
        names = [req_ids[i] for i in chosen[order]]
        drafting = Drafting(names, together.sizes, notes, drawn_notes, level_rows)
        if self.keeps_candidates:
            # Probes are told by their places among the requests, as they are named.
            batch = replace(batch, probes=torch.from_numpy(np.flatnonzero(np.isin(order, probes))))
            lens = roots.context_lens[self._upload(chosen[order])]
            drafting.traced = TracedDrafting(names, lens, batch, together, drawn_pool, pool)
        return drafting

    def _first_metadata(self, batch: InputBatch, *, is_profile: bool = False) -> dict[str, Any]:
        """The metadata of the first forward; if that runs in a full graph, the graph's."""
        manager = self.prefill_cudagraph_manager
        assert isinstance(manager, CatchUpGraphs)
        manager.most_rows = None
        if not batch.has_prefill and not is_profile:
            manager.most_rows = int(batch.num_scheduled_tokens.max())
        graph = manager.dispatch(batch.num_reqs, batch.num_tokens_after_padding, None, 0)
        num_reqs, num_rows = batch.num_reqs, batch.num_tokens
        if graph.cg_mode is CUDAGraphMode.FULL:
            assert graph.num_reqs is not None
            buffers = self.target_input_buffers
            num_reqs, num_rows = graph.num_reqs, graph.num_tokens
            row_start = buffers.query_start_loc[: num_reqs + 1]
            added = num_reqs - batch.num_reqs
            bounds = batch.query_start_loc_np[: batch.num_reqs + 1]
            lens = batch.seq_lens_cpu_upper_bound[: batch.num_reqs]
            batch = replace(
                batch,
                num_reqs_after_padding=num_reqs,
                num_tokens_after_padding=num_rows,
                query_start_loc=row_start,
                query_start_loc_np=np.pad(bounds, (0, added), mode="edge"),
                seq_lens=buffers.seq_lens[:num_reqs],
                seq_lens_cpu_upper_bound=torch.nn.functional.pad(lens, (0, added)),
            )
            for _, builder in builders_of(self.attn_groups):
                if builder.rows_to_capture is not None:
                    builder.verification = builder.rows_to_capture(row_start, num_rows)
        metadata: dict[str, Any] = self.model_state.prepare_attn(
            batch,
            graph.cg_mode,
            tuple(table[:num_reqs] for table in self.block_tables.input_block_tables),
            self.block_tables.slot_mappings[:, :num_rows],
            self.attn_groups,
            self.kv_cache_config,
        )
        for _, builder in builders_of(self.attn_groups):
            builder.verification = None
        return metadata

    def _drafts_for(self, req_id: str) -> bool:
        return self.drafting_for is None or req_id in self.drafting_for

    def _mark_verified(self) -> None:
        if self.marks is not None:
            self.marks.verified.record()

    def _may_rest(self, input_batch: InputBatch) -> bool:
        """Whether the drafter may see a batch later: one of a row a request."""
        n = input_batch.num_reqs
        return self.rested is not None and n == input_batch.num_tokens and self.rested.has_room(n)

    def _rest(
        self,
        input_batch: InputBatch,
        num_sampled: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        aux_hidden_states: list[torch.Tensor],
    ) -> None:
        """Keep what the drafter has to see of a batch; for the arguments see `propose`."""
        assert self.rested is not None
        n, slots = input_batch.num_reqs, input_batch.idx_mapping
        self.rested.put(
            input_batch.idx_mapping_np,
            torch.where(  # Who samples nothing reads a prompt.
                num_sampled > 0,
                last_sampled.flatten()[slots],
                next_prefill_tokens.flatten()[slots],
            ),
            input_batch.positions[:n],
            [layer[:n] for layer in aux_hidden_states],
        )

    def leaves(self, slot: int | None) -> None:
        """The request in `slot`, if there is one, gives its blocks back."""
        if self.drawn is not None and slot is not None:
            self.drawn.end(slot)
        if self.rested is not None and slot in self.rested:
            self.catch_up()

    def catch_up(self) -> None:
        """Pass what steps that rested have left through the drafter, in one forward."""
        if self.rested is None or not (of_slot := self.rested.take()):
            return
        counts = np.array([len(rows) for rows in of_slot.values()])
        bounds = torch.from_numpy(np.append(0, counts.cumsum()).astype(np.int32))
        rows = self._upload(np.concatenate(list(of_slot.values())))
        slots = self._upload(np.fromiter(of_slot, np.int64))
        owners = self._upload(np.arange(len(counts)).repeat(counts))
        positions = self.rested.positions[rows]
        tables = [table.gpu[slots] for table in self.block_tables.block_tables]
        slot_mappings = torch.stack(
            [
                table[owners, positions // size] * size + positions % size
                for table, size in zip(tables, self.block_tables.block_sizes, strict=True)
            ]
        )
        row_start = upload(bounds, self.device)
        metadata = build_attn_metadata(
            self.attn_groups,
            num_reqs=len(counts),
            num_tokens=len(rows),
            query_start_loc_gpu=row_start,
            query_start_loc_cpu=bounds,
            max_query_len=int(counts.max()),
            seq_lens=positions[row_start[1:].to(torch.int64) - 1].to(torch.int32) + 1,
            max_seq_len=self.max_model_len,
            block_tables=tables,
            slot_mappings=slot_mappings,
            kv_cache_config=self.kv_cache_config,
            seq_lens_cpu_upper_bound=torch.full_like(bounds[1:], self.max_model_len),
            positions=positions,
        )
        self.run_level(
            self.rested.token_ids[rows],
            positions,
            self.model.combine_hidden_states(self.rested.features[rows]),
            metadata,
            build_slot_mappings_by_layer(slot_mappings, self.kv_cache_config),
        )

    def _upload(self, values: np.ndarray) -> torch.Tensor:
        return upload(torch.from_numpy(values), self.device)

    @staticmethod
    def _accepted_first(input_batch: InputBatch, accepted: torch.Tensor) -> torch.Tensor:
        """[rows] int64, an order of the batch's rows in which every accepted path comes first.

        `accepted` is [R, D + 1], rows inside the request, -1 behind the path.
        """
        accepted = accepted.to(torch.int64)
        # A request's path begins at the first row that logits are computed for.
        stop = input_batch.query_start_loc[1 : len(accepted) + 1]
        first = (stop - input_batch.cu_num_logits.diff()).to(torch.int64).unsqueeze(1)
        places = torch.arange(accepted.shape[1], device=accepted.device)
        is_path = accepted >= 0
        order = torch.arange(input_batch.input_ids.shape[0], device=accepted.device)
        # What is not on the path says once more that the root stays where it is.
        target = first + torch.where(is_path, places, 0)
        source = first + torch.where(is_path, accepted, 0)
        return order.scatter_(0, target.flatten(), source.flatten())

    def _grow(self, roots: Roots, batch: DraftBatch) -> tuple[CandidatePool, list[int]]:
        """The candidates of a batch, and the rows of each level that was a forward."""
        policy, levels, output = self.policy, self.levels, roots.output
        frontier = Frontier(roots.features, policy, levels.scratch)
        pool = CandidatePool.empty_unseen(len(output), output.device)
        pool.roots = roots.token_ids
        level_rows: list[int] = []
        held = 0
        for depth, expansion, requests in policy.levels(pool, batch):
            frontier.keep(requests)
            if expansion.frontier is None:
                expansion = replace(expansion, going=roots.are_read)
            else:
                if held != len(requests):  # Fewer than there were are others.
                    held = len(requests)
                    levels.hold_requests(
                        pool.rows_of(requests, roots.context_lens),
                        [pool.rows_of(requests, table) for table in roots.block_tables],
                    )
                positions = pool.rows_of(requests, roots.context_lens) + (depth - 2)
                levels.hold(
                    frontier.advance(pool.rows_above(expansion.frontier)),
                    pool.rows_of(requests, pool.token_ids).gather(1, expansion.frontier),
                    positions.clamp(max=self.max_model_len - 1),
                )
                output, features = self.run_held(held, frontier.width)
                frontier.ran(features)
                level_rows.append(len(output))
            tokens, logprobs = self.top_tokens(output, policy.num_ranks)
            shape = (len(requests), frontier.width, policy.num_ranks)
            pool.grow(expansion, tokens.view(shape), logprobs.view(shape))
        return pool, level_rows

    def run_held(self, count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`run_level` of the level that the buffers hold, of `count` requests with `width` rows."""
        graph, levels, n = self.level_graphs.find(count, width), self.levels, count * width
        if graph is None or graph.num_reqs is None:
            return self._run_level_of(count, width)
        levels.pad(count, graph.num_reqs, width)
        self.level_graphs.run_fullgraph(graph)
        return levels.output[:n], levels.features[:n]

    def _run_level_of(self, count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        levels, n = self.levels, count * width
        metadata: dict[str, Any] = {}
        for index, groups in enumerate(self.attn_groups):
            tree = levels.attention(index, count, width)
            for group in groups:
                of_group = TreeAttentionMetadata(tree=tree, rest=None)
                metadata |= dict.fromkeys(group.layer_names, of_group)
        return self.run_level(
            levels.token_ids[:n], levels.positions[:n], levels.hidden[:n], metadata
        )

    def run_level(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        metadata: dict[str, Any] | None,
        slot_mapping: dict[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the drafter on n rows, [n], [n] and [n, hidden]; returns (what the head reads, what
        the next level reads), both [n, hidden]. Without slots nothing goes to the paged cache."""
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=len(token_ids),
            slot_mapping=slot_mapping or {},
        ):
            output, features = self.model(
                input_ids=token_ids.to(torch.int32),
                positions=positions,
                hidden_states=hidden_states,
                inputs_embeds=None,
            )
        return output, features

    def logits_of(self, output: torch.Tensor) -> torch.Tensor:
        """[rows, V_draft], after each row; on all ranks."""
        logits: torch.Tensor = self.model.logits_processor(self.model.lm_head, output)
        return logits

    def top_tokens(self, output: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best tokens after each row, in the target's vocabulary, and their
        log-probabilities, both [rows, k]."""
        model = self.model
        ids, logprobs = model.logits_processor.get_top_k_tokens(
            model.lm_head, output, k, return_log_probs=True
        )
        offsets = model.draft_id_to_target_id
        return (ids if offsets is None else ids + offsets[ids]), logprobs
