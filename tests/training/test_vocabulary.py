# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A head that goes on with a larger draft vocabulary keeps what it knew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from echo_vllm.training.head_files import (
    draft_vocabulary,
    larger_output_layer,
    larger_vocabulary,
)
from echo_vllm.training.work import TrainingError
from tests.training.targets import SHAPE, make_llama, train_settings

VOCAB = 20


@given(
    st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=VOCAB - 1),
    st.dictionaries(st.integers(0, VOCAB - 1), st.integers(1, 9)),
    st.data(),
)
def test_a_larger_vocabulary_adds_the_most_frequent_tokens(
    known: set[int], counts: dict[int, int], data: st.DataObject
) -> None:
    size = data.draw(st.integers(len(known), VOCAB))
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[list(known)] = True
    d2t, larger = larger_vocabulary(t2d, counts, size)
    tokens = (torch.arange(size) + d2t).tolist()
    assert tokens == sorted(set(tokens))
    assert larger.nonzero()[:, 0].tolist() == tokens
    assert known <= set(tokens)
    added = set(tokens) - known
    left = set(range(VOCAB)) - set(tokens)
    for token in added:
        assert all(counts.get(token, 0) >= counts.get(other, 0) for other in left)


def test_what_a_head_can_draft_is_read_from_whatever_vllm_loads(tmp_path: Path) -> None:
    """Published heads have other architectures, several files, or none of safetensors."""
    assert draft_vocabulary(tmp_path / "missing") is None
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    assert draft_vocabulary(tmp_path) is None
    save_file({"norm.weight": torch.ones(4)}, tmp_path / "model-1.safetensors")
    everything = draft_vocabulary(tmp_path)
    assert everything is not None
    assert 7 in everything
    save_file({"d2t": torch.tensor([1, 1, 4])}, tmp_path / "model-2.safetensors")
    assert draft_vocabulary(tmp_path) == {1, 2, 6}
    (tmp_path / "model-1.safetensors").write_bytes(b"cut off")
    assert draft_vocabulary(tmp_path) is None


def test_added_rows_follow_the_map_that_the_known_ones_show() -> None:
    target_rows = torch.randn(12, 4)
    mapping = torch.randn(4, 4)
    known = torch.arange(12) % 3 != 0
    rows = target_rows[known] @ mapping
    found = larger_output_layer(rows, target_rows, known)
    assert torch.equal(found[known], rows)
    torch.testing.assert_close(found, target_rows @ mapping, atol=1e-4, rtol=1e-4)


def test_a_grown_head_has_the_logits_it_had(tmp_path: Path) -> None:
    pytest.importorskip("speculators", reason="speculators is not installed: make train-setup")
    from echo_vllm.training.head_files import export_head
    from echo_vllm.training.trainer import make_model

    settings = train_settings(make_llama(tmp_path / "target"), draft_vocab=24)
    first = make_model(settings, dict.fromkeys(range(1, SHAPE.vocab, 2), 1))
    old = tmp_path / "old"
    export_head(first, old, dtype=torch.float32, bos_and_eos={})

    def logits(model: Any) -> torch.Tensor:
        """Of a random last hidden state, by the target's token ids."""
        states = torch.randn(5, model.hidden_size, generator=torch.Generator().manual_seed(1))
        found = torch.full((5, SHAPE.vocab), torch.nan)
        tokens = torch.arange(SHAPE.vocab)
        if model.d2t is not None:
            tokens = torch.arange(len(model.d2t)) + model.d2t
        found[:, tokens] = model.eval().lm_head(model.norm(states)).detach()
        return found

    before = logits(first)
    known = ~before[0].isnan()
    assert known.sum() == 24
    going_on = replace(settings, init=str(old))
    for size, more in ((24, 24), (40, 40), (SHAPE.vocab, SHAPE.vocab), (9999, SHAPE.vocab)):
        grown = make_model(replace(going_on, draft_vocab=size), {2: 5, 4: 1})
        after = logits(grown)
        assert (~after[0].isnan()).sum() == more
        torch.testing.assert_close(after[:, known], before[:, known])
    assert not logits(make_model(replace(going_on, draft_vocab=25), {4: 1}))[0, 4].isnan()
    with pytest.raises(TrainingError, match=r"--draft-vocab 23 is smaller .* give 24 to keep it"):
        make_model(replace(going_on, draft_vocab=23), {})
    with pytest.raises(TrainingError, match="--intermediate-size 7 is not that of --init"):
        make_model(replace(going_on, intermediate_size=7), {})


def test_answer_tokens_are_counted_as_speculators_counts_them(tmp_path: Path) -> None:
    pytest.importorskip("speculators", reason="speculators is not installed: make train-setup")
    from datasets import Dataset
    from speculators.train.vocab_mapping import save_token_frequency_distribution

    from echo_vllm.training.rows import Row
    from echo_vllm.training.trainer import count_answer_tokens

    draw = torch.Generator().manual_seed(0)
    rows = []
    for number, length in enumerate((9, 4, 12)):
        ids = torch.randint(0, 7, (length,), generator=draw).tolist()
        mask = torch.randint(0, 2, (length,), generator=draw).tolist()
        rows.append(Row(number, 0, 0.0, ids, mask))
    cut = [{"input_ids": row.input_ids[:10], "loss_mask": row.loss_mask[:10]} for row in rows]
    theirs = tmp_path / "theirs.pt"
    save_token_frequency_distribution(Dataset.from_list(cut).with_format("torch"), theirs)
    assert count_answer_tokens(rows, 10) == torch.load(theirs, weights_only=True)
