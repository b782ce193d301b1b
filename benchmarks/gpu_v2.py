# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Tokens a second on Model Runner V2: plain decoding, vLLM's chains, our trees.

    VLLM_USE_V2_MODEL_RUNNER=1 python -m benchmarks.gpu_v2 [--shape llama-8b] [--out FILE.json]

Without `--shape` it runs a real pair, the demo's. With it a target of that shape and its head have
dummy weights: the text means nothing and little is accepted, so that what counts there is the time
of a step and how many rows it verifies; tokens a second follow from the acceptance of a real head.

Every engine has a process of its own. As many as the GPU's memory holds start at once; they take
turns, one working at a time. Loads come in rounds, and no measurement starts when the time is up.
The file is written after each, so that a run that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.command_line import (
    add_engine_options,
    engine_options,
    integers,
    names,
    report,
    run_program,
    token_prompts,
)
from benchmarks.gpu_engine import write_models
from benchmarks.steps import Answer
from echo_vllm import atomic
from echo_vllm.offline.bench.configurations import PLAIN, Configuration, choose
from echo_vllm.offline.bench.engine_process import EngineError, EngineProcess
from echo_vllm.offline.bench.tables import markdown

CONFIGURATIONS = [
    "eagle3-k1",
    "eagle3-k3",
    "eagle3-k5-adaptive",
    "chain-k3",
    "topn-8",
    "echo",
    "auto",
]
DUMMY_PROMPT = 256
"""Tokens of a prompt where the weights are dummies."""
BYTES_OF_A_TOKEN = {"demo": 24 << 10, "llama-8b": 132 << 10}
"""Of K and V, target and head, in 16 bits; rounded up."""
GIB_BESIDE_WEIGHTS = 6
"""Of each engine: its context on the GPU, activations, graphs."""


@dataclass
class Cell:
    """One measurement of one engine."""

    engine: str
    requests: int
    round: int
    tokens: float
    seconds: float
    steps: float

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


def table(cells: Sequence[Cell]) -> str:
    """Tokens a second by load, over plain decoding's, milliseconds and tokens a step."""
    rows = []
    loads = sorted({cell.requests for cell in cells})
    for name in dict.fromkeys(cell.engine for cell in cells):
        row = [name]
        for load in loads:
            own = [c for c in cells if (c.engine, c.requests) == (name, load)]
            plain = [c.speed for c in cells if (c.engine, c.requests) == (PLAIN.name, load)]
            if not own:
                row.append("-")
                continue
            speed = median(cell.speed for cell in own)
            over = f" ({speed / median(plain):.2f})" if plain else ""
            step = median(1000 * cell.seconds / cell.steps for cell in own)
            each = median(cell.tokens / cell.steps / load for cell in own)
            row.append(f"{speed:.0f}{over}, {step:.2f} ms, {each:.2f}")
        rows.append(row)
    return markdown(["engine", *(f"{load} requests" for load in loads)], rows)


def groups(configurations: Sequence[Configuration], size: int) -> Iterator[list[Configuration]]:
    for first in range(0, len(configurations), size):
        yield list(configurations[first : first + size])


def room_for(options: argparse.Namespace, kv_bytes: int) -> int:
    """Engines that the GPU's memory holds at once."""
    if not torch.cuda.is_available():
        return 1
    weights = 17 << 30 if options.shape else 1 << 30
    each = weights + kv_bytes + (GIB_BESIDE_WEIGHTS << 30)
    free, _ = torch.cuda.mem_get_info()
    return max(1, int(free // each))


class Run:
    """All cells, kept in a file.

    Args:
        options: of the command line.
        until: of `time.monotonic`.
    """

    def __init__(self, options: argparse.Namespace, until: float) -> None:
        self.options, self._until = options, until
        self.cells: list[Cell] = []
        self.failed: dict[str, str] = {}

    def has_time(self) -> bool:
        return time.monotonic() < self._until

    def measure(self, engines: Sequence[EngineProcess], prompts: Sequence[list[int]]) -> None:
        """Every load in every round, as long as there is time."""
        options, living = self.options, list(engines)
        for number in range(options.rounds):
            for load in options.requests:
                for engine in list(living):
                    if not self.has_time():
                        return
                    tokens = options.tokens
                    task = Answer(list(prompts[:load]), tokens, options.temperature)
                    try:
                        if number == 0:  # Whatever a first time compiles.
                            engine.do(Answer(task.prompts, min(8, tokens), options.temperature))
                        cell = Cell(engine.name, load, number, **engine.do(task))
                    except EngineError as error:
                        self.failed[engine.name] = str(error)
                        living.remove(engine)
                        continue
                    self.cells.append(cell)
                    self.keep()

    def keep(self) -> None:
        if self.options.out is None:
            return
        has_gpu = torch.cuda.is_available()
        content = report(
            "gpu_v2",
            gpu=torch.cuda.get_device_name() if has_gpu else None,
            temperature=self.options.temperature,
            failed=self.failed,
            table=table(self.cells).splitlines(),
            cells=[asdict(cell) for cell in self.cells],
        )
        atomic.write_json(self.options.out, content)


def run(options: argparse.Namespace) -> Run:
    """Start engines in groups, and measure each group."""
    found = Run(options, time.monotonic() + options.seconds)
    most = max(options.requests)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="echo-gpu-v2-")))
        if options.shape:
            options.model, options.head = write_models(folder, options.layers)
            options.vocab = 128000
        prompts = token_prompts(options, most=256, length=DUMMY_PROMPT if options.shape else 24)
        prompts = [prompts[i % len(prompts)] for i in range(most)]
        length = max(map(len, prompts)) + options.tokens + 64
        kv_bytes = most * length * BYTES_OF_A_TOKEN[options.shape or "demo"] + (1 << 28)
        common = engine_options(options, most)
        more = {**common.more, "async_scheduling": True}
        if options.shape:
            more["load_format"] = "dummy"
        common = replace(common, kv_cache_bytes=kv_bytes, more=more)
        chosen = choose(options.configs, options.head.resolve())
        size = options.at_once or room_for(options, kv_bytes)
        for group in groups(chosen, size):
            if not found.has_time():
                break
            with contextlib.ExitStack() as alive:
                engines = []
                for configuration in group:
                    log = folder / f"{configuration.name}.log"
                    engines.append(EngineProcess(configuration, common, log))
                    alive.callback(engines[-1].stop)
                ready = []
                for engine in engines:
                    try:
                        engine.wait_ready()
                        ready.append(engine)
                    except EngineError as error:
                        found.failed[engine.name] = f"{error}: {last_lines(engine.log)}"
                found.measure(ready, prompts)
        found.keep()
    return found


def last_lines(log: Path) -> str:
    """Of an engine's log, which is gone when the run ends."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-5:])[-1500:]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["llama-8b"], help="dummy weights of this shape")
    parser.add_argument("--layers", type=int, default=32, help="of that shape (32)")
    parser.add_argument("--requests", type=integers, default=[1, 4, 16, 64, 256], help="at once")
    parser.add_argument("--configs", type=names, default=CONFIGURATIONS, help="beside plain")
    parser.add_argument("--tokens", type=int, default=128, help="of a request (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of all requests (0)")
    parser.add_argument("--rounds", type=int, default=3, help="as far as time goes (3)")
    parser.add_argument("--seconds", type=float, default=180.0, help="start nothing after (180)")
    parser.add_argument("--at-once", type=int, help="engines (as many as the memory holds)")
    add_engine_options(parser)
    parser.set_defaults(dtype="bfloat16", threads=4)
    parser.add_argument("--out", type=Path, metavar="FILE", help="all of it, as JSON")
    return parser.parse_args(arguments)


def main() -> int:
    """Returns the exit code: 1 where nothing could be measured, or an engine failed."""
    found = run(parse())
    print(table(found.cells))
    print("\nTokens a second (over plain decoding's), milliseconds a step, tokens a step.")
    for name, why in found.failed.items():
        print(f"{name} failed: {why}")
    return 1 if found.failed or not found.cells else 0


if __name__ == "__main__":
    run_program(main)
