# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""One tree attention call at a model's shape, and everything that it is compared with.

Used by `benchmarks.gpu`. A baseline takes `AttentionInputs` and prepares a function of no arguments
that computes the same rows, [T, H, D]; only that function is timed. Where it cannot be prepared,
it raises `Unavailable` with the reason. All run on a CPU too, with what a CPU has, so that tests
can compare them with the reference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from echo_vllm import ops
from echo_vllm.ops import dispatch, prefix_attention
from echo_vllm.ops.reference import mask_bits


class Unavailable(RuntimeError):
    """Why a baseline cannot run here."""


@dataclass(frozen=True)
class Model:
    """The attention of one tensor-parallel rank."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    layers: int


MODELS = [
    Model("Llama-3.1-8B", 32, 8, 128, 32),
    Model("Llama-3.3-70B/TP4", 16, 2, 128, 80),
    Model("Qwen3-30B-A3B", 32, 4, 128, 48),
    # 4 kv heads on 8 ranks: each rank holds a copy of one.
    Model("Qwen3-235B-A22B/TP8", 8, 1, 128, 94),
]


def trees(requests: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """parents, token_ids, cu_nodes of binary trees with `rows` rows each."""
    nodes = rows - 1
    one = (torch.arange(nodes, dtype=torch.int32) + 1) // 2 - 1
    tokens = torch.arange(nodes, dtype=torch.int32)
    bounds = torch.arange(requests + 1, dtype=torch.int32) * nodes
    return one.repeat(requests).to(device), tokens.repeat(requests).to(device), bounds.to(device)


@dataclass(frozen=True)
class Case:
    """A batch: requests of `context` tokens each, with `rows` tree rows each."""

    model: Model
    requests: int
    context: int
    rows: int

    def cache_bytes(self, element: int = 2) -> int:
        """Bytes of the context's K and V."""
        model = self.model
        return 2 * self.requests * self.context * model.num_kv_heads * model.head_size * element

    def moved_bytes(self, element: int = 2) -> int:
        """Bytes that any attention must move: all K and V once, Q and the output once."""
        model = self.model
        rows = self.requests * self.rows
        own = 2 * 2 * model.head_size * rows * (model.num_kv_heads + model.num_heads)
        return self.cache_bytes(element) + own

    def flops(self) -> int:
        """Two products of rows x keys x D a q head."""
        model = self.model
        pairs = self.requests * self.rows * (self.context + self.rows)
        return 4 * pairs * model.num_heads * model.head_size


class AttentionInputs:
    """Random tensors of a case, in vLLM's paged layout and whole ones made from it on demand.

    Attributes:
        arguments: those of `ops.tree_attention`.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        block_size: int = 16,
        fp8_cache: bool = False,
    ) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        self.block_size = block_size
        model, requests, rows, context = case.model, case.requests, case.rows, case.context
        heads, kv_heads, d = model.num_heads, model.num_kv_heads, model.head_size
        # Room for the rows too: causal attention reads them from the cache.
        blocks_each = -(-(context + rows) // block_size)
        shape = (requests * blocks_each, block_size, kv_heads, 2 * d)
        cache = torch.randn(shape, dtype=dtype, device=device)
        order = torch.randperm(requests * blocks_each).to(device)
        self.blocks = order.view(requests, blocks_each)
        query, key, value = (
            torch.randn(requests * rows, n, d, dtype=dtype, device=device)
            for n in (heads, kv_heads, kv_heads)
        )
        slots = torch.arange(context, context + rows, device=device)
        block, offset = self.blocks[:, slots // block_size].flatten(), slots % block_size
        cache[block, offset.repeat(requests)] = torch.cat([key, value], -1)
        if fp8_cache:
            cache = cache.to(torch.float8_e4m3fn)
        key_cache, value_cache = cache.chunk(2, dim=-1)
        parents, _, cu_nodes = trees(requests, rows, device)
        mask, depths = ops.build_super_tree(parents, cu_nodes, -(-rows // 64))
        self.bounds = torch.arange(requests + 1, dtype=torch.int32, device=device) * rows
        self.arguments: dict[str, Any] = {
            "query": query,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "block_table": self.blocks.int(),
            "context_lens": torch.full((requests,), context, dtype=torch.int32, device=device),
            "query_start": self.bounds,
            "row_start": self.bounds,
            "suffix_key": key,
            "suffix_value": value,
            "suffix_start": self.bounds[:-1],
            "suffix_len": torch.full((requests,), rows, dtype=torch.int32, device=device),
            "mask": mask,
            "positions": context + depths.long(),
            "scale": d**-0.5,
            "softcap": 0.0,
            "sliding_window": -1,
            "layout": "nhd",
            "out": torch.zeros_like(query),
        }

    @cached_property
    def query(self) -> Tensor:
        """[R, H, rows, D]"""
        case = self.case
        query: Tensor = self.arguments["query"]
        return query.view(case.requests, case.rows, *query.shape[1:]).transpose(1, 2)

    @cached_property
    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """K and V of context and rows, gathered: [R, KVH, context + rows, D] each."""
        keys = self.case.context + self.case.rows

        def gathered(name: str) -> Tensor:
            pages: Tensor = self.arguments[name]
            return pages[self.blocks].flatten(1, 2)[:, :keys].transpose(1, 2).contiguous()

        return gathered("key_cache"), gathered("value_cache")

    @cached_property
    def seen(self) -> Tensor:
        """bool [R, rows, rows]: which of its request's rows a row sees."""
        case = self.case
        bits = mask_bits(self.arguments["mask"], case.rows)
        return bits.view(case.requests, case.rows, case.rows)

    def flat(self, output: Tensor) -> Tensor:
        """[R, H, rows, D] as [T, H, D]."""
        return output.transpose(1, 2).flatten(0, 1)


Run = Callable[[], Tensor]


def by_implementation(name: str) -> Callable[[AttentionInputs], Run]:
    """Our operator by one implementation of the table."""

    def prepare(inputs: AttentionInputs) -> Run:
        is_cuda = inputs.device.type == "cuda"
        features = ("fp8 cache",) if inputs.arguments["key_cache"].dtype != inputs.dtype else ()
        choice = dispatch.choose("tree_attention", inputs.device.type, features, name)
        if choice.name != name:
            raise Unavailable(choice.passed_over.get(name, f"{name} is not in the table"))
        run = dispatch.implementation("tree_attention", is_cuda, features, name)
        arguments = inputs.arguments

        def call() -> Tensor:
            run(*arguments.values())  # in the order of the schema
            out: Tensor = arguments["out"]
            return out

        return call

    return prepare


def causal_flash(inputs: AttentionInputs) -> Run:
    """FlashAttention on the same rows as if they were a chain: the price of the tree.

    vLLM's reads the paged cache; the package flash_attn and torch's SDPA read gathered K and V.
    `causal_backend` says which of them it is.
    """
    backend, function = causal_backend()
    case, arguments = inputs.case, inputs.arguments
    total = case.context + case.rows
    if backend == "vllm.vllm_flash_attn":
        lengths = torch.full_like(arguments["context_lens"], total)
        out = torch.empty_like(arguments["query"])
        return lambda: function(
            q=arguments["query"], k=arguments["key_cache"], v=arguments["value_cache"],
            max_seqlen_q=case.rows, cu_seqlens_q=inputs.bounds, max_seqlen_k=total,
            seqused_k=lengths, softmax_scale=arguments["scale"], causal=True,
            block_table=arguments["block_table"], out=out,
        )  # fmt: skip
    key, value = inputs.keys_and_values
    if backend == "flash_attn":
        packed = [x.transpose(1, 2).flatten(0, 1) for x in (key, value)]
        bounds = torch.arange(case.requests + 1, dtype=torch.int32, device=inputs.device) * total
        return lambda: function(
            arguments["query"], *packed, inputs.bounds, bounds, case.rows, total,
            softmax_scale=arguments["scale"], causal=True,
        )  # fmt: skip
    bias = importlib.import_module("torch.nn.attention.bias").causal_lower_right(case.rows, total)
    if inputs.device.type == "cuda":
        # The flash kernel itself takes no grouped heads everywhere.
        group = inputs.query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        attention = importlib.import_module("torch.nn.attention")

        def by_torch() -> Tensor:
            with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
                return inputs.flat(
                    scaled_dot_product_attention(inputs.query, key, value, attn_mask=bias)
                )

        return by_torch
    mask = torch.ones(case.rows, total, dtype=torch.bool).tril(case.context)
    return lambda: inputs.flat(
        scaled_dot_product_attention(inputs.query, key, value, attn_mask=mask, enable_gqa=True)
    )


def causal_backend() -> tuple[str, Callable[..., Any]]:
    """What `causal_flash` runs, the first that can be imported where there is a GPU."""
    if torch.cuda.is_available():
        try:
            return prefix_attention.load_flash_attention()
        except RuntimeError:
            pass
    return "torch SDPA", scaled_dot_product_attention


def flex(inputs: AttentionInputs) -> Run:
    """FlexAttention over gathered K and V: the context, and the bits of the mask behind it."""
    module: Any = importlib.import_module("torch.nn.attention.flex_attention")
    key, value = inputs.keys_and_values
    words: Tensor = inputs.arguments["mask"]
    context, rows = inputs.case.context, inputs.case.rows

    def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        suffix = (column - context).clamp(min=0)
        bits = words[b * rows + row, suffix // 64] >> (suffix % 64)
        return (column < context) | (bits & 1 == 1)

    requests = inputs.case.requests
    block_mask = module.create_block_mask(
        visible, requests, None, rows, context + rows, str(inputs.device)
    )
    attention = module.flex_attention
    if inputs.device.type == "cuda":
        attention = torch.compile(attention, dynamic=False)
    scale = inputs.arguments["scale"]

    def run() -> Tensor:
        return inputs.flat(
            attention(inputs.query, key, value, block_mask=block_mask, scale=scale, enable_gqa=True)
        )

    try:
        run()
    except Exception as error:  # it may not compile
        raise Unavailable(f"FlexAttention fails: {str(error)[:120]}") from error
    return run


def xformers_tree(inputs: AttentionInputs) -> Run:
    """`xformers.ops.tree_attention`: one tree for all requests, over gathered K and V."""
    try:
        function = importlib.import_module("xformers.ops.tree_attention").tree_attention
        biases: Any = importlib.import_module("xformers.ops.fmha.attn_bias")
    except Exception as error:
        raise Unavailable(f"xformers has no tree attention here ({error})") from error
    case = inputs.case
    requests, rows, context = case.requests, case.rows, case.context
    groups = case.model.num_kv_heads
    key, value = inputs.keys_and_values

    def expanded(tensor: Tensor) -> Tensor:  # [R, KVH, keys, D] -> [R, keys, KVH, group, D]
        tensor = tensor.transpose(1, 2).contiguous()[:, :, :, None]
        return tensor.expand(-1, -1, -1, case.model.num_heads // groups, -1)

    query = inputs.arguments["query"].view(requests, rows, groups, -1, case.model.head_size)
    past = [expanded(x[:, :, :context]) for x in (key, value)]
    own = [expanded(x[:, :, context:]) for x in (key, value)]
    tree = torch.zeros(rows, -(-rows // 8) * 8, dtype=inputs.dtype, device=inputs.device)
    tree = tree[:, :rows].masked_fill_(~inputs.seen[0], float("-inf"))
    prefix = biases.BlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[rows] * requests, kv_seqlen=[context] * requests, kv_padding=context
    )

    def run() -> Tensor:
        output: Tensor = function(query, *own, *past, tree, prefix)
        return output.reshape(requests * rows, -1, case.model.head_size)

    try:
        run()
    except Exception as error:  # its kernels may live in a package that is not there
        raise Unavailable(f"xformers' tree attention fails: {str(error)[:120]}") from error
    return run


def dense(inputs: AttentionInputs) -> Run:
    """torch's scaled_dot_product_attention over gathered K and V with a full mask."""
    key, value = inputs.keys_and_values
    case = inputs.case
    past = torch.ones(
        case.requests, case.rows, case.context, dtype=torch.bool, device=inputs.device
    )
    mask = torch.cat([past, inputs.seen], 2)[:, None]
    return lambda: inputs.flat(
        scaled_dot_product_attention(inputs.query, key, value, attn_mask=mask, enable_gqa=True)
    )


BASELINES: dict[str, Callable[[AttentionInputs], Run]] = {
    "flash": by_implementation("flash"),
    "causal": causal_flash,
    "triton": by_implementation("triton"),
    "dense": dense,
    "xformers": xformers_tree,
    "flex": flex,
}
"""Name -> what prepares it, in the order in which they are timed.

`flash` and `triton` are implementations of our table, the others are what there is without us;
`causal` alone computes something else, attention along a chain.
"""

SLOW_TO_PREPARE = ("xformers", "flex")
"""They compile or search for seconds a shape."""

GATHERED = ("causal", "dense", "xformers", "flex")
"""They may need the cache a second time, gathered."""
