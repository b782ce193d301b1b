# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Drawn candidates on Model Runner V2 (docs/drawn.md): drawn, kept and verified on the device.

What a tree was drawn from stays until its verification, in memory that is there from the start and
has seats for so many requests; who comes when all are taken keeps the best candidates. Whatever
else changes a request's distribution makes no difference: the target's logits have been edited
along every path before anything is rejected.
Verification runs where vLLM samples: the rows of a walked path get the tokens that recursive
rejection says, and whatever comes behind, log-probabilities and the walk itself, takes these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.states import SamplingStates

from echo_vllm import ops
from echo_vllm.config import Candidates
from echo_vllm.policies import DraftBatch, DraftPolicy
from echo_vllm.step.drawn import all_drawn, draw_level, is_drawn, places_of
from echo_vllm.step.frontier import Frontier
from echo_vllm.step.v2.state import ScheduledTrees, TreeSlots
from echo_vllm.transfer import upload
from echo_vllm.trees.drawn import DrawnPool
from echo_vllm.trees.draws import Sampling, Stream, root_keys, uniforms
from echo_vllm.trees.forest import ROOT
from echo_vllm.trees.ranked import RankedTrees

if TYPE_CHECKING:
    from echo_vllm.step.v2.drafter import Roots, TreeSpeculator


NO_SEAT = -1

MOST_BYTES = 1 << 30
"""Of all q that are kept."""


class DrawnSlots:
    """What the trees of all requests were drawn from, and the numbers that decide about them.

    Args:
        policy: whose trees they are.
        candidates: of the `echo` section.
        states: vLLM's, of the requests' parameters and seeds.
        vocab: tokens of the target.
        draft_vocab: of the drafter.
        draft_offsets: from these to those, as `draw_level` takes them.

    Attributes:
        probs: [seats * rows, V_draft] float32, q of every parent that a tree may have; some rows
            for each request that has a seat.
    """

    def __init__(
        self,
        policy: DraftPolicy,
        candidates: Candidates,
        states: SamplingStates,
        *,
        vocab: int,
        draft_vocab: int,
        draft_offsets: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        max_reqs, places = states.max_num_reqs, 1 + policy.max_nodes
        self._policy, self._candidates = policy, candidates
        self._states = states
        self._num_rows = 1 + (policy.max_depth - 1) * policy.max_frontier
        num_seats = max(1, min(max_reqs, MOST_BYTES // (4 * self._num_rows * draft_vocab)))
        self._seats = np.full(max_reqs, NO_SEAT)
        """Of the request in each slot."""
        self._free = list(range(num_seats))
        self.probs = torch.zeros(num_seats * self._num_rows, draft_vocab, device=device)
        self._draft_rows = torch.full((max_reqs, places), -1, dtype=torch.int32, device=device)
        self._uniforms = torch.zeros(max_reqs, places, dtype=torch.float64, device=device)
        self.draft_offsets = draft_offsets
        self._draft_ids = None if draft_offsets is None else places_of(draft_offsets, vocab)

    def begin(self, slot: int, params: SamplingParams) -> None:
        """A request with these parameters takes a slot."""
        self.end(slot)
        if self._free and is_drawn(params, self._candidates):
            self._seats[slot] = self._free.pop()

    def end(self, slot: int) -> None:
        """The request in a slot, if there is one, goes."""
        if self._seats[slot] != NO_SEAT:
            self._free.append(int(self._seats[slot]))
            self._seats[slot] = NO_SEAT

    def draws(self, slots: NDArray[np.int32]) -> NDArray[np.bool_]:
        """[R] bool, whose candidates are drawn, of the requests in `slots` [R]."""
        found: NDArray[np.bool_] = self._seats[slots] != NO_SEAT
        return found

    def first_rows(self, slots: NDArray[np.int32]) -> torch.Tensor:
        """[R] int64, on the device, where in `probs` the rows of the requests in `slots` [R] begin,
        who all draw."""
        first = torch.from_numpy(self._seats[slots] * self._num_rows)
        return upload(first, self.probs.device)

    def sampling(self, slots: torch.Tensor, slots_np: NDArray[np.int32]) -> Sampling:
        """The parameters of the requests in `slots` [R], on both sides."""
        states = self._states
        top_k, top_p = states.top_k.np[slots_np], states.top_p.np[slots_np]
        is_truncated = (top_k != states.vocab_size) | (top_p != 1)

        def given(values: Any, neutral: float) -> torch.Tensor | None:
            if (values.np[slots_np] == neutral).all():
                return None
            own: torch.Tensor = values.gpu[slots]
            return own

        limit = given(states.top_k, states.vocab_size)
        return Sampling(
            given(states.temperature, 1),
            None if limit is None else limit.to(torch.int64),
            given(states.top_p, 1),
            given(states.min_p, 0),
            torch.from_numpy(is_truncated),
        )

    def keys(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[n] int64, of the roots at `positions` [n] of the requests in `slots` [n]."""
        return root_keys(self._states.seeds.gpu[slots], positions.to(torch.int64) + 1)

    def keep(self, rows: torch.Tensor, probs: torch.Tensor) -> None:
        """q of a level, `probs` [A * W, V_draft], whose requests have it from `rows` [A] on."""
        places = torch.arange(len(probs) // len(rows), device=rows.device)
        self.probs.index_copy_(0, (rows.unsqueeze(1) + places).flatten(), probs)

    def write(
        self,
        slots: torch.Tensor,
        slots_np: NDArray[np.int32],
        pool: DrawnPool,
        trees: RankedTrees,
    ) -> None:
        """The new trees of the requests in `slots` [R], on both sides, made of a pool."""
        rows, numbers = pool.deciding(trees)
        n = rows.shape[1]
        first = self.first_rows(slots_np).to(torch.int32).unsqueeze(1)
        self._draft_rows[slots, :n] = torch.where(rows < 0, -1, rows + first)
        self._draft_rows[slots, n:] = -1
        self._uniforms[slots, :n] = numbers

    def verified(
        self,
        logits: torch.Tensor,
        sampled: torch.Tensor,
        batch: InputBatch,
        trees: ScheduledTrees,
        slots: TreeSlots,
    ) -> torch.Tensor:
        """Recursive rejection along the trees of drawn candidates; nothing waits.

        Args:
            logits: [L, V], what tokens are drawn from: after everything that edits it. Rows of a
                request: root, then its nodes.
            sampled: [L] int64, drawn from them.
            batch, trees: whose rows they are.
            slots: of all requests.

        Returns:
            [L] int64: `sampled`, but on the path of every such tree the tokens that come out.
        """
        device, slot = logits.device, batch.expanded_idx_mapping
        num_rows, num_reqs = len(logits), len(batch.idx_mapping)
        sizes, first_node = trees.cu_nodes.diff(), trees.cu_nodes[:-1].to(torch.int64)
        draws = upload(torch.from_numpy(self.draws(batch.idx_mapping_np)), device) & (sizes > 0)
        rows = torch.arange(num_rows, dtype=torch.int32, device=device)
        row_draws = draws.repeat_interleave(sizes + 1, output_size=num_rows)
        local = batch.expanded_local_pos.to(torch.int64)
        positions = batch.positions[batch.logits_indices]
        of_roots = uniforms(self.keys(slot, positions), Stream.ACCEPT)
        # Rows that only fill a batch up hang below the last node of the slot's tree, which has no
        # children of its own and nothing that they could have been drawn from.
        node_slot = batch.idx_mapping.repeat_interleave(sizes, output_size=len(trees.parents))
        is_node = trees.token_ids >= 0
        accepted, counts, last = ops.sample_path(
            logits.float(),
            torch.where(row_draws, rows, -1),
            self.probs,
            self._draft_rows[slot, local],
            self._draft_ids,
            all_drawn(num_reqs, device),
            torch.where(local == 0, of_roots, self._uniforms[slot, local]),
            trees.token_ids.clamp(min=0).to(torch.int32),
            torch.where(is_node, trees.parents, slots.sizes[node_slot] - 1),
            trees.cu_nodes,
            self._policy.max_depth,
        )
        nodes = (first_node.unsqueeze(1) + accepted[:, 1:] - 1).clamp(min=0)
        ends = last.to(torch.int64).unsqueeze(1)
        tokens = torch.cat([trees.token_ids[nodes], ends], dim=1)
        places = torch.arange(tokens.shape[1], device=device)
        tokens = torch.where(places == counts.unsqueeze(1), ends, tokens)
        root = batch.cu_num_logits[:-1].to(torch.int64).unsqueeze(1)
        # What is on no path says once more what its root does.
        is_path = draws.unsqueeze(1) & (accepted >= 0)
        of_root = torch.where(draws.unsqueeze(1), tokens[:, :1], sampled[root])
        tokens = torch.where(is_path, tokens, of_root)
        return sampled.scatter(
            0, torch.where(is_path, root + accepted, root).flatten(), tokens.flatten()
        )


def grow_drawn(
    drafter: TreeSpeculator,
    drawn: DrawnSlots,
    roots: Roots,
    slots: torch.Tensor,
    slots_np: NDArray[np.int32],
    batch: DraftBatch,
) -> tuple[DrawnPool, list[int]]:
    """The slots of a batch's trees, drawn, and the rows of each level that was a forward.

    Args:
        drafter: whose forwards run.
        drawn: where q goes.
        roots: of the R requests.
        slots, slots_np: [R], theirs, on both sides.
        batch: what the policy is told.
    """
    policy, levels, output = drafter.policy, drafter.levels, roots.output
    keys, first_rows = drawn.keys(slots, roots.context_lens), drawn.first_rows(slots_np)
    pool = DrawnPool(keys, policy.drawn_survival(batch, output.device), unseen=True)
    frontier = Frontier(roots.features, policy, levels.scratch)
    sampling = drawn.sampling(slots, slots_np)
    level_rows: list[int] = []
    held = 0

    def of_active(values: torch.Tensor) -> torch.Tensor:
        if len(pool.active) == pool.num_requests:
            return values
        return values[upload(pool.active, values.device)]

    for depth in range(1, policy.max_depth + 1):
        going: torch.Tensor | None = roots.are_read
        parents = torch.full((pool.num_requests, 1), ROOT, device=output.device)
        if depth > 1:
            is_probe = torch.isin(pool.active, batch.probes)
            stays = policy.planned(depth, pool.active, batch) | is_probe
            if not stays.numpy().any():
                break
            pool.go_on(pool.active[torch.from_numpy(np.flatnonzero(stays.numpy()))])
            frontier.keep(pool.active)
            level = pool.deepest()
            going = policy.promising(level, batch)
            if going is not None:
                is_probe = torch.isin(pool.active, batch.probes)
                going = going | upload(is_probe, going.device)
            parents = upload(policy.drawn_parents(level, batch), output.device)
            if held != len(pool.active):  # Fewer than there were are others.
                held = len(pool.active)
                levels.hold_requests(
                    of_active(roots.context_lens),
                    [of_active(table) for table in roots.block_tables],
                )
            positions = of_active(roots.context_lens) + (depth - 2)
            levels.hold(
                frontier.advance((parents - level.first) // policy.drawn_ranks),
                pool.tokens_of(parents),
                positions.clamp(max=drafter.max_model_len - 1),
            )
            output, features = drafter.run_held(held, frontier.width)
            frontier.ran(features)
            level_rows.append(len(output))
        rows = of_active(first_rows) + pool.num_rows
        logits = drafter.logits_of(output)
        probs = draw_level(pool, policy, parents, logits, sampling, drawn.draft_offsets, going)
        drawn.keep(rows, probs)
    return pool, level_rows
