# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The tree attention kernel of every instruction set against the plain-torch reference.

Error norm: the largest absolute error over the largest absolute reference value of the case, or
over 1 if that is smaller. float32 < 1e-5, bfloat16 and float16 < 2e-2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from echo_vllm import ops
from echo_vllm.ops import reference
from tests.ops.cases import Shape, TreeAttentionCase, build, write_cache_by_vllm

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    error = (actual.double() - expected.double()).abs().max()
    return float(error / expected.double().abs().max().clamp(min=1.0))


def each_isa() -> Iterator[str]:
    """Forces each instruction set that this machine has, one after the other."""
    for isa in ops.supported_cpu_isas():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ECHO_VLLM_CPU_ISA", isa)
            yield isa


def assert_matches_reference(case: TreeAttentionCase, tolerance: float | None = None) -> None:
    tolerance = tolerance or TOLERANCE[case.dtype]
    expected, expected_lse = case.run_with_lse(reference.tree_attention)
    for isa in each_isa():
        actual, lse = case.run_with_lse(ops.tree_attention)
        owned_lse = (lse[:, case.owned_rows], expected_lse[:, case.owned_rows])
        # The reference rounds no score; a bfloat16 kernel may round its products.
        torch.testing.assert_close(*owned_lse, atol=max(1e-5, tolerance / 2), rtol=1e-4)
        assert not actual[case.owned_rows].isnan().any(), f"{isa}: an element was not written"
        assert actual[~case.owned_rows].isnan().all(), f"{isa}: wrote a row of another request"
        error = relative_error(actual[case.owned_rows], expected[case.owned_rows])
        assert error < tolerance, f"{isa}: error {error:.2e}"


@st.composite
def shapes(draw: Any) -> Shape:
    layout = draw(st.sampled_from(["vec", "vec16", "amx", "nhd"]))
    dtype = torch.bfloat16
    if layout != "amx":
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    block_sizes = {"vec": [32, 64, 96, 128], "vec16": [16, 32, 48], "amx": [32, 64, 96, 128]}
    head_sizes = {"amx": [32, 64, 96, 128, 192, 256]}
    num_requests = draw(st.integers(0, 4))

    def per_request(numbers: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(st.lists(numbers, min_size=num_requests, max_size=num_requests)))

    few_or_many = st.one_of(st.integers(0, 4), st.integers(5, 80))
    return Shape(
        layout=layout,
        dtype=dtype,
        block_size=draw(st.sampled_from(block_sizes.get(layout, [1, 7, 16, 64]))),
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 4, 7])),
        head_size=draw(
            st.sampled_from(head_sizes.get(layout, [16, 32, 64, 80, 96, 112, 128, 192, 256]))
        ),
        rows=per_request(few_or_many),
        contexts=per_request(st.one_of(st.integers(0, 70), st.integers(71, 900))),
        suffix_lens=per_request(st.one_of(st.integers(0, 70), st.integers(71, 300))),
        softcap=draw(st.sampled_from([0.0, 0.0, 5.0])),
        sliding_window=draw(st.sampled_from([-1, -1, 1, 20, 130, 10_000])),
        seed=draw(st.integers(0, 2**32)),
        fp8_cache=layout != "amx" and draw(st.booleans()),
    )


@given(shape=shapes())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_matches_reference(shape: Shape) -> None:
    assert_matches_reference(build(shape))


@given(shape=shapes(), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_sinks_enter_once(shape: Shape, seed: int) -> None:
    """However the keys were divided; as many rows, groups and windows as without sinks."""
    case = build(shape)
    heads = case.arguments["query"].shape[1]
    sinks = torch.randn(heads, generator=torch.Generator().manual_seed(seed)) * 3
    case = case.with_arguments(sinks=sinks.to(case.dtype))
    expected = case.run(reference.tree_attention)
    for isa in each_isa():
        actual = case.run(ops.tree_attention)
        assert not actual[case.owned_rows].isnan().any(), f"{isa}: an element was not written"
        assert actual[~case.owned_rows].isnan().all(), f"{isa}: wrote a row of another request"
        error = relative_error(actual[case.owned_rows], expected[case.owned_rows])
        assert error < TOLERANCE[case.dtype], f"{isa}: error {error:.2e}"


def test_a_sink_as_large_as_all_keys_takes_half() -> None:
    case = build(replace(BASE, contexts=(0, 0, 0), suffix_lens=(5, 1, 9)))
    out, lse = case.run_with_lse(ops.tree_attention)
    row = int((case.owned_rows & lse.isfinite().all(0)).nonzero()[0])
    halved = case.with_arguments(sinks=lse[:, row].contiguous()).run(ops.tree_attention)
    torch.testing.assert_close(halved[row], out[row] / 2)
    with pytest.raises(ValueError, match="lse is of keys alone"):
        case.with_arguments(sinks=torch.zeros(6)).run_with_lse(ops.tree_attention)


BASE = Shape("vec", torch.float32, 64, 2, 3, 64, (5, 1, 9), (130, 0, 77), (5, 1, 9))


def variant(**changes: Any) -> Shape:
    return replace(BASE, **changes)


@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 112, 128, 192, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_head_size(head_size: int, dtype: torch.dtype) -> None:
    layout = "vec" if head_size % 32 == 0 else "vec16"
    assert_matches_reference(build(variant(layout=layout, head_size=head_size, dtype=dtype)))


@pytest.mark.parametrize("suffix", [64, 65, 128, 1023, 1024])
def test_long_suffixes(suffix: int) -> None:
    assert_matches_reference(
        build(variant(rows=(20, 0, 3), contexts=(70, 0, 0), suffix_lens=(suffix, 3, suffix)))
    )


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("vec", torch.float32),
        ("vec", torch.bfloat16),
        ("amx", torch.bfloat16),
        ("nhd", torch.float32),
    ],
)
def test_long_context_is_split_over_threads(layout: str, dtype: torch.dtype) -> None:
    shape = variant(
        layout=layout, dtype=dtype, num_kv_heads=1, rows=(17,), contexts=(3001,), suffix_lens=(17,)
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)  # more than tasks without a split
        assert_matches_reference(build(shape))
        assert_matches_reference(build(variant(**{**shape.__dict__, "sliding_window": 900})))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_does_not_matter(threads: int) -> None:
    shape = variant(rows=(33, 2, 65), contexts=(800, 1500, 20), suffix_lens=(33, 2, 65))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_matches_reference(build(shape))
    finally:
        torch.set_num_threads(before)


def test_large_scores_do_not_overflow() -> None:
    case = build(BASE)
    # Scores of some thousands: float32 itself rounds them by 1e-4.
    assert_matches_reference(case.with_arguments(scale=100.0), tolerance=1e-3)


def test_rows_that_see_nothing_are_zero() -> None:
    case = build(variant(contexts=(0, 0, 0)))
    case = case.with_arguments(mask=torch.zeros_like(case.arguments["mask"]))
    for isa in each_isa():
        out = case.run(ops.tree_attention)
        assert (out[case.owned_rows] == 0).all(), isa


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("vec", torch.float32),
        ("vec", torch.bfloat16),
        ("vec16", torch.float32),
        ("amx", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("context", [0, 1, 100, 700])
@pytest.mark.parametrize("window", [-1, 50])  # wider than the suffix, which it does not reach
def test_a_chain_is_stock_causal_attention(
    vllm_cpu_kernels: None, layout: str, dtype: torch.dtype, context: int, window: int
) -> None:
    if layout == "amx" and not torch.cpu._init_amx():
        pytest.skip("vLLM uses the amx layout on machines with AMX only")
    num_heads, num_kv_heads, head_size, block_size, rows = 6, 2, 64, 32, 40
    torch.manual_seed(context)
    total = context + rows
    num_blocks = -(-total // block_size) + 3
    blocks = torch.randperm(num_blocks)[: -(-total // block_size)]
    token = torch.arange(total)
    slots = blocks[token // block_size] * block_size + token % block_size
    kv_cache = torch.full((num_blocks, num_kv_heads, block_size, 2 * head_size), 1e4, dtype=dtype)
    key = torch.randn(total, num_kv_heads, head_size).to(dtype)
    value = torch.randn(total, num_kv_heads, head_size).to(dtype)
    query = torch.randn(rows, num_heads, head_size).to(dtype)
    write_cache_by_vllm(kv_cache, slots, key, value, layout)
    key_cache, value_cache = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, 2)
    block_table = blocks[None].to(torch.int32)

    query_start_loc = torch.tensor([0, rows], dtype=torch.int32)
    seq_lens = torch.tensor([total], dtype=torch.int32)
    metadata = torch.ops._C.get_scheduler_metadata(
        1, num_heads, num_kv_heads, head_size, seq_lens, dtype, query_start_loc, True, window,
        layout, False, None, "auto",
    )  # fmt: skip
    stock = torch.full_like(query, float("nan"))
    torch.ops._C.cpu_attention_with_kv_cache(
        query, key_cache, value_cache, stock, query_start_loc, seq_lens, head_size**-0.5, True,
        None, window, block_table, 0.0, metadata, None, None, 1.0, 1.0, "auto",
    )  # fmt: skip

    for isa in each_isa():
        ours = torch.full_like(query, float("nan"))
        ops.tree_attention(
            query,
            key_cache,
            value_cache,
            block_table,
            context_lens=torch.tensor([context], dtype=torch.int32),
            query_start=torch.tensor([0], dtype=torch.int32),
            row_start=query_start_loc,
            suffix_key=key[context:],
            suffix_value=value[context:],
            suffix_start=torch.tensor([0], dtype=torch.int32),
            suffix_len=torch.tensor([rows], dtype=torch.int32),
            mask=torch.tensor([[(2 << row) - 1] for row in range(rows)]),
            positions=torch.arange(context, total),
            scale=head_size**-0.5,
            softcap=0.0,
            sliding_window=window,
            layout=layout,
            out=ours,
        )
        assert relative_error(ours, stock) < TOLERANCE[dtype], isa
