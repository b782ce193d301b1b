# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""How often the first level of a tree is accepted, by what its children are.

    python -m benchmarks.drawn_levels --json benchmarks/results/drawn-levels-cpu.json

Answers of the demo at a temperature; at each of their steps the target's distribution p of the next
token and the drafter's q of the same token are taken, both at that temperature, and what k children
accept is worked out from these:

- drawn: from q without replacement, by recursive rejection (`docs/drawn.md`); mean of some draws.
- best: the k tokens of most q.
- best, and one drawn: k - 1 of these, and one drawn from what they leave of q.

With one child the last of these is the most that any child from q can be accepted, sum(min(p, q)).

Only numbers of distributions are worked out, so a busy machine does no harm.
"""

from __future__ import annotations

import argparse
import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.drawn_acceptance import named
from echo_vllm import atomic
from echo_vllm.conversations import CHATS, read_conversations, shuffled
from echo_vllm.offline.bench.configurations import DEMO_HEAD, DEMO_TARGET
from echo_vllm.offline.bench.tables import markdown
from echo_vllm.offline.engine import LocalEngine
from echo_vllm.ops import reference

MOST = 4
LEAST = 1e-8
"""Tokens less probable than this under both are left out: all of them together are not seen."""

DRAWN, BEST, MIXED = "drawn", "best", "best, and one drawn"

Pair = tuple[torch.Tensor, torch.Tensor]
"""Logits of the next token, both float32 [V]: the target's and the drafter's, which has -inf for
tokens outside of its vocabulary."""


def accepted(
    p: torch.Tensor, q: torch.Tensor, samples: int, generator: torch.Generator
) -> dict[str, list[float]]:
    """How probably one of k children is accepted, for k = 1 to `MOST`.

    Args:
        p, q: float64 [V], distributions.
        samples: draws whose mean is taken.
        generator: of these.
    """
    likely = torch.maximum(p, q) > LEAST
    p, q = (x[likely] / x[likely].sum() for x in (p, q))
    drawn = np.zeros(MOST)
    for _ in range(samples):
        tokens = torch.multinomial(q, MOST, generator=generator).tolist()
        chances, _ = reference.rejection(p, q, tokens)
        drawn += 1 - np.cumprod(1 - np.array(chances))
    best = q.topk(MOST).indices
    mixed = []
    for k in range(MOST):
        certain = best[:k]
        left_p, left_q = p.clone(), q.clone()
        left_p[certain] = left_q[certain] = 0.0
        left_q *= left_p.sum() / left_q.sum()
        mixed.append(float(p[certain].sum() + torch.minimum(left_p, left_q).sum()))
    return {
        DRAWN: (drawn / samples).tolist(),
        BEST: p[best].cumsum(0).tolist(),
        MIXED: mixed,
    }


def record(
    engine: LocalEngine, prompts: list[list[int]], temperature: float, tokens: int
) -> list[Pair]:
    """Of the steps of answers to `prompts`, one after the other."""
    ops: Any = importlib.import_module("echo_vllm.ops")
    drafting: Any = importlib.import_module("echo_vllm.step.v1.drawn")
    pairs: list[Pair] = []
    pending: list[torch.Tensor] = []
    draw_level, sample_path = drafting.draw_level, ops.sample_path

    def drafts(pool: Any, policy: Any, parents: Any, logits: Any, sampling: Any, ids: Any) -> Any:
        wide = torch.full((vocab,), float("-inf"))
        places = torch.arange(logits.shape[1])
        wide[places if ids is None else places + ids] = logits[0].float()
        pending[:] = [wide]
        return draw_level(pool, policy, parents, logits, sampling, ids)

    def verifies(logits: torch.Tensor, rows: torch.Tensor, *args: Any) -> Any:
        if pending:
            pairs.append((logits[int(rows[0])].float().clone(), pending.pop()))
        return sample_path(logits, rows, *args)

    vocab = engine.engine.model_config.get_vocab_size()
    drafting.draw_level, ops.sample_path = drafts, verifies
    try:
        engine.answer_each(prompts, tokens, temperature)
    finally:
        drafting.draw_level, ops.sample_path = draw_level, sample_path
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-prompts", type=int, default=32, help="(32)")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer (24)")
    parser.add_argument("--samples", type=int, default=8, help="draws of each step (8)")
    parser.add_argument("--temperatures", default="0.6,1.0", help="(0.6,1.0)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    chats = shuffled(read_conversations(CHATS))[: args.num_prompts]
    speculation = {
        "method": "echo",
        "model": str(DEMO_HEAD),
        "num_speculative_tokens": 1,
        "echo": {"policy": "chain", "candidates": "drawn"},
    }
    generator = torch.Generator().manual_seed(0)
    found: dict[str, dict[float, tuple[float, float]]] = {}
    with LocalEngine(
        str(DEMO_TARGET),
        speculative_config=speculation,
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=1,  # One tree a step: a draft and its verdict follow each other.
    ) as engine:
        prompts = [engine.chat.encode(turns[:1]) for turns in chats]
        for temperature in map(float, args.temperatures.split(",")):
            pairs = record(engine, prompts, temperature, args.tokens)
            each = []
            for target, draft in pairs:
                p, q = (torch.softmax(x.double() / temperature, 0) for x in (target, draft))
                each.append(accepted(p, q, args.samples, generator))
            means: dict[str, NDArray[np.float64]] = {}
            for kind in (DRAWN, BEST, MIXED):
                values = np.array([step[kind] for step in each])
                errors = values.std(0) / math.sqrt(len(values))
                means[kind] = values.mean(0)
                cells = zip(means[kind].tolist(), errors.tolist(), strict=True)
                found[f"T = {temperature:g}: {kind}"] = dict(enumerate(cells, 1))
            of_best = {kind: (mean / means[BEST]).round(3).tolist() for kind, mean in means.items()}
            print(f"T = {temperature:g}: {len(pairs)} steps; over the best {of_best}", flush=True)
    rows = [
        [name, *(f"{value:.3f} +- {error:.3f}" for value, error in row.values())]
        for name, row in found.items()
    ]
    print(markdown(["", *(f"{k} children" for k in range(1, MOST + 1))], rows))
    if args.json:
        by_kind = {name: named(row) for name, row in found.items()}
        atomic.write_json(args.json, {"prompts": len(prompts), "accepted": by_kind})


if __name__ == "__main__":
    main()
