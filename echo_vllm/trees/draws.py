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
"""Tokens among which the ends of top-k and top-p are looked for. A wider q than the request's own is
as exact as any other q, and a full sort of the vocabulary takes longer than what it would gain."""

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
    greedy = sampling.temperature == 0
    temperature = torch.where(greedy, 1.0, sampling.temperature)
    scaled = logits.float() / temperature.unsqueeze(1)
    lowest: list[torch.Tensor] = []
    if sampling.top_k is not None or sampling.top_p is not None:
        # Sorted once for both; top_p is of what top_k leaves, as in the target's sampler.
        best = scaled.topk(min(NUCLEUS, scaled.shape[1]), dim=1).values
        last = torch.full_like(greedy, best.shape[1] - 1, dtype=torch.int64)
        if sampling.top_k is not None:
            last = torch.minimum(last, sampling.top_k - 1)
            kept = best.gather(1, last.unsqueeze(1))
            all_of_it = (sampling.top_k > best.shape[1]).unsqueeze(1)
            lowest.append(kept.masked_fill(all_of_it, float("-inf")))
            scaled_in = scaled.masked_fill(scaled < lowest[-1], float("-inf"))
        else:
            scaled_in = scaled
        if sampling.top_p is not None:
            share = (best - scaled_in.logsumexp(1, keepdim=True)).exp()
            before = share.cumsum(1) - share
            inside = (before < sampling.top_p.unsqueeze(1)).sum(1) - 1
            kept = best.gather(1, inside.clamp(min=0).unsqueeze(1))
            # The nucleus may end behind what was sorted: then nothing is cut.
            open_end = (inside == best.shape[1] - 1) & (last == best.shape[1] - 1)
            lowest.append(kept.masked_fill(open_end.unsqueeze(1), float("-inf")))
    if sampling.min_p is not None:
        top = scaled.amax(1, keepdim=True)
        lowest.append(top + sampling.min_p.unsqueeze(1).log())
    for bound in lowest:
        bound = bound.masked_fill(greedy.unsqueeze(1), float("-inf"))
        scaled = scaled.masked_fill(scaled < bound, float("-inf"))
    return torch.softmax(scaled, 1)


def draw_children(
    logits: torch.Tensor, k: int, keys: torch.Tensor, sampling: Sampling
) -> Draws:
    """The first k draws from every row's q, one after the other without replacement.

    Each draw inverts the sum of q from the left with the drawn tokens left out, so it takes one
    random number a child and one pass over the vocabulary a row, where a race of noisy logits takes
    a number a token; the distribution is the same.

    Args:
        logits: [rows, V_draft], floating point, the drafter's.
        k: children a row.
        keys: [rows] int64, of the nodes that the rows belong to.
        sampling: of the rows.
    """
    probs = draft_distribution(logits, sampling)
    rows, vocab = probs.shape
    own_keys = child_keys(keys, k)
    numbers = uniforms(own_keys, Stream.DRAW)
    through = probs.cumsum(1, dtype=torch.float64)
    total = through[:, -1:]
    left = total.clone()
    # What is drawn: where its piece of the sum begins and how long it is, by its beginning.
    begins = total.new_empty(rows, 0)
    masses = total.new_empty(rows, 0)
    tokens: list[torch.Tensor] = []
    for rank in range(k):
        place = numbers[:, rank : rank + 1] * left
        for begin, mass in zip(begins.unbind(1), masses.unbind(1), strict=True):
            skipped = (place >= begin.unsqueeze(1)) & (mass.unsqueeze(1) > 0)
            place = torch.where(skipped, place + mass.unsqueeze(1), place)
        found = torch.searchsorted(through, place, right=True).clamp(max=vocab - 1)
        mass = probs.gather(1, found).double()
        again = torch.zeros_like(found, dtype=torch.bool)
        for token in tokens:
            again |= found == token
        # Rounding can end up on a token without mass, or on a drawn one: rather no child.
        missing = again | (mass <= 0) | (left <= EXHAUSTED * total)
        mass = mass.masked_fill(missing, 0.0)
        begin = through.gather(1, found) - mass
        tokens.append(found.masked_fill(missing, -1))
        left = left - mass
        begins, order = torch.cat([begins, begin], 1).sort(dim=1)
        masses = torch.cat([masses, mass], 1).gather(1, order)
    ids = torch.cat(tokens, 1) if k else own_keys
    greedy = sampling.temperature == 0
    if k:
        best = probs.topk(min(k, vocab), dim=1).indices
        best = torch.nn.functional.pad(best, (0, k - best.shape[1]), value=-1)
        ids = torch.where(greedy.unsqueeze(1), best, ids)
    logprobs = probs.gather(1, ids.clamp(min=0)).log().masked_fill(ids < 0, float("-inf"))
    return Draws(ids, logprobs, own_keys, probs)
