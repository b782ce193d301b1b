# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the CUDA kernels must do, for whoever can run them: a GPU (tests/gpu) or the emulator.

`kernels` is the namespace that holds the operators, `torch.ops.echo_vllm` on a GPU and
`torch.ops.echo_vllm_emulated` on a host; `device` is where their tensors live. The reference always
runs on the CPU.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from echo_vllm.ops import prefix_attention, reference
from tests.ops.cases import Shape, TreeAttentionCase, build

NONE = -float("inf")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}

Forest = tuple[Tensor, Tensor, Tensor]  # parents, token_ids, cu_nodes
Pool = tuple[Tensor, Tensor, Tensor]  # scores, tiers, parents


def random_forest(seed: int, requests: int, max_nodes: int) -> Forest:
    """Trees of any form, empty ones too; no two siblings share a token."""
    draw = random.Random(seed)
    parents: list[int] = []
    tokens: list[int] = []
    bounds = [0]
    for _ in range(requests):
        form = draw.choice(["any", "chain", "star"])
        siblings: dict[int, int] = {}
        for node in range(draw.randint(0, max_nodes)):
            parent = {"any": draw.randint(-1, node - 1), "chain": node - 1, "star": -1}[form]
            siblings[parent] = siblings.get(parent, 0) + 1
            parents.append(parent)
            tokens.append(5 * siblings[parent])
        bounds.append(len(parents))
    return (
        torch.tensor(parents, dtype=torch.int32),
        torch.tensor(tokens, dtype=torch.int32),
        torch.tensor(bounds, dtype=torch.int32),
    )


def words_for(cu_nodes: Tensor) -> int:
    return int(cu_nodes.diff().max()) // 64 + 1 if len(cu_nodes) > 1 else 1


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.cpu(), expected)


def check_super_tree(kernels: Any, device: str, forest: Forest) -> None:
    parents, _, cu_nodes = forest
    for num_words in (words_for(cu_nodes), words_for(cu_nodes) + 1):
        actual = kernels.build_super_tree(parents.to(device), cu_nodes.to(device), num_words)
        expected = reference.build_super_tree(parents, cu_nodes, num_words)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)


def random_samples(forest: Forest, seed: int) -> Tensor:
    """The target's tokens: mostly one that a child holds, so that paths are long."""
    parents, tokens, cu_nodes = forest
    draw = random.Random(seed)
    sampled: list[int] = []
    for begin, end in zip(cu_nodes.tolist(), cu_nodes.tolist()[1:], strict=False):
        for row in range(end - begin + 1):
            children = [
                int(tokens[node]) for node in range(begin, end) if int(parents[node]) == row - 1
            ]
            sampled.append(draw.choice([*children, *children, 3]))
    return torch.tensor(sampled, dtype=torch.int64)


def check_accept_path(kernels: Any, device: str, forest: Forest, seed: int) -> None:
    parents, tokens, cu_nodes = forest
    sampled = random_samples(forest, seed)
    for token_ids in (tokens, tokens.long()):
        for max_depth in (0, 3, 70):
            arguments = (sampled, token_ids, parents, cu_nodes)
            actual = kernels.accept_path(*(x.to(device) for x in arguments), max_depth)
            expected = reference.accept_path(*arguments, max_depth)
            for one, other in zip(actual, expected, strict=True):
                assert_same(one, other)


def random_pool(seed: int, requests: int, columns: int, steps: int) -> Pool:
    """No child ranks before its parent; few `steps` make many ties."""
    draw = random.Random(seed)
    scores = torch.full((requests, columns), NONE)
    tiers = torch.zeros(requests, columns, dtype=torch.int32)
    parents = torch.full((requests, columns), -1)
    for request in range(requests):
        alive = [-1]
        for column in range(columns):
            tiers[request, column], parents[request, column] = draw.randint(-9, 9), 77
            if draw.randrange(5) == 0:
                scores[request, column] = draw.choice([NONE, float("nan")])
                continue
            parent = draw.choice(alive)
            above, tier = 0.0, draw.choice([0, 0, 0, 1])
            if parent >= 0:
                above = float(scores[request, parent])
                tier = int(tiers[request, parent]) + draw.choice([0, 0, 0, 2])
            scores[request, column] = above - draw.randrange(steps) / steps
            tiers[request, column], parents[request, column] = tier, parent
            alive.append(column)
    return scores, tiers, parents


def check_select_budget(
    kernels: Any, device: str, pool: Pool, budget: int, cap: int, limit: int | None = None
) -> None:
    there = None if limit is None else torch.tensor([limit], dtype=torch.int32)
    held = None if there is None else there.to(device)
    actual = kernels.select_budget(*(x.to(device) for x in pool), budget, cap, held)
    expected = reference.select_budget(*pool, budget, cap, there)
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)


def check_commit_kv(
    kernels: Any, device: str, layout: str, dtype: torch.dtype, moves: int, seed: int
) -> None:
    """Any map of slots, cycles and skipped moves included."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    num_blocks, heads, block_size, row, layers = 9, 3, 16, 32, 4
    slots = num_blocks * block_size
    dst = draw.sample(range(slots), moves)
    src = [draw.choice([*range(slots), *dst, *dst]) for _ in range(moves)]
    for i in range(0, moves, 7):
        (src if draw.randrange(2) else dst)[i] = -1
    caches = [
        torch.randn(num_blocks, heads, block_size, row, generator=generator).to(dtype)
        for _ in range(layers)
    ]
    expected = [cache.clone() for cache in caches]
    held = []
    for cache in caches:
        if layout == "nhd":  # tokens before heads in memory, views of one storage
            wide = torch.zeros(num_blocks, block_size, heads, row + 32, dtype=dtype, device=device)
            view = wide[..., :row].transpose(1, 2)
        else:
            view = torch.zeros(num_blocks, heads, block_size, row, dtype=dtype, device=device)
        held.append(view.copy_(cache.to(device)))
    sources = torch.tensor(src, dtype=torch.int64)
    targets = torch.tensor(dst, dtype=torch.int64)
    kernels.commit_kv(held, sources.to(device), targets.to(device), block_size, layout)
    reference.commit_kv(expected, sources, targets, block_size, layout)
    for one, other in zip(held, expected, strict=True):
        assert_same(one, other)


def check_tree_attention(kernels: Any, device: str, shape: Shape) -> None:
    """Against the reference, with everything poisoned that must not be read or written."""
    case = build(shape)
    check_attention(case, device, kernels.tree_attention, reference.tree_attention)


def check_attention(case: TreeAttentionCase, device: str, kernel: Any, wanted: Any) -> None:
    """`kernel` on the device against `wanted` on the CPU: rows and LSE of the requests, no more."""
    expected, expected_lse = case.run_with_lse(wanted)
    actual, lse = (result.cpu() for result in case.to(device).run_with_lse(kernel))
    owned = case.owned_rows
    assert not actual[owned].isnan().any(), "an element was not written"
    assert actual[~owned].isnan().all(), "wrote a row of another request"
    if not owned.any():
        return
    error = (actual[owned].double() - expected[owned].double()).abs().max()
    error /= expected[owned].double().abs().max().clamp(min=1.0)
    assert error < TOLERANCE[case.dtype], f"error {error:.2e}"
    torch.testing.assert_close(lse[:, owned], expected_lse[:, owned], atol=2e-3, rtol=1e-4)


def check_odd_tensors(kernels: Any, device: str, shape: Shape) -> None:
    """A mask without words, where nobody has a suffix; and any stride in a dimension of one."""
    none = (0,) * len(shape.rows)
    case = build(dataclasses.replace(shape, suffix_lens=none))
    empty = case.with_arguments(mask=case.arguments["mask"][:, :0].contiguous())
    check_attention(empty, device, kernels.tree_attention, reference.tree_attention)
    case = build(dataclasses.replace(shape, num_kv_heads=1)).to(device)
    caches = {name: case.arguments[name] for name in ("key_cache", "value_cache")}
    dim = 2 if shape.layout == "nhd" else 1
    strange = {
        name: cache.as_strided(
            cache.shape, [1 if i == dim else s for i, s in enumerate(cache.stride())]
        )
        for name, cache in caches.items()
    }
    usual = case.run(kernels.tree_attention)
    odd = case.with_arguments(**strange).run(kernels.tree_attention)
    assert torch.equal(odd[case.owned_rows], usual[case.owned_rows])


def check_that_the_lse_changes_nothing(kernels: Any, device: str, shape: Shape) -> None:
    case = build(shape).to(device)
    without, (actual, _) = (
        case.run(kernels.tree_attention),
        case.run_with_lse(kernels.tree_attention),
    )
    assert torch.equal(without[case.owned_rows], actual[case.owned_rows])


SUFFIX_ARGUMENTS = (
    "query", "query_start", "row_start", "suffix_key", "suffix_value", "suffix_start",
    "suffix_len", "mask", "scale", "softcap",
)  # fmt: skip


def suffix_case(case: TreeAttentionCase) -> TreeAttentionCase:
    """The arguments of `suffix_attention`."""
    arguments = {name: case.arguments[name] for name in SUFFIX_ARGUMENTS}
    return TreeAttentionCase(arguments, case.owned_rows)


def check_suffix_attention(kernels: Any, device: str, shape: Shape) -> None:
    case = suffix_case(build(shape)).to(device)
    expected, expected_lse = suffix_case(build(shape)).run_with_lse(reference.suffix_attention)
    actual, lse = (result.cpu() for result in case.run_with_lse(kernels.suffix_attention))
    owned = case.owned_rows
    assert actual[~owned].isnan().all(), "wrote a row of another request"
    if owned.any():
        error = (actual[owned].double() - expected[owned].double()).abs().max()
        assert error < 2 * TOLERANCE[shape.dtype], f"error {error:.2e}"
    torch.testing.assert_close(lse[:, owned], expected_lse[:, owned], atol=2e-3, rtol=1e-4)


def prefix_by(kernel: Any) -> Any:
    """The attention to the context alone, by `tree_attention` with suffixes of no rows.

    A prefix attention as `prefix_attention.merged_tree_attention` wants it.
    """

    def prefix(**arguments: Any) -> tuple[Tensor, Tensor]:
        query = arguments["query"]
        out = torch.full_like(query, float("nan"))
        lse = torch.full((query.shape[1], query.shape[0]), float("nan"), device=query.device)
        nothing = torch.zeros_like(arguments["suffix_len"])
        kernel(**{**arguments, "suffix_len": nothing, "out": out, "lse": lse})
        # FlashAttention 2 says +inf of a row that sees nothing.
        return out, lse.masked_fill(lse.isneginf(), float("inf"))

    return prefix


def check_merged_attention(kernels: Any, device: str, shape: Shape) -> None:
    """Prefix, suffix and merge together are tree attention."""

    def merged(**arguments: Any) -> None:
        prefix_attention.merged_tree_attention(
            prefix=prefix_by(kernels.tree_attention),
            suffix=kernels.suffix_attention,
            merge=kernels.merge_attention,
            **arguments,
        )

    check_attention(build(shape), device, merged, reference.tree_attention)


def check_merge_attention(kernels: Any, device: str, dtype: torch.dtype, seed: int) -> None:
    """Rows of any kind: one part, both or none saw a key; what was not written is NaN."""
    generator = torch.Generator().manual_seed(seed)
    tokens, heads, size = 23, 3, 64
    row_start = torch.tensor([2, 7, 7, 16], dtype=torch.int32)
    query_start = torch.tensor([1, 0, 11], dtype=torch.int32)
    parts = []
    for infinity in (float("-inf"), float("inf")):
        lse = torch.randn(heads, tokens, generator=generator) * 30
        out = torch.randn(tokens, heads, size, generator=generator).to(dtype)
        blind = torch.rand(heads, tokens, generator=generator) < 0.3
        lse[blind] = infinity
        out[blind.T] = float("nan")
        parts += [out, lse]
    results = []
    merges: list[tuple[Any, str]] = [
        (reference.merge_attention, "cpu"),
        (kernels.merge_attention, device),
    ]
    for operator, where in merges:
        out = torch.full((tokens, heads, size), float("nan"), dtype=dtype, device=where)
        lse = torch.full((heads, tokens), float("nan"), device=where)
        arguments = [x.to(where) for x in (*parts, query_start, row_start)]
        operator(*arguments, out, lse)
        results.append((out.cpu().float(), lse.cpu()))
    (expected, expected_lse), (actual, lse) = results
    torch.testing.assert_close(
        actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True
    )
    torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=1e-5, equal_nan=True)
