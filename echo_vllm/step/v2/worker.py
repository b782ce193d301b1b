# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Workers and runners of Model Runner V2: on an NVIDIA GPU, and on a CPU for tests alone, where the
step's kernels run in Triton's interpreter."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu import model_runner as cpu_model_runner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from echo_vllm.startup.measure import measured_cost
from echo_vllm.step.attention.cpu import EchoCPUAttentionBackend
from echo_vllm.step.v1.worker import EchoWorkerMixin
from echo_vllm.step.v2.costs import forwards_of
from echo_vllm.step.v2.runner import EchoRunnerV2Mixin


class EchoGPUModelRunnerV2(EchoRunnerV2Mixin, GPUModelRunner):
    """The V2 runner with trees."""


class EchoCPUModelRunnerV2(EchoRunnerV2Mixin, cpu_model_runner.CPUModelRunner):
    """The V2 runner on a CPU with trees."""


class EchoWorkerV2Mixin(EchoWorkerMixin):
    """What steps cost is measured with V2's own forwards."""

    def compile_or_warm_up_model(self) -> Any:
        times = super(EchoWorkerMixin, self).compile_or_warm_up_model()
        runner: Any = self.model_runner
        if runner.policy.needs_cost:
            runner.cost = measured_cost(runner, forwards_of)
        return times

    def shutdown(self) -> None:
        runner: Any = getattr(self, "model_runner", None)
        if runner is not None:
            runner.end_trace()
        super().shutdown()


class EchoCPUWorkerV2(EchoWorkerV2Mixin, CPUWorker):
    """vLLM's CPU worker with `EchoCPUModelRunnerV2`."""

    def init_device(self) -> None:
        # vLLM imports its runner class inside this method.
        with patch.object(cpu_model_runner, "CPUModelRunner", EchoCPUModelRunnerV2):
            super().init_device()

    def tree_backend(self) -> tuple[AttentionBackendEnum, type]:
        return AttentionBackendEnum.CPU_ATTN, EchoCPUAttentionBackend


class EchoWorkerV2(EchoWorkerV2Mixin, Worker):
    """vLLM's GPU worker with `EchoGPUModelRunnerV2`."""

    def _make_model_runner(self) -> GPUModelRunner:
        return EchoGPUModelRunnerV2(self.vllm_config, self.device)

    def tree_backend(self) -> tuple[AttentionBackendEnum, type]:
        # Imported here, because its kernels need a GPU's build of vLLM.
        from echo_vllm.step.attention.cuda import backend_for

        return AttentionBackendEnum.CUSTOM, backend_for(self.model_config.dtype)
