# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Workers that run the tree-verifying model runner and register its attention backend."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker import cpu_worker

from echo_vllm.engine.model_runner import EchoCPUModelRunner


class EchoCPUWorker(cpu_worker.CPUWorker):
    """vLLM's CPU worker with `EchoCPUModelRunner`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        register_backend(
            AttentionBackendEnum.CPU_ATTN,
            "echo_vllm.engine.attention.cpu.EchoCPUAttentionBackend",
        )
        super().__init__(*args, **kwargs)

    def init_device(self) -> None:
        # vLLM names its runner class inside this method; building that one first and replacing it
        # would allocate everything twice.
        with patch.object(cpu_worker, "CPUModelRunner", EchoCPUModelRunner):
            super().init_device()
