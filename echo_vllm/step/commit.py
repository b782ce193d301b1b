# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Moving the accepted paths' keys and values to where a chain would have left them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from echo_vllm import ops

MAX_MOVES = 8192
"""Slots that one call of `ops.commit_kv` moves on a GPU at most."""


def commit_paths(
    accepted: torch.Tensor,
    first_rows: torch.Tensor,
    *,
    slot_mappings: Iterable[torch.Tensor],
    attn_groups: Iterable[Iterable[Any]],
    layers: Mapping[str, Any],
    drafter: Collection[str],
) -> None:
    """Move what T requests accepted.

    All places of all paths are asked for, whatever was accepted, so that nobody has to know;
    `ops.commit_kv` skips the negative slots of those that have nothing to move.

    Args:
        accepted: [T, D] int64, for each depth the accepted row inside the request; -1 for none.
        first_rows: [T] int64, the first row of each request.
        slot_mappings: of every group of paged caches, the slots [rows].
        attn_groups: of every group of paged caches vLLM's attention groups, whose layers' caches
            have one shape.
        layers: every layer, by its name.
        drafter: names of the drafter's layers, which stay as they are.
    """
    places = torch.arange(1, accepted.shape[1] + 1, device=accepted.device)
    moves = (accepted > 0) & (accepted != places)
    first = first_rows.unsqueeze(1)
    source = (first + accepted.clamp(min=0)).flatten()
    target = (first + torch.where(moves, places, 0)).flatten()
    stay = ~moves.flatten()
    # Requests share no slots, so they may be moved in several calls.
    part = max(1, MAX_MOVES // max(1, accepted.shape[1])) * max(1, accepted.shape[1])
    for slots, groups in zip(slot_mappings, attn_groups, strict=True):
        sources = slots[source].masked_fill(stay, -1)
        targets = slots[target].masked_fill(stay, -1)
        for group in groups:
            own = [layers[name] for name in group.layer_names if name not in drafter]
            if not own:
                continue
            caches, layout = [layer.kv_cache for layer in own], kv_layout(own[0])
            for start in range(0, len(sources), part):
                some = slice(start, start + part)
                ops.commit_kv(caches, sources[some], targets[some], caches[0].shape[2], layout)


def kv_layout(layer: Any) -> str:
    """The layout of a layer's paged cache, by its name in `ops.commit_kv`."""
    # On a CPU a layer knows the instructions that its cache is packed for; on a GPU the strides
    # tell NHD from HND.
    return str(getattr(layer, "isa", "nhd"))
