# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Where the time of a decoding step goes, as Markdown tables, from one interleaved run.

    python -m benchmarks.step_profile --json profile.json

Every configuration runs the same prompts in turns, as in `benchmarks.quick`, with clocks around
the stages (`benchmarks.timers`). Only steps in which all requests in flight decode
count. Times are given in hundredths of a step of plain decoding at the same concurrency, so that
rows and tables compare.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.command_line import (
    add_common_options,
    integers,
    measure,
    names,
    report,
    run_program,
)
from benchmarks.timers import STAGES, TimedProcess
from echo_vllm import atomic
from echo_vllm.offline.bench.configurations import PLAIN, choose
from echo_vllm.offline.bench.tables import Sample, acceptance_length, markdown

DESCRIPTION = "Shares of a decoding step by stage, in one interleaved run."
CONFIGURATIONS = ["plain", "eagle3-k4", "chain-k4", "topn-16"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_profile", description=DESCRIPTION
    )
    add_common_options(parser)
    parser.add_argument(
        "--concurrency", type=integers, default=[1, 16], metavar="C,C,...", help="(1,16)"
    )
    parser.add_argument(
        "--configs",
        type=names,
        default=CONFIGURATIONS,
        metavar="NAME,...",
        help=f"as in benchmarks.quick ({','.join(CONFIGURATIONS)})",
    )
    return parser.parse_args(arguments)


def seconds_per_step(samples: Sequence[Sample], name: str, concurrency: int) -> dict[str, float]:
    """Mean time of each stage in a full decoding step; empty if there was none."""
    runs = [s.run for s in samples if (s.configuration, s.load) == (name, concurrency)]
    steps = sum(run.full_steps for run in runs)
    if not steps:
        return {}
    return {stage: sum(run.stages.get(stage, 0.0) for run in runs) / steps for stage in STAGES}


def profile_table(
    samples: Sequence[Sample], configurations: Sequence[str], concurrency: int
) -> str:
    """One row a stage, one column a configuration, in hundredths of the first one's step."""
    steps = {name: seconds_per_step(samples, name, concurrency) for name in configurations}
    for name in configurations:
        if not steps[name]:
            return (
                f"{name} never had {concurrency} requests decoding in one step: raise --tokens, or "
                "ask for fewer at once."
            )
    whole = sum(steps[configurations[0]].values())

    def row(stage: str, seconds: Sequence[float]) -> list[str]:
        return [stage, *(f"{100 * s / whole:.1f}" for s in seconds)]

    at = [s for s in samples if s.load == concurrency]
    lengths = [acceptance_length(at, name) for name in configurations]
    costs = [sum(steps[name].values()) / whole for name in configurations]
    rows = [
        row(stage, [steps[name].get(stage, 0.0) for name in configurations]) for stage in STAGES
    ]
    rows.append(row("whole step", [sum(steps[name].values()) for name in configurations]))
    rows.append(["tokens a request and step", *(f"{x or 0:.2f}" for x in lengths)])
    rows.append(
        [
            "speed-up of decoding",
            *(f"{(x or 0) / c:.2f}" for x, c in zip(lengths, costs, strict=True)),
        ]
    )
    return markdown([f"concurrency {concurrency}", *configurations], rows)


def main() -> int:
    """Returns the exit code: 1 if a configuration failed."""
    options = parse()
    try:
        configurations = choose(options.configs, options.head.resolve())
        samples, failures = measure(options, configurations, TimedProcess)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if PLAIN.name in failures:
        return 1  # The progress line has said why; there is nothing to compare with.
    shown = [c.name for c in configurations if c.name not in failures]
    if options.json:
        found = [asdict(sample) for sample in samples]
        atomic.write_json(options.json, report("step_profile", failures=failures, samples=found))
    tables = [profile_table(samples, shown, c) for c in options.concurrency]
    print("\n\n".join(tables))
    return 1 if failures else 0


if __name__ == "__main__":
    run_program(main)
