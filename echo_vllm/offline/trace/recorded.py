# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Recorded candidates in the place of a drafter.

`RecordedDrafter` runs the same loop as the engine's drafter: the policy asks for a level, and gets
the recorded children of the nodes that it wants expanded. What the recording did not expand gets
stand-ins, which are counted, so that a replay says how much of it is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from echo_vllm.policies.base import DraftBatch, DraftPolicy
from echo_vllm.trace_format import TraceError, TraceRequest, TraceStep
from echo_vllm.trees.forest import ROOT, DraftForest
from echo_vllm.trees.pool import CandidatePool
from echo_vllm.trees.store import owners

STAND_IN = -2
"""In the place of a candidate's index: the recording has no such candidate."""

_SHIFT = 2
"""Candidate i of a request has row i + 2 in its tables; row 1 is the root, row 0 a stand-in."""


def replayable(steps: Iterable[TraceStep]) -> Iterator[TraceStep]:
    """The steps of a trace, as far as a policy can decide about their candidates again.

    Raises:
        TraceError: a request's candidates were drawn: for another policy others would have been.
    """
    for step in steps:
        if any(request.drawn for request in step.requests):
            raise TraceError(
                f"step {step.step} of the trace has drawn candidates, which cannot be chosen "
                'again; record it with "candidates": "best".'
            )
        yield step


def fully_verified(steps: Iterable[TraceStep]) -> list[TraceRequest]:
    """The request-steps of a trace in which every candidate was verified, to the depth that the
    rest of the answer allowed.

    Raises:
        TraceError: these are less than half of all, so the trace is not one of full verification.
    """
    every = [request for step in steps for request in step.requests]
    largest = max(every, key=lambda request: request.num_candidates, default=None)
    bounds = () if largest is None else (*largest.level_starts, largest.num_candidates)
    full = [
        request
        for request in every
        if request.is_fully_verified
        and request.num_candidates
        # The first levels of the largest tree, whole.
        and (*request.level_starts, request.num_candidates)
        == bounds[: len(request.level_starts) + 1]
    ]
    if not full or 2 * len(full) < len(every):
        raise TraceError(
            f"only {len(full)} of the trace's {len(every)} trees were verified with all "
            f"candidates; record it with policy topn and as many num_speculative_tokens as there "
            "are candidates (`echo-vllm trace record` does so by default)."
        )
    return full


@dataclass(frozen=True)
class RecordedDraft:
    """What a policy made of R recorded requests.

    Attributes:
        pool: the candidates that were drafted for the policy.
        source: [R, P] int64, which recorded candidate each column is, or STAND_IN.
        level_rows: rows of each drafter level behind the catch-up forward.
        forest: what the policy selected.
    """

    pool: CandidatePool
    source: torch.Tensor
    level_rows: list[int]
    forest: DraftForest

    def selected(self) -> list[list[int]]:
        """Recorded candidates (or STAND_IN) of every request's tree, in its order."""
        assert self.forest.columns is not None
        sources = self.source[self.forest.request_of_node(), self.forest.columns].tolist()
        cu = self.forest.cu_nodes.tolist()
        return [sources[a:b] for a, b in pairwise(cu)]


class RecordedDrafter:
    """The candidates of N recorded request-steps.

    Attributes:
        num_samples: N.
        max_depth: levels of the deepest recorded tree.
        num_ranks: children of an expanded node, at most.
        num_candidates: candidates of the largest tree.
        contexts: [N] int64, committed tokens when each tree was drafted, the root included.
        levels: [N] int64, levels of each tree: fewer where the answer could not go on for longer.
        in_chain: [N] int64, accepted nodes that are the drafter's best tokens one after another.
        in_tree: [N] int64, accepted nodes.
        answers: [N] int64, which answer each is of, from 0 on.
    """

    def __init__(
        self, requests: Sequence[TraceRequest], ranks: Sequence[int] | None = None
    ) -> None:
        """
        Args:
            requests: at least one, with at least one candidate among them.
            ranks: per candidate index, which of the drafter's best tokens after its parent it is,
                for trees of a fixed shape that leaves ranks out; without it, the children of a
                node are its best tokens in the recorded order.

        Raises:
            TraceError: there is nothing to replay.
        """
        self.num_samples = len(requests)
        self.max_depth = max((len(request.level_starts) for request in requests), default=0)
        if not self.max_depth:
            raise TraceError("the trace has no candidates; record it with a policy that drafts.")
        own_ranks = [
            _ranks(request.parents) if ranks is None else np.asarray(ranks[: len(request.parents)])
            for request in requests
        ]
        self.num_ranks = 1 + max(int(own.max()) for own in own_ranks if len(own))
        self.num_candidates = max(request.num_candidates for request in requests)
        size = (self.num_samples, self.num_candidates + _SHIFT)
        self._children = np.full((*size, self.num_ranks), STAND_IN, dtype=np.int32)
        self._scores = np.full(size, -np.inf, dtype=np.float32)
        # Padded with STAND_IN; one column more than levels, so that every path has a pad.
        self._paths = np.full((self.num_samples, self.max_depth + 1), STAND_IN, dtype=np.int64)
        self.contexts = np.array([request.context for request in requests], dtype=np.int64)
        self.levels = np.array([len(request.level_starts) for request in requests], dtype=np.int64)
        self.in_tree = np.array([len(request.accepted) for request in requests], dtype=np.int64)
        self.in_chain = np.zeros(self.num_samples, dtype=np.int64)
        names = [request.id for request in requests]
        self.answers = np.unique(names, return_inverse=True)[1].astype(np.int64)
        sums = np.zeros((self.max_depth, self.num_ranks))
        counts = np.zeros((self.max_depth, self.num_ranks))
        for i, (request, own) in enumerate(zip(requests, own_ranks, strict=True)):
            n = request.num_candidates
            parents = np.asarray(request.parents, dtype=np.int64)
            scores = np.asarray(request.logprobs, dtype=np.float32)
            self._children[i, parents + _SHIFT, own] = np.arange(n)
            self._scores[i, 1] = 0.0
            self._scores[i, _SHIFT : _SHIFT + n] = scores
            self._paths[i, : len(request.accepted)] = request.accepted
            is_best = own[np.asarray(request.accepted, dtype=np.int64)] == 0
            self.in_chain[i] = is_best.cumprod().sum()
            places = (request.depths() - 1, own)
            np.add.at(sums, places, scores - self._scores[i, parents + _SHIFT])
            np.add.at(counts, places, 1)
        # What a stand-in scores, given its parent: the mean of its depth and rank. Where no
        # candidate has that rank at that depth: of that rank at all depths.
        overall = sums.sum(0) / np.maximum(counts.sum(0), 1)
        typical = np.where(counts > 0, sums / np.maximum(counts, 1), overall)
        self._typical = torch.from_numpy(np.minimum(typical, 0.0).astype(np.float32))

    def check(self, policy: DraftPolicy) -> None:
        """Refuse a policy that wants to know more than was recorded.

        Raises:
            TraceError: it drafts deeper, or asks for more children of a node.
        """
        for name, wanted, recorded in (
            ("levels", policy.max_depth, self.max_depth),
            ("children after a node", policy.num_ranks, self.num_ranks),
        ):
            if wanted > recorded:
                raise TraceError(
                    f"the policy drafts {wanted} {name} and the trace has {recorded}; lower the "
                    "policy's max_depth, top_k or width, or record a trace with larger ones."
                )

    def draft(
        self, policy: DraftPolicy, batch: DraftBatch, samples: NDArray[np.int64]
    ) -> RecordedDraft:
        """Draft and select for the recorded request-steps `samples` [batch.num_requests]."""
        children = torch.from_numpy(self._children[samples])
        recorded = torch.from_numpy(self._scores[samples])
        pool = CandidatePool.empty(len(samples))
        source = torch.empty(len(samples), 0, dtype=torch.int64)
        k = policy.num_ranks
        level_rows: list[int] = []
        for depth, expansion, active in policy.levels(pool, batch):
            if expansion.frontier is None:
                nodes = torch.full((len(active), 1), ROOT)
                above = torch.zeros(len(active), 1)
            else:
                nodes = source[active].gather(1, expansion.frontier)
                above = pool.path_logprobs[active].gather(1, expansion.frontier)
                level_rows.append(nodes.numel())
            owner = active.unsqueeze(1)
            found = children[owner, nodes + _SHIFT, :k].long()  # [A, W, k]
            scores = torch.where(
                found == STAND_IN,
                above.unsqueeze(2) + self._typical[min(depth, self.max_depth) - 1, :k],
                recorded[owner.unsqueeze(2), found + _SHIFT],
            )
            first = pool.num_columns
            # No two children of a node have one rank, so ranks do as tokens.
            pool.grow(expansion, torch.arange(k).expand(found.shape), scores - above.unsqueeze(2))
            level = found.flatten(1)
            scores = scores.flatten(1)
            if expansion.children is not None:
                level, scores = level[:, expansion.children], scores[:, expansion.children]
            # Exactly as recorded: parent + (child - parent) is not always the child.
            pool.path_logprobs[active, first:] = scores
            whole = torch.full((len(samples), level.shape[1]), STAND_IN)
            whole[active] = level
            source = torch.cat([source, whole], dim=1)
        return RecordedDraft(pool, source, level_rows, policy.select(pool, batch))

    def accepted(
        self, draft: RecordedDraft, samples: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """How far each recorded accepted path goes inside the selected forest.

        Returns:
            accepted: [R] nodes.
            unknown: [R], whether the whole recorded path was selected and the next selected node
                is a stand-in: the path might have gone on.
        """
        forest, size = draft.forest, (len(samples), self._scores.shape[1])
        assert forest.columns is not None
        owner = forest.request_of_node()
        nodes = draft.source[owner, forest.columns]
        chosen = torch.zeros(size, dtype=torch.bool)
        chosen[owner, nodes + _SHIFT] = True
        chosen[:, 0] = False  # stand-ins are never accepted
        paths = torch.from_numpy(self._paths[samples])
        on_path = chosen.gather(1, paths + _SHIFT).long().cumprod(1)
        accepted = on_path.sum(1)

        recorded = (paths != STAND_IN).sum(1)
        last = paths.gather(1, (accepted - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        last[accepted == 0] = ROOT
        is_stand_in = nodes == STAND_IN
        owner, columns = owner[is_stand_in], forest.columns[is_stand_in]
        parents = draft.pool.parents[owner, columns]
        above = torch.where(parents == ROOT, ROOT, draft.source[owner, parents.clamp(min=0)])
        unknown = torch.zeros(len(samples), dtype=torch.bool)
        unknown[owner[(above == last[owner]) & (accepted == recorded)[owner]]] = True
        return accepted.numpy(), unknown.numpy()


def _ranks(parents: Sequence[int]) -> NDArray[np.int64]:
    """Per candidate, how many children its parent has before it."""
    of = np.asarray(parents, dtype=np.int64)
    ranks = np.empty_like(of)
    ranks[of.argsort(kind="stable")] = owners(np.unique(of, return_counts=True)[1])[1]
    return ranks
