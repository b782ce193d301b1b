# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The CUDA kernels' own sources, run by the emulator, against the references.

This shows that the index arithmetic, the barriers and the fragments of the tensor-core path are
right, on a machine without a GPU. tests/gpu runs the same checks on one.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from echo_vllm.ops import reference
from tests.cuda import kernel_checks as checks
from tests.cuda.emulator.build import build_emulated_kernels
from tests.ops.cases import Shape, build
from tests.ops.drawn_cases import KINDS, assert_same_path, cases

pytestmark = pytest.mark.full  # compiling takes a minute


@pytest.fixture(scope="module")
def kernels() -> Any:
    torch.ops.load_library(str(build_emulated_kernels()))  # type: ignore[no-untyped-call]
    return torch.ops.echo_vllm_emulated


@pytest.mark.parametrize("seed", range(4))
def test_masks_and_paths(kernels: Any, seed: int) -> None:
    forest = checks.random_forest(seed, requests=seed * 2, max_nodes=150)
    checks.check_super_tree(kernels, "cpu", forest)
    checks.check_accept_path(kernels, "cpu", forest, seed)


def test_a_graph_may_pad_the_nodes(kernels: Any) -> None:
    parents, _, cu_nodes = checks.random_forest(5, requests=3, max_nodes=20)
    padded = torch.cat([parents, torch.full((9,), 12345, dtype=torch.int32)])
    mask, depths = kernels.build_super_tree(padded, cu_nodes, 2)
    wanted_mask, wanted_depths = reference.build_super_tree(parents, cu_nodes, 2)
    rows = len(wanted_depths)
    assert torch.equal(mask[:rows], wanted_mask)
    assert torch.equal(depths[:rows], wanted_depths)
    assert not mask[rows:].any()
    assert not depths[rows:].any()


@pytest.mark.parametrize("seed", range(30))
def test_select_budget(kernels: Any, seed: int) -> None:
    draw = random.Random(seed)
    requests, columns = draw.randint(0, 6), draw.choice([0, 1, 2, 7, 16, 33])
    pool = checks.random_pool(seed, requests, columns, steps=draw.choice([1, 3, 10**6]))
    for budget in {0, 1, draw.randint(0, 60), 10_000}:
        for cap in (0, draw.randint(1, 12), 10_000):
            checks.check_select_budget(kernels, "cpu", pool, budget, cap)
    for limit in (-1, 0, draw.randint(1, 60), 10_000):
        checks.check_select_budget(kernels, "cpu", pool, draw.randint(0, 60), 9, limit)


def test_select_budget_over_many_requests(kernels: Any) -> None:
    """More requests than threads: each thread keeps to several."""
    pool = checks.random_pool(1, requests=1100, columns=3, steps=4)
    checks.check_select_budget(kernels, "cpu", pool, 700, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_sample_path(kernels: Any, kind: str) -> None:
    for case in cases(kind, 3):
        assert_same_path(kernels.sample_path, case)


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("moves", [0, 1, 40, 140])
def test_commit_kv(kernels: Any, layout: str, dtype: torch.dtype, moves: int) -> None:
    """An FP8 cache is bytes to vLLM; its scales are a layer's, so that a token moves without."""
    checks.check_commit_kv(kernels, "cpu", layout, dtype, moves, seed=moves)


MMA = Shape("nhd", torch.bfloat16, 16, 2, 4, 128, (5, 0, 9, 1), (130, 7, 0, 77), (5, 3, 9, 1))


def variant(shape: Shape = MMA, **changes: Any) -> Shape:
    return replace(shape, **changes)


@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(5, 0, 9, 1), (2, 1, 1, 0), (70, 2, 0, 1)])
def test_tensor_core_kernel(
    kernels: Any, head_size: int, dtype: torch.dtype, rows: tuple[int, ...]
) -> None:
    checks.check_tree_attention(
        kernels, "cpu", variant(head_size=head_size, dtype=dtype, rows=rows, suffix_lens=rows)
    )


@pytest.mark.parametrize(
    ("head_size", "dtype"),
    [(64, torch.bfloat16), (80, torch.float16), (128, torch.float16), (256, torch.bfloat16)],
)
@pytest.mark.parametrize("rows", [(5, 0, 9, 1), (2, 1, 1, 0), (35, 2, 0, 1)])
def test_a_cache_of_8_bits(
    kernels: Any, head_size: int, dtype: torch.dtype, rows: tuple[int, ...]
) -> None:
    shape = variant(head_size=head_size, dtype=dtype, rows=rows, suffix_lens=rows, fp8_cache=True)
    checks.check_tree_attention(kernels, "cpu", variant(shape, block_size=7, seed=head_size))


def test_a_cache_of_8_bits_with_windows_caps_and_splits(kernels: Any) -> None:
    for rows, window, softcap in (((3, 2), 100, 0.0), ((12, 9), 300, 5.0), ((3, 2), -1, 5.0)):
        shape = variant(
            num_kv_heads=1, rows=rows, contexts=(1300, 400), suffix_lens=(66, 9), head_size=64,
            sliding_window=window, softcap=softcap, fp8_cache=True, seed=window + 9,
        )  # fmt: skip
        checks.check_tree_attention(kernels, "cpu", shape)
    checks.check_tree_attention(kernels, "cpu", variant(dtype=torch.float32, fp8_cache=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_8_bit_number_is_widened_exactly(kernels: Any, dtype: torch.dtype) -> None:
    """A row that sees one key has its V: all 256 codes, in the tensor-core and the plain kernel."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for head_size in (128, 64, 32):
        count = 256 // head_size
        case = build(
            variant(
                dtype=dtype, head_size=head_size, rows=(1,), suffix_lens=(0,), contexts=(1,),
                num_kv_heads=count, group=1, fp8_cache=True, block_size=1,
            )
        )  # fmt: skip
        cache = torch.zeros(3, 2, 1, count, head_size, dtype=torch.float8_e4m3fn)
        cache[:, 1] = numbers.view(count, head_size)
        case = case.with_arguments(
            key_cache=cache[:, 0], value_cache=cache[:, 1], k_scale=1.0, v_scale=1.0
        )
        out = case.run(kernels.tree_attention)[case.owned_rows]
        assert torch.equal(out.flatten().nan_to_num(7e4), numbers.to(dtype).nan_to_num(7e4))


@pytest.mark.parametrize("shared_kib", [99, 64, 47])
@pytest.mark.parametrize("fp8_cache", [False, True])
def test_a_gpu_with_less_shared_memory_gets_another_kernel(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, shared_kib: int, fp8_cache: bool
) -> None:
    """sm_86 and sm_89 have 99 KiB a block; with fewer all but the plain kernel are left out."""
    monkeypatch.setenv("ECHO_EMULATED_SHARED_BYTES", str(shared_kib * 1024))
    for head_size in (128, 256):
        for rows in ((2, 1), (20, 2)):
            shape = variant(
                head_size=head_size, rows=rows, suffix_lens=rows, contexts=(70, 7), group=2,
                num_kv_heads=1, fp8_cache=fp8_cache,
            )  # fmt: skip
            checks.check_tree_attention(kernels, "cpu", shape)


@pytest.mark.parametrize("head_size", [64, 80])
@pytest.mark.parametrize("contexts", [(130, 7, 0, 77), (1300, 0, 0, 20)])
def test_the_lse_changes_nothing(kernels: Any, head_size: int, contexts: tuple[int, ...]) -> None:
    shape = variant(head_size=head_size, contexts=contexts, num_kv_heads=1)
    checks.check_that_the_lse_changes_nothing(kernels, "cpu", shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_odd_tensors(kernels: Any, dtype: torch.dtype) -> None:
    checks.check_odd_tensors(kernels, "cpu", variant(dtype=dtype, contexts=(10, 7, 0, 77)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_prefix_suffix_and_merge(kernels: Any, dtype: torch.dtype) -> None:
    shape = variant(dtype=dtype, head_size=64, rows=(5, 0, 70, 1), suffix_lens=(5, 2, 70, 0))
    checks.check_suffix_attention(kernels, "cpu", shape)
    checks.check_merged_attention(kernels, "cpu", shape)
    checks.check_merged_attention(kernels, "cpu", variant(shape, contexts=(0, 0, 1300, 0)))
    for seed in range(3):
        checks.check_merge_attention(kernels, "cpu", dtype, seed)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("window", [-1, 1, 100, 300])
def test_windows_caps_and_splits(kernels: Any, few: bool, window: int) -> None:
    rows = (3, 2) if few else (12, 9)
    for softcap in (0.0, 5.0):
        checks.check_tree_attention(
            kernels,
            "cpu",
            variant(
                num_kv_heads=1, rows=rows, contexts=(1300, 400), suffix_lens=(66, 9),
                sliding_window=window, softcap=softcap, block_size=7, head_size=64, seed=window + 1,
            ),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [16, 80, 256])
@pytest.mark.parametrize("contexts", [(130, 7, 0, 77), (1200, 0, 300, 900)])
def test_plain_kernel(
    kernels: Any, dtype: torch.dtype, head_size: int, contexts: tuple[int, ...]
) -> None:
    if head_size == 256 and dtype != torch.float32:
        pytest.skip("the tensor-core kernel takes this")
    checks.check_tree_attention(
        kernels, "cpu", variant(dtype=dtype, head_size=head_size, contexts=contexts, num_kv_heads=1)
    )


@pytest.mark.parametrize("seed", range(25))
def test_random_shapes(kernels: Any, seed: int) -> None:
    draw = random.Random(seed)
    requests = draw.randint(0, 4)

    def some(few: int, many: int) -> tuple[int, ...]:
        return tuple(draw.randint(0, draw.choice([few, many])) for _ in range(requests))

    checks.check_tree_attention(
        kernels,
        "cpu",
        Shape(
            layout="nhd",
            dtype=draw.choice([torch.bfloat16, torch.float16, torch.float32]),
            block_size=draw.choice([1, 7, 16, 64]),
            num_kv_heads=draw.randint(1, 2),
            group=draw.choice([1, 2, 3, 4, 7, 8]),
            head_size=draw.choice([32, 64, 64, 96, 128]),
            rows=some(3, 40),
            contexts=some(60, 700),
            suffix_lens=some(9, 200),
            softcap=draw.choice([0.0, 0.0, 5.0]),
            sliding_window=draw.choice([-1, -1, 20, 130]),
            seed=seed,
            fp8_cache=seed % 3 == 0,
        ),
    )
