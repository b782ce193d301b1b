# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""One table from one run: plain decoding, vLLM's own EAGLE-3 chain, and this project's policies.

    make bench-quick ARGS="--rounds 5"
    python -m benchmarks.quick --prompts my_prompts.jsonl --configs topn-16,examples/topn-64.json

Greedy decoding of real prompts, the same number of tokens for each request. Speed is tokens per
second over plain decoding's, prefill included: geometric mean of the rounds' ratios, and its 95 %
interval by bootstrap.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.command_line import (
    add_common_options,
    integers,
    measure,
    names,
    report,
    run_program,
)
from echo_vllm import atomic
from echo_vllm.offline.bench.configurations import DEMO_HEAD, SAME_CHAIN, built_in, choose
from echo_vllm.offline.bench.tables import table

DESCRIPTION = "Speed of plain decoding, vLLM's eagle3 and echo's policies, in one interleaved run."
CONFIGURATIONS = [
    "plain",
    "eagle3-k2",
    "eagle3-k4",
    "chain-k2",
    "chain-k4",
    "static-15",
    "topn-8",
    "topn-16",
    "echo",
    "auto",
]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quick", description=DESCRIPTION)
    add_common_options(parser)
    parser.add_argument(
        "--concurrency", type=integers, default=[1, 4, 16], metavar="C,C,...", help="(1,4,16)"
    )
    parser.add_argument(
        "--configs",
        type=names,
        default=CONFIGURATIONS,
        metavar="NAME,...",
        help=(
            f"of {', '.join(built_in(DEMO_HEAD))}, or JSON files with a speculative_config "
            f"({','.join(CONFIGURATIONS)})"
        ),
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Returns the exit code: 1 if a configuration failed."""
    options = parse()
    started = time.monotonic()
    try:
        configurations = choose(options.configs, options.head.resolve())
        samples, failures = measure(options, configurations)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = [configuration.name for configuration in configurations]
    pairs = [pair for pair in SAME_CHAIN if set(pair) <= set(chosen) - set(failures)]
    text = table(samples, chosen, options.concurrency, pairs, failures)
    print(text)
    print(
        "\nTokens per second over those of plain decoding, ratio [95 % interval] of "
        f"{options.rounds} paired rounds; {options.tokens} tokens a request, {options.dtype}, "
        f"{options.threads} threads; "
        f"{time.monotonic() - started:.0f} s in all."
    )
    if options.json:
        content = report(
            "quick",
            options={
                key: value.name if isinstance(value, Path) else value
                for key, value in vars(options).items()
                if key not in ("model", "head", "json")
            },
            configurations={
                c.name: c.speculation and {k: v for k, v in c.speculation.items() if k != "model"}
                for c in configurations
            },
            failures=failures,
            table=text.splitlines(),
            samples=[asdict(sample) for sample in samples],
        )
        atomic.write_json(options.json, content)
    return 1 if failures else 0


if __name__ == "__main__":
    run_program(main)
