# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""vLLM's CUDA attention backends, with trees (see `backend.py`).

FlashAttention where it can compute, i.e. float16 and bfloat16; for float32, which it has no
kernels for, vLLM's Triton backend. Both keep K and V of a token side by side in the same paged
cache, [num_blocks, KVH, block_size, 2 * D] with the strides of the NHD or the HND layout.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from echo_vllm.step.attention.backend import Pages, TreeAttentionImpl, TreeMetadataBuilder

NAME = "CUSTOM"
"""vLLM's name for a backend from elsewhere; the worker registers one of these under it."""


class _PagedImpl(TreeAttentionImpl):
    """The cache and the window as FlashAttention's and Triton's implementations hold them."""

    def pages(self, layer: Any, kv_cache: torch.Tensor) -> Pages:
        # Strides, not the name, tell NHD from HND.
        tokens = kv_cache.transpose(1, 2)
        size: int = self.head_size
        return Pages(tokens[..., :size], tokens[..., size:], "nhd")

    def window(self) -> int:
        left: int = self.sliding_window[0]  # tokens before the row's own, -1 for all
        return left + 1


class EchoFlashAttentionBackend(FlashAttentionBackend):
    """Stock FlashAttention, except for requests with a draft tree."""

    # Of vLLM 0.33.0: models must not write keys past us, because trees read them before the cache.
    supports_kv_cache_update_bypass = False

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[EchoFlashAttentionImpl]:
        return EchoFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[EchoFlashAttentionMetadataBuilder]:
        return EchoFlashAttentionMetadataBuilder


class EchoFlashAttentionMetadataBuilder(TreeMetadataBuilder, FlashAttentionMetadataBuilder):
    """See `TreeMetadataBuilder`."""


class EchoFlashAttentionImpl(_PagedImpl, FlashAttentionImpl):
    """See `TreeAttentionImpl`."""


class EchoTritonAttentionBackend(TritonAttentionBackend):
    """Stock Triton attention, except for requests with a draft tree."""

    # Of vLLM 0.33.0: models must not write keys past us, because trees read them before the cache.
    supports_kv_cache_update_bypass = False

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[EchoTritonAttentionImpl]:
        return EchoTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[EchoTritonAttentionMetadataBuilder]:
        return EchoTritonAttentionMetadataBuilder


class EchoTritonAttentionMetadataBuilder(TreeMetadataBuilder, TritonAttentionMetadataBuilder):
    """See `TreeMetadataBuilder`."""


class EchoTritonAttentionImpl(_PagedImpl, TritonAttentionImpl):
    """See `TreeAttentionImpl`."""


def backend_for(dtype: torch.dtype) -> type[FlashAttentionBackend | TritonAttentionBackend]:
    """The backend for a model that computes in `dtype`."""
    if dtype in FlashAttentionBackend.supported_dtypes:
        return EchoFlashAttentionBackend
    return EchoTritonAttentionBackend
