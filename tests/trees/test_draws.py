# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Children are drawn as one after the other with renormalisation, whatever the batch."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from echo_vllm.trees.draws import (
    Sampling,
    Stream,
    child_keys,
    draft_distribution,
    draw_children,
    root_keys,
    uniforms,
)

SAMPLES = 40_000
LEAST_P = 0.001


def sampling(rows: int, temperature: float = 1.0, **others: float) -> Sampling:
    wide = {name: torch.full((rows,), value) for name, value in others.items()}
    return Sampling(torch.full((rows,), temperature), **wide)


def sequences(q: np.ndarray, k: int) -> dict[tuple[int, ...], float]:
    """All orders of k draws without replacement, with their probabilities."""
    result = {}
    for order in itertools.permutations(np.flatnonzero(q).tolist(), k):
        chance, left = 1.0, 1.0
        for token in order:
            chance, left = chance * q[token] / left, left - q[token]
        result[order] = chance
    return result


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3}],
    ids=["plain", "cool", "top-k", "top-p", "min-p"],
)
def test_orders_come_as_often_as_sequential_draws_give_them(
    k: int, options: dict[str, float]
) -> None:
    logits = torch.tensor([0.3, 1.2, -0.5, 0.9, -1.5]).expand(SAMPLES, 5)
    keys = root_keys(torch.arange(SAMPLES), torch.full((SAMPLES,), 7))
    draws = draw_children(logits, k, keys, sampling(SAMPLES, **options))
    expected = sequences(draws.probs[0].double().numpy(), k)
    observed = dict.fromkeys(expected, 0)
    for order in map(tuple, draws.token_ids.tolist()):
        observed[order] += 1
    counts = np.array([observed[order] for order in expected])
    wanted = np.array(list(expected.values()))
    assert chisquare(counts, SAMPLES * wanted / wanted.sum()).pvalue > LEAST_P


def test_q_is_the_drafters_distribution_at_the_requests_parameters() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, -4.0]])
    p = torch.softmax(logits, 1)

    def q(**options: float) -> list[float]:
        return draft_distribution(logits, sampling(1, **options))[0].tolist()

    assert q() == pytest.approx(p[0].tolist())
    assert q(temperature=2.0) == pytest.approx(torch.softmax(logits / 2, 1)[0].tolist())
    best_two = [0.0, float(p[0, 1]), 0.0, float(p[0, 3]), 0.0]
    for options in ({"top_k": 2}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 3, "top_p": 0.9}):
        assert q(**options) == pytest.approx([x / sum(best_two) for x in best_two]), options
    assert q(top_k=9, top_p=1.0, min_p=0.0) == pytest.approx(p[0].tolist())


def test_only_rows_that_ask_for_it_are_truncated() -> None:
    logits = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    options = Sampling(
        torch.tensor([1.0, 0.7, 1.0]), torch.tensor([1 << 62, 5, 1 << 62]), torch.ones(3)
    )
    known = dataclasses.replace(options, truncated=torch.tensor([False, True, False]))
    q = draft_distribution(logits, known)
    assert torch.equal(q, draft_distribution(logits, options))
    assert (q > 0).sum(1).tolist() == [400, 5, 400]
    wide = known.of(torch.tensor([0, 1]), 2)
    assert wide.truncated is not None
    assert wide.truncated.tolist() == [False, False, True, True]
    rows = draft_distribution(logits[[0, 0, 1, 1]], wide)
    assert torch.equal(rows, q[[0, 0, 1, 1]])


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_draws_are_distinct_and_end_with_the_support(data: st.DataObject) -> None:
    rows, vocab = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    number = st.one_of(st.floats(-80, 80, width=32), st.just(float("-inf")))
    logits = torch.tensor(
        [data.draw(st.lists(number, min_size=vocab, max_size=vocab)) for _ in range(rows)]
    )
    logits[:, 0] = 0.0
    k = data.draw(st.integers(1, 6))
    draws = draw_children(logits, k, torch.arange(rows), sampling(rows))
    for ids, probs, logprobs in zip(
        draws.token_ids.tolist(), draws.probs.tolist(), draws.logprobs.tolist(), strict=True
    ):
        found = [token for token in ids if token >= 0]
        assert len(set(found)) == len(found)
        assert all(probs[token] > 0 for token in found)
        solid = sum(p > 1e-6 for p in probs)
        assert len(found) >= min(k, solid)
        assert ids == found + [-1] * (k - len(found)), "a missing child is behind all others"
        assert all((x == float("-inf")) == (t < 0) for x, t in zip(logprobs, ids, strict=True))


def test_a_row_that_is_not_finite_has_no_children() -> None:
    logits = torch.zeros(3, 300)
    logits[0, 7], logits[1, 200] = float("nan"), float("inf")
    draws = draw_children(logits, 2, torch.arange(3), Sampling())
    assert (draws.token_ids[:2] == -1).all()
    assert (draws.token_ids[2] >= 0).all()


def test_a_requests_draws_do_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 100, generator=generator)
    keys = root_keys(torch.arange(6), torch.arange(6) + 40)
    together = draw_children(logits, 4, keys, sampling(6))
    order = torch.tensor([3, 0, 5])
    some = draw_children(logits[order], 4, keys[order], sampling(3))
    assert torch.equal(some.token_ids, together.token_ids[order])
    assert torch.equal(some.keys, together.keys[order])
    fewer = draw_children(logits, 2, keys, sampling(6))
    assert torch.equal(fewer.token_ids, together.token_ids[:, :2]), "a prefix is a prefix"


def test_numbers_are_uniform_and_independent() -> None:
    keys = child_keys(root_keys(torch.arange(200), torch.arange(200) % 7), 50).flatten()
    assert len(set(keys.tolist())) == len(keys)
    streams = {stream: uniforms(keys, stream).numpy() for stream in Stream}
    for numbers in streams.values():
        assert kstest(numbers, "uniform").pvalue > LEAST_P
    pairs = [
        (streams[Stream.DRAW], streams[Stream.ACCEPT]),
        (streams[Stream.DRAW][:-1], streams[Stream.DRAW][1:]),
        (uniforms(torch.arange(10_000), Stream.DRAW).numpy(), streams[Stream.DRAW]),
    ]
    for one, other in pairs:
        counts, _, _ = np.histogram2d(one, other, bins=8, range=[[0, 1], [0, 1]])
        assert chisquare(counts.flatten()).pvalue > LEAST_P


def test_keys_are_the_same_on_every_machine() -> None:
    """Known values: what a seed gives must not change with a release unnoticed."""
    roots = root_keys(torch.tensor([0, 1, -5]), torch.tensor([0, 9, 1 << 40]))
    numbers = uniforms(child_keys(roots, 2), Stream.DRAW)
    assert ((numbers >= 0) & (numbers < 1)).all()
    # splitmix64 of 0 begins with 0xE220A8397B1DCDAF.
    from echo_vllm.trees.draws import _mix

    assert int(_mix(torch.tensor(0))) & (2**64 - 1) == 0xE220A8397B1DCDAF
