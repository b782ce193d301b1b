# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The CUDA kernels on a GPU, against the references, inside CUDA graphs, and under opcheck.

compute-sanitizer runs those whose name holds `sanitized`: small, but every kernel.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from echo_vllm.ops import load_library, reference
from tests.cuda import kernel_checks as checks
from tests.ops.cases import Shape, build

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def kernels() -> Any:
    load_library()
    if not torch._C._dispatch_has_kernel_for_dispatch_key("echo_vllm::tree_attention", "CUDA"):
        pytest.skip("the extension was built without CUDA kernels (ECHO_CUDA=1 builds them)")
    return torch.ops.echo_vllm


MODELS = [  # q heads of a kv head, kv heads, head size
    pytest.param(4, 8, 128, id="llama-8b"),
    pytest.param(8, 2, 128, id="llama-70b-tp4"),
    pytest.param(8, 4, 128, id="qwen3-30b-a3b"),
    pytest.param(3, 3, 64, id="smollm2"),
    pytest.param(2, 4, 256, id="gemma"),
    pytest.param(1, 4, 96, id="phi"),
]
SMALL = Shape("nhd", torch.bfloat16, 16, 2, 4, 128, (5, 0, 9, 1), (130, 7, 0, 77), (5, 3, 9, 1))


def variant(**changes: Any) -> Shape:
    return Shape(**{**SMALL.__dict__, **changes})


@pytest.mark.parametrize("seed", range(3))
def test_forest_kernels_sanitized(kernels: Any, seed: int) -> None:
    forest = checks.random_forest(seed, requests=5 * seed, max_nodes=150)
    checks.check_super_tree(kernels, "cuda", forest)
    checks.check_accept_path(kernels, "cuda", forest, seed)


@pytest.mark.parametrize("seed", range(4))
def test_select_budget_sanitized(kernels: Any, seed: int) -> None:
    pool = checks.random_pool(seed, requests=20 * seed, columns=40, steps=[1, 3, 10**6][seed % 3])
    for budget, cap in ((0, 9), (1, 9), (100, 0), (100, 9), (10_000, 64)):
        checks.check_select_budget(kernels, "cuda", pool, budget, cap)


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("moves", [0, 1, 40, 140])
def test_commit_kv_sanitized(kernels: Any, layout: str, moves: int) -> None:
    checks.check_commit_kv(kernels, "cuda", layout, torch.bfloat16, moves, seed=moves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [(5, 0, 9, 1), (2, 1, 1, 0)])
def test_tree_attention_sanitized(kernels: Any, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    for head_size in (64, 96, 128, 256):
        checks.check_tree_attention(
            kernels, "cuda", variant(dtype=dtype, rows=rows, head_size=head_size)
        )


@pytest.mark.parametrize(("group", "kv_heads", "head_size"), MODELS)
@pytest.mark.parametrize("rows", [(1, 4, 2), (17, 65, 0), (257, 33, 1)])
def test_tree_attention_of_models(
    kernels: Any, group: int, kv_heads: int, head_size: int, rows: tuple[int, ...]
) -> None:
    shape = variant(
        group=group, num_kv_heads=kv_heads, head_size=head_size, rows=rows, suffix_lens=rows,
        contexts=(3000, 17, 900),
    )  # fmt: skip
    checks.check_tree_attention(kernels, "cuda", shape)


@pytest.mark.parametrize("seed", range(60))
def test_tree_attention_of_random_shapes(kernels: Any, seed: int) -> None:
    draw = random.Random(seed)
    requests = draw.randint(0, 6)

    def some(few: int, many: int) -> tuple[int, ...]:
        return tuple(draw.randint(0, draw.choice([few, many])) for _ in range(requests))

    checks.check_tree_attention(
        kernels,
        "cuda",
        variant(
            dtype=draw.choice([torch.bfloat16, torch.float16, torch.float32]),
            block_size=draw.choice([1, 7, 16, 64]),
            num_kv_heads=draw.randint(1, 3),
            group=draw.choice([1, 2, 3, 4, 7, 8, 16]),
            head_size=draw.choice([16, 64, 80, 96, 128, 256]),
            rows=some(3, 80),
            contexts=some(60, 3000),
            suffix_lens=some(9, 300),
            softcap=draw.choice([0.0, 0.0, 5.0]),
            sliding_window=draw.choice([-1, -1, 20, 130]),
            seed=seed,
        ),
    )


def test_a_large_batch_is_selected_as_by_sorting(kernels: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = -torch.rand(512, 64, generator=generator)
    tiers, parents = torch.zeros(512, 64, dtype=torch.int32), torch.full((512, 64), -1)
    columns, cu_nodes = kernels.select_budget(scores.cuda(), tiers.cuda(), parents.cuda(), 3000, 64)
    best = scores.flatten().argsort(descending=True, stable=True)[:3000]
    wanted: list[list[int]] = [[] for _ in range(512)]
    for index in best.tolist():
        wanted[index // 64].append(index % 64)
    assert columns.tolist() == [column for tree in wanted for column in tree]
    assert cu_nodes.diff().tolist() == [len(tree) for tree in wanted]


def test_the_same_input_gives_the_same_bits(kernels: Any) -> None:
    case = build(variant(rows=(40, 3, 9, 1), contexts=(2000, 7, 0, 900))).to("cuda")
    first = case.run(kernels.tree_attention)
    pool = [x.cuda() for x in checks.random_pool(3, 60, 40, steps=3)]
    chosen = kernels.select_budget(*pool, 500, 20)
    for _ in range(20):
        again = case.run(kernels.tree_attention)
        assert torch.equal(again.nan_to_num(7.0), first.nan_to_num(7.0))
        for one, other in zip(kernels.select_budget(*pool, 500, 20), chosen, strict=True):
            assert torch.equal(one, other)


def test_nothing_waits_for_the_device(kernels: Any) -> None:
    forest = [x.cuda() for x in checks.random_forest(1, 8, 40)]
    pool = [x.cuda() for x in checks.random_pool(1, 8, 20, steps=3)]
    case = build(SMALL).to("cuda")
    out = torch.empty_like(case.arguments["query"])
    cache = torch.zeros(4, 2, 16, 64, device="cuda")
    slots = torch.tensor([3, -1], device="cuda")
    sampled = torch.zeros(len(forest[0]) + 8, dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.build_super_tree(forest[0], forest[2], 1)
        kernels.accept_path(sampled, forest[1], forest[0], forest[2], 8)
        kernels.select_budget(*pool, 30, 8)
        kernels.commit_kv([cache], slots, slots, 16, "nhd")
        kernels.tree_attention(**case.arguments, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(run: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """`run` in a graph, after a warm-up on a side stream, and what it returned."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def test_a_graph_follows_changing_trees(kernels: Any) -> None:
    """One capture; every replay has other trees, samples and scores in the same memory."""
    requests, most = 6, 256
    parents = torch.full((most,), -1, dtype=torch.int32, device="cuda")
    tokens = torch.zeros(most, dtype=torch.int32, device="cuda")
    cu_nodes = torch.zeros(requests + 1, dtype=torch.int32, device="cuda")
    sampled = torch.zeros(most + requests, dtype=torch.int64, device="cuda")
    pool = [x.cuda() for x in checks.random_pool(0, requests, 30, steps=3)]

    def run() -> tuple[Any, Any, Any]:
        return (
            kernels.build_super_tree(parents, cu_nodes, 1),
            kernels.accept_path(sampled, tokens, parents, cu_nodes, 12),
            kernels.select_budget(*pool, 50, 12),
        )

    graph, (tree, path, chosen) = captured(run)
    for seed in range(8):
        forest = checks.random_forest(seed, requests, 40)
        samples = checks.random_samples(forest, seed)
        new_pool = checks.random_pool(seed, requests, 30, steps=3)
        size = len(forest[0])
        parents[:size], tokens[:size] = forest[0].cuda(), forest[1].cuda()
        cu_nodes.copy_(forest[2])
        sampled[: size + requests] = samples.cuda()
        for held, new in zip(pool, new_pool, strict=True):
            held.copy_(new)
        graph.replay()
        rows = size + requests
        mask, depths = reference.build_super_tree(forest[0], forest[2], 1)
        checks.assert_same(tree[0][:rows], mask)
        checks.assert_same(tree[1][:rows], depths)
        assert not tree[0][rows:].any()
        expected = reference.accept_path(samples, forest[1], forest[0], forest[2], 12)
        for one, other in zip(path, expected, strict=True):
            checks.assert_same(one, other)
        for one, other in zip(chosen, reference.select_budget(*new_pool, 50, 12), strict=True):
            checks.assert_same(one, other)


def test_a_graph_follows_changing_contexts(kernels: Any) -> None:
    """One capture of tree attention; replays have other contexts, rows and masks."""
    cases = [
        build(variant(rows=(9, 4, 2), contexts=contexts, suffix_lens=(9, 4, 2), seed=1))
        for contexts in ((2000, 70, 300), (3, 0, 40), (1100, 33, 5))
    ]
    held = cases[0].to("cuda")
    out = torch.empty_like(held.arguments["query"])

    def run() -> None:
        kernels.tree_attention(**held.arguments, out=out)

    graph, _ = captured(run)
    largest = cases[0].arguments
    for case in cases:
        for name, value in case.arguments.items():
            if isinstance(value, torch.Tensor):
                target = held.arguments[name]
                assert target.dim() == value.dim()
                target[tuple(slice(0, size) for size in value.shape)] = value.cuda()
        assert case.arguments["query"].shape == largest["query"].shape
        out.fill_(float("nan"))
        graph.replay()
        expected = case.run(reference.tree_attention)
        owned = case.owned_rows
        error = (out.cpu()[owned].double() - expected[owned].double()).abs().max()
        assert error < 2e-2


def test_opcheck(kernels: Any) -> None:
    forest = [x.cuda() for x in checks.random_forest(1, 5, 20)]
    sampled = torch.zeros(len(forest[0]) + 5, dtype=torch.int64, device="cuda")
    pool = [x.cuda() for x in checks.random_pool(1, 5, 20, steps=3)]
    pool[0].nan_to_num_(nan=checks.NONE, neginf=checks.NONE)  # opcheck compares with ==
    cache = torch.randn(4, 2, 16, 64, device="cuda")
    slots = torch.tensor([3, -1, 17], device="cuda")
    arguments = {
        name: value.nan_to_num(0.0) if isinstance(value, torch.Tensor) else value
        for name, value in build(SMALL).to("cuda").arguments.items()
    }
    out = torch.zeros_like(arguments["query"])
    torch.library.opcheck(kernels.build_super_tree.default, (forest[0], forest[2], 1))
    torch.library.opcheck(
        kernels.accept_path.default, (sampled, forest[1], forest[0], forest[2], 5)
    )
    torch.library.opcheck(kernels.select_budget.default, (*pool, 30, 9))
    torch.library.opcheck(kernels.commit_kv.default, ([cache], slots, slots.flip(0), 16, "nhd"))
    torch.library.opcheck(kernels.tree_attention.default, (), {**arguments, "out": out})
