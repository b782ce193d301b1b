# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Times `tree_attention` on the CPU beside vLLM's own decode attention on the same rows.

vLLM's kernel knows no tree mask, so it runs the rows as a causal chain: the same number of rows,
the same context, the same cache. It reads the rows' own K/V from the cache, ours from the dense
suffix. Runs alternate; the fastest of each is reported (the least disturbed by other processes),
and the ratio ours / vLLM's (below 1: ours is faster).

    python benchmarks/cpu_tree_attention.py [--dtype float32|bfloat16] [--threads N] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.platforms import current_platform

from echo_vllm import ops


@dataclass(frozen=True)
class Workload:
    num_heads: int
    num_kv_heads: int
    head_size: int
    requests: int
    rows: int
    context: int


def workloads(quick: bool) -> list[Workload]:
    models = [(9, 3, 64), (32, 8, 128)]
    batches = [(1, 1), (1, 17), (1, 65), (4, 17), (32, 5), (8, 65)]
    contexts = [50, 500, 4000]
    if quick:
        batches, contexts = [(1, 17), (8, 17)], [500]
    return [
        Workload(*model, requests, rows, context)
        for model in models
        for requests, rows in batches
        for context in contexts
        if requests * context <= 64_000
    ]


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def prepare(
    w: Workload, dtype: torch.dtype, layout: str, block_size: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """(ours, vLLM's), ready to be called, after checking that they agree."""
    torch.manual_seed(0)
    total = w.context + w.rows
    blocks_each = -(-total // block_size)
    blocks = torch.randperm(w.requests * blocks_each).view(w.requests, blocks_each)
    token = torch.arange(total)
    slots = blocks[:, token // block_size] * block_size + token % block_size
    cache = torch.zeros(
        (w.requests * blocks_each, w.num_kv_heads, block_size, 2 * w.head_size), dtype=dtype
    )
    key_cache, value_cache = cache.view(*cache.shape[:2], 2 * block_size, -1).chunk(2, 2)
    key = torch.randn(w.requests * total, w.num_kv_heads, w.head_size).to(dtype)
    value = torch.randn_like(key)
    torch.ops._C.cpu_attn_reshape_and_cache(
        key, value, key_cache, value_cache, slots.flatten(), layout, 1.0, 1.0, "auto"
    )
    query = torch.randn(w.requests * w.rows, w.num_heads, w.head_size).to(dtype)
    scale = w.head_size**-0.5
    bounds = int32([r * w.rows for r in range(w.requests + 1)])
    seq_lens = int32([total] * w.requests)
    block_table = blocks.to(torch.int32)
    metadata = torch.ops._C.get_scheduler_metadata(
        w.requests, w.num_heads, w.num_kv_heads, w.head_size, seq_lens, dtype, bounds, True, -1,
        layout, True, None, "auto",
    )  # fmt: skip
    stock, ours = torch.empty_like(query), torch.empty_like(query)

    suffix_key = key.view(w.requests, total, w.num_kv_heads, w.head_size)[:, w.context :]
    suffix_value = value.view_as(key).view(w.requests, total, w.num_kv_heads, -1)[:, w.context :]
    suffix_key, suffix_value = suffix_key.flatten(0, 1), suffix_value.flatten(0, 1)
    words = -(-w.rows // 64)
    chain = [(2 << row) - 1 for row in range(w.rows)]
    mask = torch.tensor(
        [[signed(bits >> 64 * word) for word in range(words)] for bits in chain] * w.requests
    )
    positions = torch.arange(w.context, total).repeat(w.requests)
    context_lens = int32([w.context] * w.requests)
    suffix_len = int32([w.rows] * w.requests)

    def run_stock() -> None:
        torch.ops._C.cpu_attention_with_kv_cache(
            query, key_cache, value_cache, stock, bounds, seq_lens, scale, True, None, -1,
            block_table, 0.0, metadata, None, None, 1.0, 1.0, "auto",
        )  # fmt: skip

    def run_ours() -> None:
        ops.tree_attention(
            query, key_cache, value_cache, block_table, context_lens, bounds, bounds, suffix_key,
            suffix_value, bounds[:-1], suffix_len, mask, positions, scale, 0.0, -1, layout, ours,
        )  # fmt: skip

    run_stock()
    run_ours()
    error = (ours.float() - stock.float()).abs().max() / stock.float().abs().max()
    if error > (1e-5 if dtype == torch.float32 else 2e-2):
        raise AssertionError(f"the kernels disagree by {error:.2e} on {w}")
    return run_ours, run_stock


def signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def fastest(first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float]:
    """Least seconds a call of each, measured in turns for half a second or 9 turns."""
    times: tuple[list[float], list[float]] = ([], [])
    begin = time.perf_counter()
    while len(times[0]) < 9 or time.perf_counter() - begin < 0.5:
        for run, measured in zip((first, second), times, strict=True):
            run()  # brings the cache into the state that this kernel leaves behind
            start = time.perf_counter()
            run()
            measured.append(time.perf_counter() - start)
    return min(times[0]), min(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--block-size", type=int, default=128, help="vLLM's default is 128")
    parser.add_argument("--layout", choices=["vec", "amx"], help="default: what vLLM chooses")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    current_platform.import_kernels()
    print(f"threads {options.threads}, CPU kernels {ops.supported_cpu_isas()[-1]}")
    for dtype_name in options.dtype or ["float32", "bfloat16"]:
        dtype = getattr(torch, dtype_name)
        amx = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
        if amx:
            torch.cpu._init_amx()  # in a model, a matrix product has done so by then
        layout = options.layout or ("amx" if amx else "vec")
        print(f"\n{dtype_name}, layout {layout}, block size {options.block_size}")
        print("heads   D  requests rows context      ours us     vLLM us   ratio")
        ratios = []
        for w in workloads(options.quick):
            ours, stock = fastest(*prepare(w, dtype, layout, options.block_size))
            ratios.append(ours / stock)
            print(
                f"{w.num_heads:2}/{w.num_kv_heads} {w.head_size:4} {w.requests:9} {w.rows:4} "
                f"{w.context:7} {ours * 1e6:12.0f} {stock * 1e6:11.0f} {ratios[-1]:7.2f}"
            )
        print(f"geometric mean of the ratios {statistics.geometric_mean(ratios):.2f}")


if __name__ == "__main__":
    main()
