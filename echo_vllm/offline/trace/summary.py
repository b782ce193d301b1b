# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What a trace holds, as numbers for people."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from echo_vllm.trace_format import TraceError, TraceHeader, TraceStep


def summary(header: TraceHeader, steps: Iterable[TraceStep]) -> dict[str, Any]:
    """What a trace holds, as numbers for people.

    Returns:
        steps, trees, fully_verified (share of the trees), levels, candidates and nodes (mean a
        tree), accepted (mean a tree), accepted_by_depth (share of the trees that drafted the
        depth), verify_ms and draft_ms (medians of a step), concurrency (mean).
    """
    num_steps = trees = full = candidates = nodes = 0
    drafted: dict[int, int] = {}
    accepted: dict[int, int] = {}
    times: list[tuple[float, float]] = []
    for step in steps:
        num_steps += 1
        times.append((step.verify_s, step.draft_s))
        for request in step.requests:
            trees += 1
            full += request.is_fully_verified
            candidates += request.num_candidates
            nodes += len(request.selected)
            bounds = [*request.level_starts, request.num_candidates]
            for depth, (start, stop) in enumerate(pairwise(bounds), 1):
                drafted[depth] = drafted.get(depth, 0) + (stop > start)
                accepted[depth] = accepted.get(depth, 0) + (len(request.accepted) >= depth)
    if not trees:
        raise TraceError("the trace has no steps; record it with prompts that are answered.")
    verify, draft = np.median(np.array(times), axis=0).tolist()
    return {
        "model": header.model,
        "drafter": header.drafter,
        "dtype": header.dtype,
        "policy": header.echo.get("policy"),
        "num_speculative_tokens": header.num_speculative_tokens,
        "created": header.created,
        "steps": num_steps,
        "trees": trees,
        "concurrency": trees / num_steps,
        "fully_verified": full / trees,
        "levels": max(drafted, default=0),
        "candidates": candidates / trees,
        "nodes": nodes / trees,
        "accepted": sum(accepted.values()) / trees,
        "accepted_by_depth": [accepted[d] / max(1, drafted[d]) for d in sorted(drafted)],
        "verify_ms": 1e3 * verify,
        "draft_ms": 1e3 * draft,
    }
