# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What `benchmarks.quick` and `benchmarks.step_profile` share: options, and a run of engines."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from echo_vllm.conversations import PROMPTS, read_conversations, shuffled
from echo_vllm.machine import fast_dtype
from echo_vllm.offline.bench.configurations import DEMO_HEAD, DEMO_TARGET, Configuration
from echo_vllm.offline.bench.engine_process import EngineOptions
from echo_vllm.offline.bench.sweep import Plan, Sweep
from echo_vllm.offline.bench.tables import Sample


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options of both."""
    parser.add_argument("--rounds", type=_positive, default=3, help="interleaved rounds (3)")
    parser.add_argument("--tokens", type=_positive, default=64, help="tokens a request (64)")
    parser.add_argument(
        "--prompts",
        type=Path,
        default=PROMPTS,
        metavar="FILE",
        help="JSON lines with 'prompt' or 'turns' (the project's own prompts)",
    )
    parser.add_argument("--model", type=Path, default=DEMO_TARGET, help="target (the demo's)")
    parser.add_argument("--head", type=Path, default=DEMO_HEAD, help="EAGLE-3 head (the demo's)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=fast_dtype())
    parser.add_argument(
        "--threads",
        type=_positive,
        default=len(os.sched_getaffinity(0)),
        help="OpenMP threads of every engine (all cores)",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile, not eager mode")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample here too")


def integers(text: str) -> list[int]:
    """`1,4,16` as a list, for argparse."""
    return [_positive(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """`a,b` as a list, for argparse."""
    return [part for part in text.split(",") if part]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def measure(
    arguments: argparse.Namespace,
    configurations: Sequence[Configuration],
    instrumented: bool = False,
) -> tuple[list[Sample], dict[str, str]]:
    """Samples of engines in processes of their own, all alive, and why some failed.

    Only first turns are asked.

    Raises:
        ValueError: the prompts cannot be used.
    """
    sweep = Sweep(
        Plan(
            tuple(configurations),
            tuple(arguments.concurrency),
            rounds=arguments.rounds,
            max_tokens=arguments.tokens,
            chats_per_client=2,
            ignore_eos=True,
        ),
        EngineOptions(
            model=str(arguments.model.resolve()),
            dtype=arguments.dtype,
            max_num_seqs=max(arguments.concurrency),
            threads=arguments.threads,
            compile=arguments.compile,
            instrumented=instrumented,
        ),
        "in-process",
        [turns[:1] for turns in shuffled(read_conversations(arguments.prompts))],
        keep_alive=len(configurations),
        logs=Path(tempfile.mkdtemp(prefix="echo-vllm-bench-")),
    )
    samples: list[Sample] = []
    return samples, sweep.run(samples.append)
