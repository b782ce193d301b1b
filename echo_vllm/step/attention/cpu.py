# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""vLLM's CPU attention backend, with trees (see `backend.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from echo_vllm.step.attention.backend import Pages, TreeAttentionImpl, TreeMetadataBuilder
from echo_vllm.step.attention.tree import VerificationRows

FP8 = torch.float8_e4m3fn
"""The numbers of an FP8 cache."""

MANY = 4
"""Requests; with fewer the stock kernel has less to do before it begins."""

BLOCK = 32
"""Tokens a block in the small cache of `through_fp8`."""


class EchoCPUAttentionBackend(CPUAttentionBackend):
    """Stock CPU attention, except for requests with a draft tree."""

    supports_kv_cache_update_bypass = False  # See `cuda.py`.
    # One of vLLM's operators a layer instead of two, for each takes some 20 us to be called.
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[EchoCPUAttentionImpl]:
        return EchoCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[EchoCPUAttentionMetadataBuilder]:
        return EchoCPUAttentionMetadataBuilder


class EchoCPUAttentionMetadataBuilder(TreeMetadataBuilder, CPUAttentionMetadataBuilder):
    """See `TreeMetadataBuilder`. Batches of plain decoding may run in `ops.tree_attention` too, as
    trees of a root: from `MANY` requests on it takes half of the stock kernel's time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.takes_plain = False
        """Set by the model runner."""
        most = self.vllm_config.scheduler_config.max_num_seqs
        self._roots = torch.arange(most + 1, dtype=torch.int32)
        self._alone = torch.ones(most, 1, dtype=torch.int64)

    def can_take_plain(self, layers: Mapping[str, Any]) -> bool:
        """Whether `ops.tree_attention` is the faster one for all of this group's layers, of those
        by name: not with sinks or an FP8 cache, and in the layout of AMX nobody has measured it."""
        impls = [layers[name].impl for name in self.layer_names]
        plain = all(impl.sinks is None and not impl.is_fp8_kv_cache for impl in impls)
        return plain and self.isa in ("vec", "vec16")

    def rows_of(self, common_attn_metadata: CommonAttentionMetadata) -> VerificationRows | None:
        cm, n = common_attn_metadata, common_attn_metadata.num_reqs
        is_plain = cm.max_query_len == 1 and cm.num_actual_tokens == n and cm.causal is True
        if self.verification is not None or not self.takes_plain:
            return self.verification
        if n < MANY or not is_plain or cm.positions is None:
            return None
        return VerificationRows(n, n, self._roots[: n + 1], self._roots[:0], self._alone[:n])


class EchoCPUAttentionImpl(TreeAttentionImpl, CPUAttentionBackendImpl):
    """See `TreeAttentionImpl`."""

    def keep(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor
    ) -> None:
        slots = get_forward_context().slot_mapping.get(layer.layer_name)
        if slots is not None and layer.kv_sharing_target_layer_name is None:
            self.do_kv_cache_update(layer, key, value, kv_cache, slots)

    def pages(self, layer: Any, kv_cache: torch.Tensor) -> Pages:
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        halves = kv_cache.view(num_blocks, num_kv_heads, 2, block_size, -1)
        key, value = halves.unbind(2)
        if not self.is_fp8_kv_cache:
            return Pages(key, value, layer.isa)
        scales = layer._k_scale_float, layer._v_scale_float
        return Pages(key.view(FP8), value.view(FP8), layer.isa, *scales)

    def window(self) -> int:
        return int(self.sliding_window)

    def as_cached(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_fp8_kv_cache:
            return key, value
        return through_fp8(key, value, layer._k_scale_float, layer._v_scale_float)


def through_fp8(
    key: torch.Tensor, value: torch.Tensor, k_scale: float, v_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [n, KVH, D] as an FP8 cache gives them back, by vLLM's own kernel in a cache of their
    own: how it rounds (towards zero) is its business."""
    n, num_kv_heads, size = key.shape
    cache = key.new_empty(-(-n // BLOCK), num_kv_heads, 2 * BLOCK, size, dtype=torch.uint8)
    halves = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        key, value, *halves, torch.arange(n), "vec", k_scale, v_scale, "fp8_e4m3"
    )
    # A block holds K by dimension, V by token.
    keys, values = (half.contiguous().view(FP8).float() for half in halves)
    keys = keys.view(-1, num_kv_heads, size, BLOCK).permute(0, 3, 1, 2).contiguous()
    values = values.permute(0, 2, 1, 3).contiguous()
    return (
        (keys.reshape(-1, num_kv_heads, size)[:n] * k_scale).to(key.dtype),
        (values.reshape(-1, num_kv_heads, size)[:n] * v_scale).to(value.dtype),
    )
