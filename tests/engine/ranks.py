# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Decodes on several tensor-parallel ranks, in a process of its own.

`python -m tests.engine.ranks TASK RESULT` reads a Task and writes a Result, both JSON. A process of
its own, because the ranks bind to cores and need another environment than the other tests.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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


def _start_recording(worker: Any) -> None:
    """Keep every forest that the worker's drafter makes from now on."""
    drafter = worker.model_runner.drafter
    propose = drafter.draft_trees
    drafter.recorded = []

    def recording(**kwargs: Any) -> Any:
        forest = propose(**kwargs)
        drafter.recorded.append(forest.trees())
        return forest

    drafter.draft_trees = recording
    requests = worker.model_runner.drawn
    put = requests.put
    requests.recorded = []

    def recording_drawn(slots: Any, pool: Any, forest: Any) -> None:
        requests.recorded.append(forest.trees())
        put(slots, pool, forest)

    requests.put = recording_drawn


def _recorded(worker: Any) -> tuple[list[Any], list[Any]]:
    runner = worker.model_runner
    return runner.drafter.recorded, runner.drawn.recorded


def main(task: str, result: str) -> None:
    Path(result).write_text(json.dumps(asdict(decode(Task(**json.loads(Path(task).read_text()))))))


if __name__ == "__main__":
    main(*sys.argv[1:])
