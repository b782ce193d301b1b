# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The path over xFormers, with its partial attention in plain torch, against the reference."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from echo_vllm.ops import reference, xformers_attention
from echo_vllm.ops.reference import merge_partials
from echo_vllm.ops.xformers_attention import BIAS_ALIGNMENT
from tests.ops.cases import Shape, build
from tests.ops.test_tree_attention import TOLERANCE, relative_error


def partial_in_torch(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """What xFormers documents: [B, M, G, H, K] to an output alike and an LSE [B, G, H, M].

    The LSE is padded, and rows that see nothing are NaN, both of which kernels do.
    """
    scores = torch.einsum("bmghk,bnghk->bghmn", query.float(), key.float()) * scale
    if attn_bias is not None:
        assert attn_bias.dtype == query.dtype
        assert attn_bias.shape == scores.shape
        assert attn_bias.stride(-2) % BIAS_ALIGNMENT == 0
        scores = scores + attn_bias
    output = torch.einsum("bghmn,bnghk->bmghk", scores.softmax(-1), value.float())
    lse = torch.nn.functional.pad(scores.logsumexp(-1), (0, 5), value=float("nan"))
    return output, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [-1, 20])
@pytest.mark.parametrize("seed", range(4))
def test_matches_reference(dtype: torch.dtype, window: int, seed: int) -> None:
    shape = Shape(
        layout="nhd",
        dtype=dtype,
        block_size=16,
        num_kv_heads=2,
        group=3,
        head_size=32,
        rows=(5, 0, 9, 1, 2),
        contexts=(130, 7, 0, 77, 0),
        suffix_lens=(5, 2, 70, 0, 0),
        sliding_window=window,
        seed=seed,
    )
    case = build(shape)
    expected = case.run(reference.tree_attention)
    actual = case.with_arguments(partial=partial_in_torch).run(xformers_attention.tree_attention)
    owned = case.owned_rows
    assert not actual[owned].isnan().any()
    assert actual[~owned].isnan().all()
    assert relative_error(actual[owned], expected[owned]) < TOLERANCE[dtype]


def test_merged_parts_are_the_whole() -> None:
    torch.manual_seed(0)
    scores, value = torch.randn(6, 30) * 20, torch.randn(30, 8)
    scores[2, :10] = float("-inf")
    parts = [
        (scores[:, cut].softmax(-1) @ value[cut], scores[:, cut].logsumexp(-1))
        for cut in (slice(0, 10), slice(10, 11), slice(11, 30))
    ]
    output, lse = merge_partials(parts)
    assert torch.allclose(output, scores.softmax(-1) @ value, atol=1e-5)
    assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-5)


def test_parts_that_saw_nothing_do_not_count() -> None:
    nothing = (torch.full((2, 4), float("nan")), torch.full((2,), float("-inf")))
    something = (torch.ones(2, 4).bfloat16(), torch.tensor([1.0, float("-inf")]))
    output, lse = merge_partials([nothing, something, nothing])
    assert output.dtype == torch.float32
    assert output.tolist() == [[1.0] * 4, [0.0] * 4]
    assert lse.tolist() == [1.0, float("-inf")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"softcap": 5.0}, "xformers has no softcap, got 5.0"),
        ({"layout": "vec"}, "xformers has the layout nhd, got 'vec'"),
    ],
)
def test_what_xformers_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    case = build(Shape("nhd", torch.float16, 16, 1, 1, 16, (1,), (1,), (1,)))
    with pytest.raises(RuntimeError, match=message):
        case.with_arguments(**changes).run(xformers_attention.tree_attention)


def test_missing_xformers_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    load = xformers_attention.load_partial_attention.__wrapped__
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(RuntimeError, match="xformers is not installed"):
        load()

    class Stub:
        """A release whose kernels live in a package that is not there."""

    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", Stub)
    with pytest.raises(RuntimeError, match="no usable memory_efficient_attention_partial"):
        load()
