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

import numpy as np
import torch

from echo_vllm import ops
from echo_vllm.policies import DraftPolicy, make_policy
from echo_vllm.startup.profiles import find_profile
from echo_vllm.step.attention.tree import VerificationRows, num_mask_words
from echo_vllm.transfer import upload

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def fixed_policy(vllm_config: VllmConfig) -> DraftPolicy:
    """The engine's policy, whose trees have a fixed size: start-up lets no other through."""
    spec = vllm_config.speculative_config
    assert spec is not None
    profile = find_profile(spec.echo, spec.model)
    return make_policy(spec.echo, spec.num_speculative_tokens, profile)


class TreeSlots:
    """What vLLM's `req_states.draft_tokens` does not hold of a request's draft.

    Attributes:
        parents: [max_reqs, N] int32, index of each node's parent in the same row, -1 for the root;
            a parent stands before its children, so every prefix of a row is a tree.
    """

    def __init__(self, max_reqs: int, num_nodes: int, device: torch.device) -> None:
        self.parents = torch.full((max_reqs, num_nodes), -1, dtype=torch.int32, device=device)


@dataclass
class ScheduledTrees:
    """The trees of one batch, whose requests with drafts come first.

    Attributes:
        num_trees: T, the requests with drafts.
        token_ids: [K] int64, of all nodes.
        parents: [K] int32.
        cu_nodes: [R + 1] int32, over all requests of the batch.
        rows: how attention sees them; None where all of them are chains, which are causal.
        causal_positions: [rows], the positions that the trees' rows have by their order.
        accepted_rows: [R, D + 1] int32, as of `ops.accept_path`; set when the batch was verified.
    """

    num_trees: int
    token_ids: torch.Tensor
    parents: torch.Tensor
    cu_nodes: torch.Tensor
    rows: VerificationRows | None = None
    causal_positions: torch.Tensor | None = None
    accepted_rows: torch.Tensor | None = None


def scheduled_trees(
    slots: TreeSlots,
    draft_tokens: torch.Tensor,
    request_slots: torch.Tensor,
    num_nodes: np.ndarray,
    *,
    are_chains: bool,
) -> ScheduledTrees:
    """The trees that a batch verifies; nothing waits for the device.

    Args:
        slots: of all requests.
        draft_tokens: [max_reqs, N] int64, vLLM's.
        request_slots: [R] int64, slot of each request of the batch.
        num_nodes: [R], nodes that each request got rows for; on the host, those above 0 first.
        are_chains: whether every tree is a chain.
    """
    device = request_slots.device
    num_requests, num_trees = len(num_nodes), int((num_nodes > 0).sum())
    cu_nodes = np.zeros(num_requests + 1, dtype=np.int32)
    np.cumsum(num_nodes, out=cu_nodes[1:])
    total = int(cu_nodes[-1])
    owner = np.repeat(np.arange(num_requests), num_nodes)
    place = np.arange(total) - cu_nodes[owner]
    packed = upload(torch.from_numpy(np.concatenate([owner, place, cu_nodes])), device)
    owner_there, place_there, bounds = packed.split([total, total, num_requests + 1])
    slot = request_slots[owner_there]
    trees = ScheduledTrees(
        num_trees=num_trees,
        token_ids=draft_tokens[slot, place_there],
        parents=slots.parents[slot, place_there],
        cu_nodes=bounds.to(torch.int32),
    )
    if not are_chains:
        bounds = trees.cu_nodes[: num_trees + 1]
        words = num_mask_words(1 + int(num_nodes.max()))
        mask, depths = ops.build_super_tree(trees.parents, bounds, words)
        row_start = bounds + torch.arange(num_trees + 1, dtype=torch.int32, device=device)
        trees.rows = VerificationRows(num_trees, total + num_trees, row_start, depths, mask)
    return trees
