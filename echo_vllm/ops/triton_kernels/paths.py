# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What sampling reads of the past of rows in trees: penalties and bad words along a path.

For Model Runner V2 alone, which has no step without Triton. A path are the drafts from below a root
to a row, its own token the last of them; `tokens` [L, D] holds each row's `depths` [L] at the end.
Requests are found by their `slots` [L] in what vLLM's sampler knows of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def penalise_paths(
    logits: Tensor,
    before: Tensor,
    tokens: Tensor,
    depths: Tensor,
    slots: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
    counts: Tensor,
) -> None:
    """Penalise the tokens of every row's path for what was said and for the path.

    Args:
        logits: [L, vocab] float32, in which only these tokens change.
        before: [L, D] float32, the logits of `tokens` without any penalty.
        tokens, depths, slots: [L, D] int64, [L] int32, [L] int32.
        repetition, frequency, presence: [max_reqs] float32, penalties.
        counts: [max_reqs, vocab] int32, how often each token was said.
    """
    num_rows, most = tokens.shape
    _penalise_paths_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        before,
        tokens,
        depths,
        slots,
        repetition,
        frequency,
        presence,
        counts,
        counts.stride(0),
        most,
        BLOCK=triton.next_power_of_2(most),
    )


def forbid_ends(
    logits: Tensor,
    tokens: Tensor,
    depths: Tensor,
    slots: Tensor,
    num_words: Tensor,
    bounds: Tensor,
    words: Tensor,
    committed: Tensor,
    prompt_len: Tensor,
    total_len: Tensor,
    *,
    most_words: int,
) -> None:
    """Forbid the last token of every bad word whose others end what was said and a row's path.

    Args:
        logits: [L, vocab] float32.
        tokens, depths, slots: [L, D] int64, [L] int32, [L] int32.
        num_words: [max_reqs] int32.
        bounds: [max_reqs, words + 1] int32, of each word in `words`.
        words: [max_reqs, tokens of all words] int32.
        committed: [max_reqs, max_model_len] int32, prompts and what was said behind them.
        prompt_len, total_len: [max_reqs] int32.
        most_words: of a request of the batch.
    """
    num_rows, most = tokens.shape
    _forbid_ends_kernel[(num_rows, most_words)](
        logits,
        logits.stride(0),
        tokens,
        depths,
        most,
        slots,
        num_words,
        bounds,
        bounds.stride(0),
        words,
        words.stride(0),
        committed,
        committed.stride(0),
        prompt_len,
        total_len,
    )


@triton.jit
def _penalise_paths_kernel(
    logits,
    logits_stride,
    before,
    tokens,
    depths,
    slots,
    repetition,
    frequency,
    presence,
    counts,
    counts_stride,
    D,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    column = tl.arange(0, BLOCK)
    on_path = (column < D) & (column >= D - tl.load(depths + row))
    token = tl.load(tokens + row * D + column, mask=on_path, other=-1)
    value = tl.load(before + row * D + column, mask=on_path, other=0.0)
    said = tl.load(counts + slot * counts_stride + token, mask=on_path, other=0)
    said += tl.sum((token[:, None] == token[None, :]).to(tl.int32), axis=1)
    # The operations of vLLM's kernel, in its order: the two must not differ by a rounding.
    scale = tl.load(repetition + slot)
    if scale != 1.0:
        value *= tl.where(value > 0, 1.0 / scale, scale)
    value -= tl.load(frequency + slot) * said
    value -= tl.load(presence + slot)
    # A token that is twice on the path has the same value both times.
    tl.store(logits + row * logits_stride + token, value, mask=on_path)


@triton.jit
def _forbid_ends_kernel(
    logits,
    logits_stride,
    tokens,
    depths,
    D,
    slots,
    num_words,
    bounds,
    bounds_stride,
    words,
    words_stride,
    committed,
    committed_stride,
    prompt_len,
    total_len,
):
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if word >= tl.load(num_words + slot):
        return
    start = tl.load(bounds + slot * bounds_stride + word)
    last = tl.load(bounds + slot * bounds_stride + word + 1) - 1
    depth = tl.load(depths + row)
    total = tl.load(total_len + slot)
    if last - start > total - tl.load(prompt_len + slot) + depth:
        return
    is_end = 1
    for back in range(last - start):  # from the row's own token to the front
        wanted = tl.load(words + slot * words_stride + last - 1 - back)
        drafted = tl.load(tokens + row * D + D - 1 - back, mask=back < depth, other=0)
        place = slot * committed_stride + total - 1 - (back - depth)
        said = tl.load(committed + place, mask=back >= depth, other=0)
        is_end = is_end & (wanted == drafted.to(tl.int32) + said)
    if is_end:
        token = tl.load(words + slot * words_stride + last)
        tl.store(logits + row * logits_stride + token, -float("inf"))
