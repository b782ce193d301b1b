# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What is compared: names of configurations and vLLM's `speculative_config` of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import echo_vllm
from echo_vllm.forecast.drafter_profile import FILE_NAME, DrafterProfile

ROOT = Path(echo_vllm.__file__).resolve().parents[1]
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

K_BY_BATCH_SIZE = [[1, 4, 3], [5, 16, 2], [17, 256, 1]]
"""First and last batch size of a range, both included, and vLLM's chain length in it."""

NODES = 16
MAX_DEPTH = 6
TOP_K = 4
HIGHEST_TAU = 0.999
ONE_TAU = 0.2
"""The only threshold of the paper's published code that all its models share."""


@dataclass(frozen=True)
class Configuration:
    """One column of the comparison; `speculation` None is plain decoding."""

    name: str
    speculation: dict[str, Any] | None


PLAIN = Configuration("plain", None)


def built_in(head: str | Path) -> dict[str, Configuration]:
    """All configurations that have a name, in the order of a table.

    Args:
        head: the EAGLE-3 head; the ablations of the gates read the profile in its folder, if there
            is one.
    """

    def echo(num_nodes: int, **section: Any) -> dict[str, Any]:
        return {
            "method": "echo",
            "model": str(head),
            "num_speculative_tokens": num_nodes,
            "echo": section,
        }

    def eagle3(length: int, **fields: Any) -> dict[str, Any]:
        base = {"method": "eagle3", "model": str(head), "num_speculative_tokens": length}
        return base | fields

    def elastic(policy: str, **section: Any) -> dict[str, Any]:
        return echo(NODES, policy=policy, max_depth=MAX_DEPTH, top_k=TOP_K, **section)

    gates, thresholds = _gates(head)
    one_tau = dict.fromkeys(gates or thresholds, ONE_TAU)
    speculation = {
        **{f"eagle3-k{k}": eagle3(k) for k in (1, 2, 3, 4, 5)},
        # Drafts that are drawn and not the drafter's best: vLLM's own best at temperature > 0. Its
        # block verification needs the V2 runner.
        **{f"eagle3-k{k}-drawn": eagle3(k, draft_sample_method="probabilistic") for k in (1, 2, 3)},
        "eagle3-adaptive": eagle3(3, num_speculative_tokens_per_batch_size=K_BY_BATCH_SIZE),
        # vLLM's own budget of a batch, by the drafter's confidence; on the V2 runner.
        "eagle3-k5-adaptive": eagle3(5, enable_adaptive_verification=True),
        "ngram": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 4,
        },
        # This project's runtime and linear layers, which may never draft.
        "rest": echo(NODES, policy="echo", k_max=0, gates={}),
        # The same, but it weighs in every step whether to, and probes.
        "auto-rest": elastic("auto", k_max=0),
        **{f"chain-k{k}": echo(k, policy="chain") for k in (1, 2, 3, 4)},
        "static-15": echo(len(STATIC_TREE), policy="static", tree=STATIC_TREE),
        "topn-4": echo(4, policy="topn", max_depth=2, top_k=4),
        "topn-8": echo(8, policy="topn", max_depth=3, top_k=4),
        "topn-8-best": echo(8, policy="topn", max_depth=3, top_k=4, candidates="best"),
        "topn-16": echo(16, policy="topn", max_depth=4, top_k=4),
        # EAGLE-2's tree at echo's total budget: no gates, each request the same share of it.
        "topn-equal": elastic("echo", share="equal", gates={}, width=TOP_K),
        "echo": elastic("echo"),
        "auto": elastic("auto"),
        "auto-best": elastic("auto", candidates="best"),
        "evict": elastic("evict"),
        "graft": elastic("graft"),
        "echo-dense-gates": elastic("echo", gates=thresholds),
        "echo-one-tau": elastic("echo", gates=one_tau),
        "echo-no-scheduler": elastic("echo", share="equal"),
        "echo-no-width": elastic("echo", width=TOP_K),
        "auto-no-online": elastic("auto", online=False),
        "auto-stock-linear": elastic("auto", linear="stock"),
        "echo-stock-linear": elastic("echo", linear="stock"),
    }
    return {
        "plain": PLAIN,
        **{name: Configuration(name, value) for name, value in speculation.items()},
    }


def _gates(head: str | Path) -> tuple[dict[str, float], dict[str, float]]:
    """The profile's gates, and gates at every depth: its own, or with the nearest one's threshold.

    Without a profile there are none of the first, and every threshold is `ONE_TAU`.
    """
    path = Path(head) / FILE_NAME
    taus = DrafterProfile.load(path).gates() if path.is_file() else {}
    taus = {depth: min(tau, HIGHEST_TAU) for depth, tau in taus.items() if depth <= MAX_DEPTH}

    def nearest(depth: int) -> float:
        return taus[min(taus, key=lambda d: (abs(d - depth), d))] if taus else ONE_TAU

    dense = {str(depth): nearest(depth) for depth in range(1, MAX_DEPTH + 1)}
    return {str(depth): tau for depth, tau in taus.items()}, dense


SAME_CHAIN = [(f"chain-k{k}", f"eagle3-k{k}") for k in (1, 2, 3, 4)]
"""Pairs (ours, vLLM's) that draft the same tokens: their ratio measures the runtime alone."""

HELD_AGAINST = [
    ("auto", "rest"),
    ("auto", "topn-equal"),
    ("auto", "echo"),
    ("auto", "auto-best"),
    ("echo", "rest"),
    ("echo", "topn-equal"),
]
"""Pairs of which a table has a row: what the elastic policies must not be slower than."""

ELASTIC = ("echo", "auto", "evict", "topn-equal", "eagle3-adaptive", "eagle3-k5-adaptive")
"""Beginnings of the names whose drafts depend on the load; the others are fixed."""


def is_fixed(name: str) -> bool:
    """Whether a configuration drafts the same whatever the load: what `auto` is held against."""
    return not name.startswith(ELASTIC)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"configuration {path} is not a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"configuration {path} must hold a speculative config, a JSON object")
    return content


def choose(names: Sequence[str], head: str | Path) -> list[Configuration]:
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
            configuration = Configuration(Path(name).stem, _read(Path(name)))
        else:
            raise ValueError(
                f"unknown configuration {name!r}: give a JSON file or one of {', '.join(known)}"
            )
        if configuration.name in {c.name for c in chosen}:
            raise ValueError(f"configuration {configuration.name!r} is asked for twice")
        chosen.append(configuration)
    return chosen
