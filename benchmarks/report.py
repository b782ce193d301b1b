# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""From measured runs to ratios, medians, spreads and a Markdown table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.closed_loop import Run

NOT_AVAILABLE = "-"


@dataclass(frozen=True)
class Sample:
    """One run of one configuration in one round at one concurrency."""

    configuration: str
    concurrency: int
    round: int
    run: Run


@dataclass(frozen=True)
class Spread:
    """The median of some values and the range that they span."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises ValueError if there is no value."""
        known = sorted(values)
        if not known:
            raise ValueError("no values")
        return cls(statistics.median(known), known[0], known[-1])

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.2f}"
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def speed_ratios(
    samples: Sequence[Sample], configuration: str, base: str, concurrency: int
) -> list[float]:
    """Tokens per second of `configuration` over those of `base`, round by round.

    Both ran the same prompts close in time, so the quotient inside a round is free of whatever
    makes one round differ from the next. A round that lacks either is left out.
    """
    speeds: dict[str, dict[int, float]] = {configuration: {}, base: {}}
    for sample in samples:
        if sample.concurrency == concurrency and sample.configuration in speeds:
            speeds[sample.configuration][sample.round] = sample.run.tokens / sample.run.seconds
    ours, theirs = speeds[configuration], speeds[base]
    return [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys())]


def acceptance_length(samples: Sequence[Sample], configuration: str) -> float | None:
    """Generated tokens per step and request, bonus token included; prefills are left out."""
    runs = [s.run for s in samples if s.configuration == configuration]
    steps = sum(run.request_steps for run in runs)
    return sum(run.decode_tokens for run in runs) / steps if steps else None


def verified_per_accepted(samples: Sequence[Sample], configuration: str) -> float | None:
    """Verified draft tokens per accepted one; None if none was accepted."""
    runs = [s.run for s in samples if s.configuration == configuration]
    accepted = sum(run.accepted for run in runs)
    return sum(run.verified for run in runs) / accepted if accepted else None


def table(
    samples: Sequence[Sample],
    configurations: Sequence[str],
    concurrencies: Sequence[int],
    pairs: Sequence[tuple[str, str]] = (),
    failures: dict[str, str] | None = None,
) -> str:
    """The Markdown table.

    Args:
        samples: of all runs.
        configurations: rows, in order; the first is the base of the ratios.
        concurrencies: columns, in order.
        pairs: (ours, theirs), further rows with the ratio of two configurations.
        failures: configuration -> reason; its row says so instead of figures.
    """
    failures = failures or {}
    base = configurations[0]
    header = ["configuration", *(f"concurrency {c}" for c in concurrencies)]
    header += ["acceptance length", "verified per accepted"]
    rows = []
    for name in configurations:
        if name in failures:
            rows.append([name, f"failed: {failures[name]}", *[""] * (len(header) - 2)])
            continue
        ratios = [_ratio_cell(samples, name, base, c) for c in concurrencies]
        length = _cell(acceptance_length(samples, name))
        rows.append([name, *ratios, length, _cell(verified_per_accepted(samples, name))])
    for ours, theirs in pairs:
        ratios = [_ratio_cell(samples, ours, theirs, c) for c in concurrencies]
        rows.append([f"{ours} / {theirs}", *ratios, "", ""])
    return markdown(header, rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns padded to one width, so that it reads well as text too."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in [header, *rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in [lines[0], rule, *lines[1:]]
    )


def _ratio_cell(samples: Sequence[Sample], name: str, base: str, concurrency: int) -> str:
    ratios = speed_ratios(samples, name, base, concurrency)
    return str(Spread.of(ratios)) if ratios else NOT_AVAILABLE


def _cell(value: float | None) -> str:
    return NOT_AVAILABLE if value is None else f"{value:.2f}"
