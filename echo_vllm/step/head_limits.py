# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Where a loaded head ends: the positions that it has, the tokens that it can read and draft.

A head may have been trained for shorter contexts than the target serves, and for a vocabulary that
was changed since. vLLM loads such a head; the drafter calls `limit_head` once after that, so that
nothing it does later reads or drafts beyond.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")


def limit_head(head: Any, *, vocab_size: int, max_len: int, trained_len: int) -> int:
    """Have a loaded head read and draft no token that is not there; say how far it can draft.

    Args:
        head: vLLM's model of an EAGLE-3 head.
        vocab_size: of the target.
        max_len: the longest request of the engine, in tokens.
        trained_len: as many tokens the head was trained for.

    Returns:
        The positions that it can draft for, at most `max_len`.
    """
    _read_known_tokens(head, vocab_size)
    _draft_known_tokens(head, vocab_size)
    positions = min(max_len, rotary_positions(head))
    if positions < max_len:
        logger.warning_once(
            "The rotary table of the draft head ends at position %d and requests may have %d "
            "tokens: what is beyond is not drafted for (vllm:echo_requests_beyond_head counts it).",
            positions,
            max_len,
        )
    elif trained_len < max_len:
        logger.warning_once(
            "The draft head was made for %d positions and requests may have %d tokens: vLLM widens "
            "its rotary table, so what is beyond is drafted for as well, but fewer tokens may be "
            "accepted there.",
            trained_len,
            max_len,
        )
    return positions


def rotary_positions(head: nn.Module) -> int:
    """Positions in the shortest rotary table of a model.

    vLLM widens a head's table to the longest request, except where its length is that of scaled
    positions (YaRN: `original_max_position_embeddings` times `factor`) or the head's config.json
    has no `max_position_embeddings`.
    """
    tables = [getattr(module, "cos_sin_cache", None) for module in head.modules()]
    return min((len(table) for table in tables if table is not None), default=2**31)


def _read_known_tokens(head: Any, vocab_size: int) -> None:
    """Read a token that has no row in the head's own embeddings as the last one that has."""
    embeddings = head.model.embed_tokens
    if (rows := embeddings.num_embeddings_padded) < vocab_size:
        embeddings.register_forward_pre_hook(lambda _, inputs: (inputs[0].clamp(max=rows - 1),))


def _draft_known_tokens(head: Any, vocab_size: int) -> None:
    """Map every row of the head's output to a token of the target.

    The output may be the target's own, with more rows than the head drafts tokens, and the head may
    know more tokens than the target: such rows stand for the target's first or last token, which is
    a wrong draft and no more.
    """
    offsets = head.draft_id_to_target_id
    if offsets is None:
        return
    rows = torch.arange(
        max(len(offsets), head.lm_head.num_embeddings_padded), device=offsets.device
    )
    tokens = torch.zeros_like(rows)
    tokens[: len(offsets)] = rows[: len(offsets)] + offsets
    tokens.clamp_(0, vocab_size - 1)
    head.draft_id_to_target_id = nn.Parameter(tokens - rows, requires_grad=False)
