# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The greatest values of each row, faster than torch finds them on a CPU."""

from __future__ import annotations

import torch


def argmax_of_rows(logits: torch.Tensor, block: int = 1024) -> torch.Tensor:
    """[rows] int64, `logits.argmax(1)`: the first of equal maxima.

    torch finds the position of a maximum several times slower than its value on a CPU, so only the
    block of columns that holds the maximum is searched for the position. On a GPU vLLM's sampler
    takes torch's own, and so does this: equal maxima must fall alike with and without speculation.
    """
    if logits.device.type != "cpu":
        return logits.argmax(dim=-1)
    num_columns = logits.shape[1]
    whole = num_columns // block * block
    tops = [torch.unflatten(logits[:, :whole], 1, (-1, block)).amax(2)] if whole else []
    if whole < num_columns:
        tops.append(logits[:, whole:].amax(1, keepdim=True))
    first = torch.cat(tops, dim=1).argmax(1, keepdim=True) * block
    # Past the end the last column stands again; the first of equal ones is taken.
    columns = (first + torch.arange(block)).clamp(max=num_columns - 1)
    return columns.gather(1, logits.gather(1, columns).argmax(1, keepdim=True)).squeeze(1)


def best_of_rows(
    values: torch.Tensor, count: int, block: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` greatest values of each row, as `values.topk(count, 1)` gives them; of equal ones
    any.

    They are looked for in the blocks with the greatest maxima: sorting is what takes the time.

    Args:
        values: [rows, V] float, without NaN.
        count: at least 1; where V is less, so many.
        block: columns.

    Returns:
        values [rows, min(count, V)], falling, and their places, int64.
    """
    num_columns = values.shape[1]
    count = min(count, num_columns)
    whole = num_columns // block * block
    if whole // block <= count:
        best = values.topk(count, dim=1)
        return best.values, best.indices
    blocks = torch.unflatten(values[:, :whole], 1, (-1, block))
    first = blocks.amax(2).topk(count, dim=1).indices.unsqueeze(2) * block
    columns = (first + torch.arange(block, device=values.device)).flatten(1)
    if whole < num_columns:
        rest = torch.arange(whole, num_columns, device=values.device)
        columns = torch.cat([columns, rest.expand(len(values), -1)], dim=1)
    best = values.gather(1, columns).topk(count, dim=1)
    return best.values, columns.gather(1, best.indices)
