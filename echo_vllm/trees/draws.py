# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Drawing children from the drafter's distribution, and the random numbers that this takes.

A request's randomness is a tree of keys beside its tree of tokens: a root's key comes from the
request's seed and the position of its next token, a node's from its parent's key and its rank among
its siblings. A number is a hash of a key and of what it is for, so that a request's drafts and
verdicts do not depend on the batch, on the order of the work or on the device.

`draw_children` gives the children of any number of rows at once; `ops.sample_path` verifies them.
docs/drawn.md has the rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from echo_vllm import ops
from echo_vllm.transfer import upload

NUCLEUS = 256
"""Tokens among which the ends of top-k and top-p are looked for. A wider q than the request's own
is as exact as any other q, and sorting a vocabulary takes longer than what that would gain."""

BLOCK = 128
"""Tokens that are summed together: a draw looks for the block first, then inside of it."""

EXHAUSTED = 1e-12
"""Share of q's mass below which nothing is left to draw."""

_MASK = (1 << 64) - 1


class Stream(IntEnum):
    """What a random number is for; numbers of two streams are independent."""

    DRAW = 1
    ACCEPT = 2


@dataclass(frozen=True)
class Sampling:
    """How the rows of a drafting are sampled, one entry a row.

    Attributes:
        temperature: [rows] float32, above 0; None where all are 1.
        top_k: [rows] int64, at least 1; None where no row asks for it.
        top_p: [rows] float32 in (0, 1]; None as above.
        min_p: [rows] float32 in [0, 1]; None as above.
        truncated: [rows] bool, on the host, the rows that ask for top-k or top-p: only these are
            sorted. None where it may be any.
    """

    temperature: torch.Tensor | None = None
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    min_p: torch.Tensor | None = None
    truncated: torch.Tensor | None = None

    def of(self, requests: torch.Tensor, width: int) -> Sampling:
        """The same for `width` rows of each of some rows, `requests` [A] (on the host,
        ascending)."""

        def rows(values: torch.Tensor | None) -> torch.Tensor | None:
            if values is None:
                return None
            if len(requests) < len(values):
                values = values[upload(requests, values.device)]
            return values.repeat_interleave(width)

        fields = (self.temperature, self.top_k, self.top_p, self.min_p, self.truncated)
        return Sampling(*map(rows, fields))


@dataclass(frozen=True)
class Draws:
    """The children of some rows, in the order of drawing.

    Attributes:
        token_ids: [rows, k] int64, in the draft vocabulary; -1 where q had no more tokens.
        logprobs: [rows, k] float32, log q of each (not renormalised); -inf where there is none.
        keys: [rows, k] int64, the children's keys.
        probs: [rows, V_draft] float32, q as it was drawn from: `sample_path`'s `draft_probs`.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    keys: torch.Tensor
    probs: torch.Tensor


def root_keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[R] int64, the keys of the roots of R requests.

    Args:
        seeds: [R] int64, one a request, any value.
        positions: [R] int64, of the token after the root. It grows with every step, so no number
            is used twice.
    """
    return _mix(_mix(seeds) + positions)


def child_keys(keys: torch.Tensor, k: int) -> torch.Tensor:
    """[..., k] int64, the keys of the first k children of nodes with `keys` [...] int64."""
    ranks = torch.arange(1, k + 1, device=keys.device)
    return _mix(keys.unsqueeze(-1) + ranks)


def uniforms(keys: torch.Tensor, stream: Stream) -> torch.Tensor:
    """[...] float64 in [0, 1), 53 bits each, of `keys` [...] int64."""
    bits = _mix(keys ^ _signed(stream * 0xD1B54A32D192ED03))
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 64 bits whose output looks random (the finalizer of splitmix64)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def draft_distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """[rows, V_draft] float32, q: the drafter's distribution at each row's own parameters.

    Ties at the end of top-k and top-p stay in. A row with NaN or a logit of
    plus infinity is NaN.

    Args:
        logits: [rows, V_draft], floating point.
        sampling: of the rows.
    """
    return torch.softmax(_scaled(logits, sampling), 1)


def _scaled(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits [rows, V_draft] float32 over their temperature, -inf where nothing may be drawn."""
    scaled = logits.float()
    if sampling.temperature is not None:
        scaled = scaled / sampling.temperature.unsqueeze(1)
    if sampling.top_k is not None or sampling.top_p is not None:
        truncated = sampling.truncated
        if truncated is None:
            truncated = torch.ones(len(scaled), dtype=torch.bool)
        rows = upload(torch.from_numpy(np.flatnonzero(truncated.numpy())), logits.device)
        some = _truncated(
            scaled[rows],
            None if sampling.top_k is None else sampling.top_k[rows],
            None if sampling.top_p is None else sampling.top_p[rows],
        )
        scaled = scaled.index_copy(0, rows, some)
    if sampling.min_p is not None:
        least = scaled.amax(1, keepdim=True) + sampling.min_p.unsqueeze(1).log()
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    return scaled


def _truncated(
    scaled: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None
) -> torch.Tensor:
    """The rows `scaled` [rows, V_draft] with -inf behind the ends of top-k and top-p."""
    best = scaled.topk(min(NUCLEUS, scaled.shape[1]), dim=1).values
    end = best.shape[1] - 1

    def cut(scaled: torch.Tensor, last: torch.Tensor, is_behind: torch.Tensor) -> torch.Tensor:
        # Where the end is behind what was sorted, nothing is cut.
        least = best.gather(1, last.clamp(max=end)).masked_fill(is_behind, float("-inf"))
        return scaled.masked_fill(scaled < least, float("-inf"))

    if top_k is not None:
        last = top_k.unsqueeze(1) - 1
        scaled = cut(scaled, last, last > end)
    if top_p is not None:
        share = (best - scaled.logsumexp(1, keepdim=True)).exp()
        before = share.cumsum(1) - share
        last = (before < top_p.unsqueeze(1)).sum(1, keepdim=True).clamp(min=1) - 1
        scaled = cut(scaled, last, last == end)
    return scaled


def draw_children(logits: torch.Tensor, k: int, keys: torch.Tensor, sampling: Sampling) -> Draws:
    """The first k draws from every row's q, one after the other without replacement.

    Each draw inverts the sum of q from the left with the drawn tokens left out, so it takes one
    random number a child and one pass over the vocabulary a row, where a race of noisy logits takes
    a number a token; the distribution is the same.

    Args:
        logits: [rows, V_draft], floating point, the drafter's.
        k: children a row, at least 1.
        keys: [rows] int64, of the nodes that the rows belong to.
        sampling: of the rows.
    """
    if has_kernel(logits):
        return draw_by_kernel(logits, k, keys, sampling, None)[0]
    probs = draft_distribution(logits, sampling)
    own_keys = child_keys(keys, k)
    ids = _draw(probs, uniforms(own_keys, Stream.DRAW))
    logprobs = probs.gather(1, ids.clamp(min=0)).log().masked_fill(ids < 0, float("-inf"))
    return Draws(ids, logprobs, own_keys, probs)


def has_kernel(logits: torch.Tensor) -> bool:
    """Whether `draw_by_kernel` can draw from these logits."""
    return logits.device.type == "cpu" and ops.has_extension("draw_children")


def draw_by_kernel(
    logits: torch.Tensor,
    k: int,
    keys: torch.Tensor,
    sampling: Sampling,
    curve: tuple[float, float] | None,
) -> tuple[Draws, torch.Tensor, torch.Tensor]:
    """`draw_children`, and by `curve`, a scale and an exponent, what the draws are worth before and
    after they are drawn, both [rows, k]; without a curve nothing is said of that."""
    temperature = sampling.temperature
    if sampling.top_k is not None or sampling.top_p is not None or sampling.min_p is not None:
        logits, temperature = _scaled(logits, sampling), None
    elif logits.dtype not in (torch.float32, torch.bfloat16):
        logits = logits.float()
    scale, exponent = curve or (0.0, 1.0)
    ids, logprobs, own_keys, probs, gains, reaches = ops.draw_children(
        logits, temperature, keys, k, scale, exponent
    )
    return Draws(ids, logprobs, own_keys, probs), gains, reaches


def _draw(probs: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """[rows, k] int64, tokens drawn from `probs` [rows, V_draft] by `numbers` [rows, k]."""
    rows, vocab = probs.shape
    size = min(BLOCK, vocab)
    blocks = torch.nn.functional.pad(probs, (0, -vocab % size)).view(rows, -1, size)
    # Of what is not drawn yet.
    sums = blocks.sum(2, dtype=torch.float64)
    least = EXHAUSTED * sums.sum(1, keepdim=True)
    inside = torch.arange(size, device=probs.device)
    tokens = torch.empty(numbers.shape, dtype=torch.int64, device=probs.device)
    for rank in range(numbers.shape[1]):
        through = sums.cumsum(1)
        left = through[:, -1:]
        place = numbers[:, rank : rank + 1] * left
        block = torch.searchsorted(through, place, right=True).clamp(max=sums.shape[1] - 1)
        masses = blocks.gather(1, block.unsqueeze(2).expand(-1, 1, size)).squeeze(1).double()
        ids = block * size + inside
        for drawn in range(rank):
            masses.masked_fill_(ids == tokens[:, drawn : drawn + 1], 0.0)
        place = place - (through.gather(1, block) - sums.gather(1, block))
        found = torch.searchsorted(masses.cumsum(1), place, right=True).clamp(max=size - 1)
        # Rounding can end up on a token without mass, and a row may be NaN: rather no child.
        missing = ~((masses.gather(1, found) > 0) & (left > least))
        tokens[:, rank : rank + 1] = ids.gather(1, found).masked_fill(missing, -1)
        sums.scatter_(1, block, masses.scatter(1, found, 0.0).sum(1, keepdim=True))
    return tokens
