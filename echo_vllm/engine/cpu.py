# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Worker and model runner on a CPU."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from echo_vllm.engine.attention.cpu import EchoCPUAttentionBackend
from echo_vllm.engine.model_runner import EchoRunnerMixin
from echo_vllm.engine.worker import EchoWorkerMixin


class EchoCPUModelRunner(EchoRunnerMixin, CPUModelRunner):
    """The CPU runner with trees."""

    def _kv_layout(self, layer: Any) -> str:
        return str(layer.isa)


class EchoCPUWorker(EchoWorkerMixin, cpu_worker.CPUWorker):
    """vLLM's CPU worker with `EchoCPUModelRunner`."""

    def init_device(self) -> None:
        # vLLM names its runner class inside this method; building that one first and replacing it
        # would allocate everything twice.
        with patch.object(cpu_worker, "CPUModelRunner", EchoCPUModelRunner):
            super().init_device()

    def tree_backend(self) -> tuple[AttentionBackendEnum, type]:
        return AttentionBackendEnum.CPU_ATTN, EchoCPUAttentionBackend
