# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What is compared: names of configurations and vLLM's `speculative_config` of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO_TARGET = ROOT / "models" / "smollm2-135m-instruct"
DEMO_HEAD = ROOT / "models" / "smollm2-135m-eagle3"

STATIC_TREE = [
    *([rank] for rank in range(4)),
    *([0, rank] for rank in range(3)),
    *([1, rank] for rank in range(2)),
    [2, 0],
    *([0, 0, rank] for rank in range(2)),
    [0, 1, 0],
    [1, 0, 0],
    [0, 0, 0, 0],
]
"""15 nodes by child ranks: wide where the head is unsure which token, deep along its best path."""


@dataclass(frozen=True)
class Configuration:
    """One column of the comparison; `speculation` None is plain decoding."""

    name: str
    speculation: dict[str, Any] | None


PLAIN = Configuration("plain", None)


def built_in(head: Path) -> dict[str, Configuration]:
    """The configurations of `make bench-quick`, by name, in the order of the table."""

    def echo(num_nodes: int, **section: Any) -> dict[str, Any]:
        return {
            "method": "echo",
            "model": str(head),
            "num_speculative_tokens": num_nodes,
            "echo": section,
        }

    def eagle3(length: int) -> dict[str, Any]:
        return {"method": "eagle3", "model": str(head), "num_speculative_tokens": length}

    speculation = {
        "eagle3-k2": eagle3(2),
        "eagle3-k4": eagle3(4),
        "chain-k2": echo(2, policy="chain"),
        "chain-k4": echo(4, policy="chain"),
        "static-15": echo(len(STATIC_TREE), policy="static", tree=STATIC_TREE),
        "topn-8": echo(8, policy="topn", max_depth=3, top_k=4),
        "topn-16": echo(16, policy="topn", max_depth=4, top_k=4),
    }
    return {
        "plain": PLAIN,
        **{name: Configuration(name, value) for name, value in speculation.items()},
    }


SAME_CHAIN = [("chain-k2", "eagle3-k2"), ("chain-k4", "eagle3-k4")]
"""Pairs (ours, vLLM's) that draft the same tokens: their ratio measures the runtime alone."""


def choose(names: Sequence[str], head: Path) -> list[Configuration]:
    """The configurations `names`; plain decoding, the base of every ratio, is always the first.

    Args:
        names: of built-in configurations, or paths of JSON files with a `speculative_config`.
        head: the EAGLE-3 head of the built-in ones.

    Raises:
        ValueError: a name is neither, or stands twice.
    """
    known = built_in(head)
    chosen = [PLAIN]
    for name in names:
        if name == PLAIN.name:
            continue
        if name in known:
            configuration = known[name]
        elif name.endswith(".json") and Path(name).is_file():
            configuration = Configuration(Path(name).stem, json.loads(Path(name).read_text()))
        else:
            raise ValueError(
                f"unknown configuration {name!r}: give a JSON file or one of {', '.join(known)}"
            )
        if configuration.name in {c.name for c in chosen}:
            raise ValueError(f"configuration {configuration.name!r} is asked for twice")
        chosen.append(configuration)
    return chosen
