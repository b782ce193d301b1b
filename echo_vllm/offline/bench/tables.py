# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""From measured runs to ratios, medians, spreads and a Markdown table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from echo_vllm.offline.bench.closed_loop import Run

NOT_AVAILABLE = "-"


@dataclass(frozen=True)
class Sample:
    """One run of one configuration in one round at one concurrency.

    Runs compare only inside a session, which is one call of the program.
    """

    configuration: str
    concurrency: int
    round: int
    run: Run
    temperature: float = 0.0
    session: int = 0


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
    speeds: dict[str, dict[tuple[int, int], float]] = {configuration: {}, base: {}}
    for sample in samples:
        if sample.concurrency == concurrency and sample.configuration in speeds:
            number = (sample.session, sample.round)
            speeds[sample.configuration][number] = sample.run.tokens / sample.run.seconds
    ours, theirs = speeds[configuration], speeds[base]
    return [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys())]


def median_ratio(
    samples: Sequence[Sample], configuration: str, base: str, concurrency: int
) -> float | None:
    """The median of `speed_ratios`; None without a common round."""
    ratios = speed_ratios(samples, configuration, base, concurrency)
    return statistics.median(ratios) if ratios else None


def geometric_mean(
    samples: Sequence[Sample], configuration: str, base: str, concurrencies: Sequence[int]
) -> float | None:
    """Of the median ratios over a sweep; None if one of them is missing."""
    ratios = [median_ratio(samples, configuration, base, c) for c in concurrencies]
    known = [ratio for ratio in ratios if ratio is not None]
    return statistics.geometric_mean(known) if known and len(known) == len(ratios) else None


def against_best(
    samples: Sequence[Sample], configuration: str, others: Sequence[str], concurrency: int
) -> tuple[float, str] | None:
    """The lowest median ratio of `configuration` to one of `others`, and which one that is."""
    ratios = {name: median_ratio(samples, configuration, name, concurrency) for name in others}
    known = [(ratio, name) for name, ratio in ratios.items() if ratio is not None]
    return min(known, default=None)


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
    fixed: Sequence[str] = (),
    elastic: Sequence[str] = (),
) -> str:
    """The Markdown table.

    Args:
        samples: of all runs, at one temperature.
        configurations: rows, in order; the first is the base of the ratios.
        concurrencies: columns, in order.
        pairs: (ours, theirs), further rows with the ratio of two configurations.
        failures: configuration -> reason; its row says so instead of figures.
        fixed: what each of `elastic` is held against at each concurrency, where it is best.
        elastic: further rows.
    """
    failures = failures or {}
    base = configurations[0]
    header = ["configuration", *(f"concurrency {c}" for c in concurrencies), "geometric mean"]
    header += ["acceptance length", "verified per accepted"]
    rows = []

    def ratios(name: str, base: str) -> list[str]:
        cells = [_ratio_cell(samples, name, base, c) for c in concurrencies]
        return [*cells, _cell(geometric_mean(samples, name, base, concurrencies))]

    for name in configurations:
        if name in failures:
            rows.append([name, f"failed: {failures[name]}", *[""] * (len(header) - 2)])
            continue
        length = _cell(acceptance_length(samples, name))
        rows.append(
            [name, *ratios(name, base), length, _cell(verified_per_accepted(samples, name))]
        )
    for ours, theirs in pairs:
        rows.append([f"{ours} / {theirs}", *ratios(ours, theirs), "", ""])
    for ours in elastic:
        best = [against_best(samples, ours, fixed, c) for c in concurrencies]
        cells = [f"{found[0]:.2f} ({found[1]})" if found else NOT_AVAILABLE for found in best]
        rows.append([f"{ours} / best fixed", *cells, "", "", ""])
    return markdown(header, rows)


FIGURES: dict[str, Callable[[Run], float | None]] = {
    "tokens/s": lambda run: run.tokens / run.seconds,
    "TTFT p50, ms": lambda run: _milliseconds(run, "ttft_p50"),
    "TTFT p99, ms": lambda run: _milliseconds(run, "ttft_p99"),
    "ITL p50, ms": lambda run: _milliseconds(run, "itl_p50"),
    "ITL p99, ms": lambda run: _milliseconds(run, "itl_p99"),
    "TPOT p50, ms": lambda run: _milliseconds(run, "tpot_p50"),
    "acceptance length": lambda run: (
        run.decode_tokens / run.request_steps if run.request_steps else None
    ),
    "verified per accepted": lambda run: run.verified / run.accepted if run.accepted else None,
    "draft %": lambda run: _share(run.draft_seconds, run),
    "verify %": lambda run: _share(run.verify_seconds, run),
    "cores used": lambda run: run.cpu_seconds / run.seconds,
    "starved": lambda run: float(run.starved),
    "preemptions": lambda run: float(run.preemptions),
}
"""Figures of one run by the heading of their column."""


def figures(samples: Sequence[Sample], configuration: str, concurrency: int) -> dict[str, Spread]:
    """Each figure over the rounds; those that a configuration does not have are left out."""
    runs = [
        s.run for s in samples if s.configuration == configuration and s.concurrency == concurrency
    ]
    found = {}
    for heading, figure in FIGURES.items():
        values = [value for run in runs if (value := figure(run)) is not None]
        if values:
            found[heading] = Spread.of(values)
    return found


def details(
    samples: Sequence[Sample], configurations: Sequence[str], concurrencies: Sequence[int]
) -> str:
    """A Markdown table with the medians of all figures, a row a concurrency and configuration."""
    rows = []
    for concurrency in concurrencies:
        for name in configurations:
            found = figures(samples, name, concurrency)
            if found:
                cells = [_short(found[h].median) if h in found else "" for h in FIGURES]
                rows.append([str(concurrency), name, *cells])
    return markdown(["concurrency", "configuration", *FIGURES], rows)


def summary(
    samples: Sequence[Sample], configurations: Sequence[str], base: str
) -> list[dict[str, Any]]:
    """Every figure and the speed over that of `base`, as JSON."""
    cells = sorted({(s.temperature, s.concurrency) for s in samples})
    found = []
    for temperature, concurrency in cells:
        here = [s for s in samples if s.temperature == temperature]
        for name in configurations:
            values = figures(here, name, concurrency)
            if ratios := speed_ratios(here, name, base, concurrency):
                values = {f"speed over {base}": Spread.of(ratios), **values}
            if values:
                found.append(
                    {
                        "temperature": temperature,
                        "concurrency": concurrency,
                        "configuration": name,
                        **{heading: asdict(spread) for heading, spread in values.items()},
                    }
                )
    return found


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


def _milliseconds(run: Run, name: str) -> float | None:
    return None if run.latency is None else 1e3 * float(getattr(run.latency, name))


def _share(seconds: float | None, run: Run) -> float | None:
    return None if seconds is None else 100 * seconds / run.seconds


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
