# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""From measured runs to ratios, their intervals and a Markdown table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from echo_vllm.offline.bench.closed_loop import Run
from echo_vllm.offline.bench.intervals import Interval, median, ratio

NOT_AVAILABLE = "-"
AT_ONCE, A_SECOND = "at once", "a second"
"""Units of a load: requests in flight in a closed loop, requests that arrive in an open one."""


@dataclass(frozen=True)
class Sample:
    """One run of one configuration in one round at one load.

    Runs compare only inside a session, which is one call of the program.

    Attributes:
        load: requests at once, or those that arrive a second.
    """

    configuration: str
    load: float
    round: int
    run: Run
    temperature: float = 0.0
    session: int = 0


def speed_ratios(
    samples: Sequence[Sample], configuration: str, base: str, load: float
) -> list[float]:
    """Speed of `configuration` over that of `base`, round by round.

    Both ran the same prompts close in time, so the quotient inside a round is free of whatever
    makes one round differ from the next. A round that lacks either is left out.
    """
    speeds: dict[str, dict[tuple[int, int], float]] = {configuration: {}, base: {}}
    for sample in samples:
        if sample.load == load and sample.configuration in speeds:
            number = (sample.session, sample.round)
            speeds[sample.configuration][number] = sample.run.speed
    ours, theirs = speeds[configuration], speeds[base]
    return [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys())]


def speed_ratio(
    samples: Sequence[Sample], configuration: str, base: str, *loads: float
) -> Interval | None:
    """Geometric mean of `speed_ratios`, over some loads if there are several; None where one of
    them has no common round."""
    groups = [speed_ratios(samples, configuration, base, load) for load in loads]
    return ratio(*groups) if all(groups) else None


def against_best(
    samples: Sequence[Sample], configuration: str, others: Sequence[str], load: float
) -> tuple[Interval, str] | None:
    """The lowest ratio of `configuration` to one of `others`, and which one that is."""
    ratios = {name: speed_ratio(samples, configuration, name, load) for name in others}
    known = [(found, name) for name, found in ratios.items() if found is not None]
    return min(known, key=lambda pair: pair[0].middle, default=None)


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
    loads: Sequence[float],
    pairs: Sequence[tuple[str, str]] = (),
    failures: dict[str, str] | None = None,
    fixed: Sequence[str] = (),
    elastic: Sequence[str] = (),
    unit: str = AT_ONCE,
) -> str:
    """The Markdown table.

    Args:
        samples: of all runs, at one temperature.
        configurations: rows, in order; the first is the base of the ratios.
        loads: columns, in order.
        pairs: (ours, theirs), further rows with the ratio of two configurations.
        failures: configuration -> reason; its row says so instead of figures.
        fixed: what each of `elastic` is held against at each load, where it is best.
        elastic: further rows.
        unit: of a load.
    """
    failures = failures or {}
    base = configurations[0]
    header = ["configuration", *(f"{load:g} {unit}" for load in loads), "geometric mean"]
    header += ["acceptance length", "verified per accepted"]
    rows = []

    def ratios(name: str, base: str) -> list[str]:
        found = [speed_ratio(samples, name, base, load) for load in loads]
        return [_shown(ratio) for ratio in (*found, speed_ratio(samples, name, base, *loads))]

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
        best = [against_best(samples, ours, fixed, load) for load in loads]
        cells = [f"{found[0]} ({found[1]})" if found else NOT_AVAILABLE for found in best]
        rows.append([f"{ours} / best fixed", *cells, "", "", ""])
    return markdown(header, rows)


FIGURES: dict[str, Callable[[Run], float | None]] = {
    "tokens/s": lambda run: run.tokens / run.seconds,
    "TTFT p50, ms": lambda run: _milliseconds(run, "ttft_p50"),
    "TTFT p99, ms": lambda run: _milliseconds(run, "ttft_p99"),
    "ITL p50, ms": lambda run: _milliseconds(run, "itl_p50"),
    "ITL p99, ms": lambda run: _milliseconds(run, "itl_p99"),
    "TPOT p50, ms": lambda run: _milliseconds(run, "tpot_p50"),
    "TPOT p99, ms": lambda run: _milliseconds(run, "tpot_p99"),
    "good requests/s": lambda run: run.goodput,
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


def figures(samples: Sequence[Sample], configuration: str, load: float) -> dict[str, Interval]:
    """The median of each figure over the rounds; those that a configuration does not have are left
    out."""
    runs = [s.run for s in samples if (s.configuration, s.load) == (configuration, load)]
    found = {}
    for heading, figure in FIGURES.items():
        values = [value for run in runs if (value := figure(run)) is not None]
        if values:
            found[heading] = median(values)
    return found


def details(
    samples: Sequence[Sample],
    configurations: Sequence[str],
    loads: Sequence[float],
    unit: str = AT_ONCE,
) -> str:
    """A Markdown table with the medians of all figures, a row a load and configuration."""
    rows = []
    for load in loads:
        for name in configurations:
            found = figures(samples, name, load)
            if found:
                cells = [_short(found[h].middle) if h in found else "" for h in FIGURES]
                rows.append([f"{load:g}", name, *cells])
    return markdown([f"requests {unit}", "configuration", *FIGURES], rows)


def summary(
    samples: Sequence[Sample], configurations: Sequence[str], base: str
) -> list[dict[str, Any]]:
    """Every figure and the speed over that of `base`, with intervals, as JSON."""
    cells = sorted({(s.temperature, s.load) for s in samples})
    found = []
    for temperature, load in cells:
        here = [s for s in samples if s.temperature == temperature]
        for name in configurations:
            values = figures(here, name, load)
            if over := speed_ratio(here, name, base, load):
                values = {f"speed over {base}": over, **values}
            if values:
                found.append(
                    {
                        "temperature": temperature,
                        "load": load,
                        "configuration": name,
                        **{heading: asdict(interval) for heading, interval in values.items()},
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


def _shown(interval: Interval | None) -> str:
    return NOT_AVAILABLE if interval is None else str(interval)


def _cell(value: float | None) -> str:
    return NOT_AVAILABLE if value is None else f"{value:.2f}"


def _milliseconds(run: Run, name: str) -> float | None:
    return None if run.latency is None else 1e3 * float(getattr(run.latency, name))


def _share(seconds: float | None, run: Run) -> float | None:
    return None if seconds is None else 100 * seconds / run.seconds


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
