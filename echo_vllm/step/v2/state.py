# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The trees of all requests on the device, and those of one scheduled batch.

The drafter writes a request's tree into its slot at the end of a step; the runner reads as much of
it as the scheduler gave rows to, one or two schedulings later. The host knows how many nodes each
request has in a step, never which ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from echo_vllm import ops
from echo_vllm.policies import DraftPolicy, make_policy
from echo_vllm.startup.profiles import find_profile
from echo_vllm.step.attention.tree import MASK_WORD_BITS, VerificationRows, num_mask_words
from echo_vllm.trees.forest import ROOT
from echo_vllm.trees.pool import NO_CANDIDATE
from echo_vllm.trees.ranked import FILLER_TIER, RankedTrees

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.input_batch import InputBatch

NO_TOKEN = -1
"""What no target ever samples, so that a row with it is never accepted."""


def policy_of(vllm_config: VllmConfig) -> DraftPolicy:
    """The engine's policy."""
    spec = vllm_config.speculative_config
    assert spec is not None
    profile = find_profile(spec.echo, spec.model)
    return make_policy(spec.echo, spec.num_speculative_tokens, profile)


class TreeSlots:
    """What vLLM's `req_states.draft_tokens` does not hold of a request's draft.

    Attributes:
        parents: [max_reqs, N] int32, index of each node's parent in the same row, ROOT for the
            root; a parent stands before its children, so every prefix of a row is a tree.
        tiers, scores: [max_reqs, N] int32 and float32, by which nodes are served.
        depths, path_logprobs: [max_reqs, N] int32 and float32, of each node; see `RankedTrees`.
        sizes: [max_reqs] int32, nodes of each tree; what follows them may fill a batch up.
    """

    def __init__(self, max_reqs: int, num_nodes: int, device: torch.device) -> None:
        shape = max_reqs, num_nodes
        self.parents = torch.full(shape, ROOT, dtype=torch.int32, device=device)
        self.tiers = torch.full(shape, FILLER_TIER, dtype=torch.int32, device=device)
        self.scores = torch.zeros(shape, dtype=torch.float32, device=device)
        self.depths = torch.zeros(shape, dtype=torch.int32, device=device)
        self.path_logprobs = torch.full(shape, NO_CANDIDATE, device=device)
        self.sizes = torch.zeros(max_reqs, dtype=torch.int32, device=device)

    def write(self, slots: torch.Tensor, trees: RankedTrees) -> None:
        """The new trees of the requests in `slots` [R] int64."""
        n = trees.parents.shape[1]
        for held, new, behind in (
            (self.parents, trees.parents, ROOT),
            (self.tiers, trees.tiers, FILLER_TIER),
            (self.scores, trees.scores, 0),
            (self.depths, trees.depths, 0),
            (self.path_logprobs, trees.path_logprobs, NO_CANDIDATE),
        ):
            held[slots, :n] = new
            held[slots, n:] = behind
        self.sizes[slots] = trees.sizes


class VerificationBuffers:
    """Where the target's forward finds a batch's trees: always at the same addresses, which is what
    a CUDA graph keeps. The rows of each request are vLLM's `query_start_loc`.

    Attributes:
        mask: [max_rows, W] int64, W words for the largest tree there can be.
    """

    def __init__(self, max_rows: int, num_nodes: int, device: torch.device) -> None:
        words = num_mask_words(1 + num_nodes)
        self.mask = torch.zeros(max_rows, words, dtype=torch.int64, device=device)
        seen = torch.arange(1, 2 + num_nodes, device=device).unsqueeze(1)
        seen = (seen - MASK_WORD_BITS * torch.arange(words, device=device)).clamp(0, MASK_WORD_BITS)
        low = (1 << seen.clamp(max=MASK_WORD_BITS - 1)) - 1
        self._causal = low.masked_fill(seen == MASK_WORD_BITS, -1)

    def hold(
        self, mask: torch.Tensor, depths: torch.Tensor, row_start: torch.Tensor, num_rows: int
    ) -> VerificationRows:
        """The rows of a batch.

        Args:
            mask, depths: [n, W] int64 and [n] int32, of the rows that there are.
            row_start: [R + 1] int32, vLLM's, of the requests whose rows these are, and of padding
                without rows behind them.
            num_rows: n and padding, which no request has.
        """
        self.mask[: len(mask)].copy_(mask)
        return VerificationRows(
            len(row_start) - 1, num_rows, row_start, depths, self.mask[:num_rows]
        )

    def hold_roots(self, row_start: torch.Tensor, num_rows: int) -> VerificationRows:
        """As `hold`, of requests that have no tree, or of those that vLLM invents: all rows may see
        their request's first one."""
        mask = self.mask[:num_rows]
        mask.zero_()
        mask[:, 0] = 1
        return VerificationRows(len(row_start) - 1, num_rows, row_start, row_start[:0], mask)

    def hold_chains(self, row_start: torch.Tensor, num_rows: int) -> VerificationRows:
        """As `hold`, of requests whose rows see all that their request has up to themselves."""
        rows = torch.arange(num_rows, dtype=torch.int32, device=row_start.device)
        owner = torch.searchsorted(row_start[1:-1], rows, right=True)
        local = (rows - row_start[owner]).clamp(max=len(self._causal) - 1)
        mask = self.mask[:num_rows].copy_(self._causal[local])
        return VerificationRows(len(row_start) - 1, num_rows, row_start, row_start[:0], mask)


@dataclass
class ScheduledTrees:
    """The trees of one batch, whose requests with drafts come first.

    Attributes:
        num_trees: T, the requests with drafts; where they share a budget some may have no node.
        token_ids: [K] int64, of all nodes; NO_TOKEN in rows that only fill the batch up.
        parents, depths, path_logprobs: [K] int32, int32 and float32.
        cu_nodes: [R + 1] int32, over all requests of the batch.
        rows: how attention sees them; None where all of them are chains, which are causal.
        causal_positions: [rows], the positions that the trees' rows have by their order.
        accepted_rows: [R, D + 1] int32, as of `ops.accept_path`; set when the batch was verified.
        notes: of the verification, for the policy of the scheduler's process.
        drawn_notes: the same of drawn candidates.
    """

    num_trees: int
    token_ids: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    path_logprobs: torch.Tensor
    cu_nodes: torch.Tensor
    rows: VerificationRows | None = None
    causal_positions: torch.Tensor | None = None
    accepted_rows: torch.Tensor | None = None
    notes: tuple[torch.Tensor, ...] = ()
    drawn_notes: tuple[torch.Tensor, ...] = ()


def scheduled_trees(
    slots: TreeSlots,
    buffers: VerificationBuffers,
    draft_tokens: torch.Tensor,
    batch: InputBatch,
    *,
    are_causal: bool,
    in_graph: bool,
) -> ScheduledTrees:
    """The trees that a batch verifies; nothing waits for the device.

    Args:
        slots: of all requests.
        buffers: that the batch's rows are written to.
        draft_tokens: [max_reqs, N] int64, vLLM's.
        batch: whose host says how many nodes there are in all, and whose device says how many each
            request has.
        are_causal: whether every tree is a chain, which stock attention sees as it is.
        in_graph: whether the batch runs in a full graph with trees. Then all its requests count as
            trees, those of a root alone too, and its padding belongs to them.
    """
    assert batch.num_draft_tokens_per_req is not None
    device = draft_tokens.device
    total = batch.num_draft_tokens
    num_trees = int((batch.num_draft_tokens_per_req > 0).sum())
    # Every request samples one token more than it has nodes.
    bounds = torch.arange(batch.num_reqs + 1, dtype=torch.int32, device=device)
    cu_nodes = batch.cu_num_logits - bounds
    sizes = cu_nodes.diff()
    slot = batch.idx_mapping.repeat_interleave(sizes, output_size=total)
    start = cu_nodes[:-1].repeat_interleave(sizes, output_size=total)
    place = torch.arange(total, device=device) - start
    trees = ScheduledTrees(
        num_trees=num_trees,
        token_ids=draft_tokens[slot, place].masked_fill(place >= slots.sizes[slot], NO_TOKEN),
        parents=slots.parents[slot, place],
        depths=slots.depths[slot, place],
        path_logprobs=slots.path_logprobs[slot, place],
        cu_nodes=cu_nodes,
    )
    if are_causal:
        return trees
    seen = batch.num_reqs if in_graph else num_trees
    mask, depths = ops.build_super_tree(trees.parents, cu_nodes[: seen + 1], buffers.mask.shape[1])
    if in_graph:
        row_start, num_rows = batch.query_start_loc, batch.num_tokens_after_padding
    else:
        row_start, num_rows = batch.query_start_loc[: seen + 1], total + seen
    trees.rows = buffers.hold(mask, depths, row_start, num_rows)
    return trees
