# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""EAGLE-3 drafting of trees, level by level, for all requests of a batch at once.

The first forward brings the drafter's paged cache up to date with what the target committed, as
in vLLM's own EAGLE drafter. Each further forward expands one level: its rows are the frontier
nodes of every request, their keys and values go to a scratch buffer (`DraftScratch`), and they see
the committed context plus their own ancestors. A draft therefore leaves no trace in any cache.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.eagle import EagleProposer

from echo_vllm.engine.attention.cpu import TreeCPUAttentionMetadata
from echo_vllm.engine.attention.tree import (
    MASK_WORD_BITS,
    DraftScratch,
    TreeAttention,
    num_mask_words,
)
from echo_vllm.forest import DraftForest
from echo_vllm.policy import CandidatePool, DraftPolicy


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

    def dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """One forward: vLLM would run one a speculative token, as if the tree were a chain."""
        nodes, self.num_speculative_tokens = self.num_speculative_tokens, 1
        try:
            super().dummy_run(num_tokens, *args, **kwargs)
        finally:
            self.num_speculative_tokens = nodes

    def propose_forest(
        self,
        *,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        requests: torch.Tensor,
        common_attn_metadata: CommonAttentionMetadata,
    ) -> DraftForest:
        """Catch up with the committed tokens, then draft a forest.

        Args:
            token_ids: [n] int32, tokens that the target committed in this step.
            positions: [n] int64, their positions.
            hidden_states: [n, target features], the target's hidden states at these tokens.
            next_token_ids: [batch] int32, the token after each request's last one.
            requests: [R] int64, the requests of the batch that get a tree; may be empty.
            common_attn_metadata: of the n tokens, all requests of the batch.

        Returns:
            The forest that the policy selected, R trees.
        """
        cad = common_attn_metadata
        hidden_states = self.model.combine_hidden_states(hidden_states)
        num_tokens, last_rows, cad = self.set_inputs_first_pass(
            target_token_ids=token_ids,
            next_token_ids=next_token_ids,
            target_positions=positions.clamp(max=self.max_draft_len - 1),
            target_hidden_states=hidden_states,
            token_indices_to_sample=None,
            cad=cad,
            num_rejected_tokens_gpu=None,
        )
        _, metadata = self.build_per_group_and_layer_attn_metadata(cad)
        output, features = self._forward(
            self.input_ids[:num_tokens],
            self.positions[:num_tokens],
            self.hidden_states[:num_tokens],
            metadata,
            dict.fromkeys(self._draft_attn_layer_names, cad.slot_mapping),
        )
        if not len(requests):
            return DraftForest.empty(0)
        rows = last_rows.to(torch.int64)[requests]
        return self._draft_trees(
            output=output[rows],
            features=features[rows],
            context_lens=cad.seq_lens[requests],
            block_table=cad.block_table_tensor[requests],
        )

    def _draft_trees(
        self,
        *,
        output: torch.Tensor,
        features: torch.Tensor,
        context_lens: torch.Tensor,
        block_table: torch.Tensor,
    ) -> DraftForest:
        """Grow the trees of R requests.

        Args:
            output: [R, hidden], what the drafter's head reads for the first level.
            features: [R, hidden], what the children of the root take as hidden state.
            context_lens: [R] int32, tokens in the drafter's paged cache.
            block_table: [R, max blocks] int32.
        """
        policy = self.policy
        num_requests = output.shape[0]
        capacity = max(1, (policy.max_depth - 1) * policy.max_frontier)
        scratch = DraftScratch(num_requests * capacity)
        words = num_mask_words(capacity)
        first_row = torch.arange(num_requests) * capacity
        pool = CandidatePool.empty(num_requests)
        # Per candidate: the frontier row of the level above that it hangs under.
        level_parents = torch.zeros(0, dtype=torch.int64)
        # Per frontier row of the last expanded level: what it may see, and its features.
        seen = torch.zeros(num_requests, 1, words, dtype=torch.int64)
        above = features.unsqueeze(1)
        used = 0
        for depth in range(1, policy.max_depth + 1):
            expansion = policy.expand(depth, pool)
            if expansion.frontier is not None:
                level = pool.level(depth - 1)
                in_level = expansion.frontier - level.start
                width = in_level.shape[1]
                parents = level_parents[in_level]
                seen = seen.gather(1, parents.unsqueeze(2).expand(-1, -1, words)).clone()
                slots = torch.arange(used, used + width)
                seen[:, torch.arange(width), slots // MASK_WORD_BITS] |= (
                    torch.ones_like(slots) << slots % MASK_WORD_BITS
                )
                used += width
                hidden = above.gather(1, parents.unsqueeze(2).expand(-1, -1, above.shape[2]))
                output, features = self._forward_level(
                    token_ids=pool.token_ids.gather(1, expansion.frontier),
                    hidden=hidden,
                    seen=seen,
                    rows=first_row.unsqueeze(1) + slots,
                    suffix_len=used,
                    positions=context_lens - 1 + (depth - 1),
                    context_lens=context_lens,
                    block_table=block_table,
                    scratch=scratch,
                    capacity=capacity,
                )
                above = features.view(num_requests, width, -1)
            tokens, logprobs = self._top_tokens(output, policy.num_ranks)
            shape = (num_requests, output.shape[0] // num_requests, policy.num_ranks)
            level_parents = pool.grow(expansion, tokens.view(shape), logprobs.view(shape))
        return policy.select(pool)

    def _forward_level(
        self,
        *,
        token_ids: torch.Tensor,
        hidden: torch.Tensor,
        seen: torch.Tensor,
        rows: torch.Tensor,
        suffix_len: int,
        positions: torch.Tensor,
        context_lens: torch.Tensor,
        block_table: torch.Tensor,
        scratch: DraftScratch,
        capacity: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One drafter forward over the frontier [R, W] of every request.

        A frontier of more rows than the engine's largest batch runs in several forwards: rows of
        one level do not see each other.
        """
        num_requests, width = token_ids.shape
        step = max(1, self.max_num_tokens // width)
        outputs = []
        for start in range(0, num_requests, step):
            part = slice(start, min(start + step, num_requests))
            count = part.stop - part.start
            row_start = torch.arange(count + 1, dtype=torch.int32) * width
            flat_positions = positions[part].to(torch.int64).repeat_interleave(width)
            flat_positions.clamp_(max=self.max_draft_len - 1)
            tree = TreeAttention(
                block_table=block_table[part],
                context_lens=context_lens[part],
                query_start=row_start[:-1],
                row_start=row_start,
                suffix_start=torch.arange(part.start, part.stop, dtype=torch.int32) * capacity,
                suffix_len=torch.full((count,), suffix_len, dtype=torch.int32),
                mask=seen[part].reshape(count * width, -1),
                positions=flat_positions,
                scratch=scratch,
                scratch_rows=rows[part].flatten(),
            )
            metadata = TreeCPUAttentionMetadata(tree=tree, rest=None)
            outputs.append(
                self._forward(
                    token_ids[part].flatten().to(torch.int32),
                    flat_positions,
                    hidden[part].flatten(0, 1),
                    dict.fromkeys(self._draft_attn_layer_names, metadata),
                    {},  # Nothing goes to the paged cache.
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
        metadata: dict[str, Any],
        slot_mapping: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the drafter; returns (what the head reads, what the next level reads)."""
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=token_ids.shape[0],
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping=slot_mapping,
        ):
            output, features = self.model(
                input_ids=token_ids,
                positions=positions,
                hidden_states=hidden_states,
                inputs_embeds=None,
            )
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
