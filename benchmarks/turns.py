# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Tokens a second of engines that take turns of a fraction of a second, at every load.

    python -m benchmarks.turns [--requests 1,4,16] [--temperature 0,1] [--configs rest,auto]

Each engine has a process of its own and a closed loop of clients in it: one whose answer has its
tokens sends its next prompt at once, so that reading prompts is part of what is measured. All
engines answer the same prompts in the same order, and between two turns an engine waits with its
requests in place. What a shared machine does to one engine it does to the others a moment later,
which makes ratios that differ by a few hundredths mean something; `echo-vllm bench` runs one
engine at a time, through the server, and is off by a tenth on such a machine.

A pair is the tokens a second of `--pair` turns of an engine and of another one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
from benchmarks.steps import Begin, Engine, Turn
from echo_vllm import atomic
from echo_vllm.offline.bench.closed_loop import Job
from echo_vllm.offline.bench.configurations import HELD_AGAINST, PLAIN, choose, is_fixed
from echo_vllm.offline.bench.intervals import Interval, ratio
from echo_vllm.offline.bench.tables import markdown

CONFIGURATIONS = ["rest", "chain-k1", "auto"]
LONGEST_PROMPT = 1024


@dataclass
class Speeds:
    """Of one engine at one load: sums over the turns of each pair."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def ratios(self, other: Speeds) -> list[float]:
        """Of the tokens a second to another's, pair by pair."""
        pairs = zip(self.tokens, self.seconds, other.tokens, other.seconds, strict=True)
        return [max(a, 1) / b * d / max(c, 1) for a, b, c, d in pairs]

    def over(self, other: Speeds) -> Interval:
        """Their middle."""
        return ratio(self.ratios(other))


def measure(
    engines: Sequence[Engine], job: Job, warm_up: int, pairs: int, pair: int, turn: float
) -> dict[str, Speeds]:
    """Speeds of all engines.

    Args:
        job: its `load` clients, see `Clients`.
        warm_up: pairs that do not count.
        pairs: of all engines.
        pair: turns of each in a pair.
        turn: seconds.
    """
    for engine in engines:
        engine.do(Begin(job))
    found = {engine.name: Speeds() for engine in engines}
    order = list(engines)
    for number in range(warm_up + pairs):
        sums = {engine.name: [0.0, 0.0, 0.0] for engine in engines}
        for _ in range(pair):
            for engine in order:
                each = engine.do(Turn(turn))
                sums[engine.name] = [a + b for a, b in zip(sums[engine.name], each, strict=True)]
            order = order[1:] + order[:1]
        if number < warm_up:
            continue
        for name, (tokens, seconds, steps) in sums.items():
            found[name].tokens.append(int(tokens))
            found[name].seconds.append(seconds)
            found[name].steps.append(int(steps))
    return found


Found = dict[int, dict[str, Speeds]]
"""By load and engine."""


def table(found: Found) -> str:
    """A row for each engine over plain decoding, then of `auto` over what it is held against."""
    of_any = next(iter(found.values()))
    pairs = [(name, PLAIN.name) for name in of_any if name != PLAIN.name]
    pairs += [(ours, other) for ours, other in HELD_AGAINST if ours in of_any and other in of_any]
    rows = []
    for ours, other in pairs:
        cells = [speeds[ours].over(speeds[other]) for speeds in found.values()]
        mean = ratio(*(speeds[ours].ratios(speeds[other]) for speeds in found.values()))
        rows.append([ours, other, *map(str, cells), str(mean)])
    fixed = [name for name in of_any if is_fixed(name)]
    theirs = [name for name in of_any if name.startswith("eagle3")]
    for ours in ("auto", "echo"):
        for title, others in (("best fixed", fixed), ("vLLM's best chain", theirs)):
            if ours in of_any and others:
                rows.append([ours, title, *(_over_best(s, ours, others) for s in found.values())])
                rows[-1].append("")
    return markdown(["engine", "over", *(f"{n} requests" for n in found), "all"], rows)


def _over_best(speeds: dict[str, Speeds], ours: str, others: Sequence[str]) -> str:
    """Against the fastest of `others` over the whole of this load."""
    best = max(others, key=lambda name: sum(speeds[name].tokens) / sum(speeds[name].seconds))
    return f"{speeds[ours].over(speeds[best])} ({best})"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=integers, default=[1, 4, 16], help="(1,4,16)")
    parser.add_argument("--temperature", type=names, default=["0", "1"], help="(0,1)")
    parser.add_argument("--configs", type=names, default=CONFIGURATIONS, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, on average (128)")
    parser.add_argument("--turn", type=float, default=0.4, help="seconds (0.4)")
    parser.add_argument("--pair", type=int, default=4, help="turns of each engine in a pair (4)")
    parser.add_argument("--pairs", type=int, default=12, help="at each load (12)")
    parser.add_argument("--warm-up", type=int, default=3, help="pairs that do not count (3)")
    parser.add_argument("--rows", action="store_true", help="print steps and tokens as well")
    add_engine_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all sums here too")
    return parser.parse_args(arguments)


def main() -> int:
    """Returns the exit code."""
    options = parse()
    prompts = token_prompts(options, most=LONGEST_PROMPT, length=64)
    chosen = choose(options.configs, options.head.resolve())
    found: dict[str, Found] = {}
    with started(chosen, engine_options(options, max(options.requests))) as engines:
        for temperature in options.temperature:
            found[temperature] = {}
            for requests in options.requests:
                job = Job(
                    prompts, requests, options.tokens, temperature=float(temperature), spread=0.5
                )
                found[temperature][requests] = measure(
                    engines, job, options.warm_up, options.pairs, options.pair, options.turn
                )
                if options.rows:
                    print_rows(found[temperature][requests], requests)
            print(f"\nTemperature {temperature}:\n\n{table(found[temperature])}", flush=True)
    print(
        f"\nTokens a second over another engine's [95 % interval]: {options.pairs} pairs of "
        f"{options.pair} turns of {options.turn} s each; {options.dtype}, {options.threads} "
        f"threads, {'compiled' if options.compile else 'eager'}."
    )
    if options.json:
        content = report(
            "turns",
            tables={t: table(each).splitlines() for t, each in found.items()},
            sums={
                t: {n: {name: vars(s) for name, s in speeds.items()} for n, speeds in each.items()}
                for t, each in found.items()
            },
        )
        atomic.write_json(options.json, content)
    return 0


def print_rows(speeds: dict[str, Speeds], requests: int) -> None:
    """Steps a second and tokens a request and step of each engine."""
    for name, each in speeds.items():
        tokens, seconds, steps = sum(each.tokens), sum(each.seconds), sum(each.steps)
        print(
            f"{requests:3} {name:16} {tokens / seconds:7.1f} tokens/s, step "
            f"{1000 * seconds / steps:6.2f} ms, {tokens / steps / requests:.3f} a step",
            flush=True,
        )


if __name__ == "__main__":
    run_program(main)
