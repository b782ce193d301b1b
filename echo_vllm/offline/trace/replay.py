# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Replays a trace with another policy, another load and another step cost.

`replay` answers "how fast would this policy be with that many requests on that machine?" from a
trace that was recorded under full verification, in which the fate of every candidate is known. It
assumes:

- Steps are exchangeable. A step of n requests is n recorded request-steps drawn at random, with a
  fixed seed, so that all policies see the same draws. Real policies end their steps at different
  tokens, and requests of one batch may be alike.
- The steady state is shown: what a policy learns first is not counted.
- Accepted tokens are the part of the recorded accepted path that the policy selected, plus the
  bonus token.
- A step takes what the given `StepCost` says for its rows, levels and committed tokens. Contexts
  have no cost of their own, requests neither arrive nor leave, and the drafter's backlog of a
  request that was not drafted for is bounded as in the engine.
- What the recording did not expand gets stand-ins with a typical score that are never accepted;
  `unknown` says in how many request-steps this may have cost tokens.

`replay_exact` decides the recorded steps once more, as they were, and compares.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from echo_vllm.config import MAX_NODES, SECTION, EchoConfig, EchoConfigError
from echo_vllm.forecast import StepCost
from echo_vllm.forecast.drafter_profile import DrafterProfile
from echo_vllm.forecast.plan import DraftPlan, Load
from echo_vllm.offline.trace.recorded import STAND_IN, RecordedDrafter
from echo_vllm.policies import (
    DraftBatch,
    DraftPolicy,
    Observation,
    make_policy,
    parse_section,
    policy_class,
)
from echo_vllm.trace_format import TraceError, TraceHeader, TraceRequest, TraceStep
from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.pool import CandidatePool

WINDOW = 48
"""Tokens that a request catches up with at most, on average over the places in a block of 32."""

PLAIN = "plain"


@dataclass(frozen=True)
class Contender:
    """What is replayed.

    Attributes:
        name: for tables.
        config: of its policy, None for plain decoding, without a drafter.
        num_nodes: num_speculative_tokens.
        profile: of the drafter.
    """

    name: str
    config: EchoConfig | None = None
    num_nodes: int = 0
    profile: DrafterProfile | None = None

    def policy(self) -> DraftPolicy | None:
        """A new one, which has learned nothing yet."""
        if self.config is None:
            return None
        return make_policy(self.config, self.num_nodes, self.profile)

    @classmethod
    def of(
        cls,
        name: str,
        section: object,
        num_speculative_tokens: int,
        profile: DrafterProfile | None = None,
    ) -> Contender:
        """From an echo section as a user writes it.

        Raises:
            EchoConfigError: the section is wrong.
        """
        config = parse_section(section, num_speculative_tokens=num_speculative_tokens)
        if (reason := policy_class(config.policy).not_traced) is not None:
            raise EchoConfigError(
                f"{SECTION}.policy must be one that a trace can replay, got {config.policy}, "
                f"because {reason}; choose another."
            )
        return cls(name, config, num_speculative_tokens, profile)

    @classmethod
    def parse(cls, text: str, profile: DrafterProfile | None = None) -> Contender:
        """From a command line: `plain`, `NAME:N`, `NAME:N:{...}` with more fields of the echo
        section as JSON, or the name of a JSON file with a speculative config.

        Raises:
            EchoConfigError: a field of the section is wrong.
            TraceError: the text is none of these.
        """
        if text == PLAIN:
            return cls(PLAIN)
        wrong = TraceError(
            f"a policy must be plain, NAME:N, NAME:N:{{...}} or a JSON file, got {text!r}; write "
            "it as topn:16, or as echo:16:{\"k_max\": 64}."
        )  # fmt: skip
        if text.endswith(".json"):
            try:
                spec = json.loads(Path(text).read_text(encoding="utf-8"))
                return cls.of(
                    Path(text).stem, spec.get("echo", {}), spec["num_speculative_tokens"], profile
                )
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                if hasattr(error, "is_echo_config_error"):
                    raise
                raise wrong from None
        policy, _, rest = text.partition(":")
        nodes, _, fields = rest.partition(":")
        if not (nodes.isdecimal() and 1 <= int(nodes) <= MAX_NODES):
            raise wrong
        try:
            more = json.loads(fields) if fields else {}
            section = {**more, "policy": policy}
        except (ValueError, TypeError):
            raise wrong from None
        return cls.of(text, section, int(nodes), profile)


@dataclass(frozen=True)
class ReplayResult:
    """One policy at one load; means over steps.

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
        error: standard error of tokens_per_second, as a share of it.
        drafting: share of the steps in which the drafter ran.
        starved: share of the requests without a node, in steps in which others had one.
        unknown: share of the request-steps whose accepted path may have gone on where the trace
            knows nothing.
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fully_verified(steps: Iterable[TraceStep]) -> list[TraceRequest]:
    """The request-steps of a trace in which every candidate was verified, to full depth.

    Raises:
        TraceError: these are less than half of all, so the trace is not one of full verification.
    """
    every = [request for step in steps for request in step.requests]
    most = max((request.num_candidates for request in every), default=0)
    full = [r for r in every if r.is_fully_verified and r.num_candidates == most]
    if not most or 2 * len(full) < len(every):
        raise TraceError(
            f"only {len(full)} of the trace's {len(every)} trees were verified with all "
            f"candidates; record it with policy topn and as many num_speculative_tokens as there "
            "are candidates (`echo-vllm trace record` does so by default)."
        )
    return full


def replay(
    drafter: RecordedDrafter,
    contender: Contender,
    concurrency: int,
    cost: StepCost,
    *,
    prefill_tokens: int = 0,
    request_steps: int = 2048,
    warm_up: int = 256,
    seed: int = 0,
) -> ReplayResult:
    """Replay one policy at one load; see the top of this module for what is assumed.

    Args:
        drafter: the request-steps to draw from, fully verified.
        contender: what decides.
        concurrency: requests that decode in every step, >= 1.
        cost: what a step takes, also what the policy is told.
        prefill_tokens: prompt tokens in every target forward.
        request_steps: as many steps as it takes for this many requests, at least 128.
        warm_up: steps before these, for policies that learn what drafts are worth.
        seed: of the draws, which depend on it and on the load alone.

    Raises:
        TraceError: the policy wants to know more than was recorded.
    """
    run = _Run(drafter, contender.policy(), concurrency, cost, prefill_tokens)
    rng = np.random.default_rng([seed, concurrency])
    num_steps = max(128, math.ceil(request_steps / concurrency))
    steps = []
    for number in range(warm_up + num_steps):
        samples = rng.choice(
            drafter.num_samples, concurrency, replace=concurrency > drafter.num_samples
        )
        if number >= warm_up:
            steps.append(run.step(samples))
        elif run.policy is not None and run.policy.learns:
            run.step(samples)
    tokens = np.array([step.tokens for step in steps], dtype=np.float64)
    seconds = np.array([step.seconds for step in steps])
    speed = float(tokens.sum() / seconds.sum())
    spread = float((tokens - speed * seconds).std() / math.sqrt(num_steps))
    shared = [step for step in steps if step.nodes]
    return ReplayResult(
        policy=contender.name,
        concurrency=concurrency,
        steps=num_steps,
        tokens=float(tokens.mean() / concurrency),
        nodes=float(np.mean([step.nodes for step in steps])),
        most_nodes=max(step.nodes for step in steps),
        drafter_rows=float(np.mean([sum(step.level_rows) for step in steps])),
        drafter_levels=float(np.mean([len(step.level_rows) for step in steps])),
        seconds=float(seconds.mean()),
        tokens_per_second=speed,
        error=spread / float(seconds.mean()) / speed,
        drafting=float(np.mean([step.drafted for step in steps])),
        starved=float(np.mean([step.starved for step in shared]) / concurrency if shared else 0.0),
        unknown=float(np.mean([step.unknown for step in steps]) / concurrency),
    )


@dataclass(frozen=True)
class _Step:
    tokens: int
    nodes: int
    level_rows: Sequence[int]
    seconds: float
    drafted: bool
    starved: int
    unknown: int


class _Run:
    """A policy in its steady state: every slot always holds a request that decodes."""

    def __init__(
        self,
        drafter: RecordedDrafter,
        policy: DraftPolicy | None,
        concurrency: int,
        cost: StepCost,
        prefill_tokens: int,
    ) -> None:
        """Raises TraceError: the policy wants to know more than was recorded."""
        self.drafter = drafter
        self.policy = policy
        self.load = Load(concurrency, prefill_tokens)
        self.cost = cost
        if policy is not None:
            drafter.check(policy)
            if policy.needs_cost:
                policy.set_cost(cost)
        # Per slot: committed tokens that the drafter has not seen.
        self.waiting = np.ones(concurrency, dtype=np.int64)

    def step(self, samples: np.ndarray[Any, np.dtype[np.int64]]) -> _Step:
        """One step: plan, draft, select, verify."""
        count = self.load.num_decoding
        plain = self.cost.plain_step(count, self.load.prefill_tokens)
        if self.policy is None:
            return _Step(count, 0, [], plain, False, 0, 0)
        plan = self.policy.plan(replace(self.load, waiting=int(self.waiting.sum())))
        slots = np.arange(count)
        probes = list(plan.probed(count))
        if plan.max_depth == 0:
            slots, probes = slots[probes], list(range(len(probes)))
        if not len(slots):
            self._observe(DraftForest.empty(0), np.zeros(0, dtype=np.int64), None, probes)
            self.waiting = np.minimum(self.waiting + 1, WINDOW)
            return _Step(count, 0, [], plain, False, 0, 0)
        batch = DraftBatch(len(slots), count, plan, torch.tensor(probes, dtype=torch.int64))
        draft = self.drafter.draft(self.policy, batch, samples[slots])
        accepted, unknown = self.drafter.accepted(draft, samples[slots])
        committed = int(self.waiting[slots].sum())
        self.waiting = np.minimum(self.waiting + 1, WINDOW)
        self.waiting[slots] = 1 + accepted
        nodes = draft.forest.num_nodes
        self._observe(draft.forest, accepted, draft.pool, probes)
        return _Step(
            tokens=count + int(accepted.sum()),
            nodes=nodes,
            level_rows=draft.level_rows,
            seconds=self.cost.step(self.load.rows + nodes, draft.level_rows, committed),
            drafted=True,
            starved=int((draft.forest.cu_nodes.diff() == 0).sum()),
            unknown=int(unknown.sum()),
        )

    def _observe(
        self,
        verified: DraftForest,
        accepted: np.ndarray[Any, np.dtype[np.int64]],
        pool: CandidatePool | None,
        probes: list[int],
    ) -> None:
        """What the engine's worker reports to its scheduler, but for times."""
        assert self.policy is not None
        report = self.policy.report(
            verified=verified,
            num_accepted=torch.from_numpy(accepted),
            pool=pool,
            probes=torch.tensor(probes, dtype=torch.int64),
        )
        self.policy.observe(Observation(report=report))


@dataclass(frozen=True)
class ExactReport:
    """What became of deciding recorded steps again.

    Attributes:
        steps: steps that were decided again.
        incomplete: steps that could not be, because a request that was drafted for was never
            verified (it ended meanwhile), and so is not in the trace.
        equal: requests with the recorded selection.
        cut: requests of whose selection the engine verified only the first nodes.
        different: requests with another selection.
        first: the first difference, in words; None without one.
    """

    steps: int = 0
    incomplete: int = 0
    equal: int = 0
    cut: int = 0
    different: int = 0
    first: str | None = None

    @property
    def agrees(self) -> bool:
        return self.different == 0


def recorded_policy(header: TraceHeader, profile: DrafterProfile | None = None) -> DraftPolicy:
    """The policy that the trace was recorded with.

    Args:
        header: of the trace.
        profile: that the engine had; a trace names no file.
    """
    config = parse_section(dict(header.echo), num_speculative_tokens=header.num_speculative_tokens)
    return make_policy(config, header.num_speculative_tokens, profile)


def replay_exact(steps: Iterable[TraceStep], policy: DraftPolicy) -> ExactReport:
    """Give `policy` what it was given, step by step, and compare what it selects.

    Args:
        steps: of the trace.
        policy: normally `recorded_policy`.
    """
    done = incomplete = equal = cut = different = 0
    first: str | None = None
    for step in steps:
        batch = _recorded_batch(step)
        if batch.num_requests != len(step.requests):
            incomplete += 1
            continue
        done += 1
        chosen = _decide(step, policy, batch)
        for request, own in zip(step.requests, chosen, strict=True):
            size = len(request.selected)
            if own == list(request.selected):
                equal += 1
            elif size < len(own) and own[:size] == list(request.selected):
                cut += 1
            else:
                different += 1
                first = first or (
                    f"step {step.step}, request {request.id}: {own} was selected, the trace has "
                    f"{list(request.selected)} (a candidate {STAND_IN} is not in the trace)"
                )
    return ExactReport(done, incomplete, equal, cut, different, first)


def _decide(step: TraceStep, policy: DraftPolicy, batch: DraftBatch) -> list[list[int]]:
    if not any(request.num_candidates for request in step.requests):
        return [[] for _ in step.requests]
    drafter = RecordedDrafter(step.requests, policy.column_ranks)
    if policy.num_ranks > drafter.num_ranks or policy.max_depth < drafter.max_depth:
        return [[STAND_IN] for _ in step.requests]  # another policy drafted this
    return drafter.draft(policy, batch, np.arange(len(step.requests))).selected()


def _recorded_batch(step: TraceStep) -> DraftBatch:
    """What the policy was told, as far as the trace says it."""
    values = dict(step.plan or DraftPlan().to_dict())
    told = values.pop("batch", None) or {
        "num_requests": len(step.requests),
        "num_decoding": step.decoding,
        "probes": [],
    }
    limits = told.get("depth_limits")
    return DraftBatch(
        num_requests=told["num_requests"],
        num_decoding=told["num_decoding"],
        plan=DraftPlan.from_dict(values),
        probes=torch.tensor(told["probes"], dtype=torch.int64),
        depth_limits=None if limits is None else torch.tensor(limits, dtype=torch.int64),
    )


def summary(header: TraceHeader, steps: Iterable[TraceStep]) -> dict[str, Any]:
    """What a trace holds, as numbers for people.

    Returns:
        steps, trees, fully_verified (share of the trees), levels, candidates and nodes (mean a
        tree), accepted (mean a tree), accepted_by_depth (share of the trees that drafted the
        depth), verify_ms and draft_ms (medians of a step), concurrency (mean).
    """
    num_steps = trees = full = candidates = nodes = 0
    drafted: dict[int, int] = {}
    accepted: dict[int, int] = {}
    times: list[tuple[float, float]] = []
    for step in steps:
        num_steps += 1
        times.append((step.verify_s, step.draft_s))
        for request in step.requests:
            trees += 1
            full += request.is_fully_verified
            candidates += request.num_candidates
            nodes += len(request.selected)
            bounds = [*request.level_starts, request.num_candidates]
            for depth, (start, stop) in enumerate(pairwise(bounds), 1):
                drafted[depth] = drafted.get(depth, 0) + (stop > start)
                accepted[depth] = accepted.get(depth, 0) + (len(request.accepted) >= depth)
    if not trees:
        raise TraceError("the trace has no steps; record it with prompts that are answered.")
    verify, draft = np.median(np.array(times), axis=0).tolist()
    return {
        "model": header.model,
        "drafter": header.drafter,
        "dtype": header.dtype,
        "policy": header.echo.get("policy"),
        "num_speculative_tokens": header.num_speculative_tokens,
        "created": header.created,
        "steps": num_steps,
        "trees": trees,
        "concurrency": trees / num_steps,
        "fully_verified": full / trees,
        "levels": max(drafted, default=0),
        "candidates": candidates / trees,
        "nodes": nodes / trees,
        "accepted": sum(accepted.values()) / trees,
        "accepted_by_depth": [accepted[d] / max(1, drafted[d]) for d in sorted(drafted)],
        "verify_ms": 1e3 * verify,
        "draft_ms": 1e3 * draft,
    }


def best_chain(run: Callable[[Contender], ReplayResult], longest: int) -> ReplayResult:
    """The fastest chain of fixed length at the load that `run` replays, in hindsight.

    Args:
        run: replays a contender.
        longest: nodes of the longest chain to try.
    """
    lengths = range(1, longest + 1)
    results = [run(Contender.of(f"chain:{n}", {"policy": "chain"}, n)) for n in lengths]
    return max(results, key=lambda result: result.tokens_per_second)
