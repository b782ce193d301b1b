# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Decodes on several tensor-parallel ranks, in a process of its own.

`python -m tests.engine.ranks TASK RESULT` reads a Task and writes a Result, both JSON. A process of
its own, because the ranks bind to cores and need another environment than the other tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import IN_PROCESS_ENGINE, ROOT
from tests.engine.engines import counters, engine, generate


@dataclass(frozen=True)
class Task:
    """What to decode: greedily, at temperature 1 with a seed for each prompt, and without one."""

    target: str
    speculation: dict[str, Any] | None
    num_ranks: int
    prompts: list[list[int]]
    num_tokens: int


@dataclass(frozen=True)
class Result:
    """What came out.

    Attributes:
        greedy: token ids, by prompt.
        sampled: token ids, by prompt.
        counters: of speculation, over both.
        drafts: by rank, by step of speculation, by request: the tree's tokens and parents.
        drawn: the same of drawn candidates, which only requests without a seed have.
    """

    greedy: list[list[int]]
    sampled: list[list[int]]
    counters: dict[str, Any]
    drafts: list[list[Any]]
    drawn: list[list[Any]]


def decode(task: Task) -> Result:
    """Run an engine for `task` in this process; its ranks are processes below it."""
    from vllm import SamplingParams

    common: dict[str, Any] = {
        "max_tokens": task.num_tokens,
        "ignore_eos": True,
        "detokenize": False,
    }
    prompts = [{"prompt_token_ids": prompt} for prompt in task.prompts]
    with engine(
        Path(task.target),
        task.speculation,
        skip_tokenizer_init=True,
        max_model_len=256,
        tensor_parallel_size=task.num_ranks,
        distributed_executor_backend="mp" if task.num_ranks > 1 else None,
    ) as llm:
        if task.speculation is not None:
            llm.collective_rpc(_start_recording)
        greedy = generate(llm, prompts, SamplingParams(temperature=0, **common))
        seeded = [SamplingParams(temperature=1, seed=i, **common) for i in range(len(prompts))]
        sampled = generate(llm, prompts, seeded)
        found = counters(llm)
        generate(llm, prompts, SamplingParams(temperature=1, **common))
        recorded = [] if task.speculation is None else llm.collective_rpc(_recorded)
        drafts, drawn = [best for best, _ in recorded], [drawn for _, drawn in recorded]
        return Result(greedy, sampled, found, drafts, drawn)


def on_two_ranks(task: Task, folder: Path) -> Result:
    """`decode` on two ranks, whose files go to `folder`."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("two ranks need two cores, and this process may use one only")
    (folder / "task.json").write_text(json.dumps(asdict(replace(task, num_ranks=2))))
    env = {
        **os.environ,
        **IN_PROCESS_ENGINE,
        # One core a rank. vLLM's own choice could give both ranks the same one.
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores)),
    }
    run = subprocess.run(
        [
            *(sys.executable, "-m", "tests.engine.ranks"),
            *(str(folder / "task.json"), str(folder / "result.json")),
        ],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:]
    return Result(**json.loads((folder / "result.json").read_text()))


def _start_recording(worker: Any) -> None:
    """Keep every forest that the worker drafts from now on."""
    runner = worker.model_runner
    runner.recorded, runner.recorded_drawn = [], []
    if hasattr(runner, "tree_slots"):  # Model Runner V2, whose trees are all of a kind
        slots, write = runner.tree_slots, runner.tree_slots.write

        def written(places: Any, trees: Any) -> None:
            write(places, trees)
            kept = places, trees.token_ids, trees.parents, trees.sizes
            runner.recorded.append([tensor.tolist() for tensor in kept])

        slots.write = written
        return
    drafter, propose = runner.drafter, runner.drafter.draft_trees

    def recording(**kwargs: Any) -> Any:
        forest = propose(**kwargs)
        runner.recorded.append(forest.trees())
        return forest

    drafter.draft_trees = recording
    requests, put = runner.drawn, runner.drawn.put

    def recording_drawn(slots: Any, pool: Any, forest: Any) -> None:
        runner.recorded_drawn.append(forest.trees())
        put(slots, pool, forest)

    requests.put = recording_drawn


def _recorded(worker: Any) -> tuple[list[Any], list[Any]]:
    runner = worker.model_runner
    return runner.recorded, runner.recorded_drawn


def main(task: str, result: str) -> None:
    Path(result).write_text(json.dumps(asdict(decode(Task(**json.loads(Path(task).read_text()))))))


if __name__ == "__main__":
    main(*sys.argv[1:])
