# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Host time of a decoding step in two versions of this project, from runs of both in turns.

    git worktree add ../before REVISION && (cd ../before && make setup)
    for i in 1 2 3; do
      (cd ../before && .venv/bin/python -m benchmarks.step_profile ... --json /tmp/before-$i.json)
      .venv/bin/python -m benchmarks.step_profile ... --json /tmp/after-$i.json
    done
    python -m benchmarks.compare_profiles --before /tmp/before-*.json --after /tmp/after-*.json

Host time is a step's time outside of the target's and the drafter's forwards and of the drafter's
language-model head, in milliseconds: the median over the runs of the mean of a step. The ratio is
of run i after to run i before, with its interval (docs/benchmarks.md, "A cell").
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from echo_vllm.offline.bench.intervals import median, ratio

MODEL = ("target forward", "draft forward", "draft head")
"""Stages in which a model computes."""

Cell = tuple[str, int]


def host_ms(files: list[Path]) -> dict[Cell, list[float]]:
    """(configuration, requests) -> milliseconds of host time a full decoding step, one a run."""
    cells: dict[Cell, list[float]] = defaultdict(list)
    for file in files:
        for sample in json.loads(file.read_text())["samples"]:
            run = sample["run"]
            if not run["full_steps"]:
                continue
            host = sum(s for stage, s in run["stages"].items() if stage not in MODEL)
            # Versions before the open loop called it so.
            cell = sample["configuration"], int(sample.get("load", sample.get("concurrency")))
            cells[cell].append(1000 * host / run["full_steps"])
    return cells


def table(before: dict[Cell, list[float]], after: dict[Cell, list[float]]) -> str:
    """A row a configuration and number of requests that both have."""
    lines = ["| configuration | requests | before | after | ratio |", "|---|---|---|---|---|"]
    for cell in sorted(before.keys() & after.keys()):
        old, new = before[cell], after[cell]
        pairs = ratio([b / a for a, b in zip(old, new, strict=False)])
        shown = f"{median(old)} | {median(new)} | {pairs}"
        lines.append(f"| {cell[0]} | {cell[1]} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Host time of a step, before and after.")
    parser.add_argument("--before", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--after", type=Path, nargs="+", required=True, metavar="FILE")
    options = parser.parse_args()
    print(table(host_ms(options.before), host_ms(options.after)))


if __name__ == "__main__":
    main()
