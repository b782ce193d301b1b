# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What a policy is: one class, with the model of its `echo` section, that decides what is drafted.

The engine holds two objects of a policy's class. The scheduler's makes a `DraftPlan` before every
drafting and learns from finished steps: whatever depends on times or on the past is decided there,
once for all ranks. The worker's, one on each tensor-parallel rank, follows the plan: before each
level it names the requests that go on, the nodes to expand (the frontier) and which of their
children become candidates; after the last level it selects the forest to verify. `expand` and
`select` are pure functions of the pool and of the `DraftBatch`, which are the same on every rank,
so all ranks decide alike. Nobody outside of `echo_vllm.policies` asks which policy it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from echo_vllm.config import EchoConfig
from echo_vllm.forecast import Costs, StepCost
from echo_vllm.forecast.drafter_profile import DrafterProfile
from echo_vllm.forecast.gains import usual_acceptance
from echo_vllm.forecast.plan import DraftPlan, Load
from echo_vllm.transfer import download, upload
from echo_vllm.trees.drawn import DrawnLevel, DrawnPool, OpenLevel, Survival
from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.pool import CandidatePool, Expansion, best_first, places_in
from echo_vllm.trees.ranked import RankedTrees


@dataclass(frozen=True)
class DraftBatch:
    """The batch that a drafting is for.

    Attributes:
        num_requests: R, requests that get a tree.
        num_decoding: requests that the next target forward will decode, R among them.
        plan: of this step.
        probes: [n] int64, those of the R requests that draft to full depth; on the host.
        depth_limits: [R] int64, on the host, levels that each request may have at most, whatever
            the policy wants: what it may still emit. None where no request is limited. The drafter
            takes a request out of `pool.active` at its limit (`CandidatePool.stop_at`).
    """

    num_requests: int
    num_decoding: int
    plan: DraftPlan = field(default_factory=DraftPlan)
    probes: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    depth_limits: torch.Tensor | None = None

    @classmethod
    def of(cls, num_requests: int) -> DraftBatch:
        """A batch of which nothing else is known."""
        return cls(num_requests, num_requests)

    def of_some(self, requests: NDArray[np.int64], other_nodes: int = 0) -> DraftBatch:
        """The batch that some of these requests are drafted for, ascending places in 0 .. R - 1.

        Args:
            requests: [r], which ones.
            other_nodes: what the other requests' trees have; to these ones they are rows of the
                target's forward as those of prompts are.
        """
        places = torch.from_numpy(requests)
        found = torch.isin(self.probes, places)
        return DraftBatch(
            len(requests),
            self.num_decoding,
            replace(self.plan, prefill_tokens=self.plan.prefill_tokens + other_nodes),
            torch.searchsorted(places, self.probes[found]),
            None if self.depth_limits is None else self.depth_limits[places],
        )

    @property
    def load(self) -> Load:
        """What of the scheduler's `Load` the plan brings along."""
        return Load(self.num_decoding, self.plan.prefill_tokens)

    @property
    def rows(self) -> int:
        """Rows that the next target forward has without any draft."""
        return self.num_decoding + self.plan.prefill_tokens


class Level(NamedTuple):
    """A level that grows next.

    Attributes:
        depth: of its nodes, 1-based.
        expansion: how it grows.
        requests: [A] int64, ascending, on the host: those that it grows for.
    """

    depth: int
    expansion: Expansion
    requests: torch.Tensor


@dataclass(frozen=True)
class Observation:
    """A finished step, as the scheduler tells it to its policy.

    On Model Runner V2 the drafter's first forward, over all rows, is part of `verify_s`, and
    `committed` counts the requests that were drafted for.

    Attributes:
        rows: rows of the target's forward; 0 where there is no time to learn from.
        num_nodes: draft nodes among them.
        rested: whether the step was vLLM's own.
        verify_s: seconds of that forward, with sampling and commit.
        other_s: seconds between the last step and this one; None if that was a lack of requests.
        draft_s: seconds of the drafting at the end of the step.
        committed: tokens that went through the drafter to bring its cache up to date; 0 where the
            time of the drafting is not known.
        level_rows: rows of each further drafter forward.
        report: what the worker's policy said (`DraftPolicy.report`); None after a rest, of which
            it is not asked.
        sampled_report: the same of the trees of best candidates whose requests have a temperature;
            `report` has those of the others.
        drawn_report: the same of drawn candidates (`DraftPolicy.report_drawn`).
    """

    rows: int = 0
    num_nodes: int = 0
    rested: bool = False
    verify_s: float = 0.0
    other_s: float | None = None
    draft_s: float = 0.0
    committed: int = 0
    level_rows: Sequence[int] = ()
    report: dict[str, Any] | None = None
    sampled_report: dict[str, Any] | None = None
    drawn_report: dict[str, Any] | None = None


@dataclass(frozen=True)
class Cut:
    """Where trees of drawn candidates end. All numbers are known before anything is drawn.

    Attributes:
        max_nodes: the most nodes of one request.
        least_worth: slots that are worth less are not verified.
        floor: slots of greatest worth of each request that are, whatever they are worth.
        probed: the same of a probe.
    """

    max_nodes: int
    least_worth: float = 0.0
    floor: int = 0
    probed: int = 0


class DraftPolicy(ABC):
    """Decides what is drafted and what is verified.

    Class attributes:
        Config: the model of the `echo` section; its `policy` is a Literal of the policy's name.
        without_profile: what a missing profile of the drafter means, as the end of "it works, but
            ..."; None for a policy that reads none. One that does has the field `profile`.
        not_traced: why a trace cannot hold its drafts; None if it can.
        learns: whether `observe` changes what it decides. A replay lets it settle first.
        draws: whether its trees may have drawn candidates (docs/drawn.md).
        has_fixed_size: whether every tree has `num_nodes` nodes, whatever the request and the step.
            Such a policy has `columns`, too.
        has_order: whether a request's nodes are served in an order that neither the budget nor
            another request changes: then it has `ranked`.

    Attributes, which `__init__` may set as well:
        needs_cost: whether it asks what forwards cost; the engine then measures at start-up.
        may_rest: whether a plan may say that nobody drafts; the drafter then holds tokens back.
        wants_logits: whether the worker's object gets `observe_logits`.
        max_depth: levels of the deepest tree.
        num_ranks: how many of the drafter's best tokens are asked for after every node (k).
        max_frontier: the most nodes of one request that one drafter forward expands.
        k_max: the most nodes of the batch, prompt tokens included; None for no such limit.
        column_ranks: of a fixed shape, per column of the pool the place among the drafter's best
            tokens after its parent; None where children take the places from the first one on.
        acceptance: how probably a drawn token is accepted, by the probability that it was drawn
            with: what slots of drawn candidates are expected to be worth follows from it. None for
            a shape that is fixed, where all slots are worth the same.
    """

    Config: ClassVar[type[EchoConfig]]
    without_profile: ClassVar[str | None] = None
    not_traced: ClassVar[str | None] = None
    learns: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    has_fixed_size: ClassVar[bool] = False
    has_order: ClassVar[bool] = False

    needs_cost: bool = False
    may_rest: bool = False
    wants_logits: bool = False
    k_max: int | None = None
    column_ranks: Sequence[int] | None = None
    acceptance: Callable[[torch.Tensor], torch.Tensor] | None = usual_acceptance

    def __init__(
        self, config: EchoConfig, max_nodes: int, profile: DrafterProfile | None = None
    ) -> None:
        """
        Args:
            config: of the class `Config`, filled in.
            max_nodes: the most nodes of one request (N, num_speculative_tokens).
            profile: of the drafter, for a policy that reads one; None takes built-in values.
        """
        self.max_nodes = max_nodes
        self.max_depth = config.max_depth
        self.num_ranks = config.top_k
        self.max_frontier = config.top_k

    @property
    def are_chains(self) -> bool:
        """Whether each of its trees is one path."""
        return self.max_frontier == 1 == self.num_ranks

    # ---- In the scheduler's process ----

    def set_cost(self, cost: StepCost) -> None:  # noqa: B027  (nothing, by default)
        """What steps cost, as measured at start-up; comes once, if `needs_cost`."""

    def costs(self) -> Costs | None:
        """What steps cost as far as is known; None for a policy that does not ask."""
        return None

    def plan(self, load: Load) -> DraftPlan:
        """What the worker is told for the drafting at the end of the step just scheduled."""
        return DraftPlan()

    def batch_limit(self, load: Load) -> int | None:
        """The most draft nodes of the whole batch in one step; None for N a request."""
        return None if self.k_max is None else max(0, self.k_max - load.prefill_tokens)

    def request_limit(self, load: Load) -> int:
        """The most nodes of one request in one step."""
        return self.max_nodes

    def equal_part(self, load: Load, num_requests: int) -> int:
        """Nodes of each of `num_requests` that have equal parts of `batch_limit`."""
        limit = self.batch_limit(load)
        if limit is None:
            return self.max_nodes
        return min(self.max_nodes, limit // max(1, num_requests))

    def num_nodes_of(
        self, load: Load, sizes: Sequence[int], plan: DraftPlan, num_probes: int
    ) -> int:
        """Nodes that the trees of a batch have in all, where the device says who gets them.

        Args:
            load: of that batch.
            sizes: of its trees, the most nodes that each can have as far as is known.
            plan: that they were drafted by.
            num_probes: how many of them are probes.
        """
        most, limit = sum(sizes), self.batch_limit(load)
        return most if limit is None else min(most, limit)

    def observe(self, step: Observation) -> None:  # noqa: B027
        """Learn from a finished step."""

    # ---- In the worker's process, the same on every rank ----

    def level_widths(self) -> Sequence[int]:
        """Of how many nodes of a request a level below the root may be."""
        return (self.max_frontier,)

    def expand(self, depth: int, pool: CandidatePool, batch: DraftBatch) -> Expansion | None:
        """How the level `depth` (1-based) grows; called with all levels above it in the pool.

        Only requests of `pool.active`, at least one, may go on. None ends the drafting. The first
        level always grows. By default each level expands the `max_frontier` best nodes of the one
        above, as EAGLE-2 does.
        """
        return pool.expand_best(depth, self.max_frontier)

    def levels(self, pool: CandidatePool, batch: DraftBatch) -> Iterator[Level]:
        """Every level that grows, in turn; whoever asks appends it (`CandidatePool.grow`) before
        the next one."""
        for depth in range(1, self.max_depth + 1):
            if not pool.stop_at(depth, batch.depth_limits):
                return
            expansion = self.expand(depth, pool, batch)
            if expansion is None:
                return
            requests = expansion.requests
            yield Level(depth, expansion, pool.active if requests is None else requests)

    @abstractmethod
    def select(self, pool: CandidatePool, batch: DraftBatch) -> DraftForest:
        """The forest to verify: topological, ancestor-closed, any prefix of a tree a tree.

        Columns with NO_CANDIDATE belong to requests that stopped above; they are no nodes.
        """

    # ---- Drawn candidates, where `draws`: slots are given out before their tokens are drawn. ----

    @property
    def drawn_ranks(self) -> int:
        """Children of a node that are drawn at most (k)."""
        return self.num_ranks

    def drawn_cut(self, batch: DraftBatch) -> Cut:
        """Where the trees of a batch end, known before anything is drawn.

        Args:
            batch: all requests that draft, those with the best candidates among them.
        """
        return Cut(self.max_nodes)

    def drawn_rows(self, batch: DraftBatch, num_requests: int) -> int:
        """Nodes that the best candidates' requests must reckon with in the target's forward, for
        `num_requests` of the batch whose candidates are drawn; known before anything is drawn."""
        return num_requests * self.drawn_cut(batch).max_nodes

    def drawn_survival(self, batch: DraftBatch, device: torch.device) -> Survival | None:
        """Calibration of what slots are expected to be worth; None takes it as it is."""
        return None

    def planned(self, depth: int, requests: torch.Tensor, batch: DraftBatch) -> torch.Tensor:
        """[A] bool, on the host: which of `requests` ([A], on the host) may have nodes of a depth,
        by what was decided before the drafting. Probes may in any case."""
        return torch.ones(len(requests), dtype=torch.bool)

    def promising(self, level: DrawnLevel, batch: DraftBatch) -> torch.Tensor | None:
        """[A] bool, on the pool's device: which of the level's requests may have nodes below it, by
        what these promise; None where nobody is asked. Probes may in any case.

        What is said of a request follows from its own nodes, and from no other's: how many nodes it
        has must not depend on what is drawn for others, because a token budget compares them. And
        it follows from what its best node promises: a sum over nodes would let the token of one
        decide about slots that come before it.

        Args:
            level: the deepest one.
            batch: the requests whose candidates are drawn.
        """
        return None

    def going(self, level: DrawnLevel, batch: DraftBatch) -> torch.Tensor:
        """[A] bool, on the host: which of the level's requests may have nodes below it."""
        going = self.planned(level.depth + 1, level.requests, batch)
        if going.any() and (promising := self.promising(level, batch)) is not None:
            going = going & download(promising)[0]
        return going | torch.isin(level.requests, batch.probes)

    def drawn_parents(self, level: DrawnLevel, batch: DraftBatch) -> torch.Tensor:
        """[A, W] int64, the columns of the level to draw children under."""
        return level.best(self.max_frontier)

    def drawn_widths(self, level: OpenLevel) -> torch.Tensor:
        """[A, W] int64: children that each parent gets, `drawn_ranks` at most."""
        return torch.full(level.parents.shape, self.drawn_ranks, device=level.parents.device)

    def drawn_ranked(self, pool: DrawnPool, batch: DraftBatch, cut: Cut) -> RankedTrees:
        """`ranked`, of the requests whose candidates are drawn: the slots of greatest worth, the
        floors of `cut` before all others. A batch may share its nodes by them (docs/drawn.md)."""
        places = places_in(best_first(pool.worths))
        floors = torch.full((pool.num_requests, 1), cut.floor)
        floors[batch.probes] = max(cut.floor, cut.probed)
        tiers = torch.where(places < upload(floors, places.device), 0, 1).to(torch.int32)
        return RankedTrees.best(pool, pool.worths, tiers, self.max_nodes)

    def report_drawn(
        self,
        *,
        verified: DraftForest,
        num_accepted: torch.Tensor,
        pool: DrawnPool | None,
        probes: torch.Tensor,
    ) -> dict[str, Any] | None:
        """`report`, of requests whose candidates are drawn; the probes are of their batch."""
        return None

    @property
    def num_nodes(self) -> int:
        """n, the nodes of every tree, if `has_fixed_size`."""
        return self.max_nodes

    def columns(self, pool: CandidatePool) -> torch.Tensor:
        """[R, n] int64, what `select` takes of the pool, on its device, if `has_fixed_size`."""
        raise NotImplementedError

    def ranked(self, pool: CandidatePool, batch: DraftBatch) -> RankedTrees:
        """What `select` chooses from, on the pool's device, if `has_fixed_size` or `has_order`.

        That is how trees are chosen where the host never sees one. It must not ask the device
        either: `expand` finds a pool that is unseen.
        """
        return RankedTrees.of(pool, self.columns(pool))

    def observe_logits(  # noqa: B027
        self, tokens: torch.Tensor, logits: torch.Tensor
    ) -> None:
        """Learn from a forward of the target, before anything masks its logits.

        Args:
            tokens: [n] int, the tokens of the rows that logits were computed for.
            logits: [n, V], what the target said after each; not changed.
        """

    def report(
        self,
        *,
        verified: DraftForest,
        num_accepted: torch.Tensor,
        pool: CandidatePool | None,
        probes: torch.Tensor,
    ) -> dict[str, Any] | None:
        """What the scheduler's policy is to learn from a step, as numbers and lists.

        Args:
            verified: the trees of the step, on the host.
            num_accepted: [R] int, accepted nodes of each of them, on the host.
            pool: the candidates of the drafting at the end of the step; None without one.
            probes: of the batch of that drafting.
        """
        return None

    # ---- The same where the host never sees a tree: two parts of it on the device. ----

    def notes_of_verified(
        self, path_logprobs: torch.Tensor, depths: torch.Tensor, num_accepted: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """What is to be known of a verification; nothing may wait for the device.

        Args:
            path_logprobs: [K] float32, of all nodes; NO_CANDIDATE of rows that only fill up.
            depths: [K] int32.
            num_accepted: [R] int32, accepted nodes of each tree.
        """
        return ()

    def notes_of_drafted(
        self, pool: CandidatePool | None, trees: RankedTrees, probes: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The same of a drafting.

        Args:
            pool: the best candidates; None where all are drawn.
            trees: of the whole batch.
            probes: of the requests of `pool`, on the host.
        """
        return ()

    def report_of_notes(
        self, verified: Sequence[NDArray[Any]], drafted: Sequence[NDArray[Any]]
    ) -> dict[str, Any] | None:
        """`report`, of the notes of a step; empty where nothing was verified or drafted."""
        return None

    def notes_of_verified_drawn(
        self, path_logprobs: torch.Tensor, depths: torch.Tensor, num_accepted: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """`notes_of_verified`, of drawn candidates."""
        return ()

    def notes_of_drawn(self, pool: DrawnPool, probes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`notes_of_drafted`, of drawn candidates alone."""
        return ()

    def report_of_drawn_notes(
        self, verified: Sequence[NDArray[Any]], drafted: Sequence[NDArray[Any]]
    ) -> dict[str, Any] | None:
        """`report_drawn`, of the notes of a step; empty where nothing was verified or drafted."""
        return None
