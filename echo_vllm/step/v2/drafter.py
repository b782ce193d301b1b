# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""EAGLE-3 drafting of trees on Model Runner V2, level by level, in shapes that the host knows.

vLLM's own first forward brings the drafter's paged cache up to date with what was accepted, over as
many rows as the target had: the accepted rows of a tree are moved to the front of its request's
rows first, so that what follows them is rejected, as in a chain. Every level is one forward over
the same number of frontier nodes for every request; its keys and values go to a scratch buffer.
The trees stay in their requests' slots.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator

from echo_vllm.policies import DraftBatch, DraftPolicy
from echo_vllm.step.attention.backend import TreeAttentionMetadata
from echo_vllm.step.attention.tree import (
    MASK_WORD_BITS,
    DraftScratch,
    TreeAttention,
    num_mask_words,
)
from echo_vllm.step.v2.state import ScheduledTrees, TreeSlots
from echo_vllm.trees.pool import CandidatePool


class TreeSpeculator(EagleSpeculator):
    """vLLM's EAGLE-3 speculator with a tree in place of the chain.

    Args:
        policy: one whose trees have a fixed size.
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
        self._output: torch.Tensor | None = None

    def sample_draft(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keep what the drafter's head reads for the first level; nothing is sampled here."""
        self._output = hidden_states
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
        *args: Any,
        dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Write every request's next tree into its slot; see vLLM's speculators for the arguments.

        Returns:
            [R, N] int64, the trees' tokens.
        """
        trees, self.verified = self.verified, None
        if not dummy_run:
            n = input_batch.num_tokens
            # The target's metadata may be that of trees, and the drafter's layers share it.
            attn_metadata = self.model_state.prepare_attn(
                input_batch,
                CUDAGraphMode.NONE,
                tuple(
                    table[: input_batch.num_reqs] for table in self.block_tables.input_block_tables
                ),
                self.block_tables.slot_mappings[:, :n],
                self.attn_groups,
                self.kv_cache_config,
            )
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
        wants_trees = not dummy_run and num_speculative_tokens != 0
        drafts = super().propose(
            input_batch,
            attn_metadata,
            slot_mappings,
            last_hidden_states,
            aux_hidden_states,
            num_sampled,
            num_rejected,
            last_sampled,
            *args,
            dummy_run=dummy_run,
            num_speculative_tokens=int(wants_trees or dummy_run),
            **kwargs,
        )
        if not wants_trees:
            return drafts
        assert self._output is not None
        num_reqs = input_batch.num_reqs
        token_ids, parents = self._grow_trees(
            output=self._output,
            features=self.hidden_states[:num_reqs].clone(),
            context_lens=input_batch.seq_lens[:num_reqs] - num_rejected,
        )
        self.slots.parents[input_batch.idx_mapping, : parents.shape[1]] = parents
        drafts[:, : token_ids.shape[1]] = token_ids
        return drafts

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

    def _grow_trees(
        self, *, output: torch.Tensor, features: torch.Tensor, context_lens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Grow the trees of R requests.

        Args:
            output: [R, hidden], what the drafter's head reads for the first level.
            features: [R, hidden], what the children of the root take as hidden state.
            context_lens: [R] int32, tokens in the drafter's paged cache.

        Returns:
            tokens [R, n] int64 and parents [R, n] int32, parents first.
        """
        policy, device = self.policy, output.device
        num_reqs = output.shape[0]
        batch = DraftBatch.of(num_reqs)
        capacity = max(1, (policy.max_depth - 1) * policy.max_frontier)
        scratch = DraftScratch(num_reqs * capacity)
        words = num_mask_words(capacity)
        first_rows = torch.arange(num_reqs, device=device) * capacity
        pool = CandidatePool.empty(num_reqs, device, compacts=False)
        level_parents = torch.zeros(0, dtype=torch.int64, device=device)
        seen = torch.zeros(num_reqs, 1, words, dtype=torch.int64, device=device)
        above = features.unsqueeze(1)
        used = 0
        for depth in range(1, policy.max_depth + 1):
            expansion = policy.expand(depth, pool, batch)
            if expansion is None:
                break
            if expansion.frontier is not None:
                in_level = expansion.frontier - pool.level(depth - 1).start
                width = in_level.shape[1]
                parents = level_parents[in_level]
                seen = seen.gather(1, parents.unsqueeze(2).expand(-1, -1, words)).clone()
                slots = torch.arange(used, used + width, device=device)
                seen[:, slots - used, slots // MASK_WORD_BITS] |= (
                    torch.ones_like(slots) << slots % MASK_WORD_BITS
                )
                used += width
                output, below = self._forward_level(
                    token_ids=pool.token_ids.gather(1, expansion.frontier),
                    hidden=above.gather(1, parents.unsqueeze(2).expand(-1, -1, above.shape[2])),
                    seen=seen,
                    first_rows=first_rows,
                    slots=slots,
                    num_slots=used,
                    depth=depth,
                    context_lens=context_lens,
                    scratch=scratch,
                )
                above = below.view(num_reqs, width, -1)
            tokens, logprobs = self._top_tokens(output, policy.num_ranks)
            shape = (num_reqs, output.shape[0] // num_reqs, policy.num_ranks)
            level_parents = pool.grow(expansion, tokens.view(shape), logprobs.view(shape))
        return pool.tree_of(policy.columns(pool))

    def _forward_level(
        self,
        *,
        token_ids: torch.Tensor,
        hidden: torch.Tensor,
        seen: torch.Tensor,
        first_rows: torch.Tensor,
        slots: torch.Tensor,
        num_slots: int,
        depth: int,
        context_lens: torch.Tensor,
        scratch: DraftScratch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One drafter forward over the frontier [R, W]; see `_grow_trees`."""
        num_reqs, width = token_ids.shape
        row_start = torch.arange(num_reqs + 1, dtype=torch.int32, device=slots.device) * width
        positions = context_lens.to(torch.int64) - 1 + (depth - 1)
        positions = positions.clamp(max=self.max_model_len - 1).repeat_interleave(width)
        metadata: dict[str, Any] = {}
        for gid, groups in enumerate(self.attn_groups):
            tree = TreeAttention(
                block_table=self.block_tables.input_block_tables[gid][:num_reqs],
                context_lens=context_lens,
                query_start=row_start[:-1],
                row_start=row_start,
                suffix_start=first_rows.to(torch.int32),
                suffix_len=torch.full_like(row_start[1:], num_slots),
                mask=seen.reshape(num_reqs * width, -1),
                positions=positions,
                scratch=scratch,
                scratch_rows=(first_rows.unsqueeze(1) + slots).flatten(),
            )
            for group in groups:
                of_group = TreeAttentionMetadata(tree=tree, rest=None)
                metadata |= dict.fromkeys(group.layer_names, of_group)
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=num_reqs * width,
            slot_mapping={},  # Nothing goes to the paged cache.
        ):
            output, features = self.model(
                input_ids=token_ids.flatten().to(torch.int32),
                positions=positions,
                hidden_states=hidden.flatten(0, 1),
                inputs_embeds=None,
            )
        return output, features

    def _top_tokens(self, output: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best tokens after each row, in the target's vocabulary, and their
        log-probabilities, both [rows, k]."""
        model = self.model
        ids, logprobs = model.logits_processor.get_top_k_tokens(
            model.lm_head, output, k, return_log_probs=True
        )
        offsets = model.draft_id_to_target_id
        return (ids if offsets is None else ids + offsets[ids]), logprobs
