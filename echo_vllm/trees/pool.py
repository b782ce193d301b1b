# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The candidates that a drafting has produced so far, and how a level of them grows.

The drafter grows all trees level by level: before each level a policy says in an `Expansion` which
nodes to expand, and `CandidatePool.grow` appends their children. `take` and `take_ragged` turn the
columns that a policy selects into the forest to verify. Nothing here knows a policy or vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from echo_vllm.transfer import download, upload
from echo_vllm.trees.forest import ROOT, DraftForest

CPU = torch.device("cpu")

NO_CANDIDATE = float("-inf")
"""Path score of a column that a request has no candidate in, because it left the frontier."""


def best_first(scores: torch.Tensor) -> torch.Tensor:
    """[R, P] int64, the columns of `scores` [R, P] from the greatest on, ties by column."""
    # A stable sort, not topk: ties fall to the earlier column, on every rank the same.
    return scores.argsort(dim=1, descending=True, stable=True)


def places_in(order: torch.Tensor) -> torch.Tensor:
    """[R, P] int64: of every column its place in `order` [R, P] int64, a permutation a row."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def parents_in(parents: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[R, n] int32: where among the `columns` [R, n] int64 of a pool the parents of these are, or
    ROOT; the pool's own `parents` are [R, P] int64."""
    place = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
    num_requests, num_columns = parents.shape
    # The last column stands for the root.
    position = parents.new_full((num_requests, num_columns + 1), ROOT)
    position.scatter_(1, columns, place)
    above = parents.gather(1, columns)
    above = torch.where(above == ROOT, num_columns, above)
    return position.gather(1, above).to(torch.int32)


@dataclass(frozen=True)
class Expansion:
    """How one level of candidates grows out of the frontier.

    Attributes:
        frontier: [A, W] int64, columns of the pool to expand; the root is not in the pool, so the
            first level has no frontier (None) and grows out of the root.
        children: [C] int64, which of the W * k (frontier row, rank) pairs become candidates, as
            `row * k + rank`; None means all of them. For the first level W is 1.
        requests: [A] int64, ascending, the requests that go on, on the host; a request that is
            left out stays out in all deeper levels. None means all that were expanded in the level
            above.
        going: [A] bool, on the pool's device, where the requests that go on are not known on the
            host: the others stay in the frontier, but what grows there are no candidates. None
            means all of them.
    """

    frontier: torch.Tensor | None
    children: torch.Tensor | None
    requests: torch.Tensor | None = None
    going: torch.Tensor | None = None


@dataclass
class CandidatePool:
    """All candidates drafted for `R` requests so far, one row a request, level after level.

    Attributes:
        token_ids: [R, P] int64, in the target's vocabulary.
        parents: [R, P] int64, column of the parent in this pool, or ROOT.
        path_logprobs: [R, P] float32; NO_CANDIDATE where a request has none.
        level_starts: the first column of every level; the level of depth d has the columns
            level_starts[d - 1] up to the next start.
        active: [A] int64, on the host, the requests that the last level was drafted for.
        memo: what a policy has worked out for the columns so far and may find again, with a key
            that says what it depends on; the pool itself only ever grows.
        roots: [R] int, the tokens that the trees grow from; None where nobody asks for them.
        parent_rows: [C] int64, of every column of the last level the frontier row it hangs under.
        compacts: whether requests that stop leave the frontier, for which the host must know which
            ones they are. On a GPU it would have to wait for that, so there they stay in it
            (`Expansion.going`), unless the policy has to ask the device anyway.
        unseen: whether nobody may ask the device for anything of it: then nobody leaves but by the
            plan, and the trees are `DraftPolicy.ranked`.

    All tensors but `active` are on the device of the drafter.
    """

    token_ids: torch.Tensor
    parents: torch.Tensor
    path_logprobs: torch.Tensor
    level_starts: list[int]
    active: torch.Tensor
    memo: tuple[object, torch.Tensor] | None = None
    roots: torch.Tensor | None = None
    parent_rows: torch.Tensor | None = None
    compacts: bool = True
    unseen: bool = False

    @classmethod
    def empty(
        cls, num_requests: int, device: torch.device = CPU, compacts: bool | None = None
    ) -> CandidatePool:
        """A pool without candidates; `compacts` is what suits the device unless it is given."""
        return cls(
            token_ids=torch.empty(num_requests, 0, dtype=torch.int64, device=device),
            parents=torch.empty(num_requests, 0, dtype=torch.int64, device=device),
            path_logprobs=torch.empty(num_requests, 0, dtype=torch.float32, device=device),
            level_starts=[],
            active=torch.arange(num_requests),
            compacts=device.type == "cpu" if compacts is None else compacts,
        )

    @classmethod
    def empty_unseen(cls, num_requests: int, device: torch.device = CPU) -> CandidatePool:
        """A pool without candidates that nobody asks."""
        pool = cls.empty(num_requests, device, compacts=False)
        pool.unseen = True
        return pool

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    def on_device(self, values: torch.Tensor) -> torch.Tensor:
        """`values` of the host beside the pool's own."""
        return upload(values, self.device)

    def on_host(self) -> CandidatePool:
        """The same pool on the host, in one transfer."""
        ids, parents, scores = download(self.token_ids, self.parents, self.path_logprobs)
        return CandidatePool(ids, parents, scores, self.level_starts, self.active)

    def rows_of(self, requests: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """`values` [R, ...] of the device, for `requests` [A] of the host."""
        if len(requests) == self.num_requests:  # ascending: they are all, in their order
            return values
        return values[self.on_device(requests)]

    @property
    def num_requests(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_columns(self) -> int:
        return self.token_ids.shape[1]

    @property
    def num_levels(self) -> int:
        return len(self.level_starts)

    def stop_at(self, depth: int, limits: torch.Tensor | None) -> bool:
        """Leave out of the level `depth` and all deeper ones the requests that may not have them.

        Args:
            limits: [R] int64, on the host, levels that each request may have; None for no limits.

        Returns:
            Whether any request is left.
        """
        if limits is not None:
            going = limits[self.active] >= depth
            if not going.all():
                self.active = self.active[going]
        return len(self.active) > 0

    def rows_above(self, frontier: torch.Tensor) -> torch.Tensor:
        """[A, W] int64: of `frontier`, columns of the last level, the frontier rows of the level
        above that they hang under."""
        assert self.parent_rows is not None
        return self.parent_rows[frontier - self.level_starts[-1]]

    def grow(self, expansion: Expansion, token_ids: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Append the children of the frontier as the next level.

        Args:
            expansion: what the policy asked for.
            token_ids: [A, W, k] int64, the drafter's k best tokens after each frontier node.
            logprobs: [A, W, k] float32, their log-probabilities given the path.
        """
        if expansion.requests is not None:
            self.active = expansion.requests
        num_active, width, k = token_ids.shape
        if expansion.frontier is None:
            parents = token_ids.new_full((num_active, 1), ROOT)
            above = logprobs.new_zeros(num_active, 1)
        else:
            parents = expansion.frontier
            above = self.rows_of(self.active, self.path_logprobs).gather(1, parents)
        # A probability above 1 can only be rounding; a path must never gain by growing. What is not
        # a number (an overflow in the drafter) is no candidate.
        logprobs = torch.where(logprobs.isnan(), NO_CANDIDATE, logprobs)
        scores = (above.unsqueeze(2) + logprobs.clamp(max=0.0)).reshape(num_active, width * k)
        tokens = token_ids.reshape(num_active, width * k)
        if expansion.going is not None:
            scores = scores.masked_fill(~expansion.going.unsqueeze(1), NO_CANDIDATE)
        rows = torch.arange(width, device=self.device).repeat_interleave(k)
        if expansion.children is not None:
            children = self.on_device(expansion.children)
            scores, tokens, rows = scores[:, children], tokens[:, children], rows[children]
        self.level_starts.append(self.num_columns)
        self.token_ids = torch.cat([self.token_ids, self._of_all(tokens, 0)], dim=1)
        self.parents = torch.cat([self.parents, self._of_all(parents[:, rows], ROOT)], dim=1)
        self.path_logprobs = torch.cat(
            [self.path_logprobs, self._of_all(scores, NO_CANDIDATE)], dim=1
        )
        self.parent_rows = rows

    def _of_all(self, values: torch.Tensor, missing: float) -> torch.Tensor:
        """`values` [A, C] of the active requests as [R, C] of all."""
        if values.shape[0] == self.num_requests:
            return values
        whole = values.new_full((self.num_requests, values.shape[1]), missing)
        whole[self.on_device(self.active)] = values
        return whole

    def level(self, depth: int) -> slice:
        """The columns of one depth."""
        stops = [*self.level_starts[1:], self.num_columns]
        return slice(self.level_starts[depth - 1], stops[depth - 1])

    def depths(self) -> torch.Tensor:
        """[P] int64, the depth of every column."""
        starts = torch.tensor([*self.level_starts, self.num_columns])
        return self.on_device(torch.arange(1, len(starts)).repeat_interleave(starts.diff()))

    def level_sizes(self) -> list[int]:
        """Per level, how many requests have candidates on it."""
        sizes: list[int] = download(self.first_of_levels().sum(0))[0].tolist()
        return sizes

    def first_of_levels(self) -> torch.Tensor:
        """[R, levels] bool: whether a request has candidates on a level."""
        firsts = [self.path_logprobs[:, start] for start in self.level_starts]
        return torch.stack(firsts, dim=1) > NO_CANDIDATE

    def best_of_level(self, depth: int) -> torch.Tensor:
        """[R] float32, the best path score of one depth; NO_CANDIDATE without a candidate."""
        best = self.path_logprobs[:, self.level(depth)].amax(1)
        return best

    def take(self, columns: torch.Tensor) -> DraftForest:
        """The forest of the columns [R, n] of every request, in that order.

        The caller's columns must hold the parent of each of their nodes, before the node. Columns
        with NO_CANDIDATE, of a request that stopped above, are left out.
        """
        exists = self.path_logprobs.gather(1, columns) > NO_CANDIDATE
        bounds = exists.new_zeros(len(columns) + 1, dtype=torch.int32)
        bounds[1:] = exists.sum(1).cumsum(0)
        exists, columns = exists.flatten(), columns.flatten()
        packed = columns.new_zeros(len(columns) + 1)
        packed[torch.where(exists, exists.cumsum(0) - 1, len(columns))] = columns
        return self.take_ragged(packed[:-1], bounds)

    def take_ragged(self, columns: torch.Tensor, cu_nodes: torch.Tensor) -> DraftForest:
        """The forest of `columns`, of which request i has cu_nodes[i]:cu_nodes[i + 1].

        The caller's columns must hold the parent of each of their nodes, before the node. What
        lies behind the last request's is padding, as `ops.select_budget` leaves it.

        The forest is on the host, where its tokens are wanted next; from a GPU it comes in one
        transfer.
        """
        if not self.num_requests or not self.num_columns:
            return DraftForest.empty(self.num_requests)
        cu_nodes = cu_nodes.to(torch.int32)
        place = torch.arange(len(columns), device=self.device)
        owner = torch.searchsorted(cu_nodes[1:].to(torch.int64), place, right=True)
        is_node = owner < self.num_requests
        owner = owner.clamp(max=self.num_requests - 1)
        found = columns.clamp(min=0)
        place = place - cu_nodes[:-1].to(torch.int64)[owner]
        # Of the two extra columns the last stands for the root, index -1 finds it; the other takes
        # what padding says.
        columns_and_two = (self.num_requests, self.num_columns + 2)
        position = self.parents.new_full(columns_and_two, ROOT)
        position[owner, torch.where(is_node, found, self.num_columns)] = place
        fields = download(
            self.token_ids[owner, found].to(torch.int32),
            position[owner, self.parents[owner, found]].to(torch.int32),
            self.depths()[found].to(torch.int32),
            self.path_logprobs[owner, found],
            columns,
            cu_nodes,
        )
        *nodes, cu_nodes = fields
        token_ids, parents, depths, scores, columns = (x[: int(cu_nodes[-1])] for x in nodes)
        return DraftForest(token_ids, parents, depths, scores, cu_nodes, columns)

    def tree_of(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The trees of the columns [R, n] where they are: tokens [R, n] int64, parents [R, n]
        int32, indices into the same row. The columns are as `take` wants them."""
        return self.token_ids.gather(1, columns), parents_in(self.parents, columns)

    def all_columns(self) -> torch.Tensor:
        """[R, P] int64."""
        columns = torch.arange(self.num_columns, device=self.device)
        return columns.expand(self.num_requests, self.num_columns)

    def best_first(self) -> torch.Tensor:
        """[R, P] int64, columns by falling path score, ties by column; a parent is before its
        children."""
        return best_first(self.path_logprobs)

    def rank(self) -> torch.Tensor:
        """[R, P] int64, every column's place in `best_first`."""
        return places_in(self.best_first())

    def expand_best(
        self, depth: int, width: int, going: torch.Tensor | None = None
    ) -> Expansion | None:
        """The level `depth` under the best `width` nodes of the level above; the first one grows.

        Args:
            depth, width: as said.
            going: [A] bool, on the pool's device: which of the active requests go on; None means
                all of them.

        Returns:
            None if it is known that nobody goes on.
        """
        if depth == 1:
            return Expansion(frontier=None, children=None)
        requests = self.active
        if going is not None and self.compacts:
            requests, going = requests[going], None
            if not len(requests):
                return None
        return Expansion(self.best_frontier(depth - 1, width, requests), None, requests, going)

    def best_frontier(self, depth: int, width: int, requests: torch.Tensor) -> torch.Tensor:
        """[A, min(width, level)] int64, the best columns of one depth for each of `requests`
        ([A], on the host)."""
        level = self.level(depth)
        scores = self.rows_of(requests, self.path_logprobs[:, level])
        columns: torch.Tensor = best_first(scores)[:, :width] + level.start
        return columns
