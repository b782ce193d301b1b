# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`auto`: as many nodes as pay for themselves, batch-wide.

The batch budget is not given, it is chosen (`cost_aware`), with calibrated probabilities of
acceptance that are corrected while serving.

How deep to draft is decided in the same currency. A request goes one level deeper if the tokens
that the level is expected to add are worth more than the time that drafting and verifying it
takes, at the current price of a second in tokens; a level is drafted if all requests that go on
pay together for what it costs whoever goes on. Whether to draft at all, and down to which level,
is in the plan.

Where the host never sees a tree, a level costs the same whoever goes on, so all do, down to the
plan's level.

Of drawn candidates nothing may be chosen by what was drawn, so the forecast chooses: of the drafts
that it remembers it takes as many nodes as pay, and what the last of them is worth is what a slot
must be worth now. Depth is each request's own matter: it pays for its share of a level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from echo_vllm.forecast.drafter_profile import DrafterProfile
from echo_vllm.forecast.forecaster import PROBED_NODES, Forecaster, Kind
from echo_vllm.forecast.plan import DraftPlan, Load
from echo_vllm.forecast.survival import SurvivalModel, counted
from echo_vllm.policies.base import Cut, DraftBatch, Observation
from echo_vllm.policies.cost_aware import CostAwareConfig, CostAwarePolicy
from echo_vllm.policies.elastic import Floor, Profile
from echo_vllm.transfer import download, upload
from echo_vllm.trees.drawn import NO_SLOT, DrawnLevel, DrawnPool, Survival
from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.pool import NO_CANDIDATE, CandidatePool, Expansion, best_first
from echo_vllm.trees.ranked import RankedTrees

NO_FIRST = 0.0, 0.0
"""`first_of` no request."""

Sample = tuple[list[float], list[int], list[int]]
"""Path log-probabilities, depths and least widths of a draft's best candidates."""

DEFAULT_GROWTH = 0.6
"""Without a profile: how often an accepted node has an accepted child."""


class AutoConfig(CostAwareConfig):
    """The section of `auto`."""

    policy: Literal["auto"] = Field(
        default="auto",
        description=(
            "As `echo`, but the budget is what maximises the predicted tokens per second, and may "
            "be nothing. The default policy."
        ),
    )
    floor: Floor = None
    profile: Profile = None

    def filled(self, num_nodes: int) -> Self:
        config = super().filled(num_nodes)
        return config.with_fields(floor=self.checked_floor(self.floor, 0, num_nodes))


class AutoPolicy(CostAwarePolicy):
    """Budget and depth by expected tokens a second."""

    Config = AutoConfig
    without_profile = (
        "it takes the head's own probabilities for true until it has seen enough nodes"
    )
    learns = True
    may_rest = True
    draws = True

    def __init__(
        self, config: AutoConfig, max_nodes: int, profile: DrafterProfile | None = None
    ) -> None:
        assert config.floor is not None  # `filled` sets it.
        super().__init__(
            config,
            max_nodes,
            survival=(
                SurvivalModel.default(config.max_depth) if profile is None else profile.survival()
            ),
            floor=config.floor,
        )
        self.growth = _growth(profile, config.max_depth)
        self.drawn_model = (
            SurvivalModel.default(config.max_depth)
            if profile is None or profile.drawn is None
            else profile.drawn.survival()
        )
        self.forecaster = Forecaster(
            survival=self.survival,
            max_depth=self.max_depth,
            frontier=self.max_frontier,
            k_max=self.k_max,
            online=self.online,
            drawn=self.drawn_model,
        )

    # ---- In the scheduler's process ----

    def plan(self, load: Load) -> DraftPlan:
        return self.forecaster.plan(load, self.costs())

    def observe(self, step: Observation) -> None:
        super().observe(step)
        reports: dict[Kind, dict[str, Any] | None] = {
            "best": step.report,
            "drawn": step.drawn_report,
        }
        for kind, report in reports.items():
            if report is None:  # A rest, or nobody draws.
                self.forecaster.observe_acceptance([], [], kind)
                continue
            count, total = report["first"]
            self.forecaster.observe_first(count, total, kind)
            for scores, depths, widths in report["samples"]:
                self.forecaster.observe_draft(scores, depths, widths, kind)
            self.forecaster.observe_acceptance(report["predicted"], report["accepted"], kind)
        sampled = step.sampled_report or {"predicted": [], "accepted": []}
        self.forecaster.observe_acceptance(sampled["predicted"], sampled["accepted"], sampled=True)

    # ---- In the worker's process ----

    def level_widths(self) -> tuple[int, ...]:
        return self.forecaster.widths

    def frontier_of(self, batch: DraftBatch) -> int:
        # Every request of a level has as many rows, and a probe shows what the widest trees bring.
        width = batch.plan.width
        return self.max_frontier if width is None or len(batch.probes) else width

    def expand(self, depth: int, pool: CandidatePool, batch: DraftBatch) -> Expansion | None:
        if depth == 1:
            return Expansion(frontier=None, children=None)
        requests, plan = pool.active, batch.plan
        frontier = pool.best_frontier(depth - 1, self.frontier_of(batch), requests)
        going = np.ones(len(requests), np.bool_)
        if plan.max_depth is not None and depth > plan.max_depth:
            going[:] = False
        elif plan.cost is not None and plan.price > 0 and not pool.unseen:
            going = self._pays(depth, frontier, pool, batch)
        if len(batch.probes):
            going |= np.isin(requests.numpy(), batch.probes.numpy())
        kept = np.flatnonzero(going)
        if len(kept) < len(requests):
            chosen = torch.from_numpy(kept)
            requests, frontier = requests[chosen], frontier[pool.on_device(chosen)]
        return Expansion(frontier, None, requests) if len(requests) else None

    def _pays(
        self, depth: int, frontier: torch.Tensor, pool: CandidatePool, batch: DraftBatch
    ) -> NDArray[np.bool_]:
        """[A] bool: which of the active requests are worth another level."""
        plan = batch.plan
        assert plan.cost is not None
        survival = pool.rows_of(pool.active, self.probabilities(pool, batch))
        (reached,) = download(survival.gather(1, frontier).sum(1))
        growth = (plan.growth or self.growth)[depth - 2]
        gain = reached.clamp(max=1.0).double().numpy() * growth
        num_active, width = frontier.shape
        level, verify = plan.cost.draft_level, plan.cost.verify
        # Of a whole level's costs, what one request more or less changes, and what none does.
        each = (float(level(num_active * width)) - float(level(width))) / max(1, num_active - 1)
        fixed = max(0.0, float(level(width)) - each)
        each += (float(verify(batch.rows + num_active)) - float(verify(batch.rows))) / num_active
        net = gain - plan.price * each
        order = np.argsort(-net, kind="stable")
        going = np.zeros(num_active, dtype=bool)
        if np.maximum(net, 0).sum() > plan.price * fixed:
            going[order[: int((net > 0).sum())]] = True
        return going

    def report(
        self,
        *,
        verified: DraftForest,
        num_accepted: torch.Tensor,
        pool: CandidatePool | None,
        probes: torch.Tensor,
    ) -> dict[str, Any]:
        """Per depth how many nodes were accepted and how many the calibration predicts of those
        verified; of a drafting what the forecast remembers (`samples`), and how its requests
        begin (`first`: how many, and the sum of the probabilities of their best first nodes)."""
        counts = _counted_in(self.survival, verified, num_accepted)
        if pool is None:
            return {**counts, "samples": [], "first": NO_FIRST}
        (best,) = download(pool.best_of_level(1))
        first = tuple(first_of(self.survival, best).tolist())
        return {**counts, "samples": self.samples(pool, probes), "first": first}

    def notes_of_verified(
        self, path_logprobs: torch.Tensor, depths: torch.Tensor, num_accepted: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        chances = self._survival_on(depths.device).probability(path_logprobs, depths)
        return (counted(chances, depths, num_accepted, self.max_depth),)

    def notes_of_drafted(
        self, pool: CandidatePool | None, trees: RankedTrees, probes: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        gains = super().notes_of_drafted(pool, trees, probes)
        if pool is None:
            return gains
        first = first_of(self._survival_on(pool.device), pool.best_of_level(1))
        return *gains, first, *self._remembered(pool, probes)

    def report_of_notes(
        self, verified: Sequence[NDArray[Any]], drafted: Sequence[NDArray[Any]]
    ) -> dict[str, Any] | None:
        if not verified and not drafted:
            return None
        return {
            **(super().report_of_notes(verified, drafted[:1]) or {}),
            **_as_lists(verified[0] if verified else np.zeros((2, 0))),
            "first": tuple(drafted[1].tolist()) if len(drafted) > 1 else NO_FIRST,
            "samples": _drafts_of(drafted[2:]),
        }

    def notes_of_verified_drawn(
        self, path_logprobs: torch.Tensor, depths: torch.Tensor, num_accepted: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        model = self._survival_on(depths.device, self.drawn_model)
        chances = model.probability(path_logprobs, depths)
        return (counted(chances, depths, num_accepted, self.max_depth),)

    def notes_of_drawn(self, pool: DrawnPool, probes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        best = pool.first_scores()
        first = first_of(self._survival_on(best.device, self.drawn_model), best)
        return first, *self._remembered_drawn(pool, probes)

    def report_of_drawn_notes(
        self, verified: Sequence[NDArray[Any]], drafted: Sequence[NDArray[Any]]
    ) -> dict[str, Any] | None:
        if not verified and not drafted:
            return None
        return {
            **_as_lists(verified[0] if verified else np.zeros((2, 0))),
            "first": tuple(drafted[0].tolist()) if drafted else NO_FIRST,
            "samples": _existing(drafted[1:]),
        }

    def samples(self, pool: CandidatePool, probes: torch.Tensor) -> list[Sample]:
        """What the forecast remembers of each probe that drafted to full depth.

        Of no other request, even if it was drafted as deep: those are the promising ones.
        """
        return _drafts_of([field.numpy() for field in download(*self._remembered(pool, probes))])

    def _remembered(self, pool: CandidatePool, probes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`samples` on the pool's device: log-probabilities, depths and least widths
        [probes, max_nodes], and whether each drafted to full depth, as the score of a node there.
        Empty without any."""
        if pool.num_levels < self.max_depth or not len(probes):
            return ()
        best = pool.rows_of(probes, pool.best_first())[:, : self.max_nodes]
        logprobs = pool.rows_of(probes, pool.path_logprobs)
        parents = pool.rows_of(probes, pool.parents)
        widths = least_widths(logprobs, parents, pool.level_starts, self.forecaster.widths)
        return (
            logprobs.gather(1, best),
            pool.depths()[best],
            widths.gather(1, best),
            logprobs[:, pool.level_starts[-1]].contiguous(),
        )

    # ---- Drawn candidates ----

    @property
    def drawn_ranks(self) -> int:
        """A few draws are worth more than twice as many best tokens."""
        return self.max_frontier

    def drawn_cut(self, batch: DraftBatch) -> Cut:
        nodes = self.equal_part(batch.load, batch.num_requests)
        return Cut(nodes, batch.plan.least_worth, self.floor, PROBED_NODES)

    def drawn_rows(self, batch: DraftBatch, num_requests: int) -> int:
        """What is expected, but where there is a hard limit what there may be."""
        nodes = self.drawn_cut(batch).max_nodes
        expected = nodes if self.k_max is not None else min(nodes, math.ceil(batch.plan.nodes))
        return num_requests * expected

    def drawn_survival(self, batch: DraftBatch, device: torch.device) -> Survival:
        model = self._survival_on(device, self.drawn_model)
        if batch.plan.drawn_factors:
            factors = upload(torch.tensor(batch.plan.drawn_factors), device)
            model = model.with_factors(factors)
        return model.probability

    def planned(self, depth: int, requests: torch.Tensor, batch: DraftBatch) -> torch.Tensor:
        limit = batch.plan.max_depth
        return torch.full((len(requests),), limit is None or depth <= limit)

    def promising(self, level: DrawnLevel, batch: DraftBatch) -> torch.Tensor | None:
        """Whoever's best node promises as many tokens as a request's share of the level costs.
        Where the host does not know who goes on, a level costs the same in any case."""
        plan = batch.plan
        if plan.cost is None or plan.price <= 0 or level.unseen:
            return None
        rows = batch.num_requests * self.frontier_of(batch)
        seconds = float(plan.cost.draft_level(rows)) / batch.num_requests
        growth = (plan.growth or self.growth)[level.depth - 1]
        best = level.promises.amax(1)
        # Nor can a child be worth more than its parent promises.
        return (best * growth > plan.price * seconds) & (best >= plan.least_worth)

    def drawn_parents(self, level: DrawnLevel, batch: DraftBatch) -> torch.Tensor:
        return level.best(self.frontier_of(batch))

    def report_drawn(
        self,
        *,
        verified: DraftForest,
        num_accepted: torch.Tensor,
        pool: DrawnPool | None,
        probes: torch.Tensor,
    ) -> dict[str, Any]:
        samples = []
        first = NO_FIRST
        if pool is not None:
            (best,) = download(pool.first_scores())
            first = tuple(first_of(self.drawn_model, best).tolist())
            remembered = download(*self._remembered_drawn(pool, probes))
            samples = _existing([field.numpy() for field in remembered])
        counts = _counted_in(self.drawn_model, verified, num_accepted)
        return {**counts, "samples": samples, "first": first}

    def _remembered_drawn(self, pool: DrawnPool, probes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of the probes that drafted to full depth (see `samples`) the scores, depths and least
        widths of their slots [probes, n], on the pool's device. Empty without any."""
        full = probes[torch.isin(probes, pool.active)]
        if pool.depth < self.max_depth or not len(full):
            return ()
        promises, parents = pool.promises_of(full)
        columns, scores, depths = pool.best(full, self.max_nodes)
        needed = least_widths(promises, parents, pool.level_starts, self.forecaster.widths)
        return scores, depths, needed.gather(1, columns)


def least_widths(
    scores: torch.Tensor, parents: torch.Tensor, level_starts: Sequence[int], widths: Sequence[int]
) -> torch.Tensor:
    """[A, P] int64: the least of the rising `widths` of the frontier with which the trees of A
    requests would have each candidate; the last one where none of the others would.

    Args:
        scores: [A, P] float32, by which the nodes of a level are expanded.
        parents: [A, P] int64, columns, or ROOT.
        level_starts: the first column of every level.
        widths: as said.
    """
    least = torch.full_like(parents, widths[-1])
    num_columns = scores.shape[1]
    for width in reversed(widths[:-1]):
        # Whether a candidate is expanded; the last column stands for the root.
        expanded = scores.new_zeros(len(scores), num_columns + 1, dtype=torch.bool)
        expanded[:, -1] = True
        for start, stop in pairwise([*level_starts, num_columns]):
            level = slice(start, stop)
            exists = expanded.gather(1, parents[:, level] % expanded.shape[1])
            least[:, level].masked_fill_(exists, width)
            there = scores[:, level].masked_fill(~exists, NO_CANDIDATE)
            best = best_first(there)[:, :width]
            expanded.scatter_(1, best + start, exists.gather(1, best))
    return least


def first_of(survival: SurvivalModel, best: torch.Tensor) -> torch.Tensor:
    """[2] float32: how many requests have a first node, with the scores `best` [R], and the sum of
    the probabilities that it is accepted. Nothing waits for the device."""
    chances = survival.probability(best, torch.ones_like(best, dtype=torch.int64))
    return torch.stack([(best > NO_CANDIDATE).sum().to(chances.dtype), chances.sum()])


def _counted_in(
    survival: SurvivalModel, verified: DraftForest, num_accepted: torch.Tensor
) -> dict[str, Any]:
    """Per depth how many verified nodes were accepted and how many the calibration predicts."""
    depths = verified.depths.to(torch.int64)
    if not len(depths):
        return _as_lists(np.zeros((2, 0)))
    chances = survival.probability(verified.path_logprobs, depths)
    return _as_lists(counted(chances, depths, num_accepted, int(depths.max())).numpy())


def _as_lists(found: NDArray[Any]) -> dict[str, Any]:
    """What `counted` found, down to the deepest node that was verified."""
    deepest = 1 + int(np.flatnonzero(found.any(0)).max(initial=-1))
    predicted, accepted = found[:, :deepest]
    return {"predicted": predicted.tolist(), "accepted": accepted.astype(int).tolist()}


def _drafts_of(fields: Sequence[NDArray[Any]]) -> list[Sample]:
    """`AutoPolicy._remembered` as lists, of those that drafted to full depth."""
    if not fields:
        return []
    drafts = zip(*(field.tolist() for field in fields), strict=True)
    return [tuple(draft) for *draft, last in drafts if last > NO_CANDIDATE]


def _existing(fields: Sequence[NDArray[Any]]) -> list[Sample]:
    """`AutoPolicy._remembered_drawn` as lists, of the slots that there are."""
    found = []
    for own, levels, widths in zip(*fields, strict=True):
        exists = own > NO_SLOT
        found.append((own[exists].tolist(), levels[exists].tolist(), widths[exists].tolist()))
    return found


def _growth(profile: DrafterProfile | None, max_depth: int) -> list[float]:
    """How often depth d + 1 is accepted where depth d is, for d = 1 .. max_depth - 1."""
    growth: list[float] = []
    if profile is not None:
        growth = [
            min(1.0, below.acceptance / above.acceptance) if above.acceptance > 0 else 0.0
            for above, below in pairwise(profile.depths)
        ]
    last = growth[-1] if growth else DEFAULT_GROWTH
    return (growth + [last] * max_depth)[: max_depth - 1]
