# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The linear layers of the demo target's shape: `ops.packed_linear` and vLLM's oneDNN, by rows.

    python -m benchmarks.linear [--dtype bfloat16] [--rows 1,2,4,8,16,32] [--rounds 9] [--json FILE]

One pass is all layers of the model and its output layer, so that no weight is in the cache when
its turn comes. The columns run in turns; medians, as ratios to vLLM's time for the same rows,
with vLLM's own time over that of one row. Last, how many of the outputs of each are not bit for bit
vLLM's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.command_line import integers
from echo_vllm import atomic, ops
from echo_vllm.offline.bench.tables import markdown

LAYERS, HIDDEN, VOCAB = 30, 576, 49_152
SHAPES = [(960, HIDDEN), (HIDDEN, HIDDEN), (3072, HIDDEN), (HIDDEN, 1536)]
"""(N, K) of a layer: q, k and v; output; gate and up; down."""

Pass = list[tuple[int, Callable[[torch.Tensor], torch.Tensor]]]


def stock(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    from vllm import _custom_ops

    handler = _custom_ops.create_onednn_mm(weight.t(), 32)
    return lambda x: _custom_ops.onednn_mm(handler, x, None)


def packed(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    kept, columns = ops.pack_linear(weight), weight.shape[0]
    return lambda x: ops.packed_linear(x, kept, columns)


def packed_float32(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return packed(weight + 1e-9)  # no longer bfloat16 numbers


def seconds(layers: Pass, inputs: dict[int, torch.Tensor]) -> float:
    begin = time.perf_counter()
    for depth, layer in layers:
        layer(inputs[depth])
    return time.perf_counter() - begin


def different_bits(stock: Pass, ours: Pass, inputs: dict[int, torch.Tensor]) -> tuple[int, int]:
    """How many outputs of one pass differ, and how many there are."""
    pairs = [
        (layer(inputs[depth]), other(inputs[depth]))
        for (depth, layer), (_, other) in zip(stock, ours, strict=True)
    ]
    return sum(int((a != b).sum()) for a, b in pairs), sum(a.numel() for a, _ in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = [1, 2, 4, 6, 8, 9, 12, 16, 17, 24, 32, 48, 64, 128, 512]
    parser.add_argument("--rows", type=integers, default=rows)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    weights = [torch.randn(shape) * 0.02 for shape in [*SHAPES * LAYERS, (VOCAB, HIDDEN)]]
    dtype = getattr(torch, args.dtype)
    weights = [weight.bfloat16().to(dtype) for weight in weights]
    kinds = {"vLLM": stock, "packed, bfloat16": packed}
    if dtype == torch.float32:
        kinds["packed, float32"] = packed_float32
    passes: dict[str, Pass] = {
        name: [(weight.shape[1], make(weight)) for weight in weights]
        for name, make in kinds.items()
    }
    medians: dict[str, list[float]] = {name: [] for name in kinds}
    for count in args.rows:
        inputs = {depth: torch.randn(count, depth).to(dtype) for _, depth in SHAPES}
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(args.rounds):
            for name, layers in passes.items():
                times[name].append(seconds(layers, inputs))
        for name, found in times.items():
            medians[name].append(statistics.median(found))
    first, *others = kinds
    header = [
        "rows",
        f"{first} over its time for {args.rows[0]}",
        *(f"{n} / {first}" for n in others),
    ]
    table = [
        [
            str(count),
            f"{medians[first][i] / medians[first][0]:.2f}",
            *(f"{medians[name][i] / medians[first][i]:.2f}" for name in others),
        ]
        for i, count in enumerate(args.rows)
    ]
    print(markdown(header, table))
    differing, outputs = different_bits(passes[first], passes["packed, bfloat16"], inputs)
    print(f"\n{args.rows[-1]} rows: {differing} of {outputs} outputs are not vLLM's bit for bit.")
    if args.json:
        report = {
            "command": " ".join(["python", "-m", "benchmarks.linear", *sys.argv[1:]]),
            "dtype": args.dtype,
            "differing_outputs": differing,
            "outputs": outputs,
            "threads": torch.get_num_threads(),
            "rows": args.rows,
            "seconds": medians,
        }
        atomic.write_json(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
