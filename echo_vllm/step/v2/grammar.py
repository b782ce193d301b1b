# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Trees of requests with a grammar, which go to the scheduler and come back as it allows them.

A grammar lives in the scheduler's process, so these trees alone come to the host: tokens and
parents, copied behind the drafting while the step's tokens are on their way. The scheduler follows
them when it has the tokens that they grow from (`step/grammar.py`), and what comes back goes to the
slots before the target reads them: what the grammar forbids is never verified, and what it forces
is, as far as the request's placeholders go. So a batch with such a tree begins where its masks are
there, asynchronously too. A batch without one waits for nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.async_utils import async_copy_to_np
from vllm.v1.worker.gpu.input_batch import InputBatch

from echo_vllm.step.grammar import FORCED, AllowedTree
from echo_vllm.step.v2.state import TreeSlots
from echo_vllm.transfer import upload
from echo_vllm.trees.forest import ROOT
from echo_vllm.trees.pool import NO_CANDIDATE
from echo_vllm.trees.ranked import FILLER_TIER, RankedTrees

Drafted = tuple[list[int], list[int]]
"""A tree's tokens and parents."""


def tell_followed(
    scheduler_output: SchedulerOutput, drafted: Collection[str], scheduled: Collection[str]
) -> None:
    """Attach which requests with a grammar are drafted for at the end of a step, and which of its
    batch have placeholders."""
    scheduler_output.echo_followed = drafted
    scheduler_output.echo_awaited = scheduled


def followed_of(scheduler_output: SchedulerOutput) -> Collection[str]:
    """The requests whose new trees the scheduler wants to see; vLLM's warm-up has none."""
    return getattr(scheduler_output, "echo_followed", ())


def awaits_trees(scheduler_output: SchedulerOutput) -> bool:
    """Whether a batch has trees that a grammar has to allow first."""
    return bool(getattr(scheduler_output, "echo_awaited", ()))


def attach_trees(output: GrammarOutput, trees: Mapping[str, AllowedTree]) -> None:
    """Send what grammars have left of trees with the masks of their nodes."""
    output.echo_trees = trees


def trees_of(output: GrammarOutput | None) -> Mapping[str, AllowedTree]:
    """What came with a batch's masks."""
    return getattr(output, "echo_trees", {})


def drafted_of(draft_token_ids: DraftTokenIds) -> Mapping[str, Drafted]:
    """The trees that came to the scheduler with a step's drafts."""
    return getattr(draft_token_ids, "echo_trees", {})


class TreesToHost:
    """In the place of vLLM's handler of drafts, which copies those of a whole batch.

    Args:
        slots: of all requests.
        device: where they are.
    """

    def __init__(self, slots: TreeSlots, device: torch.device) -> None:
        self.followed: Collection[str] = ()
        """Set by the runner, of the step that drafts."""
        self._slots, self._device = slots, device
        self._copy_stream = torch.cuda.Stream(device)
        self._arrived = torch.cuda.Event(blocking=True)
        self._req_ids: list[str] = []
        self._num_drafts = 0
        self._names: list[str] = []

    def set_draft_tokens(self, input_batch: InputBatch, draft_tokens: torch.Tensor) -> None:
        """Begin to copy the trees of those that are followed.

        Args:
            input_batch: of the step that has drafted.
            draft_tokens: [R, n] int64, the tokens of all its requests' trees.
        """
        self._req_ids, self._num_drafts = input_batch.req_ids, draft_tokens.shape[1]
        places = [i for i, req_id in enumerate(self._req_ids) if req_id in self.followed]
        self._names = [self._req_ids[i] for i in places]
        if not places:
            return
        rows = upload(torch.tensor(places), draft_tokens.device)
        slots = input_batch.idx_mapping[rows].to(torch.int64)
        # Kept, as the copy reads them on another stream.
        self._there = torch.cat(
            [
                self._slots.sizes[slots].unsqueeze(1).to(torch.int64),
                draft_tokens[rows],
                self._slots.parents[slots, : self._num_drafts].to(torch.int64),
            ],
            dim=1,
        )
        self._copy_stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copy_stream):
            self._here = async_copy_to_np(self._there)
            self._arrived.record()

    def get_draft_tokens(self) -> DraftTokenIds:
        """Placeholders for everybody, and the trees of those that are followed."""
        n = self._num_drafts
        drafts = DraftTokenIds(self._req_ids, [[-1] * n for _ in self._req_ids])
        if self._names:
            self._arrived.synchronize()
            drafts.echo_trees = {
                name: (row[1 : 1 + size].tolist(), row[1 + n : 1 + n + size].tolist())
                for name, row, size in zip(
                    self._names, self._here, self._here[:, 0].tolist(), strict=True
                )
            }
        return drafts


def write_allowed(
    slots: TreeSlots,
    draft_tokens: torch.Tensor,
    places: Sequence[int],
    trees: Sequence[AllowedTree],
) -> None:
    """Put what grammars allow where it was drafted; nothing waits for the device.

    What is forced is served with the node that it hangs under, and first of all under the root.

    Args:
        slots: of all requests.
        draft_tokens: [max_reqs, N] int64, vLLM's.
        places: the slots of G requests.
        trees: of these, at most N nodes each.
    """
    device, n = draft_tokens.device, draft_tokens.shape[1]
    told = np.zeros((len(trees), 1 + 4 * n), np.int64)
    for row, place, tree in zip(told, places, trees, strict=True):
        anchors: list[int] = []  # The drafted node that each node is or hangs under.
        depths: list[int] = []
        for node, parent in zip(tree.nodes, tree.parents, strict=True):
            is_rooted = parent == ROOT
            anchors.append(node if node != FORCED else ROOT if is_rooted else anchors[parent])
            depths.append(1 if is_rooted else 1 + depths[parent])
        row[0] = place
        for i, values in enumerate((anchors, depths, tree.token_ids, tree.parents)):
            row[1 + i * n :][: len(values)] = values
    of_slots, *parts = upload(torch.from_numpy(told), device).split([1, n, n, n, n], dim=1)
    anchor, depth, token_ids, parents = parts
    slot = of_slots.squeeze(1)
    source, is_rooted, is_behind = anchor.clamp(min=0), anchor == ROOT, depth == 0

    def inherited(held: torch.Tensor, of_rooted: float, behind: Any) -> torch.Tensor:
        values = held[slot].gather(1, source).masked_fill(is_rooted, of_rooted)
        return values.masked_fill(is_behind, behind)

    slots.write(
        slot,
        RankedTrees(
            token_ids=token_ids,
            parents=parents.masked_fill(is_behind, ROOT).to(torch.int32),
            tiers=inherited(slots.tiers, 0, FILLER_TIER),
            scores=inherited(slots.scores, torch.finfo(torch.float32).max, 0),
            depths=depth.to(torch.int32),
            path_logprobs=inherited(slots.path_logprobs, 0.0, NO_CANDIDATE),
            columns=source,
        ),
    )
    draft_tokens[slot] = token_ids
