# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Contenders side by side at several loads, measured against who knows too much.

The share of the oracle's gain is (speed - plain) / (oracle - plain). Its interval is a bootstrap
over request-steps by whole answers, because the steps of one answer are alike: answers are drawn
again, and every contender's tokens and seconds are added up over the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from echo_vllm.forecast import StepCost
from echo_vllm.forecast.drafter_profile import DrafterProfile
from echo_vllm.offline.trace.contenders import (
    PLAIN,
    AnyContender,
    BestTable,
    Contender,
    Oracle,
)
from echo_vllm.offline.trace.recorded import RecordedDrafter
from echo_vllm.offline.trace.replay import ReplayResult, replay

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)
"""Percentiles."""

NOTHING = 1e-3
"""Gain of the oracle below which a share of it says nothing, as a share of the speed."""

REFERENCES = (BestTable(), Oracle("chain"), Oracle("tree"))
TABLE, ORACLE = BestTable().name, Oracle("chain").name


@dataclass(frozen=True)
class Interval:
    """A figure with its bootstrap interval of 95 %."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Figures:
    """One contender at one load.

    Attributes:
        result: its replay.
        over_plain: its speed over plain decoding's.
        share: of the oracle's gain over plain decoding; None where the oracle gains nothing.
        closed: of the gap between the best table and the oracle; None where there is none.
    """

    result: ReplayResult
    over_plain: Interval
    share: Interval | None
    closed: Interval | None

    def to_dict(self) -> dict[str, Any]:
        more = {
            name: None if found is None else vars(found)
            for name, found in (
                ("over_plain", self.over_plain),
                ("share_of_oracle", self.share),
                ("gap_closed", self.closed),
            )
        }
        return {**self.result.to_dict(), **more}


Comparison = Mapping[int, Mapping[str, Figures]]
"""By load, by the contender's name; plain decoding first, the references last."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors of a replay are small: more threads spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def compare(
    drafter: RecordedDrafter,
    contenders: Sequence[AnyContender] | None,
    loads: Sequence[int],
    cost: Callable[[float], StepCost],
    *,
    profile: DrafterProfile | None = None,
    prefill_tokens: int = 0,
    request_steps: int = 2048,
    seed: int = 0,
    on_load: Callable[[int, Mapping[str, Figures]], None] = lambda load, figures: None,
) -> dict[int, dict[str, Figures]]:
    """Replay all contenders, plain decoding and the references at all loads.

    Args:
        contenders: None for the usual ones: echo, auto, evict, and trees of equal size with the
            budgets of these.
        cost: of a step whose requests have so many tokens of context in all.
        profile: of the drafter, for the usual ones.
        on_load: called as soon as a load is done.
        drafter, loads, prefill_tokens, request_steps, seed: as for `replay`.

    Raises:
        TraceError: a policy wants to know more than was recorded.
    """
    weights = resamples(drafter.answers, seed)
    found = {}
    for load in loads:
        step_cost = cost(load * float(drafter.contexts.mean()))

        def at_load(
            contender: AnyContender, load: int = load, step_cost: StepCost = step_cost
        ) -> ReplayResult:
            return replay(
                drafter,
                contender,
                load,
                step_cost,
                prefill_tokens=prefill_tokens,
                request_steps=request_steps,
                seed=seed,
            )

        results = {PLAIN: at_load(Contender(PLAIN))}
        if contenders is None:
            results |= _usual(drafter, profile, at_load)
        else:
            missing = (one for one in contenders if one.name not in results)
            results |= {one.name: at_load(one) for one in missing}
        for reference in REFERENCES:
            # Also where it was asked for, so that the references are the last ones.
            result = results.pop(reference.name, None)
            results[reference.name] = result or at_load(reference)
        found[load] = measured(results, weights)
        on_load(load, found[load])
    return found


def _usual(
    drafter: RecordedDrafter,
    profile: DrafterProfile | None,
    at_load: Callable[[AnyContender], ReplayResult],
) -> dict[str, ReplayResult]:
    shape = {"max_depth": drafter.max_depth, "top_k": min(4, drafter.num_ranks)}
    elastic = {**shape, "width": drafter.num_ranks}
    size = min(16, drafter.num_candidates)
    results = {}
    for name in ("echo", "auto", "evict"):
        section = {**elastic, "policy": name}
        result = at_load(Contender.of(f"{name}:{size}", section, size, profile))
        # As many nodes in all, as far as whole nodes a request allow it.
        nodes = round(result.nodes / result.concurrency)
        equal = {**shape, "policy": "topn", "max_depth": min(max(1, nodes), drafter.max_depth)}
        label = f"topn:{nodes} (as {name})"
        contender = Contender.of(label, equal, nodes) if nodes else Contender(label)
        results[f"topn as {name}"] = at_load(contender)
        results[result.policy] = result
    return results


def resamples(answers: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """[RESAMPLES, N] how often each request-step is there if whole answers are drawn again."""
    count = int(answers.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return drawn[:, answers].astype(np.float64)


def measured(
    results: Mapping[str, ReplayResult], weights: NDArray[np.float64]
) -> dict[str, Figures]:
    """The figures of all `results`, the references and plain decoding among them, by name.

    Args:
        weights: [n, N], see `resamples`.
    """
    speeds = {
        name: np.concatenate(
            [
                [result.tokens_per_second],
                (weights @ result.ledger.tokens) / (weights @ result.ledger.seconds),
            ]
        )
        for name, result in results.items()
    }
    plain, table, oracle = speeds[PLAIN], speeds[TABLE], speeds[ORACLE]
    return {
        name: Figures(
            result,
            _interval(speeds[name] / plain),
            _share(speeds[name], plain, oracle),
            _share(speeds[name], table, oracle),
        )
        for name, result in results.items()
    }


def _share(
    speeds: NDArray[np.float64], floor: NDArray[np.float64], ceiling: NDArray[np.float64]
) -> Interval | None:
    gains = ceiling - floor
    if gains[0] < NOTHING * floor[0]:
        return None
    # Where a resample has no gap its share says nothing.
    return _interval(((speeds - floor) / gains)[gains > 0])


def _interval(values: NDArray[np.float64]) -> Interval:
    """Of a figure, followed by what resamples make of it."""
    low, high = np.percentile(values[1:] if len(values) > 1 else values, INTERVAL).tolist()
    return Interval(float(values[0]), low, high)


TABLES: dict[str, Callable[[Figures], Interval | None]] = {
    "Speed over plain decoding": lambda figures: figures.over_plain,
    "Share of the oracle's gain over plain decoding": lambda figures: figures.share,
    "Share of the gap from the best table to the oracle": lambda figures: figures.closed,
}


def rows(comparison: Comparison, title: str) -> list[list[str]]:
    """The cells of one of `TABLES`, the contender's name first, loads to the right."""
    figure = TABLES[title]
    names = list(next(iter(comparison.values())))
    return [
        [name, *(str(figure(at_load[name]) or "-") for at_load in comparison.values())]
        for name in names
    ]


def markdown(comparison: Comparison) -> str:
    """All of `TABLES`, and what was drafted."""
    loads = [f"{load} requests" for load in comparison]
    head = ["", *loads]
    parts = []
    for title in TABLES:
        parts += [f"**{title}**", "", *lines(head, rows(comparison, title)), ""]
    names = list(next(iter(comparison.values())))
    drafted = [
        [name, *(_drafted(at_load[name].result, name) for at_load in comparison.values())]
        for name in names
        if name != PLAIN
    ]
    parts += ["**Nodes a request, tokens a request and step**", "", *lines(head, drafted), ""]
    return "\n".join(parts)


def _drafted(result: ReplayResult, name: str) -> str:
    text = f"{result.nodes / result.concurrency:.2f}, {result.tokens:.2f}"
    return f"{result.policy.removeprefix(TABLE + ': ')}: {text}" if name == TABLE else text


def lines(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    table = [head, ["---"] * len(head), *cells]
    return [f"| {' | '.join(line)} |" for line in table]
