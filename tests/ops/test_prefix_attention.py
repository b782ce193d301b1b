# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Prefix, suffix and merge against the reference, on the CPU.

FlashAttention itself needs a GPU (tests/gpu); a stand-in in plain torch takes its arguments here.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from echo_vllm import ops
from echo_vllm.ops import prefix_attention, reference
from tests.cuda import kernel_checks as checks
from tests.ops.cases import Shape, build

SHAPE = Shape("nhd", torch.float32, 16, 2, 3, 64, (5, 0, 9, 1), (130, 7, 0, 77), (5, 3, 9, 0))


def variant(**changes: Any) -> Shape:
    return replace(SHAPE, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernels", [ops, reference], ids=["extension", "reference"])
def test_suffix_and_merge_match_the_reference(kernels: Any, dtype: torch.dtype) -> None:
    for softcap in (0.0, 5.0):
        checks.check_suffix_attention(kernels, "cpu", variant(dtype=dtype, softcap=softcap))
    for seed in range(5):
        checks.check_merge_attention(kernels, "cpu", dtype, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 30}, {"fp8_cache": True}], ids=str)
def test_the_parts_together_are_tree_attention(dtype: torch.dtype, changes: Any) -> None:
    """With a prefix that honours windows and 8-bit caches, the whole does."""
    checks.check_merged_attention(ops, "cpu", variant(dtype=dtype, **changes))


def flash_in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    block_table: Tensor,
    softmax_scale: float,
    softcap: float,
    causal: bool,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_softmax_lse: bool = False,
    return_attn_probs: bool = False,
) -> tuple[Tensor, ...]:
    """What `flash_attn_varlen_func` documents; a row without keys has an LSE of +inf, as in 2."""
    assert not causal
    bounds = cu_seqlens_q.tolist()
    if seqused_k is None:
        assert cu_seqlens_k is not None
        seqused_k = cu_seqlens_k.diff()
        assert return_attn_probs
    else:
        assert return_softmax_lse
    assert len(bounds) == len(block_table) + 1 == len(seqused_k) + 1
    out = torch.full_like(q, 1e4)
    lse = torch.full((q.shape[1], q.shape[0]), 1e4)
    for request, length in enumerate(seqused_k.tolist()):
        rows = slice(bounds[request], bounds[request + 1])
        assert 0 <= bounds[request + 1] - bounds[request] <= max_seqlen_q
        assert length <= max_seqlen_k
        blocks = block_table[request, : -(-length // k.shape[1])]
        key, value = reference.gather_context(k, v, blocks, length, "nhd")
        group = q.shape[1] // k.shape[2]
        scores = torch.einsum(
            "rhd,khd->hrk", q[rows].float(), key.float().repeat_interleave(group, 1)
        )
        scores = scores * softmax_scale
        if softcap > 0:
            scores = torch.tanh(scores / softcap) * softcap
        result = torch.einsum(
            "hrk,khd->rhd", scores.softmax(-1), value.float().repeat_interleave(group, 1)
        )
        out[rows] = result.to(q.dtype)
        lse[:, rows] = scores.logsumexp(-1) if length else float("inf")
    extra = (None,) if return_attn_probs else ()
    return (out, lse, *extra)


@pytest.mark.parametrize("package", prefix_attention.PACKAGES)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_flash_attention_is_called_as_it_wants(
    monkeypatch: pytest.MonkeyPatch, package: str, softcap: float
) -> None:
    monkeypatch.setattr(prefix_attention, "load_flash_attention", lambda: (package, flash_in_torch))
    for rows in ((5, 0, 9, 1), (1, 40, 0, 3)):
        case = build(variant(softcap=softcap, rows=rows, suffix_lens=rows))
        checks.check_attention(
            case, "cpu", prefix_attention.tree_attention, reference.tree_attention
        )


def test_bounds_are_those_of_the_rows() -> None:
    starts = torch.tensor([2, 7, 7, 99], dtype=torch.int32)  # one more than there are requests
    rows = torch.tensor([4, 9, 9, 12], dtype=torch.int32)
    bounds = prefix_attention.packed_bounds(starts, rows)
    assert bounds.tolist() == [2, 7, 7, 10]
    assert bounds.dtype == torch.int32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 5}, "FlashAttention has no window for trees, got 5"),
        ({"fp8_cache": True}, "reads a cache of torch.float32 only, got torch.float8_e4m3fn"),
        ({"layout": "vec"}, "FlashAttention has the layout nhd, got 'vec'"),
    ],
)
def test_what_flash_attention_cannot_do_is_refused(changes: Any, message: str) -> None:
    case = build(variant(**changes))
    with pytest.raises(RuntimeError, match=message):
        case.run(prefix_attention.tree_attention)


def test_vllms_flash_attention_comes_first_and_none_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = prefix_attention.load_flash_attention.__wrapped__
    ours, other = (SimpleNamespace(flash_attn_varlen_func=partial(print, i)) for i in range(2))
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", ours)
    monkeypatch.setitem(sys.modules, "flash_attn", other)
    assert load() == ("vllm.vllm_flash_attn", ours.flash_attn_varlen_func)
    ours.is_fa_version_supported = lambda version: version == 3
    package, newest = load()
    assert isinstance(newest, partial)
    assert (package, newest.keywords) == ("vllm.vllm_flash_attn", {"fa_version": 3})
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", None)
    assert load() == ("flash_attn", other.flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(RuntimeError, match=r"FlashAttention is not installed: vllm.vllm_flash_at"):
        load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suffix_lse": torch.zeros(2, 9)}, r"suffix_lse.shape\[1\] must be 8"),
        ({"prefix_out": torch.zeros(8, 2, 32).bfloat16()}, "prefix_out must be Float, got BFloat1"),
        ({"row_start": torch.tensor([0, 9], dtype=torch.int32)}, "owns rows 0 .. 9, but out has 8"),
        ({"query_start": torch.tensor([], dtype=torch.int32)}, "need as many entries of query_sta"),
    ],
)
def test_bad_parts_are_refused(changes: dict[str, Tensor], message: str) -> None:
    part = {"prefix_out": torch.zeros(8, 2, 32), "prefix_lse": torch.zeros(2, 8)}
    part |= {"suffix_out": torch.zeros(8, 2, 32), "suffix_lse": torch.zeros(2, 8)}
    rows = torch.tensor([0, 8], dtype=torch.int32)
    arguments = {**part, "query_start": rows[:1], "row_start": rows, "out": torch.zeros(8, 2, 32)}
    with pytest.raises(RuntimeError, match=f"merge_attention: .*{message}"):
        ops.merge_attention(**{**arguments, **changes})
