# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Masks of tokens that a grammar allows, laid over logits on a CPU.

xgrammar's kernel goes from bit to bit, over a copy in float32 that vLLM makes and copies back: with
a row for every node of a tree that takes half as long as the forward. Here eight bits are looked up
at a time.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray


@functools.cache
def _bounds(dtype: torch.dtype) -> NDArray[np.complex128]:
    """[256, n] of 8 upper bounds of `dtype` in n times 16 bytes: of a byte of a mask, for each of
    its bits inf where it is 1, and -inf where it is 0."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    bounds = torch.where(torch.from_numpy(bits) == 1, torch.inf, -torch.inf).to(dtype)
    return bounds.view(torch.uint8).numpy().view(np.complex128)


def forbid_(logits: torch.Tensor, allowed: NDArray[np.int32]) -> None:
    """Set the logits of all tokens that are not allowed to -inf, in place.

    Args:
        logits: [rows, V] float16, bfloat16 or float32, on the host.
        allowed: [rows, words] int32, a bit a token, the lowest first; what lies beyond the last
            word stays as it is.
    """
    places = np.ascontiguousarray(allowed).view(np.uint8)
    table = _bounds(logits.dtype)
    bounds = torch.from_numpy(table.take(places, axis=0).reshape(len(places), -1).view(np.uint8))
    bounds = bounds.view(logits.dtype)
    width = min(logits.shape[1], bounds.shape[1])
    logits = logits[:, :width]
    torch.minimum(logits, bounds[:, :width], out=logits)
