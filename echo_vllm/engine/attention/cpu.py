# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""vLLM's CPU attention backend, with trees.

A batch without trees runs in the stock backend, untouched. In a batch with trees, the requests
that have one come first (the model runner orders them) and go to this project's kernel; the rest
of the batch goes to the stock kernel as a smaller batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from echo_vllm import ops
from echo_vllm.engine.attention.tree import TreeAttention, VerificationRows


@dataclass
class TreeCPUAttentionMetadata:
    """Metadata of a forward with trees.

    Attributes:
        tree: the tree rows, the first of the forward.
        rest: stock metadata of the other requests, None if there are none.
        slot_mapping: [tokens] int64, of all rows.
    """

    tree: TreeAttention
    rest: CPUAttentionMetadata | None
    slot_mapping: torch.Tensor | None = None


class EchoCPUAttentionBackend(CPUAttentionBackend):
    """Stock CPU attention, except for requests with a draft tree."""

    @staticmethod
    def get_impl_cls() -> type[EchoCPUAttentionImpl]:
        return EchoCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[EchoCPUAttentionMetadataBuilder]:
        return EchoCPUAttentionMetadataBuilder


class EchoCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds stock metadata unless the model runner announced trees in `verification`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.verification: VerificationRows | None = None
        """Set by the model runner for the duration of one build."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        trees, cm = self.verification, common_attn_metadata
        if trees is None:
            return super().build(common_prefix_len, cm, fast_build)
        n = trees.num_requests
        tree = TreeAttention(
            block_table=cm.block_table_tensor[:n],
            context_lens=cm.seq_lens[:n] - trees.row_start.diff(),
            query_start=trees.row_start[:-1],
            row_start=trees.row_start,
            suffix_start=trees.row_start[:-1],
            suffix_len=trees.row_start.diff(),
            mask=trees.mask,
            positions=cm.positions,
        )
        rest = None
        if n < cm.num_reqs:
            others = cm.replace(
                query_start_loc=cm.query_start_loc[n:] - trees.num_rows,
                query_start_loc_cpu=cm.query_start_loc_cpu[n:] - trees.num_rows,
                seq_lens=cm.seq_lens[n:],
                num_reqs=cm.num_reqs - n,
                num_actual_tokens=cm.num_actual_tokens - trees.num_rows,
                block_table_tensor=cm.block_table_tensor[n:],
                slot_mapping=cm.slot_mapping[trees.num_rows :],
                positions=None,
            )
            rest = super().build(common_prefix_len, others, fast_build)
        return TreeCPUAttentionMetadata(tree=tree, rest=rest, slot_mapping=cm.slot_mapping)


class EchoCPUAttentionImpl(CPUAttentionBackendImpl):
    """Runs tree rows in `ops.tree_attention` and everything else in the stock kernel."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `CPUAttentionBackendImpl.forward` for shapes."""
        if not isinstance(attn_metadata, TreeCPUAttentionMetadata):
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        tree, rest = attn_metadata.tree, attn_metadata.rest
        if rest is not None:
            first = tree.num_rows
            super().forward(
                layer, query[first:], key[first:], value[first:], kv_cache, rest, output[first:]
            )
        num_blocks, num_kv_heads, block_size, _ = kv_cache.size()
        pages = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1)
        key_cache, value_cache = pages.chunk(2, dim=2)
        suffix_key, suffix_value = tree.suffix(layer.layer_name, key, value)
        ops.tree_attention(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            block_table=tree.block_table,
            context_lens=tree.context_lens,
            query_start=tree.query_start,
            row_start=tree.row_start,
            suffix_key=suffix_key,
            suffix_value=suffix_value,
            suffix_start=tree.suffix_start,
            suffix_len=tree.suffix_len,
            mask=tree.mask,
            positions=tree.positions,
            scale=self.scale,
            softcap=self.logits_soft_cap,
            sliding_window=self.sliding_window,
            layout=layer.isa,
            out=output,
        )
        return output
