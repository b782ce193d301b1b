# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Worker and model runner on a CPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from vllm.config import CompilationMode
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from echo_vllm.machine import fast_dtype
from echo_vllm.startup.linear import packed_linears
from echo_vllm.startup.norm import fuse_norms
from echo_vllm.step.attention.backend import builders_of
from echo_vllm.step.attention.cpu import (
    EchoCPUAttentionBackend,
    EchoCPUAttentionMetadataBuilder,
)
from echo_vllm.step.v1.runner import EchoRunnerMixin
from echo_vllm.step.v1.worker import EchoWorkerMixin

logger = init_logger(f"vllm.{__name__}")


class EchoCPUModelRunner(EchoRunnerMixin, CPUModelRunner):
    """The CPU runner with trees."""

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        own = self.speculative_config.echo.linear == "auto"
        layers = self.compilation_config.static_forward_context
        for _, builder in builders_of(self.attn_groups):
            if isinstance(builder, EchoCPUAttentionMetadataBuilder):
                builder.takes_plain = own and builder.can_take_plain(layers)


class EchoCPUWorker(EchoWorkerMixin, cpu_worker.CPUWorker):
    """vLLM's CPU worker with `EchoCPUModelRunner`."""

    def init_device(self) -> None:
        is_bfloat16 = self.model_config.dtype == torch.bfloat16
        if self.rank == 0 and is_bfloat16 and fast_dtype() == "float32":
            logger.warning(
                "This CPU has no bfloat16 instructions: a row of a forward takes several times "
                "as long as in float32, and speculation gains nothing; serve with --dtype float32."
            )
        # vLLM names its runner class inside this method; building that one first and replacing it
        # would allocate everything twice.
        with patch.object(cpu_worker, "CPUModelRunner", EchoCPUModelRunner):
            super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        own = self.vllm_config.speculative_config.echo.linear == "auto"
        with packed_linears() if own else nullcontext():
            super().load_model(*args, **kwargs)
        # Inductor makes one kernel of a norm and what is around it.
        if own and self.vllm_config.compilation_config.mode == CompilationMode.NONE:
            runner: Any = self.model_runner
            fuse_norms([runner.model, runner.drafter.model])

    def tree_backend(self) -> tuple[AttentionBackendEnum, type]:
        return AttentionBackendEnum.CPU_ATTN, EchoCPUAttentionBackend
