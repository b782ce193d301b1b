# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Attention over documents that are packed into one batch, each by itself.

speculators packs documents into one sequence and keeps them apart by a mask over all pairs of
positions. Only `flex_attention`, compiled, skips what the mask hides; any other implementation
computes it, which for a batch of 16,384 tokens in documents of 512 is 32 times the work. Here each
document is a row of its own, padded at its end, where no position before sees it. Those of about
the same length run together.

In step m of the training-time test the query at a position stands m positions further on. It sees
the keys of step 0 up to its own position, and of each later step the key at its own position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

NAME = "sdpa_by_document"
"""Under which transformers knows `attention_by_document`."""

ALIGNMENT = 16
"""Lengths of rows are multiples of it, which PyTorch's kernels ask of masks."""

SHORTEST = 63
"""Documents of up to so many positions are padded to the longest of them."""

BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Without cuDNN, which makes a plan for each new shape."""


@dataclass(frozen=True)
class Rows:
    """Documents of about the same length, each a row.

    Attributes:
        count: documents.
        length: of a row, padding included.
        positions: [positions of these documents], where each stands in the packed sequence.
        places: [positions of these documents], row * length + position in the row.
    """

    count: int
    length: int
    positions: torch.Tensor
    places: torch.Tensor

    def unpack(self, packed: torch.Tensor, positions: int) -> torch.Tensor:
        """Packed vectors of one or more steps, by document.

        Args:
            packed: [heads, steps * positions, size].
            positions: of a step.

        Returns:
            [count, heads, steps * length, size].
        """
        heads, _, size = packed.shape
        by_position = packed.view(heads, -1, positions, size).permute(2, 1, 0, 3)
        steps = by_position.shape[1]
        empty = packed.new_zeros(self.count * self.length, steps, heads, size)
        filled = empty.index_copy(0, self.places, by_position[self.positions])
        by_row = filled.view(self.count, self.length, steps, heads, size).permute(0, 3, 2, 1, 4)
        return by_row.reshape(self.count, heads, steps * self.length, size)

    def pack_into(self, packed: torch.Tensor, by_row: torch.Tensor) -> torch.Tensor:
        """The other way round, for one step.

        Args:
            packed: [positions, heads, size], of other documents and padding.
            by_row: [count, heads, length, size].

        Returns:
            `packed` with these documents in it.
        """
        vectors = by_row.transpose(1, 2).flatten(0, 1)[self.places]
        return packed.index_copy(0, self.positions, vectors)


@dataclass(frozen=True)
class Packing:
    """Documents that follow each other, as rows.

    Attributes:
        groups: of which none has rows more than twice as long as one of its documents, if that has
            more than `SHORTEST` positions.
    """

    groups: list[Rows]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> Packing:
        """Packing of documents.

        Args:
            lengths: positions of each, in their order.
            device: for the places.
        """
        begins = [0, *accumulate(lengths)]
        by_size: dict[int, list[int]] = {}
        for number, length in enumerate(lengths):
            by_size.setdefault(max(length, SHORTEST).bit_length(), []).append(number)
        groups = []
        for members in by_size.values():
            longest = max(lengths[number] for number in members)
            length = -(-longest // ALIGNMENT) * ALIGNMENT
            positions, places = [], []
            for row, number in enumerate(members):
                positions.append(torch.arange(begins[number], begins[number + 1]))
                places.append(torch.arange(row * length, row * length + lengths[number]))
            groups.append(
                Rows(
                    len(members),
                    length,
                    torch.cat(positions).to(device),
                    torch.cat(places).to(device),
                )
            )
        return cls(groups)


def mask_of(length: int, steps: int, device: torch.device) -> torch.Tensor:
    """Which keys of `steps` steps the queries of the last of them see: [length, steps * length]."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    own = torch.eye(length, dtype=torch.bool, device=device)
    return torch.cat([causal, own.repeat(1, steps - 1)], dim=1)


def attention_by_document(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    packing: Packing | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one step of the training-time test, as transformers calls it.

    Args:
        module: the layer's attention.
        query: [1, heads, positions, size].
        key: [1, kv_heads, steps * positions, size]; of all steps so far.
        value: as key.
        attention_mask: not used.
        scaling: of the scores.
        packing: of the batch; None for one document.

    Returns:
        [1, positions, heads, size], and no weights.
    """
    # Under autocast, rotary embeddings are float32 and values are not.
    query, key = query.to(value.dtype), key.to(value.dtype)
    positions = query.shape[2]
    if packing is None:
        packing = Packing.of([positions], query.device)
    shared = query.shape[1] // key.shape[1]
    steps = key.shape[2] // positions
    packed = query.new_zeros(positions, query.shape[1], query.shape[3])
    for rows in packing.groups:
        with sdpa_kernel(BACKENDS):
            by_row = torch.nn.functional.scaled_dot_product_attention(
                rows.unpack(query[0], positions),
                rows.unpack(key[0], positions).repeat_interleave(shared, dim=1),
                rows.unpack(value[0], positions).repeat_interleave(shared, dim=1),
                attn_mask=mask_of(rows.length, steps, query.device),
                scale=scaling,
            )
        packed = rows.pack_into(packed, by_row)
    return packed[None], None


AttentionInterface.register(NAME, attention_by_document)
