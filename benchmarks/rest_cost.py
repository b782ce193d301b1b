# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What a step that rests costs: steps of engines that may not draft over those of plain decoding.

    python -m benchmarks.rest_cost [--requests 8,32,64] [--steps 200] [--json FILE]

Each engine has a process of its own; all hold the same prompts, and take turns after every few
steps. A pair is the median step of such a block, of an engine and of plain decoding, one right
after the other at the same context lengths. The first steps of each round, which read all prompts,
are pairs too. `rest` is this project's runtime without a draft; `auto-rest` also forecasts in every
step and probes now and then, and a probe is a step in which it does not rest: the medians leave it
out. Both have vLLM's linear layers unless `--linear auto` says otherwise, so that what is seen is
the runtime alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.command_line import (
    add_engine_options,
    engine_options,
    integers,
    names,
    report,
    run_program,
    started,
    token_prompts,
)
from benchmarks.steps import Decode, Engine, Read, Stop
from echo_vllm import atomic
from echo_vllm.offline.bench.configurations import PLAIN, choose
from echo_vllm.offline.bench.intervals import Interval, ratio
from echo_vllm.offline.bench.tables import markdown

RESTING = ["rest", "auto-rest"]
WARM_UP_STEPS = 16


@dataclass
class Times:
    """Seconds of one engine with a number of requests: [rounds], and [rounds * blocks] medians."""

    reading: list[float] = field(default_factory=list)
    decoding: list[float] = field(default_factory=list)

    def over(self, other: Times) -> tuple[Interval, Interval]:
        """Ratios to another's, of decoding steps and of those that read prompts."""
        found = [
            ratio([a / b for a, b in zip(ours, theirs, strict=True)])
            for ours, theirs in (
                (self.decoding, other.decoding),
                (self.reading, other.reading),
            )
        ]
        return found[0], found[1]


def measure(
    engines: Sequence[Engine],
    prompts: Sequence[list[int]],
    requests: int,
    rounds: int,
    blocks: int,
    block: int,
    temperature: float,
) -> dict[str, Times]:
    """Times of all engines.

    Args:
        engines: that take turns.
        prompts: token ids; each round takes the next ones.
        requests: at once.
        rounds: each reads its prompts and decodes `blocks` times `block` steps.
    """
    times = {engine.name: Times() for engine in engines}
    for number in range(rounds):
        first = number * requests
        chosen = [prompts[(first + i) % len(prompts)] for i in range(requests)]
        order = [engines[(number + i) % len(engines)] for i in range(len(engines))]
        for engine in order:
            times[engine.name].reading.append(engine.do(Read(chosen, temperature)))
        for engine in order:
            engine.do(Decode(2))  # What follows upon reading.
        for _ in range(blocks):
            for engine in order:
                times[engine.name].decoding.append(median(engine.do(Decode(block))))
            order = order[1:] + order[:1]
        for engine in order:
            engine.do(Stop(requests))
    return times


def table(found: dict[int, dict[str, Times]]) -> str:
    """A row for each engine and each kind of step."""
    configurations = [name for name in next(iter(found.values())) if name != PLAIN.name]
    rows = []
    for kind, step in enumerate(("decodes", "reads the prompts")):
        for name in configurations:
            ratios = [times[name].over(times[PLAIN.name])[kind] for times in found.values()]
            rows.append([name, step, *map(str, ratios)])
    return markdown(["engine", "step that", *(f"{n} requests" for n in found)], rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=integers, default=[8, 32, 64], help="(8,32,64)")
    parser.add_argument("--steps", type=int, default=200, help="decoding steps of each (200)")
    parser.add_argument("--rounds", type=int, default=20, help="with other prompts each (20)")
    parser.add_argument("--block", type=int, default=5, help="steps of a turn (5)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of all requests (0)")
    parser.add_argument("--configs", type=names, default=RESTING, help="(rest,auto-rest)")
    parser.add_argument("--linear", choices=["stock", "auto"], default="stock", help="(stock)")
    add_engine_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times here too")
    return parser.parse_args(arguments)


def main() -> int:
    """Returns the exit code."""
    options = parse()
    # No long ones, so that all prompts of a batch fit into one step.
    prompts = token_prompts(options, most=64, length=32)
    blocks = max(1, -(-options.steps // (options.rounds * options.block)))
    chosen = choose(options.configs, options.head.resolve())
    for configuration in chosen:
        if configuration.speculation and "echo" in configuration.speculation:
            configuration.speculation["echo"]["linear"] = options.linear
    found = {}
    with started(chosen, engine_options(options, max(options.requests))) as engines:
        for requests in options.requests:
            measure(engines, prompts, requests, 1, 1, WARM_UP_STEPS, options.temperature)
            found[requests] = measure(
                engines,
                prompts,
                requests,
                options.rounds,
                blocks,
                options.block,
                options.temperature,
            )
    print(table(found))
    steps = options.rounds * blocks * options.block
    print(
        f"\nStep time over plain decoding's [95 % interval]: {steps} steps of each engine in "
        f"{options.rounds * blocks} pairs of blocks, {options.rounds} pairs that read prompts; "
        f"{options.dtype}, {options.linear} linear layers, {options.threads} threads."
    )
    if options.json:
        content = report(
            "rest_cost",
            steps=steps,
            block=options.block,
            table=table(found).splitlines(),
            seconds={
                requests: {name: asdict(each) for name, each in times.items()}
                for requests, times in found.items()
            },
        )
        atomic.write_json(options.json, content)
    return 0


if __name__ == "__main__":
    run_program(main)
