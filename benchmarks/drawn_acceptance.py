# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Tokens a step with drawn candidates, with the best ones, and with vLLM's own chains.

    python -m benchmarks.drawn_acceptance --json benchmarks/results/drawn-cpu.json

Only tokens are counted, so a busy machine does no harm.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echo_vllm import atomic
from echo_vllm.conversations import CHATS, Chat, read_conversations, shuffled
from echo_vllm.offline.acceptance_run import Counted, measure
from echo_vllm.offline.bench.configurations import DEMO_HEAD, DEMO_TARGET
from echo_vllm.offline.bench.tables import markdown

NODES, CHAIN = 8, 3
GREEDY_CHAIN = f"vLLM, chain of {CHAIN}"
DRAWN_CHAIN = f"vLLM, chain of {CHAIN}, probabilistic"
BEST, DRAWN = f"{NODES} best nodes", f"{NODES} drawn nodes"
RATIOS = ((DRAWN, DRAWN_CHAIN), (DRAWN, BEST))


def configurations(head: str) -> dict[str, dict[str, Any]]:
    """Name -> vLLM's speculative_config."""
    chain = {"model": head, "num_speculative_tokens": CHAIN}
    tree = {"method": "echo", "model": head, "num_speculative_tokens": NODES}
    shape = {"policy": "topn", "max_depth": 4, "top_k": 4}
    best, drawn = {"candidates": "best"}, {"candidates": "drawn"}
    return {
        GREEDY_CHAIN: {"method": "eagle3", **chain},
        DRAWN_CHAIN: {
            "method": "eagle3",
            "draft_sample_method": "probabilistic",
            **chain,
        },
        f"chain of {CHAIN} drawn": {
            "method": "echo",
            **chain,
            "echo": {"policy": "chain", **drawn},
        },
        BEST: {**tree, "echo": shape | best},
        DRAWN: {**tree, "echo": shape | drawn},
    }


def error_of(counted: Counted) -> float:
    """Standard error of the mean tokens of a step, as if steps were independent."""
    shares = counted.per_position
    mean = sum(shares)
    square = sum((2 * i + 1) * share for i, share in enumerate(shares))
    return math.sqrt(max(0.0, square - mean**2) / max(1, counted.drafts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--prompts",
        type=Path,
        default=CHATS,
        metavar="FILE",
        help="JSON lines, of which first turns are asked (the project's chats, which neither head "
        "nor profile has seen)",
    )
    parser.add_argument("--num-prompts", type=int, default=32, help="at most (32)")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer (48)")
    parser.add_argument("--temperatures", default="0.6,1.0", help="(0.6,1.0)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    temperatures = [float(part) for part in args.temperatures.split(",")]
    chat, asked = Chat(str(DEMO_TARGET)), shuffled(read_conversations(args.prompts))
    prompts = [chat.encode(turns[:1]) for turns in asked[: args.num_prompts]]
    found: dict[str, dict[float, tuple[float, float]]] = {}
    for name, speculation in configurations(str(DEMO_HEAD)).items():
        counted = measure(
            str(DEMO_TARGET),
            speculation,
            {"all": prompts},
            temperatures,
            max_tokens=args.tokens,
            dtype="float32",
            max_model_len=2048,
            concurrency=16,
        )
        found[name] = {
            t: (counted["all", t].length, error_of(counted["all", t])) for t in temperatures
        }
        print(name, found[name], flush=True)
        ratios = {
            f"{above} / {below}": {
                t: ratio_of(found[above][t], found[below][t]) for t in temperatures
            }
            for above, below in RATIOS
            if above in found and below in found
        }
        if args.json:
            report = {
                "prompts": len(prompts),
                "tokens": args.tokens,
                "tokens_per_step": {name: named(row) for name, row in found.items()},
                "ratios": {name: named(row) for name, row in ratios.items()},
            }
            atomic.write_json(args.json, report)
    header = ["", *(f"T = {t:g}" for t in temperatures)]
    rows = [
        [name, *(f"{value:.2f} +- {error:.2f}" for value, error in row.values())]
        for name, row in (found | ratios).items()
    ]
    print(markdown(header, rows))


def ratio_of(above: tuple[float, float], below: tuple[float, float]) -> tuple[float, float]:
    """The ratio of two figures with standard errors, and its own."""
    ratio = above[0] / below[0]
    return ratio, ratio * math.hypot(above[1] / above[0], below[1] / below[0])


def named(row: Mapping[float, tuple[float, float]]) -> dict[str, dict[str, float]]:
    """By temperature, for a file."""
    return {
        f"{t:g}": {"value": round(value, 4), "error": round(error, 4)}
        for t, (value, error) in row.items()
    }


if __name__ == "__main__":
    main()
