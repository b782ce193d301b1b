# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Real vLLM engines inside the test's process, one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from echo_vllm.offline.engine import LocalEngine


@contextmanager
def engine(model: Path, spec: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` that is torn down at the end."""
    options = {
        "dtype": "float32",
        "max_num_seqs": 16,
        "disable_log_stats": False,
        **options,
    }
    with LocalEngine(model, speculative_config=spec, **options) as local:
        yield local.llm


def echo(head: Path, num_nodes: int, **section: Any) -> dict[str, Any]:
    """A speculative config of method `echo`, of policy topn unless another is named."""
    return {
        "method": "echo",
        "model": str(head),
        "num_speculative_tokens": num_nodes,
        "echo": {"policy": "topn", **section},
    }


def generate(
    llm: Any, prompts: Sequence[Any], params: Any, *, one_by_one: bool = False
) -> list[list[int]]:
    """Token ids of the first completion of every prompt."""
    batches = [[p] for p in prompts] if one_by_one else [list(prompts)]
    each = [[p] for p in params] if one_by_one and isinstance(params, list) else None
    outputs = []
    for i, batch in enumerate(batches):
        outputs += llm.generate(batch, each[i] if each else params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]


def counters(llm: Any) -> dict[str, float]:
    """The engine's speculation counters, by name without the `vllm:` prefix."""
    found = {}
    for metric in llm.get_metrics():
        if "spec_decode" in metric.name or "echo" in metric.name:
            value = getattr(metric, "value", None)
            if value is not None:
                found[metric.name.removeprefix("vllm:")] = value
    return found


def runner(llm: Any) -> Any:
    """The model runner of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def free_blocks(llm: Any) -> int:
    """Free KV blocks of an in-process engine."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    free: int = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    return free
