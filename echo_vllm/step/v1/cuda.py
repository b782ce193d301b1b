# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Worker and model runner on an NVIDIA GPU, on vLLM's V1 model runner."""

from __future__ import annotations

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from echo_vllm.step.attention.cuda import backend_for
from echo_vllm.step.v1.runner import EchoRunnerMixin
from echo_vllm.step.v1.worker import EchoWorkerMixin


class EchoGPUModelRunner(EchoRunnerMixin, GPUModelRunner):
    """The V1 GPU runner with trees."""


class EchoWorker(EchoWorkerMixin, Worker):
    """vLLM's GPU worker with `EchoGPUModelRunner`."""

    def _make_model_runner(self) -> GPUModelRunner:
        return EchoGPUModelRunner(self.vllm_config, self.device)

    def tree_backend(self) -> tuple[AttentionBackendEnum, type]:
        return AttentionBackendEnum.CUSTOM, backend_for(self.model_config.dtype)
