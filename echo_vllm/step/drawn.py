# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Requests with drawn candidates: how a level of them is drawn, and on V1 their parameters, their
trees between two steps, and how these are verified (docs/drawn.md).

A draft lives here from its drawing to its verification, by the request's slot: the distributions
that its nodes were drawn from, and the numbers that decide about them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from echo_vllm import ops
from echo_vllm.config import Candidates
from echo_vllm.forecast.gains import draw_and_weigh
from echo_vllm.ops import AcceptRule
from echo_vllm.policies import DraftPolicy
from echo_vllm.step.verification import MAX_SAMPLED_ROWS, Children, Drawing, Judge, Verdict
from echo_vllm.transfer import download, upload
from echo_vllm.trees.drawn import DrawnPool
from echo_vllm.trees.draws import Sampling, Stream, root_keys, uniforms
from echo_vllm.trees.forest import ROOT, DraftForest
from echo_vllm.trees.store import Ints, owners

_ANY = (1 << 63) - 1

DRAWN_FROM = 0.5
"""The temperature from which `"candidates": "auto"` draws. At 0.6 drawn tokens are accepted as
often as the best ones (benchmarks/results/drawn-cpu.md); colder was not measured."""


def is_drawn(params: SamplingParams, candidates: Candidates) -> bool:
    """Whether the candidates of a request with these parameters are drawn, where the policy can.

    With "auto" a request with a seed keeps the tokens that it would get without speculation.
    """
    if candidates == "best" or not Drawing.of(params).is_random:
        return False
    if params.structured_outputs is not None:  # Drafts that it forbids get no node.
        return False
    return candidates == "drawn" or (params.temperature >= DRAWN_FROM and params.seed is None)


def draw_level(
    pool: DrawnPool,
    policy: DraftPolicy,
    parents: torch.Tensor,
    logits: torch.Tensor,
    sampling: Sampling,
    draft_offsets: torch.Tensor | None,
    going: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw a level of A requests: its slots are given out, then filled.

    Args:
        pool: whose `active` requests they are.
        policy: that says how many children each parent gets.
        parents: [A, W] int64, as of `DrawnPool.open`.
        logits: [A * W, V_draft], the drafter's after each parent.
        sampling: of all requests of the pool.
        draft_offsets: [V_draft] int64, from a token of the draft vocabulary to the target's; None
            where the two are one.
        going: [A] bool, on the pool's device: the others get no children; None for all.

    Returns:
        [A * W, V_draft] float32, q of each parent.
    """
    (count, width), k, device = parents.shape, policy.drawn_ranks, logits.device
    keys = pool.keys_of(parents).flatten()
    draws, gains, reaches = draw_and_weigh(
        logits, k, keys, sampling.of(pool.active, width), policy.acceptance
    )
    opened = pool.open(parents, gains.view(count, width, k))
    tokens = draws.token_ids.clamp(min=0)
    if draft_offsets is not None:
        tokens = tokens + draft_offsets[tokens]
    widths = upload(policy.drawn_widths(opened), device)
    if going is not None:
        widths = widths * going.unsqueeze(1)
    pool.fill(opened, widths, draws, tokens, reaches)
    return draws.probs


class DrawnRequests:
    """What is known of the requests in all slots.

    Attributes:
        draws: [num_slots] bool, whether the request's candidates are drawn.
        by_level: [num_slots] bool, whether more than temperature, top-k, top-p and min-p makes the
            distribution of such a request's tokens, or more is asked for than tokens: only rows on
            the accepted path can be sampled, by `judge`.
    """

    def __init__(self, num_slots: int, max_nodes: int, candidates: Candidates) -> None:
        self.draws = np.zeros(num_slots, np.bool_)
        self.by_level = np.zeros(num_slots, np.bool_)
        self._candidates = candidates
        self._seeds = np.zeros(num_slots, np.int64)
        self._temperature = np.ones(num_slots, np.float32)
        self._top_k = np.zeros(num_slots, np.int64)
        self._top_p = np.ones(num_slots, np.float32)
        self._min_p = np.zeros(num_slots, np.float32)
        # Of the last drafting of each slot: per row of the tree (the root, then the nodes) the row
        # of `_probs` that its children were drawn from, and per node the number that decides.
        self._probs: dict[int, torch.Tensor] = {}
        self._draft_rows = np.full((num_slots, 1 + max_nodes), -1, np.int32)
        self._uniforms = np.zeros((num_slots, 1 + max_nodes), np.float64)
        self._draft_ids: torch.Tensor | None = None

    def begin(self, slot: int, params: SamplingParams) -> None:
        """A request takes the slot, or goes on with other parameters."""
        self.draws[slot] = is_drawn(params, self._candidates)
        self.by_level[slot] = self.draws[slot] and not Drawing.of(params).only_scales
        self.end(slot)
        if not self.draws[slot]:
            return
        # Ranks draw the same number, as they do when they sample.
        seed = int(torch.randint(_ANY, ())) if params.seed is None else params.seed
        self._seeds[slot] = seed
        self._temperature[slot] = params.temperature
        self._top_k[slot] = params.top_k if params.top_k > 0 else _ANY
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p

    def end(self, slot: int) -> None:
        """Forget the slot's draft."""
        self._probs.pop(slot, None)
        self._draft_rows[slot] = -1

    def sampling(self, slots: Ints, device: torch.device) -> Sampling:
        """The parameters of the requests in `slots` [R]."""

        def given(values: NDArray[np.generic], neutral: object) -> torch.Tensor | None:
            return _unless_all(values[slots], neutral, device)

        return Sampling(
            given(self._temperature, 1),
            given(self._top_k, _ANY),
            given(self._top_p, 1),
            given(self._min_p, 0),
            torch.from_numpy(self._is_truncated(slots)),
        )

    def _is_truncated(self, slots: Ints) -> NDArray[np.bool_]:
        """[R] bool, which of the requests in `slots` ask for top-k or top-p."""
        found: NDArray[np.bool_] = (self._top_k[slots] != _ANY) | (self._top_p[slots] != 1)
        return found

    def root_keys(self, slots: Ints, positions: Ints, device: torch.device) -> torch.Tensor:
        """[R] int64, see `draws.root_keys`: `positions` are those of the tokens to come."""
        host = torch.from_numpy(np.stack([self._seeds[slots], positions]))
        seeds, positions_ = upload(host, device)
        return root_keys(seeds, positions_)

    def put(self, slots: Ints, pool: DrawnPool, forest: DraftForest) -> None:
        """Keep what the trees of `forest`, taken from `pool`, need for their verification."""
        rows, numbers = pool.rows_of(forest)
        # Of the distributions only those that a tree still has children of.
        used, places = rows[rows >= 0].unique(return_inverse=True)
        rows[rows >= 0] = places
        owner, place = owners(forest.cu_nodes.diff().numpy().astype(np.int64) + 1)
        self._draft_rows[slots] = -1
        self._draft_rows[slots[owner], place] = rows.numpy()
        self._uniforms[slots[owner], place] = numbers.numpy()
        self._probs.update(dict.fromkeys(slots.tolist(), pool.draft_probs(used)))

    def verify(
        self,
        others: Verdict,
        logits: torch.Tensor,
        forest: DraftForest,
        sampling: SamplingMetadata,
        slots: Ints,
        positions: Ints,
        requests: Ints,
        draft_offsets: torch.Tensor | None,
    ) -> Verdict:
        """Walk the trees of `requests`, by recursive rejection.

        Args:
            others: the verdict on the rest of the batch.
            logits, forest, sampling: as for `verification.verify`.
            slots, positions: [R], of the batch's requests, and where each one's next token stands.
            requests: [n], which of them.
            draft_offsets: [V_draft] int64, from a token of the draft vocabulary to the target's;
                None where the two are one.

        Returns:
            The verdict on all of them, on the host.
        """
        device = logits.device
        sizes = forest.cu_nodes.diff().numpy().astype(np.int64)
        starts = forest.cu_nodes[:-1].numpy().astype(np.int64)
        own = sizes[requests]
        cu_nodes = torch.zeros(len(own) + 1, dtype=torch.int32)
        cu_nodes[1:] = torch.from_numpy(own.cumsum())
        owner, place = owners(own)
        nodes = torch.from_numpy(starts[requests[owner]] + place)
        row_owner, row_place = owners(own + 1)
        rows = starts[requests[row_owner]] + requests[row_owner] + row_place
        numbers = self._uniforms[slots[requests[row_owner]], row_place]
        numbers[row_place == 0] = self._root_numbers(slots[requests], positions[requests])
        vocab = self._draft_vocab(logits.shape[1], draft_offsets)
        own_slots = slots[requests[row_owner]]
        probs, draft_rows = self._drawn_from(own_slots, row_place, vocab, device)
        max_depth = others.accepted_rows.shape[1] - 1
        values, rows = self._allowed(logits, sampling, rows, requests[row_owner], slots)
        accepted, counts, last = download(
            *ops.sample_path(
                values,
                upload(torch.from_numpy(rows.astype(np.int32)), device),
                probs,
                upload(draft_rows, device),
                self._draft_ids,
                all_drawn(len(own), device),
                upload(torch.from_numpy(numbers), device),
                upload(forest.token_ids[nodes], device),
                upload(forest.parents[nodes], device),
                upload(cu_nodes, device),
                max_depth,
                _unless_all(self._temperature[slots[requests]], 1, device),
            )
        )
        verdict = others.on_host()
        tokens = verdict.sampler_output.sampled_token_ids.clone()
        all_rows, num_accepted = verdict.accepted_rows.clone(), verdict.num_accepted.clone()
        index = torch.from_numpy(requests)
        all_rows[index], num_accepted[index] = accepted, counts
        first = torch.from_numpy(starts[requests]).unsqueeze(1)
        found = forest.token_ids[(first + accepted[:, 1:] - 1).clamp(min=0)] if len(nodes) else None
        path = torch.full_like(accepted, -1)
        if found is not None:
            path[:, :-1] = found.masked_fill(accepted[:, 1:] < 0, -1)
        path[torch.arange(len(own)), counts.long()] = last
        tokens[index] = path.to(tokens.dtype)
        output = replace(verdict.sampler_output, sampled_token_ids=tokens)
        return Verdict(output, all_rows, num_accepted)

    def judge(
        self,
        sampling: SamplingMetadata,
        slots: Ints,
        positions: Ints,
        draft_offsets: torch.Tensor | None,
    ) -> Judge:
        """Of one step; for the arguments see `verify`.

        A row and its children are a tree of their own. The root's number, which decides the last
        token, is looked at once in a walk: where no child is accepted.
        """

        def tokens_of(logits: torch.Tensor, requests: Ints, rows: Ints, children: Children) -> Ints:
            device, own = logits.device, slots[requests]
            values, _ = self._allowed(logits, sampling, np.arange(len(requests)), requests, slots)
            owner, place = owners(children.counts + 1)
            is_root = place == 0
            numbers = np.zeros(len(owner))
            numbers[is_root] = self._root_numbers(own, positions[requests])
            numbers[~is_root] = self._uniforms[own[owner[~is_root]], children.places + 1]
            vocab = self._draft_vocab(logits.shape[1], draft_offsets)
            probs, draft_rows = self._drawn_from(own[owner], rows[owner], vocab, device)
            draft_rows[torch.from_numpy(~is_root)] = -1
            cu_nodes = np.concatenate([[0], children.counts.cumsum()])
            accepted, counts, last = download(
                *ops.sample_path(
                    values,
                    upload(torch.from_numpy(np.where(is_root, owner, -1).astype(np.int32)), device),
                    probs,
                    upload(draft_rows, device),
                    self._draft_ids,
                    all_drawn(len(own), device),
                    upload(torch.from_numpy(numbers), device),
                    upload(torch.from_numpy(children.token_ids), device),
                    torch.full((len(children.token_ids),), ROOT, dtype=torch.int32, device=device),
                    upload(torch.from_numpy(cu_nodes.astype(np.int32)), device),
                    1,
                    _unless_all(self._temperature[own], 1, device),
                )
            )
            tokens = last.numpy().astype(np.int64)
            chosen = np.flatnonzero(counts.numpy())
            tokens[chosen] = children.token_ids[cu_nodes[chosen] + accepted.numpy()[chosen, 1] - 1]
            return tokens

        return tokens_of

    def _root_numbers(self, slots: Ints, positions: Ints) -> NDArray[np.float64]:
        """[n], the number of each root: it has one in every step, whether anything was drawn or
        not."""
        keys = self.root_keys(slots, positions, torch.device("cpu"))
        numbers: NDArray[np.float64] = uniforms(keys, Stream.ACCEPT).numpy()
        return numbers

    def _draft_vocab(self, vocab: int, draft_offsets: torch.Tensor | None) -> int:
        """Tokens of the draft vocabulary; `_draft_ids` is there from now on."""
        if draft_offsets is None:
            return vocab
        if self._draft_ids is None:
            self._draft_ids = places_of(draft_offsets, vocab)
        return len(draft_offsets)

    def _drawn_from(
        self, slots: Ints, places: Ints, vocab: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q of the rows `places` of the trees in `slots`, and which of its rows each one has.

        Drafts of several draftings meet where a request was not scheduled meanwhile.
        """
        draft_rows = torch.from_numpy(self._draft_rows[slots, places])
        probs: list[torch.Tensor] = []
        for slot in dict.fromkeys(slots.tolist()):
            own = self._probs.get(slot)
            if own is not None and not any(own is each for each in probs):
                probs.append(own)
        if not probs:
            return torch.zeros(1, vocab, device=device), torch.full_like(draft_rows, -1)
        if len(probs) == 1:
            return probs[0], draft_rows
        start = 0
        for each in probs:
            mine = np.array([self._probs.get(slot) is each for slot in slots.tolist()])
            draft_rows[torch.from_numpy(mine) & (draft_rows >= 0)] += start
            start += len(each)
        return torch.cat(probs), draft_rows

    def _allowed(
        self,
        logits: torch.Tensor,
        sampling: SamplingMetadata,
        rows: Ints,
        owner: Ints,
        slots: Ints,
    ) -> tuple[torch.Tensor, Ints]:
        """`rows` [n] of the logits, with -inf for what min-p, top-k and top-p forbid, in vLLM's
        order, at the requests' temperatures; the walk divides by these where it reads.

        Nobody reads these rows again, so they are changed where they are: a copy of all would cost
        more than the walk, which reads few of them. A GPU's kernels read float32 alone.

        Returns:
            [m, V], and in which of its rows the n are.
        """
        is_read = logits.is_cpu and logits.dtype == torch.bfloat16
        if not is_read and logits.dtype != torch.float32:
            logits = logits[upload(torch.from_numpy(rows), logits.device)].float()
            rows = np.arange(len(rows))
        device, own = logits.device, slots[owner]
        min_p = self._min_p[own]
        cut = np.flatnonzero(self._is_truncated(own) | (min_p > 0))
        for start in range(0, len(cut), MAX_SAMPLED_ROWS):
            part = cut[start : start + MAX_SAMPLED_ROWS]
            places = upload(torch.from_numpy(rows[part]), device)
            requests = upload(torch.from_numpy(owner[part]), device)
            given = logits[places]
            temperature = upload(torch.from_numpy(self._temperature[own[part]]), device)
            values = given.float() / temperature.unsqueeze(1)
            if min_p[part].any():
                least = upload(torch.from_numpy(min_p[part]), device).log().unsqueeze(1)
                values.masked_fill_(values < values.amax(1, keepdim=True) + least, float("-inf"))
            top_k = None if sampling.top_k is None else sampling.top_k[requests]
            top_p = None if sampling.top_p is None else sampling.top_p[requests]
            values = apply_top_k_top_p(values, top_k, top_p)
            logits[places] = given.masked_fill_(values == float("-inf"), float("-inf"))
        return logits, rows


def _unless_all(
    values: NDArray[np.generic], neutral: object, device: torch.device
) -> torch.Tensor | None:
    """`values` on `device`; None where all are `neutral`."""
    return upload(torch.from_numpy(values), device) if (values != neutral).any() else None


def all_drawn(count: int, device: torch.device) -> torch.Tensor:
    """[count] int32, `ops.sample_path`'s rules of requests with drawn candidates."""
    return torch.full((count,), AcceptRule.DRAWN, dtype=torch.int32, device=device)


def places_of(draft_offsets: torch.Tensor, vocab: int) -> torch.Tensor:
    """[vocab] int32, where in the draft vocabulary each of the target's tokens is, or -1."""
    places = torch.full((vocab,), -1, dtype=torch.int32, device=draft_offsets.device)
    own = torch.arange(len(draft_offsets), device=draft_offsets.device)
    places[own + draft_offsets] = own.to(torch.int32)
    return places
