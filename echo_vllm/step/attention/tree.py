# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What an attention backend must know about trees, whatever the device.

A request's rows attend to its committed context in the paged cache, without a causal mask, and to
dense suffix rows under an ancestor bitmask. In the target's verification the suffix is the rows
of the same forward. In the drafter's level-by-level forwards it is a scratch buffer that holds the
levels drafted so far; drafted rows never enter the drafter's paged cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

MASK_WORD_BITS = 64


def num_mask_words(num_rows: int) -> int:
    """Words that a bitmask over `num_rows` rows takes."""
    return -(-num_rows // MASK_WORD_BITS)


@dataclass
class DraftScratch:
    """Keys and values of the nodes that were expanded in this drafting, per drafter layer.

    Request i owns the rows i * capacity up to (i + 1) * capacity.

    Attributes:
        num_rows: rows in all, i.e. requests * capacity.
        layers: layer name -> (keys, values), each [num_rows, num_kv_heads, head_size].
    """

    num_rows: int
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def write(
        self, layer_name: str, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new rows' keys and values; return the whole buffers of the layer."""
        if layer_name not in self.layers:
            shape = (self.num_rows, *key.shape[1:])
            self.layers[layer_name] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self.layers[layer_name]
        keys[rows] = key
        values[rows] = value
        return keys, values


@dataclass
class TreeAttention:
    """The tree rows of one forward: `R` requests, `n` rows in all.

    Attributes:
        block_table: [R, max blocks] int32.
        context_lens: [R] int32, committed tokens in the paged cache.
        query_start: [R] int32, the first query row of each request.
        row_start: [R + 1] int32, the rows of each request in `mask`.
        suffix_start: [R] int32, the first suffix row of each request.
        suffix_len: [R] int32.
        mask: [n, W] int64, bit j of a row: the request's suffix row j is seen.
        positions: [n] int64.
        scratch: where the suffix lives if it is not the rows of this forward.
        scratch_rows: [n] int64, where in `scratch` the rows of this forward go.
    """

    block_table: torch.Tensor
    context_lens: torch.Tensor
    query_start: torch.Tensor
    row_start: torch.Tensor
    suffix_start: torch.Tensor
    suffix_len: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    scratch: DraftScratch | None = None
    scratch_rows: torch.Tensor | None = None

    @property
    def num_requests(self) -> int:
        return self.context_lens.shape[0]

    @property
    def num_rows(self) -> int:
        return self.mask.shape[0]

    def suffix(
        self, layer_name: str, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the suffix rows, given those of this forward's rows."""
        if self.scratch is None:
            return key, value
        assert self.scratch_rows is not None
        rows = self.num_rows  # rows of padding may follow
        return self.scratch.write(layer_name, self.scratch_rows, key[:rows], value[:rows])


@dataclass(frozen=True)
class VerificationRows:
    """The trees of a batch that its attention must treat as trees: the first requests of it.

    Requests behind them (prefills, single tokens, chains) are causal and stay with stock kernels.
    In a full CUDA graph there are none, and padding belongs to the trees: requests without rows,
    and rows behind the last request's.

    Attributes:
        num_requests: how many of the batch's first requests have trees.
        num_rows: their rows in all, the first of the batch.
        row_start: [num_requests + 1] int32.
        depths: [rows] int32, of every row that is no padding, the root's is 0; empty where nobody
            has more than a root.
        mask: [num_rows, W] int64, ancestors or self among the request's own rows.
    """

    num_requests: int
    num_rows: int
    row_start: torch.Tensor
    depths: torch.Tensor
    mask: torch.Tensor
