# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The CUDA kernels on a GPU, against the references, inside CUDA graphs, and under opcheck.

compute-sanitizer runs those whose name holds `sanitized`: small, but every kernel.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from echo_vllm.ops import load_library, prefix_attention, reference
from tests.cuda import kernel_checks as checks
from tests.ops.cases import Shape, build
from tests.ops.drawn_cases import KINDS, assert_same_path, cases

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
    return replace(SMALL, **changes)


@pytest.mark.parametrize("seed", range(3))
def test_forest_kernels_sanitized(kernels: Any, seed: int) -> None:
    forest = checks.random_forest(seed, requests=5 * seed, max_nodes=150)
    checks.check_super_tree(kernels, "cuda", forest)
    checks.check_accept_path(kernels, "cuda", forest, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_sample_path_sanitized(kernels: Any, kind: str) -> None:
    for case in cases(kind, 10):
        assert_same_path(kernels.sample_path, case, "cuda")


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


def test_the_lse_changes_nothing(kernels: Any) -> None:
    for contexts in ((130, 7, 0, 77), (4000, 0, 0, 20)):
        checks.check_that_the_lse_changes_nothing(kernels, "cuda", variant(contexts=contexts))


@pytest.mark.parametrize("rows", [(5, 0, 9, 1), (2, 1, 1, 0)])
def test_an_8_bit_cache_sanitized(kernels: Any, rows: tuple[int, ...]) -> None:
    for head_size in (64, 80, 128, 256):
        checks.check_tree_attention(
            kernels, "cuda", variant(rows=rows, head_size=head_size, fp8_cache=True)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_odd_tensors_sanitized(kernels: Any, dtype: torch.dtype) -> None:
    checks.check_odd_tensors(kernels, "cuda", variant(dtype=dtype, contexts=(10, 7, 0, 77)))


def test_tensors_of_different_devices_are_refused(kernels: Any) -> None:
    case = build(SMALL).to("cuda")
    for name in ("context_lens", "mask", "value_cache"):
        elsewhere = case.with_arguments(**{name: case.arguments[name].cpu()})
        with pytest.raises(RuntimeError, match=f"{name} is not on the device of the other"):
            elsewhere.run(kernels.tree_attention)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_prefix_suffix_and_merge_sanitized(kernels: Any, dtype: torch.dtype) -> None:
    shape = variant(dtype=dtype, rows=(5, 0, 70, 1), suffix_lens=(5, 2, 70, 0))
    checks.check_suffix_attention(kernels, "cuda", shape)
    checks.check_merged_attention(kernels, "cuda", shape)
    for seed in range(3):
        checks.check_merge_attention(kernels, "cuda", dtype, seed)


@pytest.mark.parametrize(("group", "kv_heads", "head_size"), MODELS)
@pytest.mark.parametrize("rows", [(1, 4, 2), (17, 65, 0), (257, 33, 1)])
@pytest.mark.parametrize("fp8_cache", [False, True])
def test_tree_attention_of_models(
    kernels: Any, group: int, kv_heads: int, head_size: int, rows: tuple[int, ...], fp8_cache: bool
) -> None:
    shape = variant(
        group=group, num_kv_heads=kv_heads, head_size=head_size, rows=rows, suffix_lens=rows,
        contexts=(3000, 17, 900), fp8_cache=fp8_cache,
    )  # fmt: skip
    checks.check_tree_attention(kernels, "cuda", shape)


@pytest.mark.parametrize("rows", [(1, 4, 2), (17, 65, 0)])
def test_flash_attention_and_our_suffix_are_tree_attention(
    kernels: Any, rows: tuple[int, ...]
) -> None:
    """The implementation `flash` of the table, with the FlashAttention that is installed."""
    try:
        package, _ = prefix_attention.load_flash_attention()
    except RuntimeError as error:
        pytest.skip(str(error))
    # The package flash_attn wants pages of 256 tokens.
    block_size = 16 if package.startswith("vllm") else 256
    shape = variant(
        rows=rows, suffix_lens=rows, contexts=(3000, 17, 900), block_size=block_size, group=4
    )
    case = build(shape)
    # FlashAttention multiplies whatever a page holds by zero.
    for name in ("query", "key_cache", "value_cache"):
        case.arguments[name].nan_to_num_(nan=0.0)
    checks.check_attention(case, "cuda", prefix_attention.tree_attention, reference.tree_attention)


def test_a_cache_behind_the_reach_of_32_bits(kernels: Any) -> None:
    """Blocks whose first number lies more than 2^31 numbers into the cache."""
    case = build(SMALL)
    arguments = dict(case.arguments)
    needed = arguments["key_cache"].shape[0]
    _, block_size, heads, size = arguments["key_cache"].shape
    of_block = 2 * block_size * heads * size
    num_blocks = (1 << 31) // of_block + needed + 1
    if torch.cuda.mem_get_info()[0] < 2 * num_blocks * of_block + (1 << 30):
        pytest.skip("the GPU has no 6 GiB left")
    cache = torch.empty(num_blocks, 2, block_size, heads, size, device="cuda", dtype=SMALL.dtype)
    for half, name in enumerate(("key_cache", "value_cache")):
        cache[-needed:, half] = arguments[name].cuda()
    table = arguments["block_table"]
    arguments["block_table"] = torch.where(
        table < needed, table + num_blocks - needed, torch.zeros_like(table)
    )
    far = {**arguments, "key_cache": cache[:, 0], "value_cache": cache[:, 1]}
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in far.items()}
    out = torch.zeros_like(moved["query"])
    kernels.tree_attention(**moved, out=out)
    expected = case.run(reference.tree_attention)[case.owned_rows]
    assert (out.cpu()[case.owned_rows].float() - expected.float()).abs().max() < 2e-2


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
            fp8_cache=seed % 3 == 0,
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
    lse = torch.zeros(out.shape[1], out.shape[0], device="cuda")
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
        own = {name: case.arguments[name] for name in checks.SUFFIX_ARGUMENTS}
        kernels.suffix_attention(**own, out=out, lse=lse)
        kernels.merge_attention(
            out.clone(), lse.clone(), out.clone(), lse, own["query_start"], own["row_start"], out
        )
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
    """One capture; every replay has other trees, samples, scores and another budget in the same
    memory."""
    requests, most = 6, 256
    parents = torch.full((most,), -1, dtype=torch.int32, device="cuda")
    tokens = torch.zeros(most, dtype=torch.int32, device="cuda")
    cu_nodes = torch.zeros(requests + 1, dtype=torch.int32, device="cuda")
    sampled = torch.zeros(most + requests, dtype=torch.int64, device="cuda")
    pool = [x.cuda() for x in checks.random_pool(0, requests, 30, steps=3)]
    limit = torch.zeros(1, dtype=torch.int32, device="cuda")

    def run() -> tuple[Any, Any, Any]:
        return (
            kernels.build_super_tree(parents, cu_nodes, 1),
            kernels.accept_path(sampled, tokens, parents, cu_nodes, 12),
            kernels.select_budget(*pool, 50, 12, limit),
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
        limit.fill_(8 * seed)
        graph.replay()
        rows = size + requests
        mask, depths = reference.build_super_tree(forest[0], forest[2], 1)
        checks.assert_same(tree[0][:rows], mask)
        checks.assert_same(tree[1][:rows], depths)
        assert not tree[0][rows:].any()
        expected = reference.accept_path(samples, forest[1], forest[0], forest[2], 12)
        for one, other in zip(path, expected, strict=True):
            checks.assert_same(one, other)
        selected = reference.select_budget(*new_pool, 50, 12, limit.cpu())
        for one, other in zip(chosen, selected, strict=True):
            checks.assert_same(one, other)


@pytest.mark.parametrize("form", ["fused", "merged"])
def test_a_graph_follows_changing_contexts(kernels: Any, form: str) -> None:
    """One capture of tree attention; replays have other contexts, rows and masks."""
    cases = [
        build(variant(rows=(9, 4, 2), contexts=contexts, suffix_lens=(9, 4, 2), seed=1))
        for contexts in ((2000, 70, 300), (3, 0, 40), (1100, 33, 5))
    ]
    held = cases[0].to("cuda")
    out = torch.empty_like(held.arguments["query"])

    def run() -> None:
        if form == "fused":
            kernels.tree_attention(**held.arguments, out=out)
            return
        prefix_attention.merged_tree_attention(
            prefix=checks.prefix_by(kernels.tree_attention),
            suffix=kernels.suffix_attention,
            merge=kernels.merge_attention,
            **held.arguments,
            out=out,
        )

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
    lse = torch.zeros(out.shape[1], out.shape[0], device="cuda")
    own = {name: arguments[name] for name in checks.SUFFIX_ARGUMENTS}
    torch.library.opcheck(kernels.suffix_attention.default, (), {**own, "out": out, "lse": lse})
    torch.library.opcheck(
        kernels.merge_attention.default,
        (out.clone(), lse.clone(), out.clone(), lse.clone(), own["query_start"], own["row_start"]),
        {"out": out, "lse": lse},
    )
