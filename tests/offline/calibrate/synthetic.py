# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Traces of a drafter whose acceptance is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from echo_vllm.trace_format import TraceRequest, TraceStep

SHARPNESS = 1.5
"""The target takes a child with its draft probability to this power: an over-confident drafter,
whose nodes are accepted with probability exp(SHARPNESS * path log-probability)."""


def tree(
    generator: np.random.Generator, name: str, *, max_depth: int = 4, top_k: int = 3
) -> TraceRequest:
    """A fully verified tree, grown as policy topn grows it."""
    parents: list[int] = []
    logprobs: list[float] = []
    level_starts: list[int] = []
    accepted: list[int] = []
    reached = -1  # The last accepted node, or the root; None: the target has left the tree.
    alive = True
    frontier = [(-1, 0.0)]
    sure = generator.uniform(0.3, 4.0)
    for _ in range(max_depth):
        start = len(parents)
        level_starts.append(start)
        for node, above in frontier:
            logits = np.sort(generator.normal(size=8) * sure)[::-1]
            chances = np.exp(logits) / np.exp(logits).sum()
            for chance in chances[:top_k]:
                parents.append(node)
                logprobs.append(float(np.float32(above + np.log(chance))))
            if alive and node == reached:
                taken = np.append(chances[:top_k] ** SHARPNESS, 0.0)
                taken[-1] = 1.0 - taken.sum()
                choice = int(generator.choice(top_k + 1, p=taken))
                hit = len(parents) - top_k + choice
                if choice < top_k:
                    accepted.append(hit)
        alive = len(accepted) == len(level_starts)
        if alive:
            reached = accepted[-1]
        level = sorted(range(start, len(parents)), key=lambda i: -logprobs[i])
        frontier = [(i, logprobs[i]) for i in level[:top_k]]
    return request(name, parents, logprobs, level_starts, accepted)


def request(
    name: str,
    parents: Sequence[int],
    logprobs: Sequence[float],
    level_starts: Sequence[int],
    accepted: Sequence[int],
    selected: Sequence[int] | None = None,
) -> TraceRequest:
    """A tree of which everything was verified, unless `selected` says what was."""
    if selected is None:
        selected = range(len(parents))
    made = TraceRequest(name, 10, parents, logprobs, level_starts, selected, accepted)
    made.validate()
    return made


def step(requests: Sequence[TraceRequest]) -> TraceStep:
    rows = sum(1 + len(r.selected) for r in requests)
    return TraceStep(0, rows, len(requests), 0, 0.01, 0.01, (4,), None, tuple(requests))


def trace(num_requests: int, num_steps: int, seed: int = 0) -> list[TraceStep]:
    generator = np.random.default_rng(seed)
    return [
        step([tree(generator, f"request-{i}") for i in range(num_requests)])
        for _ in range(num_steps)
    ]


def chain(name: str, logprobs: Sequence[float], accepted: int) -> TraceRequest:
    """One node a depth, of which the first `accepted` were accepted."""
    size = len(logprobs)
    return request(name, range(-1, size - 1), logprobs, range(size), range(accepted))
