# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Replays a trace with another policy, another load and another step cost.

`replay` answers "how fast would this policy be with that many requests on that machine?" from a
trace that was recorded under full verification, in which the fate of every candidate is known. It
assumes:

- Steps are exchangeable. A step of n requests is n recorded request-steps drawn at random, with a
  fixed seed, so that all contenders see the same draws. Real policies end their steps at different
  tokens, and requests of one batch may be alike.
- The steady state is shown: what a policy learns first is not counted, requests neither arrive nor
  leave. A request-step near the end of its answer drafts no deeper than it did when it was
  recorded.
- Accepted tokens are the part of the recorded accepted path that the policy selected, plus the
  bonus token.
- A step takes what the given `StepCost` says for its rows, levels and committed tokens, and that is
  what the policy observes. The drafter's backlog of a request that was not drafted for is the
  engine's (`step.v1.window`).
- What the recording did not expand gets stand-ins with a typical score that are never accepted;
  `unknown` says in how many request-steps this may have cost tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from echo_vllm.forecast import StepCost
from echo_vllm.forecast.plan import Load
from echo_vllm.offline.trace.contenders import AnyContender, BestTable, Contender, Oracle
from echo_vllm.offline.trace.oracle import best_lengths, level_rows
from echo_vllm.offline.trace.recorded import RecordedDrafter
from echo_vllm.policies import DraftBatch, DraftPolicy, Observation
from echo_vllm.step.v1.window import WINDOW

Ints = NDArray[np.int64]

BLOCK_SIZE = 16
"""Tokens a block of the paged cache: vLLM's default on CUDA."""

PRICES = 8
"""Passes in which the oracle's speed is found, which is what it must know to decide."""


@dataclass(frozen=True)
class Ledger:
    """What came of each recorded request-step, whenever it was drawn.

    Attributes:
        tokens: [N] float64, all its tokens, bonus tokens included.
        seconds: [N] float64, its part of its steps: an equal one of plain decoding, of what
            drafting took longer by its share of the nodes.
    """

    tokens: NDArray[np.float64]
    seconds: NDArray[np.float64]


@dataclass(frozen=True)
class ReplayResult:
    """One contender at one load; means over steps.

    Attributes:
        policy: the contender's name.
        concurrency: requests of a step.
        steps: steps that were counted.
        tokens: tokens a request and step, the bonus token included.
        nodes: verified nodes of the batch.
        most_nodes: the most of any step.
        drafter_rows: rows of all drafter levels behind the catch-up forward.
        drafter_levels: number of these levels.
        seconds: predicted time of a step.
        tokens_per_second: all tokens by all seconds.
        error: standard error of tokens_per_second, as a share of it, over the draws alone.
        drafting: share of the steps in which the drafter ran.
        starved: share of the requests without a node, in steps in which others had one.
        unknown: share of the request-steps whose accepted path may have gone on where the trace
            knows nothing.
        ledger: by recorded request-step, for intervals.
    """

    policy: str
    concurrency: int
    steps: int
    tokens: float
    nodes: float
    most_nodes: int
    drafter_rows: float
    drafter_levels: float
    seconds: float
    tokens_per_second: float
    error: float
    drafting: float
    starved: float
    unknown: float
    ledger: Ledger = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All but the ledger."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "ledger"}


@dataclass(frozen=True)
class _Setting:
    """What all contenders are given alike."""

    drafter: RecordedDrafter
    load: Load
    cost: StepCost
    num_steps: int
    warm_up: int
    seed: int

    @property
    def plain(self) -> float:
        """Seconds of a step of plain decoding."""
        return self.cost.plain_step(self.load.num_decoding, self.load.prefill_tokens)

    def draws(self) -> Iterator[Ints]:
        """The request-steps of every step, those of the warm-up first."""
        rng = np.random.default_rng([self.seed, self.load.num_decoding])
        known, count = self.drafter.num_samples, self.load.num_decoding
        for _ in range(self.warm_up + self.num_steps):
            yield rng.choice(known, count, replace=count > known)


def replay(
    drafter: RecordedDrafter,
    contender: AnyContender,
    concurrency: int,
    cost: StepCost,
    *,
    prefill_tokens: int = 0,
    request_steps: int = 2048,
    warm_up: int = 256,
    seed: int = 0,
) -> ReplayResult:
    """Replay one contender at one load; see the top of this module for what is assumed.

    Args:
        drafter: the request-steps to draw from, fully verified.
        contender: what decides.
        concurrency: requests that decode in every step, >= 1.
        cost: what a step takes, also what a policy is told.
        prefill_tokens: prompt tokens in every target forward.
        request_steps: as many steps as it takes for this many requests, at least 128.
        warm_up: steps before these, for policies that learn what drafts are worth.
        seed: of the draws, which depend on it and on the load alone.

    Raises:
        TraceError: the policy wants to know more than was recorded.
    """
    num_steps = max(128, math.ceil(request_steps / concurrency))
    load = Load(concurrency, prefill_tokens)
    setting = _Setting(drafter, load, cost, num_steps, warm_up, seed)
    return _replay(setting, contender)


def _replay(setting: _Setting, contender: AnyContender) -> ReplayResult:
    if isinstance(contender, BestTable):
        chains = map(Contender.chain, range(setting.drafter.max_depth + 1))
        results = [_replay(setting, chain) for chain in chains]
        best = max(results, key=lambda result: result.tokens_per_second)
        return replace(best, policy=f"{contender.name}: {best.policy}")
    if isinstance(contender, Oracle):
        # At the best speed s no choice has more tokens - s * seconds, and none has more than 0.
        price = setting.load.num_decoding / setting.plain
        results = []
        for _ in range(PRICES):
            results.append(
                _measured(setting, contender.name, _OracleRun(setting, contender, price))
            )
            last, price = price, results[-1].tokens_per_second
            if abs(price - last) < 1e-4 * last:
                break
        return max(results, key=lambda result: result.tokens_per_second)
    policy = contender.policy()
    decides = _PlainRun(setting) if policy is None else _PolicyRun(setting, policy)
    return _measured(setting, contender.name, decides)


@dataclass(frozen=True)
class _Step:
    """Of one step: tokens and nodes [B] of each request, and the rest of what `ReplayResult` has
    means of."""

    tokens: Ints
    nodes: Ints
    seconds: float
    level_rows: Sequence[int] = ()
    drafted: bool = False
    starved: int = 0
    unknown: int = 0


class _Run(Protocol):
    """A contender in its steady state: every slot always holds a request that decodes."""

    learns: bool

    def step(self, samples: Ints) -> _Step: ...


def _measured(setting: _Setting, name: str, run: _Run) -> ReplayResult:
    concurrency, known = setting.load.num_decoding, setting.drafter.num_samples
    ledger = Ledger(np.zeros(known), np.zeros(known))
    steps = []
    for number, samples in enumerate(setting.draws()):
        if number < setting.warm_up:
            if run.learns:
                run.step(samples)
            continue
        step = run.step(samples)
        steps.append(step)
        nodes = step.nodes if step.nodes.any() else np.ones(concurrency)
        seconds = setting.plain / concurrency + (step.seconds - setting.plain) * nodes / nodes.sum()
        np.add.at(ledger.tokens, samples, step.tokens)
        np.add.at(ledger.seconds, samples, seconds)
    tokens = np.array([step.tokens.sum() for step in steps], dtype=np.float64)
    seconds = np.array([step.seconds for step in steps])
    nodes = np.array([step.nodes.sum() for step in steps])
    speed = float(tokens.sum() / seconds.sum())
    spread = float((tokens - speed * seconds).std() / math.sqrt(len(steps)))

    def mean(values: Callable[[_Step], float]) -> float:
        return float(np.mean([values(step) for step in steps]))

    shared = [step.starved for step in steps if step.nodes.any()]
    return ReplayResult(
        policy=name,
        concurrency=concurrency,
        steps=len(steps),
        tokens=float(tokens.mean() / concurrency),
        nodes=float(nodes.mean()),
        most_nodes=int(nodes.max()),
        drafter_rows=mean(lambda step: sum(step.level_rows)),
        drafter_levels=mean(lambda step: len(step.level_rows)),
        seconds=float(seconds.mean()),
        tokens_per_second=speed,
        error=spread / float(seconds.mean()) / speed,
        drafting=mean(lambda step: step.drafted),
        starved=float(np.mean(shared) / concurrency) if shared else 0.0,
        unknown=mean(lambda step: step.unknown) / concurrency,
        ledger=ledger,
    )


class Backlog:
    """How many tokens of each of B requests the drafter has not seen.

    What it needs of them is `step.v1.window.DrafterWindow`'s to say, by the same rule: all, or
    after a long rest a window of the last ones, which begins at a block's boundary.
    """

    def __init__(self, num_requests: int) -> None:
        self._missed = np.zeros(num_requests, dtype=np.int64)
        self._fresh = np.ones(num_requests, dtype=np.int64)

    def rows(self, contexts: Ints) -> Ints:
        """[B] tokens that pass through the drafter if it drafts now.

        Args:
            contexts: [B], committed tokens of each request, the root included.
        """
        return self._rows(contexts - 1, self._fresh)

    def missed(self, contexts: Ints) -> int:
        """Tokens of these that were committed before the last step: what a scheduler knows of."""
        return int(self._rows(contexts - 1 - self._fresh, np.zeros_like(contexts)).sum())

    def commit(self, tokens: Ints, drafted: Ints) -> None:
        """`tokens` [B] were committed, after a drafting for the requests `drafted` [n]."""
        self._missed += self._fresh
        self._missed[drafted] = 0
        self._fresh = tokens

    def _rows(self, stops: Ints, fresh: Ints) -> Ints:
        # A slot's request changes from step to step, and none has missed more than it has.
        missed = np.clip(self._missed, 0, np.maximum(0, stops))
        windows = WINDOW + (stops - WINDOW) % BLOCK_SIZE
        return np.where(missed <= WINDOW + BLOCK_SIZE, missed + fresh, windows)


class _PlainRun:
    learns = False

    def __init__(self, setting: _Setting) -> None:
        count = setting.load.num_decoding
        self._step = _Step(np.ones(count, np.int64), np.zeros(count, np.int64), setting.plain)

    def step(self, samples: Ints) -> _Step:
        return self._step


class _OracleRun:
    learns = False

    def __init__(self, setting: _Setting, oracle: Oracle, price: float) -> None:
        drafter = setting.drafter
        self.setting = setting
        self.acceptable = drafter.in_chain if oracle.knows == "chain" else drafter.in_tree
        self.price = price
        self.backlog = Backlog(setting.load.num_decoding)

    def step(self, samples: Ints) -> _Step:
        cost, rows = self.setting.cost, self.setting.load.rows
        committed = self.backlog.rows(self.setting.drafter.contexts[samples])
        lengths = best_lengths(self.acceptable[samples], committed, rows, cost, self.price)
        drafted = np.flatnonzero(lengths)
        self.backlog.commit(1 + lengths, drafted)
        levels = level_rows(lengths)
        seconds = self.setting.plain
        if len(drafted):
            seconds = cost.step(rows + int(lengths.sum()), levels, int(committed[drafted].sum()))
        return _Step(1 + lengths, lengths, seconds, levels, len(drafted) > 0)


class _PolicyRun:
    """Plan, draft, select, verify, observe."""

    def __init__(self, setting: _Setting, policy: DraftPolicy) -> None:
        """Raises TraceError: the policy wants to know more than was recorded."""
        self.setting = setting
        self.policy = policy
        self.learns = policy.learns
        setting.drafter.check(policy)
        if policy.needs_cost:
            policy.set_cost(setting.cost)
        self.backlog = Backlog(setting.load.num_decoding)

    def step(self, samples: Ints) -> _Step:
        drafter, cost, count = self.setting.drafter, self.setting.cost, len(samples)
        contexts, limits = drafter.contexts[samples], drafter.levels[samples]
        deepest = np.arange(1, self.policy.max_depth + 1)
        load = replace(
            self.setting.load,
            waiting=self.backlog.missed(contexts),
            num_drafting=tuple((limits >= deepest[:, None]).sum(1).tolist()),
        )
        plan = self.policy.plan(load)
        slots = np.arange(count)
        # A probe shows what full depth brings, so it needs room for it.
        full = np.flatnonzero(limits >= self.policy.max_depth)
        probes = full[plan.probed(len(full))]
        if plan.max_depth == 0:
            slots, probes = probes, np.arange(len(probes))
        if not len(slots):
            tokens = np.ones(count, np.int64)
            self.backlog.commit(tokens, slots)
            self._observe(load.rows, 0)
            return _Step(tokens, np.zeros(count, np.int64), self.setting.plain)
        batch = DraftBatch(
            len(slots), count, plan, torch.from_numpy(probes), torch.from_numpy(limits[slots])
        )
        draft = drafter.draft(self.policy, batch, samples[slots])
        accepted, unknown = drafter.accepted(draft, samples[slots])
        committed = int(self.backlog.rows(contexts)[slots].sum())
        tokens, nodes = np.ones(count, np.int64), np.zeros(count, np.int64)
        tokens[slots] += accepted
        nodes[slots] = draft.forest.cu_nodes.diff().numpy()
        self.backlog.commit(tokens, slots)
        num_nodes = draft.forest.num_nodes
        report = self.policy.report(
            verified=draft.forest,
            num_accepted=torch.from_numpy(accepted),
            pool=draft.pool,
            probes=batch.probes,
        )
        self._observe(
            load.rows + num_nodes,
            num_nodes,
            draft_s=cost.draft(draft.level_rows, committed),
            committed=committed,
            level_rows=draft.level_rows,
            report=report,
        )
        return _Step(
            tokens,
            nodes,
            cost.step(load.rows + num_nodes, draft.level_rows, committed),
            draft.level_rows,
            drafted=True,
            starved=int((nodes[slots] == 0).sum()),
            unknown=int(unknown.sum()),
        )

    def _observe(self, rows: int, num_nodes: int, **more: Any) -> None:
        """What the engine tells its policy; times are as predicted."""
        cost = self.setting.cost
        verify_s = float(cost.verify(rows))
        self.policy.observe(
            Observation(
                rows=rows,
                num_nodes=num_nodes,
                rested=not num_nodes and "committed" not in more,
                verify_s=verify_s,
                other_s=cost.other,
                **more,
            )
        )
