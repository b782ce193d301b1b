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

from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.policies import DraftBatch, DraftPolicy
from echo_vllm.step.attention.backend import TreeAttentionMetadata
from echo_vllm.step.frontier import Frontier, LevelRows
from echo_vllm.step.v2.state import ScheduledTrees, TreeSlots
from echo_vllm.trees.pool import CandidatePool
from echo_vllm.trees.ranked import RankedTrees


class TreeSpeculator(EagleSpeculator):
    """vLLM's EAGLE-3 speculator with a tree in place of the chain.

    Args:
        policy: one that runs unseen.
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
        """Set by the runner, of the step that drafts."""
        self.draft_token_confidence_probs: torch.Tensor | None = None
        """vLLM's runner hands it to `TreeBudget`, which has the scores in the slots."""
        self.drafted: RankedTrees | None = None
        """Of the step that has just drafted; the runner takes it."""
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
        # A rest catches up as well, so that the drafter's cache never has holes.
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
            num_speculative_tokens=1,
            **kwargs,
        )
        if not wants_trees:
            return drafts
        assert self._output is not None
        num_reqs = input_batch.num_reqs
        ranked = self._grow_trees(
            output=self._output,
            features=self.hidden_states[:num_reqs].clone(),
            context_lens=input_batch.seq_lens[:num_reqs] - num_rejected,
            are_read=num_sampled > 0,
        )
        self.slots.write(input_batch.idx_mapping, ranked)
        num_places = ranked.token_ids.shape[1]
        drafts[:, :num_places] = ranked.token_ids
        drafts[:, num_places:] = 0  # vLLM marks what it does not use with -1, which is no token.
        self.drafted = ranked
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
        self,
        *,
        output: torch.Tensor,
        features: torch.Tensor,
        context_lens: torch.Tensor,
        are_read: torch.Tensor,
    ) -> RankedTrees:
        """Grow the trees of R requests.

        Args:
            output: [R, hidden], what the drafter's head reads for the first level.
            features: [R, hidden], what the children of the root take as hidden state.
            context_lens: [R] int32, tokens in the drafter's paged cache.
            are_read: [R] bool, whether a request's prompt was read to its end; the others have no
                candidates and take nothing of what a policy shares out.
        """
        policy, frontier = self.policy, Frontier(features, self.policy)
        pool = CandidatePool.empty(len(output), output.device, compacts=False)
        batch = DraftBatch(len(output), len(output), self.plan)
        for depth, expansion, requests in policy.levels(pool, batch):
            if expansion.frontier is None:
                expansion = replace(expansion, going=are_read)
            else:
                output = self._expand_level(
                    frontier,
                    frontier.advance(pool.rows_above(expansion.frontier)),
                    pool.token_ids.gather(1, expansion.frontier),
                    depth,
                    context_lens,
                )
            tokens, logprobs = self._top_tokens(output, policy.num_ranks)
            shape = (len(requests), frontier.width, policy.num_ranks)
            pool.grow(expansion, tokens.view(shape), logprobs.view(shape))
        return policy.ranked(pool)

    def _expand_level(
        self,
        frontier: Frontier,
        level: LevelRows,
        token_ids: torch.Tensor,
        depth: int,
        context_lens: torch.Tensor,
    ) -> torch.Tensor:
        """One drafter forward over a level of `token_ids` [R, W]; see `_grow_trees`."""
        num_reqs, width = token_ids.shape
        positions = context_lens.to(torch.int64) - 1 + (depth - 1)
        positions = positions.clamp(max=self.max_model_len - 1).repeat_interleave(width)
        metadata: dict[str, Any] = {}
        for gid, groups in enumerate(self.attn_groups):
            tree = level.attention(
                block_table=self.block_tables.input_block_tables[gid][:num_reqs],
                context_lens=context_lens,
                positions=positions,
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
                hidden_states=level.hidden.flatten(0, 1),
                inputs_embeds=None,
            )
        frontier.ran(features)
        return output

    def _top_tokens(self, output: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best tokens after each row, in the target's vocabulary, and their
        log-probabilities, both [rows, k]."""
        model = self.model
        ids, logprobs = model.logits_processor.get_top_k_tokens(
            model.lm_head, output, k, return_log_probs=True
        )
        offsets = model.draft_id_to_target_id
        return (ids if offsets is None else ids + offsets[ids]), logprobs
