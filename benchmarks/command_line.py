# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What benchmarks share: options, engines in processes of their own, the head of a report."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from echo_vllm.conversations import CHATS, PROMPTS, Chat, read_conversations, shuffled
from echo_vllm.machine import fast_dtype
from echo_vllm.offline.bench.configurations import DEMO_HEAD, DEMO_TARGET, Configuration
from echo_vllm.offline.bench.engine_process import (
    MAX_MODEL_LEN,
    EngineOptions,
    EngineProcess,
)
from echo_vllm.offline.bench.fleet import exit_on_sigterm
from echo_vllm.offline.bench.results import hardware, versions
from echo_vllm.offline.bench.sweep import Plan, Sweep
from echo_vllm.offline.bench.tables import Sample

CAPTURE_SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
"""Rows that batches are padded to on a GPU, of every engine."""


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options of `benchmarks.quick` and `benchmarks.step_profile`."""
    parser.add_argument("--rounds", type=_positive, default=3, help="interleaved rounds (3)")
    parser.add_argument("--tokens", type=_positive, default=64, help="tokens a request (64)")
    parser.add_argument(
        "--prompts",
        type=Path,
        default=PROMPTS,
        metavar="FILE",
        help="JSON lines with 'prompt' or 'turns' (the project's own prompts)",
    )
    add_engine_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample here too")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """What engines run, and how."""
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
    parser.add_argument("--max-model-len", type=_positive, default=MAX_MODEL_LEN)
    parser.add_argument(
        "--vocab", type=_positive, metavar="N", help="prompts of N tokens, which mean nothing"
    )


def engine_options(arguments: argparse.Namespace, max_num_seqs: int) -> EngineOptions:
    """What the command line says about all engines."""
    return EngineOptions(
        model=str(arguments.model.resolve()),
        dtype=arguments.dtype,
        max_num_seqs=max_num_seqs,
        threads=arguments.threads,
        compile=arguments.compile,
        max_model_len=arguments.max_model_len,
        more=engine_more(arguments),
    )


def engine_more(arguments: argparse.Namespace) -> dict[str, Any]:
    """What engines need here beside what they run."""
    more: dict[str, Any] = {}
    if arguments.vocab:
        more["skip_tokenizer_init"] = True
    if torch.cuda.is_available():
        more["gpu_memory_utilization"] = 0.05  # What must be free at the start, no more.
        if arguments.compile:  # Not vLLM's many sizes, so that an engine starts in time.
            more["compilation_config"] = {"cudagraph_capture_sizes": CAPTURE_SIZES}
    return more


def token_prompts(arguments: argparse.Namespace, most: int, length: int) -> list[list[int]]:
    """Token ids of prompts: first turns of chats with at most `most` tokens, or some that mean
    nothing, with `length`."""
    if arguments.vocab:
        return [[(7919 * i + 31 * j) % arguments.vocab for j in range(length)] for i in range(1024)]
    chat = Chat(str(arguments.model.resolve()))
    texts = shuffled(read_conversations(CHATS, PROMPTS))
    return [ids for ids in (chat.encode(turns[:1]) for turns in texts) if len(ids) <= most]


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


@contextlib.contextmanager
def started(
    configurations: Sequence[Configuration], options: EngineOptions
) -> Iterator[list[EngineProcess]]:
    """Engines that wait for tasks, in the order of `configurations`, each in a process of its own.

    Raises:
        EngineError: one does not start.
    """
    logs = Path(tempfile.mkdtemp(prefix="echo-vllm-bench-"))
    with contextlib.ExitStack() as stack:
        engines = []
        for configuration in configurations:
            log = logs / f"{configuration.name}.log"
            engines.append(EngineProcess(configuration, options, log))
            stack.callback(engines[-1].stop)
            engines[-1].wait_ready()
        yield engines


def measure(
    arguments: argparse.Namespace,
    configurations: Sequence[Configuration],
    process: type[EngineProcess] = EngineProcess,
) -> tuple[list[Sample], dict[str, str]]:
    """Samples of engines, each in a `process` of its own, all alive, and why some failed.

    Only first turns are asked.

    Raises:
        ValueError: the prompts cannot be used.
    """
    options = engine_options(arguments, max(arguments.concurrency))
    sweep = Sweep(
        Plan(
            tuple(configurations),
            tuple(arguments.concurrency),
            rounds=arguments.rounds,
            max_tokens=arguments.tokens,
            chats_per_client=2,
            ignore_eos=True,
        ),
        options,
        "in-process",
        [turns[:1] for turns in shuffled(read_conversations(arguments.prompts))],
        keep_alive=len(configurations),
        logs=Path(tempfile.mkdtemp(prefix="echo-vllm-bench-")),
        launch=lambda configuration, log: process(configuration, options, log),
    )
    samples: list[Sample] = []
    return samples, sweep.run(samples.append)


def report(program: str, **facts: Any) -> dict[str, Any]:
    """What a reader needs to repeat a run of `benchmarks.PROGRAM`, and `facts`."""
    return {
        "command": ["python", "-m", f"benchmarks.{program}", *sys.argv[1:]],
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "hardware": hardware(),
        **facts,
    }


def run_program(main: Callable[[], int]) -> NoReturn:
    """Exit with the status that `main` returns; ctrl-C and a polite kill unwind it first."""
    exit_on_sigterm()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; all engines are stopped", file=sys.stderr)
        sys.exit(130)
