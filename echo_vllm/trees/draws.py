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

import torch

NUCLEUS = 256
"""Tokens among which the ends of top-k and top-p are looked for. A wider q than the request's own
is as exact as any other q, and sorting a vocabulary takes longer than what that would gain."""

SUMMED_AT_ONCE = 1 << 24
"""Probabilities whose running sums are in memory at once, 128 MiB."""

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
        temperature: [rows] float32; 0: the row's best tokens are taken instead of draws.
        top_k: [rows] int64, at least 1; None where no row asks for it.
        top_p: [rows] float32 in (0, 1]; None as above.
        min_p: [rows] float32 in [0, 1]; None as above.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    min_p: torch.Tensor | None = None


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

    A row of temperature 0 has that of temperature 1. Ties at the end of top-k and top-p stay in.

    Args:
        logits: [rows, V_draft], floating point.
        sampling: of the rows.
    """
    greedy = (sampling.temperature == 0).unsqueeze(1)
    scaled = logits.float() / sampling.temperature.unsqueeze(1).masked_fill(greedy, 1.0)

    def cut(bound: torch.Tensor) -> torch.Tensor:
        bound = bound.masked_fill(greedy, float("-inf"))
        return scaled.masked_fill(scaled < bound, float("-inf"))

    if sampling.top_k is not None or sampling.top_p is not None:
        best = scaled.topk(min(NUCLEUS, scaled.shape[1]), dim=1).values
        end = best.shape[1] - 1
        if sampling.top_k is not None:
            last = sampling.top_k.unsqueeze(1) - 1
            scaled = cut(best.gather(1, last.clamp(max=end)).masked_fill(last > end, float("-inf")))
        if sampling.top_p is not None:
            share = (best - scaled.logsumexp(1, keepdim=True)).exp()
            before = share.cumsum(1) - share
            last = (before < sampling.top_p.unsqueeze(1)).sum(1, keepdim=True).clamp(min=1) - 1
            # The nucleus may end behind what was sorted: then nothing is cut.
            scaled = cut(best.gather(1, last).masked_fill(last == end, float("-inf")))
    if sampling.min_p is not None:
        scaled = cut(scaled.amax(1, keepdim=True) + sampling.min_p.unsqueeze(1).log())
    return torch.softmax(scaled, 1)


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
    probs = draft_distribution(logits, sampling)
    own_keys = child_keys(keys, k)
    numbers = uniforms(own_keys, Stream.DRAW)
    # Sums in float64 take twice what q does, so not of all rows at once.
    step = max(1, SUMMED_AT_ONCE // probs.shape[1])
    ids = torch.cat(
        [
            _draw(probs[first : first + step], numbers[first : first + step])
            for first in range(0, max(1, len(probs)), step)
        ]
    )
    greedy = (sampling.temperature == 0).unsqueeze(1)
    best = probs.topk(min(k, probs.shape[1]), dim=1).indices
    best = torch.nn.functional.pad(best, (0, k - best.shape[1]), value=-1)
    ids = torch.where(greedy, best, ids)
    logprobs = probs.gather(1, ids.clamp(min=0)).log().masked_fill(ids < 0, float("-inf"))
    return Draws(ids, logprobs, own_keys, probs)


def _draw(probs: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """[rows, k] int64, tokens drawn from `probs` [rows, V_draft] by `numbers` [rows, k]."""
    through = probs.cumsum(1, dtype=torch.float64)
    total = through[:, -1:]
    left = total.clone()
    # What is drawn: where its piece of the sum begins and how long it is, by its beginning.
    begins, masses = total[:, :0], total[:, :0]
    tokens = torch.empty(numbers.shape, dtype=torch.int64, device=probs.device)
    for rank in range(numbers.shape[1]):
        place = numbers[:, rank : rank + 1] * left
        for drawn in range(rank):
            begin, mass = begins[:, drawn : drawn + 1], masses[:, drawn : drawn + 1]
            place = torch.where((place >= begin) & (mass > 0), place + mass, place)
        found = torch.searchsorted(through, place, right=True).clamp(max=probs.shape[1] - 1)
        mass = probs.gather(1, found).double()
        # Rounding can end up on a token without mass, or on a drawn one: rather no child.
        again = (tokens[:, :rank] == found).any(1, keepdim=True)
        missing = again | (mass <= 0) | (left <= EXHAUSTED * total)
        mass = mass.masked_fill(missing, 0.0)
        tokens[:, rank : rank + 1] = found.masked_fill(missing, -1)
        left = left - mass
        begins, order = torch.cat([begins, through.gather(1, found) - mass], 1).sort(dim=1)
        masses = torch.cat([masses, mass], 1).gather(1, order)
    return tokens
