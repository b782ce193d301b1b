# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""vLLM's CPU attention backend, with trees (see `backend.py`)."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from echo_vllm.step.attention.backend import Pages, TreeAttentionImpl, TreeMetadataBuilder


class EchoCPUAttentionBackend(CPUAttentionBackend):
    """Stock CPU attention, except for requests with a draft tree."""

    supports_kv_cache_update_bypass = False  # See `cuda.py`.

    @staticmethod
    def get_impl_cls() -> type[EchoCPUAttentionImpl]:
        return EchoCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[EchoCPUAttentionMetadataBuilder]:
        return EchoCPUAttentionMetadataBuilder


class EchoCPUAttentionMetadataBuilder(TreeMetadataBuilder, CPUAttentionMetadataBuilder):
    """See `TreeMetadataBuilder`."""


class EchoCPUAttentionImpl(TreeAttentionImpl, CPUAttentionBackendImpl):
    """See `TreeAttentionImpl`."""

    def pages(self, layer: Any, kv_cache: torch.Tensor) -> Pages:
        num_blocks, num_kv_heads, block_size, _ = kv_cache.size()
        halves = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1)
        key, value = halves.chunk(2, dim=2)
        return Pages(key, value, layer.isa)

    def window(self) -> int:
        return int(self.sliding_window)
