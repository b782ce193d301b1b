# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Attention by document is attention over all pairs of positions under speculators' own mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_vllm.training.packing import Packing, attention_by_document
from tests.training.targets import SHAPE, make_llama, train_settings

HEADS, KV_HEADS, SIZE = 6, 2, 8

lengths = st.lists(st.integers(1, 40) | st.integers(60, 140), min_size=1, max_size=5)


def dense_mask(lengths: list[int], positions: int, steps: int) -> torch.Tensor:
    """By the definition of the training-time test, for one pair of positions after the other."""
    document = [i for i, n in enumerate(lengths) for _ in range(n)]
    mask = torch.zeros(positions, steps * positions, dtype=torch.bool)
    for query in range(len(document)):
        for key in range(query + 1):
            mask[query, key] = document[query] == document[key]
        for step in range(1, steps):
            mask[query, step * positions + query] = True
    return mask


@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(0, 20), st.integers(1, 4), st.integers(0, 2**31))
def test_values_and_gradients_are_those_of_the_dense_mask(
    lengths: list[int], padding: int, steps: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    used = sum(lengths)
    positions = used + padding

    def tensor(heads: int, steps: int) -> torch.Tensor:
        shape = (1, heads, steps * positions, SIZE)
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    inputs = [tensor(HEADS, 1), tensor(KV_HEADS, steps), tensor(KV_HEADS, steps)]
    up = torch.randn(1, used, HEADS, SIZE, generator=draw, dtype=torch.float64)
    mask = dense_mask(lengths, positions, steps)

    def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
        scores = (query @ key.mT * 0.3).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1).nan_to_num() @ value).transpose(1, 2)

    def by_document(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        packing = Packing.of(lengths, "cpu")
        module = torch.nn.Module()
        found, _ = attention_by_document(
            module, query, key, value, None, scaling=0.3, packing=packing
        )
        return found

    results = []
    for attention in (dense, by_document):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attention(*leaves)
        assert out.shape == (1, positions, HEADS, SIZE)
        gradients = torch.autograd.grad((out[:, :used] * up).sum(), leaves)
        results.append([out[:, :used], *gradients])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.nan_to_num(), expected.nan_to_num(), atol=1e-9, rtol=1e-9)


def test_padding_gets_zeros_and_one_document_needs_no_packing() -> None:
    query = torch.randn(1, HEADS, 9, SIZE)
    key = torch.randn(1, KV_HEADS, 9, SIZE)
    module = torch.nn.Module()
    packing = Packing.of([4, 3], "cpu")
    out, weights = attention_by_document(module, query, key, key, None, packing=packing)
    assert weights is None
    assert torch.equal(out[:, 7:], torch.zeros(1, 2, HEADS, SIZE))
    assert [(rows.count, rows.length) for rows in packing.groups] == [(2, 16)]
    alone, _ = attention_by_document(module, query[:, :, :4], key[:, :, :4], key[:, :, :4], None)
    torch.testing.assert_close(out[:, :4], alone)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30))
def test_rows_are_little_longer_than_their_documents(lengths: list[int]) -> None:
    packing = Packing.of(lengths, "cpu")
    assert sum(rows.count for rows in packing.groups) == len(lengths)
    size = sum(rows.count * rows.length for rows in packing.groups)
    assert size <= 2 * sum(lengths) + 64 * len(lengths)


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_by_document"])
def test_a_batch_has_the_drafts_that_its_documents_have_with_speculators_own_mask(
    attention: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The whole model, three steps of the training-time test, against documents one by one."""
    pytest.importorskip("speculators", reason="speculators is not installed: make train-setup")
    from echo_vllm.training.trainer import make_model

    settings = train_settings(
        make_llama(tmp_path_factory.mktemp("packing") / "target"), draft_vocab=SHAPE.vocab
    )
    model = make_model(settings, None).eval()
    lengths = [21, 4, 70]
    positions = sum(lengths) + 5
    states = torch.randn(1, positions, 3 * model.hidden_size)
    ids = torch.randint(5, SHAPE.vocab, (1, positions))
    documents = torch.full((1, positions), -1)
    documents[0, : sum(lengths)] = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    where = torch.cat([torch.arange(n) for n in (*lengths, 5)])[None]
    packing = None
    if attention == "sdpa":
        model.config.transformer_layer_config._attn_implementation = attention
        model.uses_full_attn = True
    else:
        packing = Packing.of(lengths, "cpu")
    with torch.inference_mode():
        drafted = model(
            hidden_states=states,
            input_ids=ids,
            document_ids=documents,
            position_ids=where,
            packing=packing,
        )
    begin = 0
    alone = make_model(settings, None).eval()
    for length in lengths:
        part = slice(begin, begin + length)
        with torch.inference_mode():
            own = alone(
                hidden_states=states[:, part],
                input_ids=ids[:, part],
                document_ids=torch.zeros(1, length, dtype=torch.long),
                position_ids=where[:, part],
            )
        for step, (together, single) in enumerate(zip(drafted, own, strict=True)):
            # The last tokens of a document are followed by those of the next, in speculators too.
            kept = max(0, length - step)
            assert torch.equal(together[:, part][:, :kept], single[:, :kept])
        begin += length
