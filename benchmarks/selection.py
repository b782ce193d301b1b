# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the decisions of `echo` and `auto` cost, beside the step that they are part of.

    python -m benchmarks.selection [--requests 32] [--nodes 16] [--cost FILE]

Random drafts go through `expand` and `select` as in the engine, and through the forecast of `auto`;
drafter forwards are left out. With a file of the cost cache the time is also given as a share of
the predicted step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from echo_vllm.forecast import CostCurve, StepCost
from echo_vllm.forecast.drafter_profile import FILE_NAME, DrafterProfile
from echo_vllm.forecast.plan import DraftPlan, Load
from echo_vllm.offline.bench.configurations import DEMO_HEAD
from echo_vllm.offline.bench.intervals import median
from echo_vllm.policies import DraftBatch, DraftPolicy, Observation, make_policy, parse_section
from echo_vllm.trees.pool import CandidatePool

RUNS = 30


def some_cost() -> StepCost:
    """A machine on which everything pays, so that no decision is cut short."""
    return StepCost(
        verify=CostCurve((1.0, 1024.0), (0.05, 0.051)),
        draft_level=CostCurve((1.0, 1024.0), (1e-5, 2e-5)),
        catch_up=CostCurve((1.0, 1024.0), (1e-5, 2e-5)),
    )


def decide(
    policy: DraftPolicy, batch: DraftBatch, logprobs: list[torch.Tensor]
) -> tuple[float, int]:
    """Seconds of all decisions of one drafting, and the nodes that were selected."""
    pool = CandidatePool.empty(batch.num_requests)
    seconds = 0.0
    for depth in range(1, policy.max_depth + 1):
        start = perf_counter()
        expansion = policy.expand(depth, pool, batch)
        seconds += perf_counter() - start
        if expansion is None:
            break
        active = len(pool.active if expansion.requests is None else expansion.requests)
        width = 1 if expansion.frontier is None else expansion.frontier.shape[1]
        scores = logprobs[depth - 1][:active, :width, : policy.num_ranks]
        tokens = torch.arange(scores.numel()).view_as(scores)
        start = perf_counter()
        pool.grow(expansion, tokens, scores)
        seconds += perf_counter() - start
    start = perf_counter()
    forest = policy.select(pool, batch)
    forest.trees()
    return seconds + perf_counter() - start, forest.num_nodes


def milliseconds(times: list[float]) -> str:
    return f"{median([1000 * seconds for seconds in times])} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--nodes", type=int, default=16, help="nodes of one request")
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cost", type=Path, help="a file of the cost cache")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    logprobs = [
        torch.rand(options.requests, options.top_k, 8, generator=generator)
        .mul(-3)
        .sort(dim=2, descending=True)
        .values
        for _ in range(options.depth)
    ]
    cost = some_cost()
    step = None
    if options.cost is not None:
        data: Any = json.loads(options.cost.read_text())
        step = StepCost.from_dict(data.get("cost", data))
    profile = DrafterProfile.load(DEMO_HEAD / FILE_NAME)
    fields = {"max_depth": options.depth, "top_k": options.top_k}
    print(
        f"{options.requests} requests, up to {options.nodes} nodes each, depth {options.depth}, "
        f"frontier {options.top_k}, {options.threads} thread(s); median [95 % interval] of {RUNS} "
        "draftings"
    )
    for name in ("topn", "echo", "auto"):
        section = {"policy": name, **fields}
        config = parse_section(section, num_speculative_tokens=options.nodes)
        policy = make_policy(config, options.nodes, profile)
        plan = DraftPlan(price=1.0, cost=cost) if policy.learns else DraftPlan()
        batch = DraftBatch(options.requests, options.requests, plan)
        runs = [decide(policy, batch, logprobs) for _ in range(RUNS)]
        times, nodes = [seconds for seconds, _ in runs], runs[0][1]
        line = f"{name}: {milliseconds(times)}, {nodes} nodes"
        if step is not None:
            share = median(times).middle / step.step(
                options.requests + nodes,
                [options.requests * options.top_k] * (options.depth - 1),
                options.requests,
            )
            line += f", {share:.1%} of a predicted step"
        print(line)
        if policy.learns:
            decide_once = planning(policy, options.requests, cost)
            print(f"plan of {name}: {milliseconds([decide_once() for _ in range(RUNS)])}")


def planning(policy: DraftPolicy, requests: int, cost: StepCost) -> Callable[[], float]:
    """One plan, the expected tokens worked out as often as while serving."""
    policy.set_cost(cost)
    draft = [-0.1 * j for j in range(16)], [1 + j // 4 for j in range(16)], [1] * 16
    seen = {
        "predicted": [0.6 * requests, 0.3 * requests],
        "accepted": [requests, 0],
        "first": (requests, 0.6 * requests),
    }
    policy.observe(Observation(report={**seen, "samples": [draft] * 64}))
    step = Observation(report={**seen, "samples": []})

    def run() -> float:
        start = perf_counter()
        for _ in range(4):
            policy.observe(step)
            policy.plan(Load(requests))
        return (perf_counter() - start) / 4

    return run


if __name__ == "__main__":
    main()
