# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What every attention backend with trees has in common, as mix-ins over a stock backend.

A batch without trees runs in the stock backend, untouched. In a batch with trees, the requests
that have one come first (the model runner orders them) and go to `ops.tree_attention`; the rest
of the batch goes to the stock backend as a smaller batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    CommonAttentionMetadata,
    max_decode_query_len,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from echo_vllm import ops
from echo_vllm.step.attention.tree import TreeAttention, VerificationRows

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionImpl as _Impl
    from vllm.v1.attention.backend import AttentionMetadataBuilder as _Builder
else:
    _Builder = _Impl = object


@dataclass
class TreeAttentionMetadata:
    """Metadata of a forward with trees.

    Attributes:
        tree: the tree rows, the first of the forward.
        rest: the stock backend's metadata of the other requests, None if there are none.
        slot_mapping: [tokens] int64, of all rows; None if nothing goes to the paged cache.
    """

    tree: TreeAttention
    rest: Any | None
    slot_mapping: torch.Tensor | None = None


class TreeMetadataBuilder(_Builder):
    """Builds stock metadata unless the model runner announced trees in `verification`.

    Full CUDA graphs hold batches of decoding requests, whatever their trees: all of them run in
    `ops.tree_attention` then. A batch with prompts is divided, which none can hold.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.verification: VerificationRows | None = None
        """Set by the model runner for the duration of one build."""
        self.rows_to_capture: Callable[[torch.Tensor, int], VerificationRows] | None = None
        """Set by a model runner whose full CUDA graphs hold trees: the rows of a batch that is made
        up, of its `row_start` and its number of rows."""
        # Sizes and context lengths of the trees, where a CUDA graph finds those of every batch.
        most = self.vllm_config.scheduler_config.max_num_seqs
        self._sizes = torch.zeros(most, dtype=torch.int32, device=self.device)
        self._context_lens = torch.zeros_like(self._sizes)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        return AttentionCGSupport.UNIFORM_BATCH

    @classmethod
    def get_stock_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """What the stock backend says of itself, whose metadata batches without trees have."""
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)

    @classmethod
    def get_varlen_cudagraph_max_query_len(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> int:
        """Trees of one batch have different sizes."""
        return max_decode_query_len(vllm_config)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        cm = common_attn_metadata
        # Batches of plain decoding, a row a request, run in a graph of stock attention.
        if self.rows_to_capture is None or cm.max_query_len == 1:
            return super().build_for_cudagraph_capture(cm)
        self.verification = self.rows_to_capture(cm.query_start_loc, cm.num_actual_tokens)
        try:
            return self.build(0, cm)
        finally:
            self.verification = None

    def rows_of(self, common_attn_metadata: CommonAttentionMetadata) -> VerificationRows | None:
        """The rows of this batch that go to `ops.tree_attention`; None for none."""
        return self.verification

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        trees, cm = self.rows_of(common_attn_metadata), common_attn_metadata
        if trees is None:
            return super().build(common_prefix_len, cm, fast_build)
        n = trees.num_requests
        row_start = trees.row_start
        sizes = torch.sub(row_start[1:], row_start[:-1], out=self._sizes[:n])
        assert cm.positions is not None
        tree = TreeAttention(
            block_table=cm.block_table_tensor[:n],
            context_lens=torch.sub(cm.seq_lens[:n], sizes, out=self._context_lens[:n]),
            query_start=row_start[:-1],
            row_start=row_start,
            suffix_start=row_start[:-1],
            suffix_len=sizes,
            mask=trees.mask,
            positions=cm.positions[: trees.num_rows],
        )
        rest = None
        if n < cm.num_reqs:
            rest = super().build(common_prefix_len, without_trees(cm, trees), fast_build)
        return TreeAttentionMetadata(tree=tree, rest=rest, slot_mapping=cm.slot_mapping)

    def update_block_table(
        self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> Any:
        """The same batch in another group of layers, which has its own blocks."""
        if not isinstance(metadata, TreeAttentionMetadata):
            return super().update_block_table(metadata, blk_table, slot_mapping)
        tree, rest = metadata.tree, metadata.rest
        n = tree.num_requests
        if rest is not None:
            rest = super().update_block_table(rest, blk_table[n:], slot_mapping[tree.num_rows :])
        return TreeAttentionMetadata(
            replace(tree, block_table=blk_table[:n]), rest, slot_mapping=slot_mapping
        )


def builders_of(
    attn_groups: Iterable[Iterable[Any]],
) -> Iterator[tuple[Any, TreeMetadataBuilder]]:
    """Every one of vLLM's attention groups, and who builds its metadata."""
    for groups in attn_groups:
        for group in groups:
            yield group, group.get_metadata_builder()


def without_trees(cm: CommonAttentionMetadata, trees: VerificationRows) -> CommonAttentionMetadata:
    """The batch of the requests behind those with trees."""
    n, rows = trees.num_requests, trees.num_rows
    starts = cm.query_start_loc_cpu[n:] - rows
    upper = cm.seq_lens_cpu_upper_bound
    return cm.replace(
        query_start_loc=cm.query_start_loc[n:] - rows,
        query_start_loc_cpu=starts,
        seq_lens=cm.seq_lens[n:],
        num_reqs=cm.num_reqs - n,
        num_actual_tokens=cm.num_actual_tokens - rows,
        max_query_len=int(starts.diff().max()),
        block_table_tensor=cm.block_table_tensor[n:],
        slot_mapping=cm.slot_mapping[rows:],
        positions=None,
        is_prefilling=None if cm.is_prefilling is None else cm.is_prefilling[n:],
        seq_lens_cpu_upper_bound=None if upper is None else upper[n:],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


@dataclass(frozen=True)
class Pages:
    """A layer's paged cache as `ops.tree_attention` takes it: K, V, the name of their layout, and
    the scales of 8-bit ones."""

    key: torch.Tensor
    value: torch.Tensor
    layout: str
    k_scale: float = 1.0
    v_scale: float = 1.0


class TreeAttentionImpl(_Impl):
    """Runs tree rows in `ops.tree_attention` and everything else in the stock kernel."""

    def pages(self, layer: Any, kv_cache: torch.Tensor) -> Pages:
        """`kv_cache` [num_blocks, KVH, block_size, 2 * D] as views of K and V."""
        raise NotImplementedError

    def window(self) -> int:
        """Tokens that a sliding window holds, the row's own among them; 0 without a window."""
        raise NotImplementedError

    def keep(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor
    ) -> None:
        """Write new rows to the cache, before anything attends, where `forward` has to do so
        (`forward_includes_kv_cache_update`)."""

    def as_cached(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What reading `key` and `value` back from the cache would give. Without a tree a row sees
        even itself there, so a tree's rows must see each other like this."""
        return key, value

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
        """See vLLM's `AttentionImpl.forward` for shapes; rows of padding may follow the batch's."""
        self.keep(layer, key, value, kv_cache)
        if attn_metadata is None:
            # A forward that warms up or is timed. vLLM's CPU leaves what was in memory there, and
            # experts would be chosen by it.
            return output.zero_()
        if not isinstance(attn_metadata, TreeAttentionMetadata):
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
        assert output_scale is None
        assert output_block_scale is None
        tree, rest = attn_metadata.tree, attn_metadata.rest
        rows = tree.num_rows
        if rest is not None:
            super().forward(
                layer, query[rows:], key[rows:], value[rows:], kv_cache, rest, output[rows:]
            )
        of_trees = output
        if rows < query.shape[0]:
            query, key, value, of_trees = query[:rows], key[:rows], value[:rows], output[:rows]
        pages = self.pages(layer, kv_cache)
        own = self.as_cached(layer, key, value)
        suffix_key, suffix_value = tree.suffix(layer.layer_name, *own)
        ops.tree_attention(
            query=query,
            key_cache=pages.key,
            value_cache=pages.value,
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
            sliding_window=self.window(),
            layout=pages.layout,
            out=of_trees,
            k_scale=pages.k_scale,
            v_scale=pages.v_scale,
            sinks=self.sinks,
        )
        return output
