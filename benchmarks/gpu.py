# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Times the CUDA kernels at the shapes of real models, beside their physical floors.

    python -m benchmarks.gpu [--out FILE.json] [--quick]

A time is the median of CUDA events around one call, with the L2 cache flushed before each. The
floor of a call is the larger of its bytes over the measured copy bandwidth and its multiply-adds
over the measured rate of a matrix product; both are measured first. `dense` is torch's
scaled_dot_product_attention over K and V that are already gathered, with a full mask; `flex` is
FlexAttention over the same, where this torch compiles it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo_vllm import ops
from echo_vllm.ops.reference import mask_bits

BLOCK_SIZE = 16
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Model:
    """The attention of one tensor-parallel rank."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    layers: int


MODELS = [
    Model("Llama-3.1-8B", 32, 8, 128, 32),
    Model("Llama-3.3-70B/TP4", 16, 2, 128, 80),
    Model("Qwen3-30B-A3B", 32, 4, 128, 48),
    # 4 kv heads on 8 ranks: each rank holds a copy of one.
    Model("Qwen3-235B-A22B/TP8", 8, 1, 128, 94),
]


@dataclass(frozen=True)
class Rates:
    bytes_per_second: float
    flops: float


@dataclass(frozen=True)
class Result:
    op: str
    model: str
    requests: int
    context: int
    rows: int
    microseconds: float
    floor_microseconds: float
    others: dict[str, float]


class Timer:
    """Medians of CUDA events, the L2 cache flushed before every call."""

    def __init__(self, device: torch.device, runs: int) -> None:
        self.runs = runs
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device=device)

    def microseconds(self, run: Callable[[], Any], cold: bool = True) -> float:
        for _ in range(3):
            run()
        times = []
        for _ in range(self.runs):
            if cold:
                self.flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(1000 * begin.elapsed_time(end))
        return statistics.median(times)


def measure_rates(timer: Timer, device: torch.device) -> Rates:
    source = torch.empty(1 << 30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = timer.microseconds(lambda: target.copy_(source), cold=False)
    size = 8192
    a, b = (torch.randn(size, size, dtype=DTYPE, device=device) for _ in range(2))
    product = timer.microseconds(lambda: a @ b, cold=False)
    return Rates(2 * source.numel() / copy * 1e6, 2 * size**3 / product * 1e6)


def trees(requests: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """parents, token_ids, cu_nodes of binary trees with `rows` rows each."""
    nodes = rows - 1
    one = (torch.arange(nodes, dtype=torch.int32) + 1) // 2 - 1
    tokens = torch.arange(nodes, dtype=torch.int32)
    bounds = torch.arange(requests + 1, dtype=torch.int32) * nodes
    return one.repeat(requests).to(device), tokens.repeat(requests).to(device), bounds.to(device)


@dataclass
class AttentionInputs:
    arguments: dict[str, Any]
    dense: tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, mask

    def run(self) -> Tensor:
        ops.tree_attention(**self.arguments)
        out: Tensor = self.arguments["out"]
        return out

    def run_dense(self) -> Tensor:
        q, k, v, mask = self.dense
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=True
        )

    def error(self) -> float:
        """The largest difference between the two."""
        q = self.dense[0]
        dense = self.run_dense().transpose(1, 2).reshape(-1, q.shape[1], q.shape[3])
        return float((self.run().float() - dense.float()).abs().max())


def attention_inputs(
    model: Model, requests: int, context: int, rows: int, device: torch.device
) -> AttentionInputs:
    heads, kv_heads, d = model.num_heads, model.num_kv_heads, model.head_size
    blocks_each = -(-context // BLOCK_SIZE)
    shape = (requests * blocks_each, BLOCK_SIZE, kv_heads, 2 * d)
    cache = torch.randn(shape, dtype=DTYPE, device=device)
    key_cache, value_cache = cache.split(d, dim=-1)
    blocks = torch.randperm(requests * blocks_each, device=device).view(requests, blocks_each)
    query, key, value = (
        torch.randn(requests * rows, n, d, dtype=DTYPE, device=device)
        for n in (heads, kv_heads, kv_heads)
    )
    parents, _, cu_nodes = trees(requests, rows, device)
    mask, depths = ops.build_super_tree(parents, cu_nodes, -(-rows // 64))
    bounds = torch.arange(requests + 1, dtype=torch.int32, device=device) * rows

    def gathered(paged: Tensor, own: Tensor) -> Tensor:
        past = paged[blocks].flatten(1, 2)[:, :context]
        return torch.cat([past, own.view(requests, rows, kv_heads, d)], 1).transpose(1, 2)

    seen = mask_bits(mask, rows).view(requests, rows, rows)
    past = torch.ones(requests, rows, context, dtype=torch.bool, device=device)
    return AttentionInputs(
        arguments={
            "query": query,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "block_table": blocks.int(),
            "context_lens": torch.full((requests,), context, dtype=torch.int32, device=device),
            "query_start": bounds,
            "row_start": bounds,
            "suffix_key": key,
            "suffix_value": value,
            "suffix_start": bounds[:-1],
            "suffix_len": torch.full((requests,), rows, dtype=torch.int32, device=device),
            "mask": mask,
            "positions": context + depths.long(),
            "scale": d**-0.5,
            "softcap": 0.0,
            "sliding_window": -1,
            "layout": "nhd",
            "out": torch.empty_like(query),
        },
        dense=(
            query.view(requests, rows, heads, d).transpose(1, 2),
            gathered(key_cache, key),
            gathered(value_cache, value),
            torch.cat([past, seen], 2)[:, None],
        ),
    )


def flex_attention(inputs: AttentionInputs) -> Callable[[], Any] | None:
    """FlexAttention over the gathered K and V, or None where it cannot be compiled."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q, k, v, mask = inputs.dense
        seen = mask[:, 0]
        block_mask = create_block_mask(
            lambda b, h, i, j: seen[b, i, j], len(q), None, q.shape[2], k.shape[2], str(q.device)
        )
        compiled = torch.compile(flex_attention)

        def run() -> Any:
            return compiled(q, k, v, block_mask=block_mask, enable_gqa=True)

        run()
    except Exception as error:
        print(f"  FlexAttention left out: {str(error).splitlines()[0][:90]}")
        return None
    return run


def time_attention(timer: Timer, rates: Rates, device: torch.device, quick: bool) -> list[Result]:
    results = []
    for model in MODELS:
        for requests, context, rows in cases(quick):
            inputs = attention_inputs(model, requests, context, rows, device)
            error = inputs.error()
            if not error < 3e-2:
                raise AssertionError(f"{model.name}: differs from dense attention by {error:.1e}")
            keys = requests * (context + rows)
            moved = (
                2
                * 2
                * model.head_size
                * (keys * model.num_kv_heads + requests * rows * model.num_heads)
            )
            flops = 4 * rows * keys * model.num_heads * model.head_size
            floor = 1e6 * max(moved / rates.bytes_per_second, flops / rates.flops)
            others = {"dense": timer.microseconds(inputs.run_dense)}
            flex = flex_attention(inputs) if (requests, rows) == (8, 33) else None
            if flex is not None:
                others["flex"] = timer.microseconds(flex)
            time = timer.microseconds(inputs.run)
            name = "tree_attention"
            results.append(Result(name, model.name, requests, context, rows, time, floor, others))
            report(results[-1])
    return results


def cases(quick: bool) -> list[tuple[int, int, int]]:
    """(requests, context, rows)"""
    if quick:
        return [(8, 2048, 33)]
    return [
        (requests, context, rows)
        for requests in (1, 8, 64)
        for context in (512, 4096, 16384)
        for rows in (1, 8, 33, 65)
        if requests * context <= 1 << 18
    ]


def time_forest(timer: Timer, rates: Rates, device: torch.device) -> list[Result]:
    results = []
    for requests, rows in ((1, 65), (64, 33), (512, 9)):
        parents, tokens, bounds = trees(requests, rows, device)
        sampled = torch.arange(rows, device=device).repeat(requests)  # down the first branch
        words = -(-rows // 64)
        written = requests * rows * (8 * words + 4)
        floor = 1e6 * written / rates.bytes_per_second
        build = partial(ops.build_super_tree, parents, bounds, words)
        accept = partial(ops.accept_path, sampled, tokens, parents, bounds, 16)
        for name, run in (("build_super_tree", build), ("accept_path", accept)):
            time = timer.microseconds(run)
            results.append(Result(name, "-", requests, 0, rows, time, floor, {}))
            report(results[-1])
    for requests in (8, 64, 512):
        scores = -torch.rand(requests, 64, device=device)
        tiers = torch.zeros(requests, 64, dtype=torch.int32, device=device)
        parents = torch.full((requests, 64), -1, device=device)
        budget = requests * 8
        select = partial(ops.select_budget, scores, tiers, parents, budget, 32)
        floor = 1e6 * scores.numel() * 8 / rates.bytes_per_second
        others = {"topk": timer.microseconds(partial(scores.flatten().topk, budget))}
        time = timer.microseconds(select)
        results.append(Result("select_budget", "-", requests, 0, 64, time, floor, others))
        report(results[-1])
    return results


def time_commit(timer: Timer, rates: Rates, device: torch.device) -> list[Result]:
    results = []
    for model in MODELS:
        shape = (1024, BLOCK_SIZE, model.num_kv_heads, 2 * model.head_size)
        caches = [
            torch.zeros(shape, dtype=DTYPE, device=device).transpose(1, 2)
            for _ in range(model.layers)
        ]
        for requests in (1, 64, 512):
            # Each request keeps four nodes out of its sixteen slots.
            first = torch.arange(requests, device=device)[:, None] * 16
            src = (first + torch.tensor([1, 5, 9, 12], device=device)).flatten()
            dst = (first + torch.arange(1, 5, device=device)).flatten()
            commit = partial(ops.commit_kv, caches, src, dst, BLOCK_SIZE, "nhd")
            row = model.num_kv_heads * 2 * model.head_size * 2
            floor = 1e6 * 2 * len(src) * row * model.layers / rates.bytes_per_second
            time = timer.microseconds(commit)
            results.append(Result("commit_kv", model.name, requests, 0, 4, time, floor, {}))
            report(results[-1])
    return results


def report(result: Result) -> None:
    others = ", ".join(f"{name} {time:.1f}" for name, time in result.others.items())
    print(
        f"{result.op:17} {result.model:20} {result.requests:4} {result.context:6} {result.rows:4} "
        f"{result.microseconds:9.1f} {result.floor_microseconds:9.1f}  {others}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="one shape a model")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: torch sees no CUDA GPU")
    device = torch.device("cuda")
    timer = Timer(device, options.runs)
    rates = measure_rates(timer, device)
    properties = torch.cuda.get_device_properties(device)
    print(
        f"{properties.name}: copies {rates.bytes_per_second / 1e12:.2f} TB/s, "
        f"multiplies {rates.flops / 1e12:.0f} Tflop/s; times in microseconds"
    )
    print("op                model                 reqs    ctx rows      time     floor  others")
    results: list[Result] = []
    for measure in (
        lambda: time_forest(timer, rates, device),
        lambda: time_commit(timer, rates, device),
        lambda: time_attention(timer, rates, device, options.quick),
    ):
        results += measure()
        if options.out is not None:  # after each part: what was measured is kept
            record = {
                "device": properties.name,
                "torch": torch.__version__,
                "rates": asdict(rates),
                "results": [asdict(result) for result in results],
            }
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
