# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The operators as torch sees them (opcheck), how one is chosen, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from echo_vllm import ops
from echo_vllm.ops import library
from tests.cuda.kernel_checks import suffix_case
from tests.ops.cases import Shape, TreeAttentionCase, build
from tests.ops.drawn_cases import make_case

SHAPE = Shape("vec", torch.float32, 32, 2, 3, 32, (5, 1, 0, 9), (40, 0, 3, 77), (5, 1, 2, 9))
FOREST = (
    torch.tensor([-1, -1, 0, 0, 1, -1, 0, 1], dtype=torch.int32),
    torch.tensor([0, 5, 5, 8], dtype=torch.int32),
)


def opcheck(op: Any, *arguments: Any, **named: Any) -> None:
    assert torch.library.opcheck(op.default, arguments, named)


def test_opcheck_tree_attention() -> None:
    case = build(SHAPE)
    # opcheck compares results with ==, which NaN fails.
    plain = {
        name: value.nan_to_num(0.0) if isinstance(value, torch.Tensor) else value
        for name, value in case.arguments.items()
    }
    out = torch.zeros(plain["query"].shape)
    opcheck(torch.ops.echo_vllm.tree_attention, **plain, out=out)


@pytest.mark.parametrize("fp8_cache", [False, True])
def test_opcheck_tree_attention_with_an_lse(fp8_cache: bool) -> None:
    case = build(replace(SHAPE, fp8_cache=fp8_cache))
    plain = {
        name: value.nan_to_num(0.0)
        if isinstance(value, torch.Tensor) and value.dtype != torch.float8_e4m3fn
        else value
        for name, value in case.arguments.items()
    }
    out = torch.zeros(plain["query"].shape)
    named = {**plain, "out": out, "lse": torch.zeros(out.shape[1], out.shape[0])}
    op = torch.ops.echo_vllm.tree_attention.default
    if not fp8_cache:
        assert torch.library.opcheck(op, (), named)
        return
    # The other checks compute with the arguments, which torch cannot do with 8-bit floats.
    assert torch.library.opcheck(op, (), named, test_utils="test_faketensor")


def test_opcheck_suffix_and_merge_attention() -> None:
    case = suffix_case(build(SHAPE))
    plain = {
        name: value.nan_to_num(0.0) if isinstance(value, torch.Tensor) else value
        for name, value in case.arguments.items()
    }
    query = plain["query"]
    out, lse = torch.zeros(query.shape), torch.zeros(query.shape[1], query.shape[0])
    opcheck(torch.ops.echo_vllm.suffix_attention, **plain, out=out, lse=lse)
    parts = (torch.randn(query.shape), torch.randn(lse.shape)) * 2
    rows = (plain["query_start"], plain["row_start"])
    opcheck(torch.ops.echo_vllm.merge_attention, *parts, *rows, out)
    opcheck(torch.ops.echo_vllm.merge_attention, *parts, *rows, out, lse)


@pytest.mark.parametrize("layout", ["vec", "amx"])
def test_opcheck_commit_kv(layout: str) -> None:
    caches = [torch.randn(3, 2, 32, 64).bfloat16() for _ in range(2)]
    src, dst = torch.tensor([5, 40, 7]), torch.tensor([3, 4, 7])
    opcheck(torch.ops.echo_vllm.commit_kv, caches, src, dst, 32, layout)


def test_opcheck_build_super_tree() -> None:
    opcheck(torch.ops.echo_vllm.build_super_tree, *FOREST, 2)


def test_opcheck_accept_path() -> None:
    sampled = torch.tensor([3, 9, 7, 1, 1, 1, 5, 4, 4, 8, 4])
    token_ids = torch.tensor([2, 3, 1, 2, 7, 4, 4, 4], dtype=torch.int32)
    opcheck(torch.ops.echo_vllm.accept_path, sampled, token_ids, *FOREST, 3)


@pytest.mark.parametrize("draft_vocab", [None, 25])
def test_opcheck_sample_path(draft_vocab: int | None) -> None:
    case = make_case(1, draft_vocab=draft_vocab)
    # opcheck compares arguments with ==, which NaN fails.
    logits = case.target_logits.nan_to_num(0.0)
    opcheck(torch.ops.echo_vllm.sample_path, logits, *case.arguments()[1:])


def test_opcheck_select_budget() -> None:
    scores = torch.tensor([[-0.1, -0.5, -0.7, -float("inf")], [-0.2, -0.2, -1.0, -0.9]])
    tiers = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 2]], dtype=torch.int32)
    parents = torch.tensor([[-1, 0, 0, 1], [-1, -1, 0, 1]])
    opcheck(torch.ops.echo_vllm.select_budget, scores, tiers, parents, 4, 3)
    limit = torch.tensor([2], dtype=torch.int32)
    opcheck(torch.ops.echo_vllm.select_budget, scores, tiers, parents, 4, 3, limit)


def test_a_missing_library_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "LIBRARY_PATH", tmp_path / "_C.abi3.so")
    with pytest.raises(RuntimeError, match=r"is not built: run `make setup`"):
        library.load_library.__wrapped__()
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    with pytest.raises(RuntimeError, match=r"does not load with torch .*build it again"):
        library.load_library.__wrapped__()


def test_an_unknown_isa_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build(SHAPE)
    monkeypatch.setenv("ECHO_VLLM_CPU_ISA", "avx1024")
    with pytest.raises(RuntimeError, match=r"ECHO_VLLM_CPU_ISA=avx1024 .* runs portable"):
        case.run(ops.tree_attention)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "neon"}, "layout must be one of vec, vec16, amx, nhd, got 'neon'"),
        ({"layout": "amx"}, "amx layout holds bfloat16"),
        ({"query": torch.zeros(30, 6, 32).double()}, "query must be float32, bfloat16 or float16"),
        ({"query": torch.zeros(30, 6, 30)}, "head size must be a multiple of 16, got 30"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, r"positions.shape\[0\] must be"),
        (
            {"context_lens": torch.tensor([0, 0, 0, 9999], dtype=torch.int32)},
            "does not fit block_t",
        ),
        ({"context_lens": torch.tensor([0, 0, 0, -1], dtype=torch.int32)}, "does not fit block_t"),
        ({"suffix_start": torch.tensor([0, 0, 0, 99], dtype=torch.int32)}, "owns suffix rows 99"),
        ({"query_start": torch.tensor([0, 0, 0, 99], dtype=torch.int32)}, "owns query rows 99"),
        ({"row_start": torch.tensor([0, 5, 4, 4, 99], dtype=torch.int32)}, "is not a range of"),
        ({"mask": torch.zeros(99, 0, dtype=torch.int64)}, "needs 1 mask words, but mask has 0"),
        ({"mask": torch.zeros(99, 1, dtype=torch.int32)}, "mask must be Long, got Int"),
        ({"block_table": torch.full((4, 4), 77, dtype=torch.int32)}, "but the cache has"),
        ({"lse": torch.zeros(6, 3)}, r"lse.shape\[1\] must be"),
        ({"lse": torch.zeros(6, 99).double()}, "lse must be Float, got Double"),
        ({"k_scale": 0.5}, "k_scale and v_scale must be 1 unless the cache is Float8_e4m3fn"),
        ({"key_cache": torch.zeros(9, 2, 32, 32, dtype=torch.uint8)}, "key_cache must be Float"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    case: TreeAttentionCase = build(SHAPE).with_arguments(**changes)
    out = torch.zeros(case.arguments["query"].shape, dtype=case.dtype)
    with pytest.raises(RuntimeError, match=message):
        ops.tree_attention(**case.arguments, out=out)


LIST_OPENMP_RUNTIMES = """
import json
from echo_vllm import ops

def runtimes():
    paths = {line.split()[-1] for line in open("/proc/self/maps")}
    return sorted(p for p in paths if any(name in p for name in ("gomp", "iomp", "libomp")))

before = runtimes()
ops.load_library()
print(json.dumps([before, runtimes()]))
"""


def test_no_second_openmp_runtime_is_loaded() -> None:
    """Two runtimes would each start a thread per core; vLLM binds the threads of one."""
    result = subprocess.run(
        [sys.executable, "-c", LIST_OPENMP_RUNTIMES],
        check=True,
        capture_output=True,
        cwd=Path(__file__).parents[2],
    )
    before, after = json.loads(result.stdout)
    assert after == before
    assert len(after) == 1
