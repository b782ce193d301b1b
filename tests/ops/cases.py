# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Random inputs for the operators: trees, paged caches in vLLM's layouts, poisoned memory.

Everything that an operator must not read is NaN, and so is everything that it must write.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo_vllm.ops import reference

PACKED_LAYOUTS = ("vec", "vec16", "amx")


def load_vllm_cpu_kernels() -> bool:
    """Loads vLLM's CPU operators without importing vLLM; False if this vLLM has none."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return False
    if torch.cpu._is_avx512_bf16_supported():
        name = "_C.abi3.so"
    elif torch.cpu._is_avx512_supported():
        name = "_C_AVX512.abi3.so"
    else:
        name = "_C_AVX2.abi3.so"
    library = Path(spec.origin).parent / name
    if not library.exists():
        return False
    torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    return hasattr(torch.ops._C, "cpu_attn_reshape_and_cache")


def split_cache(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """[blocks, kv heads, block_size, 2 * D] -> the K and the V half, as vLLM's backend views it."""
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    key_cache, value_cache = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, 2)
    return key_cache, value_cache


def write_cache_by_vllm(
    kv_cache: Tensor, slots: Tensor, key: Tensor, value: Tensor, layout: str
) -> None:
    """vLLM's own kernel: key and value [tokens, kv heads, D] to int64 slots [tokens]."""
    key_cache, value_cache = split_cache(kv_cache)
    torch.ops._C.cpu_attn_reshape_and_cache(
        key.contiguous(),
        value.contiguous(),
        key_cache,
        value_cache,
        slots,
        layout,
        1.0,
        1.0,
        "auto",
    )


def write_cache(kv_cache: Tensor, slots: Tensor, key: Tensor, value: Tensor, layout: str) -> None:
    """The same by the reference's offset tables, for machines where vLLM's kernel cannot run."""
    block_size, head_size = kv_cache.shape[2], kv_cache.shape[3] // 2
    for cache, offsets, tokens in (
        (split_cache(kv_cache)[0], reference.key_offsets(layout, block_size, head_size), key),
        (split_cache(kv_cache)[1], reference.value_offsets(layout, block_size, head_size), value),
    ):
        regions = cache.view(*cache.shape[:2], -1)
        block = slots[:, None] // block_size
        regions[block, :, offsets[slots % block_size]] = tokens.transpose(1, 2)


@dataclass(frozen=True)
class Shape:
    """What a tree attention case looks like; `build` fills it with random numbers."""

    layout: str
    dtype: torch.dtype
    block_size: int
    num_kv_heads: int
    group: int
    head_size: int
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    suffix_lens: tuple[int, ...]
    softcap: float = 0.0
    sliding_window: int = -1
    seed: int = 0
    fp8_cache: bool = False  # e4m3, with scales


@dataclass(frozen=True)
class TreeAttentionCase:
    """Arguments of `tree_attention`, and which rows of `out` it must write."""

    arguments: dict[str, Any]
    owned_rows: Tensor

    def run(self, op: Any) -> Tensor:
        """Runs `op` on a fresh poisoned `out` with strides of its own and returns it."""
        num_tokens, num_heads, head_size = self.arguments["query"].shape
        storage = torch.full(
            (num_tokens, num_heads + 1, head_size + 16),
            float("nan"),
            dtype=self.dtype,
            device=self.arguments["query"].device,
        )
        out = storage[:, :num_heads, :head_size]
        op(**self.arguments, out=out)
        assert storage[:, num_heads:].isnan().all(), "wrote between the rows of out"
        assert storage[:, :, head_size:].isnan().all(), "wrote between the heads of out"
        return out

    def run_with_lse(self, op: Any) -> tuple[Tensor, Tensor]:
        """The same with a poisoned LSE, which has strides of its own too."""
        num_tokens, num_heads, _ = self.arguments["query"].shape
        storage = torch.full((num_heads, num_tokens + 3), float("nan"))
        storage = storage.to(self.arguments["query"].device)
        lse = storage[:, :num_tokens]
        out = self.with_arguments(lse=lse).run(op)
        assert storage[:, num_tokens:].isnan().all(), "wrote between the rows of lse"
        assert lse[:, ~self.owned_rows].isnan().all(), "wrote the LSE of another request's row"
        return out, lse

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.arguments["query"].dtype
        return dtype

    def to(self, device: str) -> TreeAttentionCase:
        moved = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.arguments.items()
        }
        return TreeAttentionCase(moved, self.owned_rows)

    def with_arguments(self, **changes: Any) -> TreeAttentionCase:
        return dataclasses.replace(self, arguments={**self.arguments, **changes})


def random_bits(generator: random.Random, count: int) -> int:
    """Rows of any density: empty, full, sparse and even ones."""
    kind = generator.randrange(4)
    if kind == 0:
        return 0
    if kind == 1:
        return (1 << count) - 1
    bits = generator.getrandbits(count) if count else 0
    return bits & generator.getrandbits(count) if kind == 2 and count else bits


def to_words(bits: int, words: int) -> list[int]:
    """An int as signed 64-bit words, lowest first."""
    unsigned = [bits >> (64 * word) & (1 << 64) - 1 for word in range(words)]
    return [word - (1 << 64) if word >> 63 else word for word in unsigned]


def build(shape: Shape) -> TreeAttentionCase:
    """Random inputs of the given shape; whatever may not be read is NaN or out of range."""
    draw = random.Random(shape.seed)
    torch_draw = torch.Generator().manual_seed(shape.seed)
    dtype, head_size, block_size = shape.dtype, shape.head_size, shape.block_size
    num_kv_heads, num_heads = shape.num_kv_heads, shape.num_kv_heads * shape.group
    num_requests = len(shape.rows)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=torch_draw).to(dtype)

    def int32(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    # Rows of other requests lie before, between and behind ours.
    query_start, num_tokens = [], draw.randrange(3)
    for rows in shape.rows:
        query_start.append(num_tokens)
        num_tokens += rows + draw.randrange(3)
    row_start = [draw.randrange(3)]
    for rows in shape.rows:
        row_start.append(row_start[-1] + rows)
    owned_rows = torch.zeros(num_tokens, dtype=torch.bool)
    for start, rows in zip(query_start, shape.rows, strict=True):
        owned_rows[start : start + rows] = True
    query = normal(num_tokens, num_heads + 2 * num_kv_heads, head_size)[:, :num_heads]
    query[~owned_rows] = float("nan")

    suffix_start, num_suffix_rows = [], draw.randrange(3)
    for length in shape.suffix_lens:
        suffix_start.append(num_suffix_rows)
        num_suffix_rows += length + draw.randrange(3)
    words = -(-max(shape.suffix_lens, default=0) // 64) + draw.randrange(2)
    mask_rows = [[draw.getrandbits(63)] * words for _ in range(row_start[-1] + draw.randrange(2))]
    for request, (rows, length) in enumerate(zip(shape.rows, shape.suffix_lens, strict=True)):
        for row in range(rows):
            beyond = draw.getrandbits(64 * words) >> length << length  # no such suffix row
            bits = random_bits(draw, length) | beyond
            mask_rows[row_start[request] + row] = to_words(bits, words)
    mask = torch.tensor(mask_rows, dtype=torch.int64).reshape(len(mask_rows), words)
    suffix_is_seen = torch.zeros(num_suffix_rows, dtype=torch.bool)
    for request, length in enumerate(shape.suffix_lens):
        own = mask[row_start[request] : row_start[request + 1]]
        begin = suffix_start[request]
        suffix_is_seen[begin : begin + length] = reference.mask_bits(own, length).any(0)
    suffix = normal(num_suffix_rows, 3 * num_kv_heads, head_size)
    suffix[~suffix_is_seen] = float("nan")

    blocks_of = [-(-context // block_size) for context in shape.contexts]
    num_blocks = sum(blocks_of) + 2
    free_blocks = draw.sample(range(num_blocks), num_blocks)
    max_blocks = max(blocks_of, default=0) + draw.randrange(2)
    block_table = torch.full((num_requests, max_blocks + 1), 1 << 30, dtype=torch.int32)
    block_table = block_table[:, :max_blocks]
    if shape.layout == "nhd":
        cache = torch.full(
            (num_blocks, 2, block_size, num_kv_heads, head_size), float("nan"), dtype=dtype
        )
        key_cache, value_cache = cache.unbind(1)
    else:
        cache = torch.full(
            (num_blocks, num_kv_heads, block_size, 2 * head_size), float("nan"), dtype=dtype
        )
        key_cache, value_cache = split_cache(cache)
    positions = torch.full((num_tokens,), -(1 << 40))
    if shape.fp8_cache:  # written as it is, and rounded to 8 bits at the end
        cache = cache.float()
        key_cache, value_cache = cache.unbind(1) if shape.layout == "nhd" else split_cache(cache)
    for request, context in enumerate(shape.contexts):
        blocks = [free_blocks.pop() for _ in range(blocks_of[request])]
        block_table[request, : len(blocks)] = int32(blocks)
        token = torch.arange(context)
        slots = torch.tensor(blocks, dtype=torch.int64)[token // block_size] * block_size
        slots += token % block_size
        key = normal(context, num_kv_heads, head_size).to(cache.dtype)
        value = normal(context, num_kv_heads, head_size).to(cache.dtype)
        if shape.layout == "nhd":
            key_cache[slots // block_size, slots % block_size] = key
            value_cache[slots // block_size, slots % block_size] = value
        else:
            write_cache(cache, slots, key, value, shape.layout)
        depths = torch.randint(0, 7, (shape.rows[request],), generator=torch_draw)
        begin = query_start[request]
        positions[begin : begin + len(depths)] = context + depths

    scales = {}
    if shape.fp8_cache:
        cache = cache.to(torch.float8_e4m3fn)
        key_cache, value_cache = cache.unbind(1) if shape.layout == "nhd" else split_cache(cache)
        scales = {"k_scale": draw.choice([0.7, 1.9]), "v_scale": draw.choice([0.3, 1.6])}

    arguments = {
        **scales,
        "query": query,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "block_table": block_table,
        "context_lens": int32(list(shape.contexts)),
        "query_start": int32(query_start),
        "row_start": int32(row_start),
        "suffix_key": suffix[:, num_kv_heads : 2 * num_kv_heads],
        "suffix_value": suffix[:, 2 * num_kv_heads :],
        "suffix_start": int32(suffix_start),
        "suffix_len": int32(list(shape.suffix_lens)),
        "mask": mask,
        "positions": positions,
        "scale": head_size**-0.5,
        "softcap": shape.softcap,
        "sliding_window": shape.sliding_window,
        "layout": shape.layout,
    }
    return TreeAttentionCase(arguments, owned_rows)
