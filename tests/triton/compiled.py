# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The Triton kernels compile to machine code, which needs no GPU; run by test_triton.py.

The launchers run on CPU tensors, and each launch is compiled instead, with the types of its
arguments.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from echo_vllm.ops import triton_kernels
from echo_vllm.ops.triton_kernels import paths
from tests.ops.cases import Shape, build
from tests.ops.drawn_cases import make_case

SHARED_MEMORY = 99 * 1024  # a block's, on the GPU of these with least (sm_86 and sm_89 are alike)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.float64: "*fp64",
}


def type_of(argument: Any) -> str:
    if isinstance(argument, torch.Tensor):
        return TYPES[argument.dtype]
    if isinstance(argument, float):
        return "fp32"
    return "i32" if abs(argument) < 1 << 31 else "i64"


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched, that is, compiled: for sm_90, or as a test says."""
    architecture = getattr(request, "param", 90)
    names: list[str] = []

    def compile_instead(
        kernel: Any, *arguments: Any, grid: object, warmup: bool, **named: Any
    ) -> None:
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        signature = {
            name: type_of(argument)
            for name, argument in zip(kernel.arg_names, arguments, strict=False)
        }
        source = ASTSource(
            fn=kernel,
            signature={**signature, **dict.fromkeys(named, "constexpr")},
            constexprs={(kernel.arg_names.index(name),): value for name, value in named.items()},
        )
        result = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        assert result.asm["cubin"]
        assert result.metadata.shared <= SHARED_MEMORY, kernel.__name__
        names.append(kernel.__name__)

    monkeypatch.setattr(JITFunction, "run", compile_instead)
    return names


@pytest.mark.parametrize(
    ("compiled", "dtype", "head_size", "contexts", "softcap", "window"),
    [
        (90, torch.float16, 80, (700, 20), 5.0, 64),
        (100, torch.bfloat16, 128, (20, 20), 0.0, -1),
    ],
    indirect=["compiled"],
    ids=["sm_90", "sm_100"],
)
def test_tree_attention(
    compiled: list[str],
    dtype: torch.dtype,
    head_size: int,
    contexts: tuple[int, int],
    softcap: float,
    window: int,
) -> None:
    shape = Shape("nhd", dtype, 16, 2, 4, head_size, (9, 3), contexts, (9, 3), softcap, window)
    build(shape).run(triton_kernels.tree_attention)
    splits = max(contexts) > 512
    assert compiled == ["_tree_attention_kernel", *["_merge_kernel"] * splits]
    if splits:
        case = build(shape)
        lse = torch.empty(case.arguments["query"].shape[1::-1])
        case.with_arguments(lse=lse).run(triton_kernels.tree_attention)
        assert compiled[2:] == ["_tree_attention_kernel", "_merge_kernel"]


@pytest.mark.parametrize("compiled", [80], indirect=True, ids=["sm_80"])
def test_suffix_attention(compiled: list[str]) -> None:
    case = build(Shape("nhd", torch.bfloat16, 16, 2, 4, 128, (9,), (0,), (9,)))
    of_context = ("key_cache", "value_cache", "block_table", "context_lens", "positions")
    not_taken = (*of_context, "sliding_window", "layout")
    query = case.arguments["query"]
    triton_kernels.suffix_attention(
        **{name: value for name, value in case.arguments.items() if name not in not_taken},
        out=torch.empty_like(query),
        lse=torch.empty(query.shape[1], query.shape[0]),
    )
    assert compiled == ["_tree_attention_kernel"]


def test_forest_and_commit(compiled: list[str]) -> None:
    parents = torch.tensor([-1, 0], dtype=torch.int32)
    cu_nodes = torch.tensor([0, 2], dtype=torch.int32)
    triton_kernels.build_super_tree(parents, cu_nodes, 3)
    for token_ids in (parents, parents.long()):
        triton_kernels.accept_path(torch.zeros(3).long(), token_ids, parents, cu_nodes, 4)
    slots = torch.tensor([1, -1])
    triton_kernels.commit_kv([torch.zeros(2, 8, 16, 256).bfloat16()], slots, slots, 16, "nhd")
    assert compiled == ["_super_tree_kernel", *["_accept_kernel"] * 2, *["_move_kernel"] * 2]


def test_paths(compiled: list[str]) -> None:
    logits, tokens = torch.zeros(3, 9), torch.zeros(3, 5).long()
    of_rows, of_requests = torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    of_tokens = torch.zeros(2, 9, dtype=torch.int32)
    penalty, before, lengths = torch.zeros(2), torch.zeros(3, 5), [of_requests] * 2
    paths.penalise_paths(
        logits, before, tokens, of_rows, of_rows, penalty, penalty, penalty, of_tokens
    )
    paths.forbid_ends(
        logits, tokens, of_rows, of_rows, of_requests, *[of_tokens] * 3, *lengths, most_words=2
    )
    assert compiled == ["_penalise_paths_kernel", "_forbid_ends_kernel"]


@pytest.mark.parametrize("compiled", [80, 100], indirect=True)
def test_sample_path(compiled: list[str]) -> None:
    for draft_vocab in (None, 25):
        triton_kernels.sample_path(*make_case(0, draft_vocab=draft_vocab).arguments())
    assert compiled == ["_sample_path_kernel"] * 2
