# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Requests served by a policy on a machine that costs what a `StepCost` says: no model, no vLLM,
and a clock that is only counted.

The drafter is a random one: of every node it draws how sure it is of the best child, and a child is
accepted as often as it is probable, times the prompts' `honesty`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from echo_vllm.forecast import StepCost
from echo_vllm.forecast.plan import DraftPlan, Load
from echo_vllm.forecast.turnover import Turnover
from echo_vllm.policies import DraftBatch, DraftPolicy, Observation
from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.pool import CandidatePool

WINDOW = 48
"""Tokens that a request catches up with at most."""

ENDLESS = 1 << 40


@dataclass(frozen=True)
class Prompts:
    """What is asked.

    Attributes:
        sure: how probable the drafter holds the best child, on average.
        spread: of that between requests.
        honesty: how often a child is accepted, over what the drafter says.
    """

    sure: float
    spread: float = 0.02
    honesty: float = 1.0


@dataclass
class Drafted:
    """The trees of a step that are verified in the next one.

    Attributes:
        accepted: [requests], how many nodes are accepted.
        expected: how many are to be expected in all.
    """

    forest: DraftForest
    accepted: NDArray[np.int64]
    expected: float = 0.0


@dataclass
class Serving:
    """Requests that decode side by side, served by `policy` on a machine that costs `true`.

    Attributes:
        requests: how many at the start.
        lengths: tokens of each of them; endless without.
        comes_again: whether another request begins where one ends.
        able: how many of them may have trees; all without.
        more_for_trees: seconds that a step with trees takes in the scheduler beyond one without.
        noise: of all times, as a standard deviation of their logarithm.
        dictated: a plan in place of the policy's.
    """

    policy: DraftPolicy
    true: StepCost
    prompts: Prompts
    requests: int = 1
    lengths: Sequence[int] | None = None
    comes_again: bool = False
    able: int | None = None
    more_for_trees: float = 0.0
    noise: float = 0.05
    seed: int = 0
    dictated: DraftPlan | None = None
    seconds: float = 0.0
    tokens: int = 0
    expected_seconds: float = 0.0
    expected_tokens: float = 0.0
    """What it would be on average, without noise and luck."""
    steps: list[tuple[int, bool, float, int]] = field(default_factory=list)
    """Of each step: requests, whether more than probes draft at its end, seconds, probes."""

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        count = self.requests
        lengths = [ENDLESS] * count if self.lengths is None else self.lengths
        self._whole = np.array(lengths, np.int64)
        self._left = self._whole.copy()
        self._sure = self._drawn(count)
        self._may_draft = np.arange(count) < (count if self.able is None else self.able)
        self._behind = np.ones(count, np.int64)
        self._turnover = Turnover()
        self._waiting = 0
        self._drafts = Drafted(DraftForest.empty(count), np.zeros(count, np.int64))

    def _drawn(self, count: int) -> NDArray[np.float64]:
        sure = self._random.normal(self.prompts.sure, self.prompts.spread, count)
        return np.clip(sure, 0.02, 0.98)

    def ask(self, prompts: Prompts) -> None:
        """From now on something else is asked."""
        self.prompts = prompts
        self._sure = self._drawn(len(self._sure))

    def load(self) -> Load:
        """As the scheduler would say it."""
        limits = np.clip(self._left - 2, 0, 32)[self._may_draft]
        at_least = [int((limits >= depth).sum()) for depth in range(1, 33)]
        ahead: tuple[float, ...] = ()
        if self.lengths is not None:
            ahead = self._turnover.ahead(self._left.tolist(), 0, 1024)
        return Load(
            len(self._left), waiting=self._waiting, num_drafting=tuple(at_least), ahead=ahead
        )

    def step(self) -> None:
        count = len(self._left)
        load = self.load()
        self._turnover.step(0)
        plan = self.policy.plan(load) if self.dictated is None else self.dictated
        true, before = self.true, self._drafts
        # The forward that verifies the last drafts.
        nodes = before.forest.num_nodes
        verify_s = float(true.verify(count + nodes)) * self._noise()
        other_s = (true.other + (self.more_for_trees if nodes else 0.0)) * self._noise()
        made = np.minimum(1 + before.accepted, self._left)
        self._left -= made
        self._behind = np.minimum(self._behind + made, WINDOW)
        # The next drafts.
        limits = self._left - 1
        drafting = np.flatnonzero(self._may_draft & (limits > 0))
        probes = plan.probed(len(drafting))
        if plan.max_depth == 0:
            drafting, probes = drafting[probes], list(range(len(probes)))
        batch = DraftBatch(
            len(drafting),
            count,
            plan,
            torch.tensor(probes, dtype=torch.int64),
            torch.from_numpy(limits[drafting]),
        )
        self._drafts = Drafted(DraftForest.empty(count), np.zeros(count, np.int64))
        levels: list[int] = []
        draft_s, committed, pool = 0.0, 0, None
        if len(drafting):
            pool, accepted, forest, levels = self._draft(batch, self._sure[drafting])
            committed = int(self._behind[drafting].sum())
            self._behind[drafting] = 0
            draft_s = float(true.draft(levels, committed)) * self._noise()
            every = np.zeros(count, np.int64)
            every[drafting] = accepted
            chances = forest.path_logprobs.exp() * self.prompts.honesty**forest.depths
            self._drafts = Drafted(forest, every, float(chances.sum()))
        self._waiting = int(self._behind[self._may_draft].sum())
        self.seconds += verify_s + draft_s + other_s
        self.tokens += int(made.sum())
        self.expected_tokens += count + before.expected
        self.expected_seconds += float(true.verify(count + nodes)) + true.other
        self.expected_seconds += self.more_for_trees if nodes else 0.0
        self.expected_seconds += float(true.draft(levels, committed)) if committed else 0.0
        self.steps.append(
            (count, plan.max_depth != 0, verify_s + draft_s + other_s, len(probes) if pool else 0)
        )
        report = None
        if pool is not None or nodes:
            report = self.policy.report(
                verified=before.forest,
                num_accepted=torch.from_numpy(before.accepted[: before.forest.num_requests]),
                pool=pool,
                probes=batch.probes,
            )
        self.policy.observe(
            Observation(
                rows=count + nodes,
                num_nodes=nodes,
                rested=pool is None and not nodes,
                verify_s=verify_s,
                other_s=other_s,
                draft_s=draft_s,
                committed=committed,
                level_rows=levels,
                report=report,
            )
        )
        self._end()

    def _end(self) -> None:
        """Requests that have all their tokens go, or others take their places."""
        ended = self._left <= 0
        for whole in self._whole[ended].tolist():
            self._turnover.ended(whole, whole)
        if self.comes_again:
            self._left[ended] = self._whole[ended]
            self._sure[ended] = self._drawn(int(ended.sum()))
            self._behind[ended] = WINDOW
            self._drafts.accepted[ended] = 0
            for _ in range(int(ended.sum())):
                self._turnover.step(1)
            return
        if not ended.any():
            return
        stay = ~ended
        for name in ("_whole", "_left", "_sure", "_may_draft", "_behind"):
            setattr(self, name, getattr(self, name)[stay])
        self._drafts.accepted = self._drafts.accepted[stay]

    def _draft(
        self, batch: DraftBatch, sure: NDArray[np.float64]
    ) -> tuple[CandidatePool, NDArray[np.int64], DraftForest, list[int]]:
        """Candidates, accepted nodes of each request, the forest, and rows of each level."""
        pool = CandidatePool.empty(batch.num_requests)
        alive, levels = self._grow(pool, batch, sure)
        forest = self.policy.select(pool, batch)
        assert forest.columns is not None
        owner = forest.request_of_node()
        hits = alive[owner, forest.columns.long()].long()
        accepted = torch.zeros(batch.num_requests, dtype=torch.int64).index_add_(0, owner, hits)
        return pool, accepted.numpy(), forest, levels

    def _grow(
        self, pool: CandidatePool, batch: DraftBatch, sure: NDArray[np.float64]
    ) -> tuple[torch.Tensor, list[int]]:
        """Fill the pool; which of its columns the target would take, and rows of each level."""
        policy, random, k = self.policy, self._random, self.policy.num_ranks
        alive = torch.zeros(batch.num_requests, 0, dtype=torch.bool)
        levels = []
        for _, expansion, active in policy.levels(pool, batch):
            if expansion.frontier is None:
                above = torch.ones(len(active), 1, dtype=torch.bool)
            else:
                above = alive[active].gather(1, expansion.frontier)
                levels.append(expansion.frontier.numel())
            mean = sure[active.numpy()][:, None]
            best = random.beta(12 * mean, 12 * (1 - mean), tuple(above.shape)).clip(1e-3, 0.999)
            chances = np.empty((*above.shape, k))
            chances[..., 0] = best
            chances[..., 1:] = (1 - best)[..., None] * 0.4 * 0.5 ** np.arange(1, k)
            chances = -np.sort(-chances, axis=2)
            draw = random.random(tuple(above.shape)) / self.prompts.honesty
            hit = (draw[..., None] >= np.cumsum(chances, axis=2)).sum(2)
            first = pool.num_columns
            pool.grow(
                expansion,
                torch.arange(k).expand(chances.shape),
                torch.from_numpy(np.log(chances)).float(),
            )
            chosen = above[..., None] & torch.from_numpy(hit[..., None] == np.arange(k))
            level = torch.zeros(batch.num_requests, pool.num_columns - first, dtype=torch.bool)
            level[active] = chosen.flatten(1)
            alive = torch.cat([alive, level], dim=1)
        return alive, levels

    def run(self, steps: int) -> Serving:
        for _ in range(steps):
            if not len(self._left):
                break
            self.step()
        return self

    def until(self, seconds: float) -> Serving:
        end = self.seconds + seconds
        while self.seconds < end:
            self.step()
        return self

    def finish(self) -> Serving:
        while len(self._left):
            self.step()
        return self

    def speed(self, steps: int) -> float:
        """Tokens a second to be expected of as many steps from now on."""
        tokens, seconds = self.expected_tokens, self.expected_seconds
        self.run(steps)
        return (self.expected_tokens - tokens) / (self.expected_seconds - seconds)

    def share_drafting(self, last: int) -> float:
        """Of the last steps, those in which more than probes drafted."""
        return float(np.mean([drafts for _, drafts, _, _ in self.steps[-last:]]))

    def _noise(self) -> float:
        return float(np.exp(self._random.normal(0, self.noise)))


def best_fixed(
    make: Callable[[], DraftPolicy], serving: Callable[[DraftPolicy], Serving], true: StepCost
) -> tuple[float, int]:
    """(tokens a second, depth) of the fastest among plain decoding and drafting always to one
    depth, with as many nodes as pay."""
    run = serving(make())
    plan = DraftPlan(max_depth=0)
    results = []
    for depth in range(run.policy.max_depth + 1):
        run = serving(make())
        run.dictated = replace(plan, max_depth=depth, cost=true)
        run.run(4)
        results.append((run.speed(max(30, 400 // run.requests)), depth))
    return max(results)
