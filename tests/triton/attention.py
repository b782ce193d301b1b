# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Triton's tree and suffix attention against the reference; run by test_triton.py.

Runs in Triton's interpreter, and without it on a GPU. Error norm and tolerances are those of
tests/ops/test_tree_attention.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from echo_vllm.ops import reference, triton_kernels
from echo_vllm.ops.triton_kernels import attention
from tests.ops.cases import Shape, TreeAttentionCase, build
from tests.ops.test_tree_attention import TOLERANCE, relative_error

DEVICE = "cpu" if attention.INTERPRETED else "cuda"

BASE = Shape("nhd", torch.float32, 16, 2, 3, 64, (5, 1, 9), (70, 0, 33), (5, 1, 9))

SUFFIX_ARGUMENTS = (
    "query",
    "query_start",
    "row_start",
    "suffix_key",
    "suffix_value",
    "suffix_start",
    "suffix_len",
    "mask",
    "scale",
    "softcap",
)


def variant(**changes: Any) -> Shape:
    return replace(BASE, **changes)


def on_device(case: TreeAttentionCase) -> TreeAttentionCase:
    return case.with_arguments(
        **{
            name: value.to(DEVICE) if isinstance(value, Tensor) else value
            for name, value in case.arguments.items()
        }
    )


def run_triton(case: TreeAttentionCase) -> Tensor:
    return on_device(case).run(triton_kernels.tree_attention).cpu()


def assert_matches_reference(case: TreeAttentionCase) -> None:
    expected, expected_lse = case.run_with_lse(reference.tree_attention)
    actual, lse = (x.cpu() for x in on_device(case).run_with_lse(triton_kernels.tree_attention))
    torch.testing.assert_close(
        lse[:, case.owned_rows], expected_lse[:, case.owned_rows], atol=2e-3, rtol=1e-4
    )
    assert not actual[case.owned_rows].isnan().any(), "an element was not written"
    assert actual[~case.owned_rows].isnan().all(), "wrote a row of another request"
    error = relative_error(actual[case.owned_rows], expected[case.owned_rows])
    assert error < TOLERANCE[case.dtype], f"error {error:.2e}"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "head_size": 80},
        {"head_size": 16, "num_kv_heads": 3, "group": 1},
        {"head_size": 256, "group": 7, "num_kv_heads": 1},
        {"block_size": 1},
        {"block_size": 7, "softcap": 5.0},
        {"sliding_window": 1},
        {"sliding_window": 20, "dtype": torch.bfloat16},
        {"sliding_window": 10_000},
        {"rows": (), "contexts": (), "suffix_lens": ()},
        {"rows": (0, 40), "contexts": (5, 0), "suffix_lens": (3, 0)},
        {"rows": (3, 0, 20), "contexts": (20, 0, 0), "suffix_lens": (65, 3, 130)},
    ],
    ids=str,
)
def test_matches_reference(changes: dict[str, Any]) -> None:
    assert_matches_reference(build(variant(**changes)))


@pytest.mark.parametrize(("splits", "window"), [(1, -1), (2, 30), (8, -1)])
def test_splits_do_not_matter(splits: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "num_splits", lambda programs, max_context: splits)
    shape = variant(num_kv_heads=1, contexts=(150, 0, 3), head_size=32, sliding_window=window)
    case = build(shape)
    assert_matches_reference(case)
    # Without an LSE to write the result is the same.
    with_lse = on_device(case).run_with_lse(triton_kernels.tree_attention)[0].cpu()
    assert torch.equal(run_triton(case)[case.owned_rows], with_lse[case.owned_rows])


def test_splits_follow_from_shapes() -> None:
    assert attention.num_splits(programs=1000, max_context=1 << 17) == 1
    assert attention.num_splits(programs=8, max_context=200) == 1
    assert attention.num_splits(programs=8, max_context=2048) == 8
    assert attention.num_splits(programs=1, max_context=1 << 17) == attention.MAX_SPLITS
    assert attention.num_splits(programs=90, max_context=1 << 17) == 2


def test_memory_may_be_in_hnd_order() -> None:
    """vLLM's cache: K and V side by side, blocks of heads of tokens; nhd by strides."""
    case = build(variant(block_size=16))
    key, value = case.arguments["key_cache"], case.arguments["value_cache"]
    pages = torch.cat([key, value], -1).transpose(1, 2).contiguous()
    assert pages.shape == (key.shape[0], 2, 16, 2 * 64)
    key_cache, value_cache = pages.transpose(1, 2).chunk(2, -1)
    assert_matches_reference(case.with_arguments(key_cache=key_cache, value_cache=value_cache))


def test_rows_that_see_nothing_are_zero() -> None:
    case = build(variant(contexts=(0, 0, 0)))
    case = case.with_arguments(mask=torch.zeros_like(case.arguments["mask"]))
    out = run_triton(case)
    assert (out[case.owned_rows] == 0).all()


def test_suffix_attention_gives_output_and_lse() -> None:
    case = build(variant(rows=(5, 0, 9), suffix_lens=(5, 1, 70), softcap=3.0, group=2))
    arguments = {name: on_device(case).arguments[name] for name in SUFFIX_ARGUMENTS}
    query: Tensor = case.arguments["query"]
    lse = torch.full((query.shape[1], query.shape[0]), float("nan"), device=DEVICE)

    def without_context(op: Any) -> Tensor:
        lens = torch.zeros_like(case.arguments["context_lens"])
        return case.with_arguments(context_lens=lens).run(op)

    out = torch.full(query.shape, float("nan"), device=DEVICE)
    triton_kernels.suffix_attention(**arguments, out=out, lse=lse)
    out, lse = out.cpu(), lse.cpu()
    owned = case.owned_rows
    assert relative_error(out[owned], without_context(reference.tree_attention)[owned]) < 1e-5
    assert out[~owned].isnan().all()
    assert lse[:, ~owned].isnan().all()

    # The LSE, row by row.
    for request, (rows, length) in enumerate(((5, 5), (0, 1), (9, 70))):
        first = int(case.arguments["query_start"][request])
        begin = int(case.arguments["row_start"][request])
        key = case.arguments["suffix_key"][int(case.arguments["suffix_start"][request]) :][:length]
        bits = reference.mask_bits(case.arguments["mask"][begin : begin + rows], length)
        scores = torch.einsum(
            "rhd,jhd->hrj",
            query[first : first + rows].double(),
            key.double().repeat_interleave(2, 1),
        )
        scores = 3.0 * torch.tanh(scores * case.arguments["scale"] / 3.0)
        expected = scores.masked_fill(~bits, float("-inf")).logsumexp(-1)
        assert torch.allclose(lse[:, first : first + rows].double(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "vec"}, "the Triton kernel has the layout nhd, got 'vec'"),
        ({"query": torch.zeros(30, 6, 64).double()}, "query must be float32, bfloat16 or float16"),
        ({"suffix_key": torch.zeros(30, 2, 64).bfloat16()}, "must be torch.float32 with a contig"),
        ({"mask": torch.zeros(99, 1, dtype=torch.int32)}, "mask must be contiguous int64"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    case = build(BASE).with_arguments(**changes)
    with pytest.raises(RuntimeError, match=message):
        case.run(triton_kernels.tree_attention)
