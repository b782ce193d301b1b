# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""EAGLE-3 drafting of trees, level by level, for all requests of a batch at once.

The first forward brings the drafter's paged cache up to date with what the target committed, as
in vLLM's own EAGLE drafter. Each further forward expands one level: its rows are the frontier
nodes of every request, their keys and values go to a scratch buffer (`DraftScratch`), and they see
the committed context plus their own ancestors. A draft therefore leaves no trace in any cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.spec_decode.utils import PADDING_SLOT_ID

from echo_vllm.config import EchoConfigError
from echo_vllm.policies import DraftBatch, DraftPolicy
from echo_vllm.policies.base import MAX_BACKLOG
from echo_vllm.step.attention.backend import TreeAttentionMetadata
from echo_vllm.step.attention.tree import (
    MASK_WORD_BITS,
    DraftScratch,
    TreeAttention,
    num_mask_words,
)
from echo_vllm.step.v1.window import DrafterBacklog, DrafterInput
from echo_vllm.transfer import upload
from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.pool import CandidatePool


@dataclass(frozen=True)
class Requests:
    """What the drafter does for each request of a batch.

    Attributes:
        ids: all requests of the batch, in its order.
        updating: indices, ascending, of those whose cache is brought up to date; the tokens of the
            others wait in the backlog.
        drafting: indices, ascending, of those that get a tree; all of them are in `updating`.
    """

    ids: list[str]
    updating: list[int]
    drafting: list[int]


@dataclass
class DraftReport:
    """What the last drafting did.

    Attributes:
        committed: tokens that went through the drafter to bring its cache up to date.
        level_rows: rows of each further forward.
        pool: all candidates, None if nothing was drafted.
        forest: those that were selected.
        probes: of the batch that was drafted for.
    """

    committed: int = 0
    level_rows: list[int] = field(default_factory=list)
    pool: CandidatePool | None = None
    forest: DraftForest | None = None
    probes: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class EchoProposer(EagleProposer):
    """vLLM's EAGLE-3 proposer with a tree in place of the chain."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, runner: Any, policy: DraftPolicy
    ) -> None:
        super().__init__(vllm_config, device, runner)
        self.num_speculative_tokens: int
        self.policy = policy
        draft_limit = self.draft_model_config.max_model_len or self.max_model_len
        self.max_draft_len = min(self.max_model_len, draft_limit)
        """Positions from here on are beyond what the drafter can be asked about."""
        self.backlog = DrafterBacklog(min(MAX_BACKLOG, self.max_num_tokens - policy.max_depth - 1))
        self.report = DraftReport()

    def dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """One forward: vLLM would run one a speculative token, as if the tree were a chain."""
        nodes, self.num_speculative_tokens = self.num_speculative_tokens, 1
        try:
            super().dummy_run(num_tokens, *args, **kwargs)
        finally:
            self.num_speculative_tokens = nodes

    def initialize_attn_backend(
        self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None
    ) -> None:
        super().initialize_attn_backend(kv_cache_config, kernel_block_sizes)
        sizes = kernel_block_sizes or []
        if self.kv_cache_gid < len(sizes) and sizes[self.kv_cache_gid] != self.block_size:
            raise EchoConfigError(
                f"--block-size {self.block_size} does not work with method echo here, because the "
                f"attention kernels split such blocks; set it to {sizes[self.kv_cache_gid]}."
            )

    def _upload(self, values: torch.Tensor) -> torch.Tensor:
        """`values` of the host on the drafter's device."""
        return upload(values, self.device)

    def propose_forest(
        self,
        *,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        requests: Requests,
        batch: DraftBatch,
        common_attn_metadata: CommonAttentionMetadata,
    ) -> DraftForest:
        """Catch up with the committed tokens, then draft a forest.

        Args:
            token_ids: [n] int32, tokens that the target committed in this step.
            positions: [n] int64, their positions.
            hidden_states: [n, target features], the target's hidden states at these tokens.
            next_token_ids: [batch] int32, the token after each request's last one.
            requests: what is to be done for each request of the batch.
            batch: what the policy is told.
            common_attn_metadata: of the n tokens, all requests of the batch; lengths on the host
                are exact.

        Returns:
            The forest that the policy selected, one tree for each of `requests.drafting`.
        """
        self.report = DraftReport()
        last_rows = common_attn_metadata.query_start_loc[1:].to(torch.int64) - 1
        # The drafter's token at a position is the one after it.
        shifted = torch.empty_like(token_ids)
        shifted[:-1] = token_ids[1:]
        shifted[last_rows] = next_token_ids.to(shifted.dtype)
        work = self._updates(shifted, positions, hidden_states, requests, common_attn_metadata)
        outputs, features = [], []
        for token_ids, positions, hidden_states, cad in work:
            self.report.committed += len(token_ids)
            _, metadata = self.build_per_group_and_layer_attn_metadata(cad)
            output, above = self._forward(
                token_ids,
                positions.clamp(max=self.max_draft_len - 1),
                self.model.combine_hidden_states(hidden_states),
                metadata,
                cad.slot_mapping,
            )
            rows = cad.query_start_loc[1:].to(torch.int64) - 1
            outputs.append(output[rows])
            features.append(above[rows])
        if not requests.drafting:
            return DraftForest.empty(0)
        place = {request: i for i, request in enumerate(requests.updating)}
        rows = self._upload(torch.tensor([place[request] for request in requests.drafting]))
        drafting = self._upload(torch.tensor(requests.drafting))
        return self._draft_trees(
            output=torch.cat(outputs)[rows],
            features=torch.cat(features)[rows],
            context_lens=common_attn_metadata.seq_lens[drafting],
            block_table=common_attn_metadata.block_table_tensor[drafting],
            roots=next_token_ids[drafting],
            batch=batch,
        )

    def _updates(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        requests: Requests,
        cad: CommonAttentionMetadata,
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, CommonAttentionMetadata]]:
        """The drafter's inputs (tokens, positions, features, metadata) of the requests to update,
        in one forward or, where a backlog makes it too large, in several; the other requests'
        tokens join the backlog."""
        if len(requests.updating) == cad.num_reqs and not len(self.backlog):
            return [(token_ids, positions, hidden_states, cad)] if len(token_ids) else []
        block_size = self.block_size
        bounds = cad.query_start_loc_cpu.tolist()
        assert cad.seq_lens_cpu_upper_bound is not None  # exact, because drafts are on the host
        first_positions = (cad.seq_lens_cpu_upper_bound - cad.query_start_loc_cpu.diff()).tolist()
        updating = set(requests.updating)
        # Where most rows wait, views keep nothing in memory that is not wanted.
        most_wait = 2 * sum(bounds[i + 1] - bounds[i] for i in updating) <= bounds[-1]
        inputs = []
        for i, req_id in enumerate(requests.ids):
            rows = slice(bounds[i], bounds[i + 1])
            tokens = DrafterInput(first_positions[i], token_ids[rows], hidden_states[rows])
            if i in updating:
                inputs.append(self.backlog.take(req_id, tokens))
            else:
                if not most_wait:
                    # A copy, so that the features of the whole batch need not stay in memory.
                    tokens = replace(tokens, features=tokens.features.clone())
                self.backlog.put(req_id, tokens, cad.block_table_tensor[i], block_size)
        groups: list[list[int]] = []
        size = 0
        for i, tokens in enumerate(inputs):
            length = tokens.stop - tokens.start
            if not groups or size + length > self.max_num_tokens:
                groups.append([])
                size = 0
            groups[-1].append(i)
            size += length
        return [
            self._update(
                [inputs[i] for i in group],
                torch.tensor([requests.updating[i] for i in group]),
                cad,
            )
            for group in groups
        ]

    def _update(
        self, inputs: list[DrafterInput], requests: torch.Tensor, cad: CommonAttentionMetadata
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, CommonAttentionMetadata]:
        """One forward over `inputs` of the batch's `requests` ([n], on the host)."""
        lengths = torch.tensor([tokens.stop - tokens.start for tokens in inputs])
        start = torch.zeros(len(inputs) + 1, dtype=torch.int32)
        start[1:] = lengths.cumsum(0)
        assert cad.seq_lens_cpu_upper_bound is not None
        seq_lens = cad.seq_lens_cpu_upper_bound[requests]
        positions = self._upload(
            torch.cat([torch.arange(tokens.start, tokens.stop) for tokens in inputs])
        )
        owner = self._upload(torch.arange(len(inputs)).repeat_interleave(lengths))
        there = self._upload(requests)
        block_table, block_size = cad.block_table_tensor[there], self.block_size
        blocks = block_table[owner, positions // block_size].to(torch.int64)
        part = cad.replace(
            query_start_loc=self._upload(start),
            query_start_loc_cpu=start,
            seq_lens=cad.seq_lens[there],
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=len(inputs),
            num_actual_tokens=len(positions),
            max_query_len=int(lengths.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=block_table,
            slot_mapping=blocks * block_size + positions % block_size,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        token_ids = torch.cat([tokens.token_ids for tokens in inputs])
        return token_ids, positions, torch.cat([tokens.features for tokens in inputs]), part

    def _draft_trees(
        self,
        *,
        output: torch.Tensor,
        features: torch.Tensor,
        context_lens: torch.Tensor,
        block_table: torch.Tensor,
        roots: torch.Tensor,
        batch: DraftBatch,
    ) -> DraftForest:
        """Grow the trees of R requests.

        Args:
            output: [R, hidden], what the drafter's head reads for the first level.
            features: [R, hidden], what the children of the root take as hidden state.
            context_lens: [R] int32, tokens in the drafter's paged cache.
            block_table: [R, max blocks] int32.
            roots: [R] int32, the tokens that the trees grow from.
            batch: what the policy is told.
        """
        policy, device = self.policy, output.device
        num_requests = output.shape[0]
        capacity = max(1, (policy.max_depth - 1) * policy.max_frontier)
        scratch = DraftScratch(num_requests * capacity)
        words = num_mask_words(capacity)
        pool = CandidatePool.empty(num_requests, device)
        pool.roots = roots
        active = pool.active
        # Per candidate: the frontier row of the level above that it hangs under.
        level_parents = torch.zeros(0, dtype=torch.int64, device=device)
        # Per frontier row of the last expanded level: what it may see, and its features.
        seen = torch.zeros(num_requests, 1, words, dtype=torch.int64, device=device)
        above = features.unsqueeze(1)
        used = 0
        for depth in range(1, policy.max_depth + 1):
            expansion = policy.expand(depth, pool, batch)
            if expansion is None:
                break
            going = expansion.requests
            if going is not None and len(going) < len(active):
                kept = pool.on_device(torch.searchsorted(active, going))
                seen, above, active = seen[kept], above[kept], going
            if expansion.frontier is not None:
                level = pool.level(depth - 1)
                in_level = expansion.frontier - level.start
                width = in_level.shape[1]
                parents = level_parents[in_level]
                seen = seen.gather(1, parents.unsqueeze(2).expand(-1, -1, words)).clone()
                slots = torch.arange(used, used + width, device=device)
                seen[:, slots - used, slots // MASK_WORD_BITS] |= (
                    torch.ones_like(slots) << slots % MASK_WORD_BITS
                )
                used += width
                hidden = above.gather(1, parents.unsqueeze(2).expand(-1, -1, above.shape[2]))
                self.report.level_rows.append(len(active) * width)
                output, features = self._forward_level(
                    token_ids=pool.rows_of(active, pool.token_ids).gather(1, expansion.frontier),
                    hidden=hidden,
                    seen=seen,
                    first_rows=pool.on_device(active * capacity),
                    slots=slots,
                    num_slots=used,
                    positions=pool.rows_of(active, context_lens) - 1 + (depth - 1),
                    context_lens=pool.rows_of(active, context_lens),
                    block_table=pool.rows_of(active, block_table),
                    scratch=scratch,
                )
                above = features.view(len(active), width, -1)
            tokens, logprobs = self._top_tokens(output, policy.num_ranks)
            shape = (len(active), output.shape[0] // len(active), policy.num_ranks)
            level_parents = pool.grow(expansion, tokens.view(shape), logprobs.view(shape))
        forest = policy.select(pool, batch)
        self.report.pool = pool
        self.report.forest = forest
        self.report.probes = batch.probes
        return forest

    def _forward_level(
        self,
        *,
        token_ids: torch.Tensor,
        hidden: torch.Tensor,
        seen: torch.Tensor,
        first_rows: torch.Tensor,
        slots: torch.Tensor,
        num_slots: int,
        positions: torch.Tensor,
        context_lens: torch.Tensor,
        block_table: torch.Tensor,
        scratch: DraftScratch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One drafter forward over the frontier [A, W] of every active request.

        A frontier of more rows than the engine's largest batch runs in several forwards: rows of
        one level do not see each other. `first_rows` [A] is where each request's scratch rows
        begin, `slots` [W] where in them this level goes, `num_slots` how many are filled then.
        """
        num_requests, width = token_ids.shape
        step = max(1, self.max_num_tokens // width)
        outputs = []
        for start in range(0, num_requests, step):
            part = slice(start, min(start + step, num_requests))
            count = part.stop - part.start
            row_start = torch.arange(count + 1, dtype=torch.int32, device=slots.device) * width
            flat_positions = positions[part].to(torch.int64).repeat_interleave(width)
            flat_positions.clamp_(max=self.max_draft_len - 1)
            tree = TreeAttention(
                block_table=block_table[part],
                context_lens=context_lens[part],
                query_start=row_start[:-1],
                row_start=row_start,
                suffix_start=first_rows[part].to(torch.int32),
                suffix_len=torch.full_like(row_start[1:], num_slots),
                mask=seen[part].reshape(count * width, -1),
                positions=flat_positions,
                scratch=scratch,
                scratch_rows=(first_rows[part].unsqueeze(1) + slots).flatten(),
            )
            metadata = TreeAttentionMetadata(tree=tree, rest=None)
            outputs.append(
                self._forward(
                    token_ids[part].flatten().to(torch.int32),
                    flat_positions,
                    hidden[part].flatten(0, 1),
                    dict.fromkeys(self._draft_attn_layer_names, metadata),
                    None,  # Nothing goes to the paged cache.
                )
            )
        if len(outputs) == 1:
            return outputs[0]
        return torch.cat([o for o, _ in outputs]), torch.cat([f for _, f in outputs])

    def _forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        metadata: dict[str, Any] | None,
        slot_mapping: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the drafter on n rows; returns (what the head reads, what the next level reads), both
        [n, hidden]. `slot_mapping` [n] is where the rows go in the paged cache, None for nowhere.
        """
        n = token_ids.shape[0]
        # Without CUDA graphs the mode is NONE and there is no padding.
        mode, size, _ = self._determine_batch_execution_and_padding(n)
        slots = {}
        if mode is not CUDAGraphMode.NONE:
            # A graph reads what stood in these very buffers when it was captured.
            self.input_ids[:n] = token_ids
            self.positions[:n] = positions
            self.hidden_states[:n] = hidden_states
            token_ids, positions = self.input_ids[:size], self.positions[:size]
            hidden_states = self.hidden_states[:size]
            if slot_mapping is None:
                slot_mapping = self._slot_mapping_buffer[:size].fill_(PADDING_SLOT_ID)
            slots = self._get_slot_mapping(size, slot_mapping)
        elif slot_mapping is not None:
            size, slots = n, dict.fromkeys(self._draft_attn_layer_names, slot_mapping)
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=token_ids.shape[0],
            cudagraph_runtime_mode=mode,
            slot_mapping=slots,
        ):
            output, features = self.model(
                input_ids=token_ids,
                positions=positions,
                hidden_states=hidden_states,
                inputs_embeds=None,
            )
        if mode is not CUDAGraphMode.NONE:  # The next replay writes to the same place.
            return output[:n].clone(), features[:n].clone()
        return output, features

    def _top_tokens(self, output: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best tokens after each row and their log-probabilities, both [rows, k].

        Works in the draft vocabulary, across tensor-parallel ranks, and maps the winners to the
        target's vocabulary (`d2t`).
        """
        model = self.model
        ids, logprobs = model.logits_processor.get_top_k_tokens(
            model.lm_head, output, k, return_log_probs=True
        )
        offsets = model.draft_id_to_target_id
        return (ids if offsets is None else ids + offsets[ids]), logprobs
