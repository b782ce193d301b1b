# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The pool of drawn candidates: slots are given out before what goes into them is drawn.

Whether a drawn token is verified must not depend on the token itself, nor on what hangs below it
(docs/drawn.md). So a level is grown in two steps. `DrawnPool.open` gives an `OpenLevel`: the worth
of every slot, from the parents and from expectations alone. A policy sees no more than that when
it says how many children each parent gets. Only then `fill` takes the draws; from then on what they
promise (`DrawnLevel`) decides who gets children, never who stays.

The forest is the slots of greatest worth. Cutting by worth anywhere is sound, as long as where to
cut does not follow from slots behind the cut, because all that is decided about a slot is decided
by slots that come earlier in the order of falling worth. Two rules make it so: a slot is never
worth more than its parent promises or than an earlier sibling is worth, and a node never promises
more than its slot was worth. Whatever a token promises, it can move nothing that comes before it.

The counterpart for certain candidates is `pool.CandidatePool`. Nothing here knows a policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from echo_vllm import ops
from echo_vllm.transfer import download, upload
from echo_vllm.trees.draws import Draws, Stream, uniforms
from echo_vllm.trees.forest import ROOT, DraftForest
from echo_vllm.trees.pool import best_first, parents_in, places_in
from echo_vllm.trees.ranked import FILLER_TIER, RankedTrees

NO_SLOT = float("-inf")
"""Worth of a column that holds no node."""

Survival = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From scores [..., n] float32 in nats and depths [n] int64 to probabilities [..., n] float32 that
do not fall with the score (`forecast.survival.SurvivalModel.probability`)."""


@dataclass(frozen=True)
class OpenLevel:
    """What may be known of a level before it is drawn. There are no children here.

    Attributes:
        depth: of the children, from 1.
        parents: [A, W] int64, columns of the pool, or ROOT; of the active requests.
        reaches: [A, W] float32 in 0..1, how probably each parent is on the accepted path, given its
            token, before calibration; 0 where there is no such parent.
        expected: [A, W, k] float32 in 0..1, accepted tokens that each parent's first to k-th child
            is expected to add, before calibration.
        worths: [A, W, k] float32 in 0..1, the same after calibration; not above what the parent
            promises, nor above that of the sibling before.
    """

    depth: int
    parents: torch.Tensor
    reaches: torch.Tensor
    expected: torch.Tensor
    worths: torch.Tensor


@dataclass(frozen=True)
class DrawnLevel:
    """What may be known of the deepest level when children are given to its nodes.

    A node promises what its token makes it worth, but never more than its slot was worth before:
    so much that a token may say for its own children, and no more against other slots.

    Attributes:
        depth: of the nodes.
        requests: [A] int64, on the host, the active requests.
        first: the column of the first node.
        promises: [A, C] float32 in 0..1, of the columns from `first` on; 0 where there is no node.
        unseen: as of the pool.
    """

    depth: int
    requests: torch.Tensor
    first: int
    promises: torch.Tensor
    unseen: bool = False

    def best(self, width: int) -> torch.Tensor:
        """[A, min(width, C)] int64, the columns that promise most, ties by column."""
        return best_first(self.promises)[:, :width] + self.first


class DrawnPool:
    """All drawn candidates of R requests, level after level; P columns a request.

    Attributes:
        active: [A] int64, on the host, ascending: the requests that the next level is drawn for.
        unseen: whether nobody may ask the device for anything of it: then a request leaves but by
            the plan, its trees are `RankedTrees`, and whoever draws keeps q.
    """

    def __init__(
        self, root_keys: torch.Tensor, survival: Survival | None = None, *, unseen: bool = False
    ) -> None:
        """
        Args:
            root_keys: [R] int64, of `draws.root_keys`; the pool lives on their device.
            survival: calibration of expected acceptance, by score (its logarithm) and depth; None
                takes expectations as they are.
            unseen: see the attribute.
        """
        self.unseen = unseen
        self.num_rows = 0
        """Rows of q so far: of the pool or, if it is unseen, of each request."""
        requests, device = len(root_keys), root_keys.device
        self._survival = survival
        self.active = torch.arange(requests)
        # The first column is the root, so that ROOT is the place before the first node's.
        self._keys = root_keys.unsqueeze(1)
        self._reaches = torch.ones(requests, 1, device=device)
        self._expected = torch.ones(requests, 1, device=device)
        self._worths = torch.ones(requests, 1, device=device)
        self._promises = torch.ones(requests, 1, device=device)
        self._rows = torch.full((requests, 1), -1, dtype=torch.int32, device=device)
        self._parents = torch.empty(requests, 0, dtype=torch.int64, device=device)
        self._token_ids = torch.empty(requests, 0, dtype=torch.int64, device=device)
        self._starts = [ROOT, 0]
        self._draft_probs: list[torch.Tensor] = []

    @property
    def num_requests(self) -> int:
        return self._keys.shape[0]

    @property
    def depth(self) -> int:
        """Levels that are filled."""
        return len(self._starts) - 2

    def go_on(self, requests: torch.Tensor) -> None:
        """Leave out of all further levels the active requests that are not in `requests` ([A'], on
        the host, ascending)."""
        self.active = requests

    def deepest(self) -> DrawnLevel:
        """The level to draw children under."""
        first, stop = self._starts[-2:]
        promises = self._of_active(self._promises)[:, first + 1 : stop + 1]
        return DrawnLevel(self.depth, self.active, first, promises, self.unseen)

    def keys_of(self, parents: torch.Tensor) -> torch.Tensor:
        """[A, W] int64, the keys of nodes [A, W], for `draws.draw_children`."""
        return self._of_active(self._keys).gather(1, parents + 1)

    def tokens_of(self, parents: torch.Tensor) -> torch.Tensor:
        """[A, W] int64, the target's tokens of nodes [A, W], none of which may be the root."""
        return self._of_active(self._token_ids).gather(1, parents)

    def open(self, parents: torch.Tensor, gains: torch.Tensor) -> OpenLevel:
        """The level below `parents`, before anything is drawn.

        Args:
            parents: [A, W] int64, of the deepest level, each at most once; ROOT for the first one.
            gains: [A, W, k] float32 in 0..1, the probability that a parent's r-th child is the
                accepted one, given that the parent is (`forecast.gains.expected_gains`).

        Raises:
            ValueError: a parent is not of the deepest level, and the pool may be asked.
        """
        is_deepest = (parents >= self._starts[-2]) & (parents < self._starts[-1])
        if not self.unseen and not is_deepest.all():
            raise ValueError(
                f"parents must be columns {self._starts[-2]} to {self._starts[-1] - 1} of the "
                f"deepest level, got {parents.min()} to {parents.max()}"
            )
        reaches, above, promises = (
            self._of_active(values).gather(1, parents + 1)
            for values in (self._reaches, self._expected, self._promises)
        )
        expected = torch.minimum(reaches.unsqueeze(2) * gains, above.unsqueeze(2))
        expected = expected.cummin(dim=2).values
        worths = torch.minimum(self._calibrated(expected, self.depth + 1), promises.unsqueeze(2))
        return OpenLevel(self.depth + 1, parents, reaches, expected, worths.cummin(dim=2).values)

    def fill(
        self,
        level: OpenLevel,
        widths: torch.Tensor,
        draws: Draws,
        target_ids: torch.Tensor,
        reaches: torch.Tensor,
    ) -> None:
        """Put the draws into the level's slots.

        Args:
            level: of the last `open`.
            widths: [A, W] int64, children that each parent gets, made from `level` and what was
                known before it.
            draws: of the A * W parents, with k children each.
            target_ids: [A * W, k] int64, their tokens in the target's vocabulary.
            reaches: [A * W, k] float32, the probability that each child is the accepted one, given
                that its parent is (`forecast.gains.reaches_of`).

        Raises:
            ValueError: the level was not opened last, or there are more parents than draws.
        """
        requests, width, k = level.worths.shape
        if level.depth != self.depth + 1:
            raise ValueError(
                f"only the level opened last can be filled, which is {self.depth + 1}, got level "
                f"{level.depth}"
            )
        if draws.token_ids.shape != (requests * width, k):
            raise ValueError(
                f"draws must be {[requests * width, k]}, got {list(draws.token_ids.shape)}"
            )
        device = self._keys.device
        shape = (requests, width, k)
        exists = torch.arange(k, device=device) < widths.unsqueeze(2)
        exists &= (draws.token_ids >= 0).view(shape) & (level.worths > 0)
        # A hole in a row of siblings would put the later ones out of their order.
        exists = exists.cumprod(2).bool()
        count = width if self.unseen else requests * width
        rows = torch.arange(self.num_rows, self.num_rows + count, dtype=torch.int32, device=device)
        rows = rows.expand(requests, -1) if self.unseen else rows.view(requests, width)
        self.num_rows += count
        active = upload(self.active, device)
        self._rows[active.unsqueeze(1), level.parents + 1] = rows
        if not self.unseen:
            self._draft_probs.append(draws.probs)
        own = (level.reaches.unsqueeze(2) * reaches.view(shape)).masked_fill(~exists, 0.0)
        worths = level.worths.masked_fill(~exists, NO_SLOT)
        promises = torch.minimum(self._calibrated(own, level.depth), level.worths)
        for name, new, nothing in (
            ("_keys", draws.keys.view(shape), 0),
            ("_reaches", own, 0.0),
            ("_expected", level.expected.masked_fill(~exists, 0.0), 0.0),
            ("_worths", worths, NO_SLOT),
            ("_promises", promises.masked_fill(~exists, 0.0), 0.0),
            ("_rows", rows.new_full(shape, -1), -1),
            ("_parents", level.parents.unsqueeze(2).expand(shape), ROOT),
            ("_token_ids", target_ids.view(shape), 0),
        ):
            values = getattr(self, name)
            if requests < self.num_requests:
                columns = values.new_full((self.num_requests, width * k), nothing)
                new = columns.index_copy_(0, active, new.flatten(1).to(values.dtype))
            setattr(self, name, torch.cat([values, new.flatten(1)], 1))
        self._starts.append(self._parents.shape[1])

    def _of_active(self, values: torch.Tensor) -> torch.Tensor:
        """`values` [R, ...] of the active requests."""
        if len(self.active) == self.num_requests:
            return values
        return values[upload(self.active, values.device)]

    def _calibrated(self, expected: torch.Tensor, depth: int) -> torch.Tensor:
        """Probabilities [A, W, k] of a depth, after calibration."""
        if self._survival is None:
            return expected
        depths = torch.full((1,), depth, device=expected.device)
        return self._survival(expected.log().unsqueeze(-1), depths).squeeze(-1)

    def take(
        self,
        budget: int,
        max_per_request: int,
        least_worth: float = 0.0,
        floors: torch.Tensor | None = None,
    ) -> DraftForest:
        """The slots of greatest worth, as a forest whose nodes fall in worth.

        Any prefix of a request's nodes may be verified instead of all of them. `path_logprobs` are
        the logarithms of what was expected of the slots before calibration.

        Args:
            budget: nodes of the batch, known before this drafting.
            max_per_request: nodes of one request.
            least_worth: slots of less are left out; known before this drafting, as a price is.
            floors: [R] int64, how many slots of each request stay whatever they are worth; known
                before this drafting. None for none.
        """
        worths = self._worths[:, 1:]
        stays = worths >= least_worth
        if floors is not None:
            stays |= places_in(best_first(worths)) < floors.unsqueeze(1)
        worths = worths.masked_fill(~stays, NO_SLOT)
        tiers = torch.zeros(worths.shape, dtype=torch.int32, device=worths.device)
        columns, cu_nodes = ops.select_budget(worths, tiers, self._parents, budget, max_per_request)
        owner = torch.searchsorted(
            cu_nodes[1:].long(), torch.arange(len(columns), device=columns.device), right=True
        )
        is_node = (columns >= 0) & (owner < self.num_requests)
        owner, columns = owner[is_node], columns[is_node]
        place = torch.arange(len(columns), device=columns.device) - cu_nodes[:-1].long()[owner]
        position = self._keys.new_full(self._keys.shape, ROOT)
        position[owner, columns + 1] = place
        above = self._parents[owner, columns]
        fields = download(
            self._token_ids[owner, columns].to(torch.int32),
            position[owner, above + 1].to(torch.int32),
            self._depths_of(columns).to(torch.int32),
            self._expected[owner, columns + 1].log(),
            cu_nodes,
            columns,
        )
        return DraftForest(*fields)

    # ---- Where the host sees no tree ----

    @property
    def worths(self) -> torch.Tensor:
        """[R, P] float32, of all slots; NO_SLOT where there is none."""
        return self._worths[:, 1:]

    @property
    def path_logprobs(self) -> torch.Tensor:
        """[R, P] float32, logarithms of what was expected of the slots before calibration; NO_SLOT
        where there is none."""
        return self._expected[:, 1:].log().masked_fill(self.worths == NO_SLOT, NO_SLOT)

    @property
    def parents(self) -> torch.Tensor:
        """[R, P] int64, columns, or ROOT."""
        return self._parents

    def depths(self) -> torch.Tensor:
        """[P] int64, the depth of every column."""
        return self._depths_of(torch.arange(self._parents.shape[1], device=self._keys.device))

    def tree_of(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `CandidatePool.tree_of`."""
        return self._token_ids.gather(1, columns), parents_in(self._parents, columns)

    def deciding(self, trees: RankedTrees) -> tuple[torch.Tensor, torch.Tensor]:
        """`rows_of`, of trees that were made of this pool's columns: both [R, 1 + n], of the root
        and the nodes of each request; int32 and float64, on the device. Rows of q are those of the
        request, -1 also behind the last node."""
        places = torch.nn.functional.pad(trees.columns + 1, (1, 0))
        # The last place is nobody's, and takes what is no node.
        is_node = trees.tiers < FILLER_TIER
        num_places = places.shape[1]
        above = torch.where(is_node, trees.parents.to(torch.int64) + 1, num_places)
        is_parent = is_node.new_zeros(len(above), num_places + 1).scatter(1, above, True)
        rows = self._rows.gather(1, places).masked_fill(~is_parent[:, :-1], -1)
        return rows, uniforms(self._keys.gather(1, places), Stream.ACCEPT)

    @property
    def level_starts(self) -> list[int]:
        """The first column of every level."""
        return self._starts[1:-1]

    def _depths_of(self, columns: torch.Tensor) -> torch.Tensor:
        """int64, the depths of `columns`, whatever their shape."""
        starts = upload(torch.tensor(self._starts[1:]), columns.device)
        return torch.searchsorted(starts, columns.contiguous(), right=True)

    def best(
        self, requests: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The slots of greatest worth, [n, min(count, P)] each.

        Args:
            requests: [n] int64, on the host, whose.
            count: slots of each.

        Returns:
            columns: int64.
            scores: float32, what was expected of each, as `path_logprobs` of `take`; -inf: no slot.
            depths: int64.
        """
        own = upload(requests, self._keys.device)
        columns = best_first(self._worths[own, 1:])[:, :count]
        scores = self._expected[own, 1:].gather(1, columns).log()
        return columns, scores, self._depths_of(columns)

    def first_scores(self) -> torch.Tensor:
        """[R] float32, the score of each request's slot of greatest worth, as of `best`: its first
        one, because none is worth more than an earlier sibling or than its parent; -inf: no slot.
        """
        return self._expected[:, 1:2].flatten().log()

    def promises_of(self, requests: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What all nodes of `requests` ([n], on the host) promise and their parents, [n, P]."""
        own = upload(requests, self._keys.device)
        return self._promises[own, 1:], self._parents[own]

    def candidates(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All slots, for a record, on the host.

        Returns:
            scores: [R, P] float32, nats, as `path_logprobs` of `take`; NO_SLOT: there is none.
            parents: [R, P] int64, columns, or ROOT.
        """
        scores, parents = download(self.path_logprobs, self._parents)
        return scores, parents

    def draft_probs(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, V_draft] float32, q of `rows` ([n] int64, on the host, ascending), which `rows_of`
        names."""
        parts, first = [], 0
        for probs in self._draft_probs:
            own = rows[(rows >= first) & (rows < first + len(probs))] - first
            first += len(probs)
            if len(own):
                parts.append(probs[upload(own, probs.device)])
        return torch.cat(parts) if parts else self._draft_probs[0][:0]

    def rows_of(self, forest: DraftForest) -> tuple[torch.Tensor, torch.Tensor]:
        """What decides about a forest of this pool, or about a prefix of one: per row of its trees
        (the root, then the nodes of each request)

        Returns:
            rows: [K + R] int64, the row of q that its children were drawn from; -1 without
                children in the forest.
            uniforms: [K + R] float64, for `ops.sample_path`.

        Both are on the host.
        """
        assert forest.columns is not None, "a forest that was taken from a pool knows its columns"
        sizes = forest.cu_nodes.diff().long() + 1
        owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        starts = sizes.cumsum(0) - sizes
        places = torch.zeros(len(owner), dtype=torch.int64)
        is_node = torch.ones(len(owner), dtype=torch.bool)
        is_node[starts] = False
        places[is_node] = forest.columns + 1
        is_parent = torch.zeros(len(owner), dtype=torch.bool)
        is_parent[starts[owner[is_node]] + 1 + forest.parents] = True
        device = self._keys.device
        requests, columns = upload(owner, device), upload(places, device)
        numbers = uniforms(self._keys[requests, columns], Stream.ACCEPT)
        rows, numbers = download(self._rows[requests, columns], numbers)
        return rows.long().masked_fill(~is_parent, -1), numbers
