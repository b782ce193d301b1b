# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Whether the cost of a step depends on the context length enough to be an axis of the cost model.

    python -m benchmarks.context_cost [--requests 1,8] [--contexts 64,256,1024,2048] [--json FILE]

One engine without speculation and one whose requests all verify a fixed tree, in one process, one
after the other; random prompts of one length, then steps in which all requests decode. A table of
the median step time at each context over that at the shortest. Every context is measured in every
round, so that a slow minute of the machine meets all of them.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.command_line import integers
from benchmarks.steps import Decode, Read, Stop
from echo_vllm import atomic
from echo_vllm.machine import fast_dtype
from echo_vllm.offline.bench.configurations import DEMO_HEAD, DEMO_TARGET
from echo_vllm.offline.bench.tables import markdown
from echo_vllm.offline.engine import LocalEngine

Medians = dict[tuple[int, int], float]

TREE = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1]]


def step_times(local: LocalEngine, requests: int, context: int, steps: int) -> list[float]:
    """Seconds of `steps` decoding steps of `requests` requests of `context` tokens."""
    draw = random.Random(context)
    prompts = [[draw.randrange(100, 40_000) for _ in range(context)] for _ in range(requests)]
    Read(prompts).run(local)
    Decode(1).run(local)
    times = Decode(steps).run(local)
    Stop(requests).run(local)
    return times


def measure(args: argparse.Namespace, speculation: dict[str, Any] | None) -> Medians:
    """Median step time in seconds by (requests, context)."""
    times: dict[tuple[int, int], list[float]] = {}
    options = {
        "speculative_config": speculation,
        "dtype": args.dtype,
        "max_num_seqs": max(args.requests),
        "max_model_len": max(args.contexts) + (1 + len(TREE)) * (args.steps + 2),
    }
    with LocalEngine(DEMO_TARGET, **options) as local:
        for _ in range(args.rounds):
            for requests in args.requests:
                for context in args.contexts:
                    times.setdefault((requests, context), []).extend(
                        step_times(local, requests, context, args.steps)
                    )
    return {load: statistics.median(seconds) for load, seconds in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=integers, default=[1, 8])
    parser.add_argument("--contexts", type=integers, default=[64, 256, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=fast_dtype())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    tree = {
        "method": "echo",
        "model": str(DEMO_HEAD),
        "num_speculative_tokens": len(TREE),
        "echo": {"policy": "static", "tree": TREE},
    }
    found = {"plain": measure(args, None), f"tree of {len(TREE)}": measure(args, tree)}
    rows = []
    for name, medians in found.items():
        for requests in args.requests:
            of = [medians[requests, context] for context in args.contexts]
            rows.append([name, str(requests), *(f"{seconds / of[0]:.2f}" for seconds in of)])
    header = ["step", "requests", *(f"{context} tokens" for context in args.contexts)]
    print(markdown(header, rows))
    if args.json:
        seconds = {
            name: [[*load, median] for load, median in medians.items()]
            for name, medians in found.items()
        }
        report = {"command": " ".join(sys.argv), "dtype": args.dtype, "seconds": seconds}
        atomic.write_json(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
