# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The pool of drawn candidates: slots are given out before what goes into them is drawn.

Whether a drawn token is verified must not depend on the token itself, nor on what hangs below it
(docs/drawn.md). So a level is grown in two steps. `DrawnPool.open` gives an `OpenLevel`: the worth
of every slot, from the parents and from expectations alone. A policy sees no more than that when
it says how many children each parent gets. Only then `fill` takes the draws; from then on their
scores decide who gets children, never who stays. The forest is the slots of greatest worth, in
which a slot is never worth more than the one above it or an earlier sibling: the order of falling
worth is an order in which all of it could have been drawn one by one, so cutting by it anywhere is
sound, as long as where to cut does not follow from slots behind the cut.

The counterpart for certain candidates is `pool.CandidatePool`. Nothing here knows a policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from echo_vllm import ops
from echo_vllm.transfer import download
from echo_vllm.trees.draws import Draws, Stream, uniforms
from echo_vllm.trees.forest import ROOT, DraftForest

NO_SLOT = float("-inf")
"""Worth of a column that holds no node."""


@dataclass(frozen=True)
class OpenLevel:
    """What may be known of a level before it is drawn. There are no children here.

    Attributes:
        depth: of the children, from 1.
        parents: [R, W] int64, columns of the pool, or ROOT.
        reaches: [R, W] float32 in 0..1, how probably each parent is on the accepted path, given its
            token; 0 where there is no such parent.
        worths: [R, W, k] float32, accepted tokens that each parent's first to k-th child is
            expected to add; not above the parent's own, nor above that of the sibling before.
    """

    depth: int
    parents: torch.Tensor
    reaches: torch.Tensor
    worths: torch.Tensor


class DrawnPool:
    """All drawn candidates of R requests, level after level; P columns a request."""

    def __init__(self, root_keys: torch.Tensor) -> None:
        """Args: root_keys: [R] int64, of `draws.root_keys`; the pool lives on their device."""
        requests, device = len(root_keys), root_keys.device
        # The first column is the root, so that ROOT is the place before the first node's.
        self._keys = root_keys.unsqueeze(1)
        self._reaches = torch.ones(requests, 1, device=device)
        self._worths = torch.ones(requests, 1, device=device)
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

    def best_parents(self, width: int) -> torch.Tensor:
        """[R, min(width, level)] int64, the columns of the deepest level to draw children under:
        those that are most probably reached, ties by column."""
        level = slice(self._starts[-2] + 1, self._starts[-1] + 1)
        order = self._reaches[:, level].argsort(dim=1, descending=True, stable=True)
        return order[:, :width] + self._starts[-2]

    def keys_of(self, parents: torch.Tensor) -> torch.Tensor:
        """[R, W] int64, the keys of nodes [R, W], for `draws.draw_children`."""
        return self._keys.gather(1, parents + 1)

    def tokens_of(self, parents: torch.Tensor) -> torch.Tensor:
        """[R, W] int64, the target's tokens of nodes [R, W], none of which may be the root."""
        return self._token_ids.gather(1, parents)

    def reaches(self, parents: torch.Tensor) -> torch.Tensor:
        """[R, W] float32 in 0..1, how probably each of the nodes [R, W] is on the accepted path,
        given all tokens drawn so far; 0 where there is no node."""
        return self._reaches.gather(1, parents + 1)

    def open(self, parents: torch.Tensor, gains: torch.Tensor) -> OpenLevel:
        """The level below `parents`, before anything is drawn.

        Args:
            parents: [R, W] int64, of the deepest level, each at most once; ROOT for the first one.
            gains: [R, W, k] float32 in 0..1, the probability that a parent's r-th child is the
                accepted one, given that the parent is (`forecast.gains.expected_gains`).

        Raises:
            ValueError: a parent is not of the deepest level.
        """
        if not ((parents >= self._starts[-2]) & (parents < self._starts[-1])).all():
            raise ValueError(
                f"parents must be columns {self._starts[-2]} to {self._starts[-1] - 1} of the "
                f"deepest level, got {parents.min()} to {parents.max()}"
            )
        reaches = self._reaches.gather(1, parents + 1)
        limits = self._worths.gather(1, parents + 1).clamp(min=0.0).unsqueeze(2)
        worths = torch.minimum(reaches.unsqueeze(2) * gains, limits).cummin(dim=2).values
        return OpenLevel(self.depth + 1, parents, reaches, worths)

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
            widths: [R, W] int64, children that each parent gets, made from `level` and what was
                known before it.
            draws: of the R * W parents, with k children each.
            target_ids: [R * W, k] int64, their tokens in the target's vocabulary.
            reaches: [R * W, k] float32, the probability that each child is the accepted one, given
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
        first_row = sum(len(probs) for probs in self._draft_probs)
        rows = torch.arange(first_row, first_row + requests * width, device=device)
        rows = rows.view(requests, width).to(torch.int32)
        self._rows.scatter_(1, level.parents + 1, rows)
        self._draft_probs.append(draws.probs)
        own = level.reaches.unsqueeze(2) * reaches.view(shape)
        for name, new in (
            ("_keys", draws.keys.view(shape)),
            ("_reaches", own.masked_fill(~exists, 0.0)),
            ("_worths", level.worths.masked_fill(~exists, NO_SLOT)),
            ("_rows", rows.new_full(shape, -1)),
            ("_parents", level.parents.unsqueeze(2).expand(shape)),
            ("_token_ids", target_ids.view(shape)),
        ):
            setattr(self, name, torch.cat([getattr(self, name), new.flatten(1)], 1))
        self._starts.append(self._parents.shape[1])

    def take(self, budget: int, max_per_request: int, least_worth: float = 0.0) -> DraftForest:
        """The slots of greatest worth, as a forest whose nodes fall in worth.

        Any prefix of a request's nodes may be verified instead of all of them. `path_logprobs` are
        the logarithms of the slots' worths.

        Args:
            budget: nodes of the batch, known before this drafting.
            max_per_request: nodes of one request.
            least_worth: slots of less are left out; known before this drafting, as a price is.
        """
        worths = self._worths[:, 1:]
        worths = worths.masked_fill(~(worths >= least_worth), NO_SLOT)
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
        level_starts = torch.tensor(self._starts[1:], device=columns.device)
        fields = download(
            self._token_ids[owner, columns].to(torch.int32),
            position[owner, above + 1].to(torch.int32),
            torch.searchsorted(level_starts, columns, right=True).to(torch.int32),
            worths[owner, columns].log(),
            cu_nodes,
            columns,
        )
        return DraftForest(*fields)

    def draft_probs(self) -> torch.Tensor:
        """[m, V_draft] float32, q of all rows that children were drawn from, for `sample_path`."""
        return torch.cat(self._draft_probs)

    def rows_of(self, forest: DraftForest) -> tuple[torch.Tensor, torch.Tensor]:
        """What `ops.sample_path` wants for a forest of this pool, or for a prefix of one.

        Returns:
            draft_rows: [K + R] int32, rows of `draft_probs`.
            uniforms: [K + R] float64.
        """
        assert forest.columns is not None, "a forest that was taken from a pool knows its columns"
        sizes = forest.cu_nodes.diff().long() + 1
        owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        places = torch.zeros(len(owner), dtype=torch.int64)
        is_root = torch.ones(len(owner), dtype=torch.bool)
        is_root[1:] = owner.diff() > 0
        places[~is_root] = forest.columns + 1
        owner, places = owner.to(self._keys.device), places.to(self._keys.device)
        keys = self._keys[owner, places]
        return self._rows[owner, places], uniforms(keys, Stream.ACCEPT)
