# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Workers that run the tree-verifying model runner with its attention backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker import cpu_worker

from echo_vllm.engine.measure import measured_cost
from echo_vllm.engine.model_runner import EchoCPUModelRunner
from echo_vllm.engine.scheduler import needs_cost


@contextmanager
def attention_backend(name: AttentionBackendEnum, class_path: str) -> Iterator[None]:
    """Layers built inside get the backend `class_path` for `name`.

    Scoped, and past vLLM's cache, so that an engine without trees in the same process (tests,
    notebooks) keeps the stock backend.
    """
    register_backend(name, class_path)
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        name.clear_override()
        selector._cached_get_attn_backend.cache_clear()


class EchoCPUWorker(cpu_worker.CPUWorker):
    """vLLM's CPU worker with `EchoCPUModelRunner`."""

    def init_device(self) -> None:
        # vLLM names its runner class inside this method; building that one first and replacing it
        # would allocate everything twice.
        with patch.object(cpu_worker, "CPUModelRunner", EchoCPUModelRunner):
            super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with attention_backend(
            AttentionBackendEnum.CPU_ATTN, "echo_vllm.engine.attention.cpu.EchoCPUAttentionBackend"
        ):
            super().load_model(*args, **kwargs)

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        runner: Any = self.model_runner
        if needs_cost(self.vllm_config.speculative_config.echo):
            runner.cost = measured_cost(runner)
        return times

    def shutdown(self) -> None:
        recorder = getattr(self.model_runner, "recorder", None)
        if recorder is not None:
            recorder.close()
        super().shutdown()
