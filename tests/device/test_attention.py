# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The CUDA attention backends on a CPU, over stand-ins for the stock kernels.

Trees, prefills, chains and single tokens of one batch, against attention written out row by row.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from echo_vllm import ops
from echo_vllm.step.attention import cuda
from echo_vllm.step.attention.backend import TreeAttentionMetadata
from echo_vllm.step.attention.tree import VerificationRows
from echo_vllm.step.v2.state import VerificationBuffers
from tests.device import flash

HEADS, KV_HEADS, D, BLOCK, BLOCKS_EACH = 4, 2, 16, 16, 6
TREES = [[-1, -1, 0, 1, 1], [-1, 0, 0]]  # parents
REST = [1, 9, 4]  # rows of a single token, a prefill and a chain
CONTEXTS = [40, 7, 33, 0, 21]  # tokens before the rows
PADDING = 5


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    flash.install(monkeypatch)


def builder_of(kind: str) -> Any:
    """A builder with what vLLM's constructor would take from the engine's config."""
    name = "Flash" if kind == "flash" else "Triton"
    cls = getattr(cuda, f"Echo{name}AttentionMetadataBuilder")
    builder = cls.__new__(cls)
    builder.verification, builder.rswa_window = None, None
    builder._sizes = torch.zeros(2 * len(CONTEXTS), dtype=torch.int32)
    builder._context_lens = torch.zeros_like(builder._sizes)
    if kind == "flash":
        builder.aot_schedule, builder.aot_sliding_window = False, (-1, -1)
        builder.use_full_cuda_graph, builder.dcp_world_size = False, 1
        builder.mm_prefix_query_ranges_np = None
    else:
        builder.seq_threshold_3D, builder.num_par_softmax_segments = 8, 16
        builder.softmax_segm_output = builder.softmax_segm_max = None
        builder.softmax_segm_expsum, builder.max_seqs_64_segments = None, 0
    return builder


def impl_of(kind: str, window: int | None, softcap: float) -> Any:
    cls = cuda.EchoFlashAttentionImpl if kind == "flash" else cuda.EchoTritonAttentionImpl
    impl: Any = cls(HEADS, D, 0.3, KV_HEADS, None, window, "auto", softcap)
    if kind == "flash":
        impl.vllm_flash_attn_version = 3
    return impl


def batch(trees: list[list[int]], rest: list[int]) -> tuple[Any, VerificationRows | None]:
    """vLLM's metadata of a batch whose first requests have `trees`, and those as rows."""
    sizes = [len(tree) + 1 for tree in trees] + rest
    contexts = CONTEXTS[: len(trees)] + CONTEXTS[len(TREES) : len(TREES) + len(rest)]
    starts = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0).to(torch.int32)
    total = int(starts[-1])
    tables = torch.arange(len(sizes) * BLOCKS_EACH, dtype=torch.int32).view(len(sizes), -1).flip(1)
    lengths = torch.tensor([c + s for c, s in zip(contexts, sizes, strict=True)])
    positions, slots, rows = [], [], None
    for i, (context, size) in enumerate(zip(contexts, sizes, strict=True)):
        for j in range(size):
            index = context + j
            slots.append(int(tables[i, index // BLOCK]) * BLOCK + index % BLOCK)
            depth = 0 if j == 0 else j
            if i < len(trees):
                depth, node = 0, j - 1
                while node >= 0:
                    depth, node = depth + 1, trees[i][node]
            positions.append(context + depth)
    if trees:
        cu = torch.tensor([0, *map(len, trees)], dtype=torch.int32).cumsum(0).to(torch.int32)
        parents = torch.tensor([p for tree in trees for p in tree], dtype=torch.int32)
        mask, depths = ops.build_super_tree(parents, cu, 1)
        bounds = cu + torch.arange(len(trees) + 1, dtype=torch.int32)
        rows = VerificationRows(len(trees), len(depths), bounds, depths, mask)
    metadata = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=lengths.to(torch.int32),
        num_reqs=len(sizes),
        num_actual_tokens=total,
        max_query_len=max(sizes),
        max_seq_len=int(lengths.max()),
        block_table_tensor=tables,
        slot_mapping=torch.tensor(slots),
        positions=torch.tensor(positions),
        is_prefilling=torch.zeros(len(sizes), dtype=torch.bool),
        seq_lens_cpu_upper_bound=lengths.to(torch.int32),
    )
    return metadata, rows


def expected(
    trees: list[list[int]], cm: Any, query: Tensor, cache: Tensor, window: int | None, cap: float
) -> Tensor:
    """[rows, HEADS, D]: every row over the tokens that it may see; all are in the cache."""
    flat = cache.transpose(1, 2).flatten(0, 1).double()  # by slot
    out = torch.empty(cm.num_actual_tokens, HEADS, D)
    for i in range(cm.num_reqs):
        first, stop = cm.query_start_loc[i : i + 2].tolist()
        context = int(cm.seq_lens[i]) - (stop - first)
        table = cm.block_table_tensor[i].tolist()
        for row in range(first, stop):
            position = int(cm.positions[row])
            seen = list(range(context))
            if window is not None:
                seen = [p for p in seen if p > position - window]
            if i < len(trees):
                node, own = row - first - 1, {0}
                while node >= 0:
                    own.add(node + 1)
                    node = trees[i][node]
            else:
                own = {
                    j for j in range(row - first + 1) if window is None or j + window > row - first
                }
            seen += [context + j for j in sorted(own)]
            slots = [table[p // BLOCK] * BLOCK + p % BLOCK for p in seen]
            tokens = flat[slots].repeat_interleave(HEADS // KV_HEADS, 1)
            key, value = tokens[..., :D], tokens[..., D:]
            scores = torch.einsum("hd,nhd->hn", query[row].double(), key) * 0.3
            if cap:
                scores = cap * (scores / cap).tanh()
            out[row] = torch.einsum("hn,nhd->hd", scores.softmax(1), value)
    return out


def padded(cm: Any, rows: Any, more: int) -> tuple[Any, VerificationRows]:
    """The same batch of trees with `more` requests and PADDING rows."""

    def longer(tensor: Tensor, count: int, value: int) -> Tensor:
        return torch.cat([tensor, torch.full((count, *tensor.shape[1:]), value).to(tensor)])

    starts = longer(rows.row_start, more, rows.num_rows)
    num_reqs, total = cm.num_reqs + more, cm.num_actual_tokens + PADDING
    batch = cm.replace(
        query_start_loc=starts,
        seq_lens=longer(cm.seq_lens, more, 0),
        num_reqs=num_reqs,
        num_actual_tokens=total,
        block_table_tensor=longer(cm.block_table_tensor, more, 0),
        slot_mapping=longer(cm.slot_mapping, PADDING, -1),
        positions=longer(cm.positions, PADDING, 3),
    )
    mask = longer(rows.mask, PADDING, -1)
    return batch, VerificationRows(num_reqs, total, starts, rows.depths, mask)


def run(
    kind: str,
    trees: list[list[int]],
    rest: list[int],
    *,
    layout: str = "nhd",
    window: int | None = None,
    softcap: float = 0.0,
    more_requests: int = 0,
) -> tuple[Any, Tensor, Tensor]:
    """(metadata, output with PADDING rows behind, what the output should be)

    With `more_requests`, which have no rows, all of it is a full graph's batch.
    """
    cm, rows = unpadded = batch(trees, rest)
    draw = torch.Generator().manual_seed(3)
    total = cm.num_actual_tokens + PADDING  # a piecewise graph pads the rows
    query = torch.randn(total, HEADS, D, generator=draw)
    key, value = torch.randn(2, total, KV_HEADS, D, generator=draw)
    shape = (cm.num_reqs * BLOCKS_EACH, KV_HEADS, BLOCK, 2 * D)
    cache = torch.randn(*shape, generator=draw)
    if layout == "nhd":  # tokens before heads in memory
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    builder, impl = builder_of(kind), impl_of(kind, window, softcap)
    layer: Any = types.SimpleNamespace(layer_name="layer")
    layer._q_scale = layer._k_scale = layer._v_scale = torch.ones(1)
    if kind == "flash":
        impl.do_kv_cache_update(layer, key, value, cache, cm.slot_mapping)
    else:
        pages = impl.pages(layer, cache)
        flash.write_to_cache(key, value, pages.key, pages.value, cm.slot_mapping)
    if more_requests:
        cm, rows = padded(*unpadded, more_requests)
    builder.verification = rows
    metadata = builder.build(0, cm)
    cm = unpadded[0]
    output = torch.full((total, HEADS, D), torch.nan)
    impl.forward(layer, query, key, value, cache, metadata, output)
    return metadata, output, expected(trees, cm, query, cache, window, softcap)


@pytest.mark.parametrize("kind", ["flash", "triton"])
@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize(("window", "softcap"), [(None, 0.0), (24, 0.0), (None, 5.0)])
def test_trees_prefills_and_decodes_share_a_batch(
    kind: str, layout: str, window: int | None, softcap: float
) -> None:
    metadata, output, wanted = run(kind, TREES, REST, layout=layout, window=window, softcap=softcap)
    assert isinstance(metadata, TreeAttentionMetadata)
    assert metadata.rest is not None
    assert metadata.rest.max_query_len == max(REST)
    assert metadata.rest.num_actual_tokens == sum(REST)
    assert torch.allclose(output[:-PADDING], wanted, atol=2e-5)
    assert output[-PADDING:].isnan().all(), "wrote to rows of padding"


@pytest.mark.parametrize("kind", ["flash", "triton"])
def test_a_batch_of_trees_alone_does_not_call_the_stock_kernel(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stock(**_: Any) -> None:
        raise AssertionError("the stock kernel was called")

    monkeypatch.setattr("tests.device.flash.paged_attention", stock)
    flash.install(monkeypatch)
    metadata, output, wanted = run(kind, TREES, [])
    assert metadata.rest is None
    assert torch.allclose(output[:-PADDING], wanted, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "stock"), [("flash", FlashAttentionMetadata), ("triton", TritonAttentionMetadata)]
)
def test_a_batch_without_trees_is_the_stock_backend_s_own(
    kind: str, stock: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "tree_attention", lambda **_: pytest.fail("our kernel was called"))
    metadata, output, wanted = run(kind, [], REST)
    assert type(metadata) is stock
    assert torch.allclose(output[:-PADDING], wanted, atol=2e-5)


def test_another_group_of_layers_gets_its_own_blocks() -> None:
    """With interleaved sliding windows vLLM builds the metadata once and swaps the block table."""
    cm, rows = batch(TREES, REST)
    builder = builder_of("flash")
    assert builder.supports_update_block_table
    builder.verification = rows
    first = builder.build(0, cm)
    other = builder.update_block_table(first, cm.block_table_tensor + 100, cm.slot_mapping + 7)
    assert torch.equal(other.tree.block_table, first.tree.block_table + 100)
    assert torch.equal(other.rest.block_table, first.rest.block_table + 100)
    assert torch.equal(other.slot_mapping, first.slot_mapping + 7)
    assert torch.equal(other.rest.slot_mapping, first.rest.slot_mapping + 7)
    assert torch.equal(other.tree.mask, first.tree.mask)


def test_float32_has_the_backend_that_can_compute_it() -> None:
    assert cuda.backend_for(torch.float32) is cuda.EchoTritonAttentionBackend
    for dtype in (torch.float16, torch.bfloat16):
        assert cuda.backend_for(dtype) is cuda.EchoFlashAttentionBackend
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert cuda.backend_for(dtype).supports_dtype(dtype)
        assert cuda.backend_for(dtype).get_name() == "CUSTOM"


def test_vllm_finds_the_backend_under_its_name_and_only_while_layers_are_built() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from echo_vllm.step.v1.worker import attention_backend

    custom = AttentionBackendEnum.CUSTOM
    with attention_backend(custom, cuda.EchoFlashAttentionBackend):
        assert custom.get_class() is cuda.EchoFlashAttentionBackend
    assert not custom.is_overridden()
    register_backend(custom, "somebody.elses.Backend")
    try:
        with attention_backend(custom, cuda.EchoTritonAttentionBackend):
            assert custom.get_class() is cuda.EchoTritonAttentionBackend
        assert custom.get_path() == "somebody.elses.Backend"
    finally:
        custom.clear_override()


def test_the_gpu_worker_builds_our_runner_over_vllm_s() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    from echo_vllm.startup import validation
    from echo_vllm.step.v1.cuda import EchoGPUModelRunner, EchoWorker
    from echo_vllm.step.v1.runner import EchoRunnerMixin

    assert f"{EchoWorker.__module__}.{EchoWorker.__qualname__}" == validation.CUDA_WORKER
    assert issubclass(EchoWorker, Worker)
    assert EchoGPUModelRunner.__mro__[1:3] == (EchoRunnerMixin, GPUModelRunner)


def pairs() -> list[tuple[type, type, set[str]]]:
    """Our class, vLLM's, and which of vLLM's methods must be among those that ours overrides."""
    from vllm.v1.spec_decode.eagle import EagleProposer
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    from echo_vllm.step.attention.backend import TreeAttentionImpl, TreeMetadataBuilder
    from echo_vllm.step.v1.cuda import EchoWorker
    from echo_vllm.step.v1.drafter import EchoProposer
    from echo_vllm.step.v1.runner import EchoRunnerMixin
    from echo_vllm.step.v1.worker import EchoWorkerMixin

    runner = {
        *("execute_model", "sample_tokens", "propose_draft_token_ids", "_update_states"),
        *("_may_reorder_batch", "_prepare_inputs", "_build_attention_metadata", "_sample"),
        *("_bookkeeping_sync", "_input_fits_in_drafter"),
    }
    return [
        (EchoRunnerMixin, GPUModelRunner, runner),
        (EchoWorkerMixin, Worker, {"load_model", "compile_or_warm_up_model", "shutdown"}),
        (EchoWorker, Worker, {"_make_model_runner"}),
        (EchoProposer, EagleProposer, {"dummy_run", "initialize_attn_backend"}),
        (TreeMetadataBuilder, FlashAttentionMetadataBuilder, {"build", "update_block_table"}),
        (TreeMetadataBuilder, TritonAttentionMetadataBuilder, {"build"}),
        (TreeAttentionImpl, FlashAttentionImpl, {"forward"}),
        (TreeAttentionImpl, TritonAttentionImpl, {"forward"}),
    ]


def test_what_is_overridden_exists_in_vllm_and_takes_what_vllm_passes() -> None:
    for ours, theirs, needed in pairs():
        shared = {
            name
            for name, value in vars(ours).items()
            if inspect.isfunction(value) and name != "__init__" and hasattr(theirs, name)
        }
        assert needed <= shared, (ours, needed - shared)
        for name in shared:
            mine = inspect.signature(getattr(ours, name)).parameters
            wanted = inspect.signature(getattr(theirs, name)).parameters
            if any(p.kind is p.VAR_POSITIONAL for p in mine.values()):
                continue
            names = [n for n, p in wanted.items() if p.kind is not p.VAR_KEYWORD]
            assert list(mine)[: len(names)] == names, f"{ours.__name__}.{name}"


@pytest.mark.parametrize("kind", ["flash", "triton"])
def test_a_full_graph_holds_trees_unless_every_request_has_one_row(kind: str) -> None:
    """What it is captured with lies where every batch's lies."""
    builder, buffers = builder_of(kind), VerificationBuffers(16, 5, torch.device("cpu"))
    builder.rows_to_capture = buffers.hold_roots
    cm, _ = batch([], [3, 2])
    captured = builder.build_for_cudagraph_capture(cm)
    assert isinstance(captured, TreeAttentionMetadata)
    assert captured.rest is None
    assert captured.tree.suffix_len.tolist() == [3, 2]
    assert captured.tree.context_lens.tolist() == CONTEXTS[2:4]
    for kept, buffer in (
        (captured.tree.mask, buffers.mask),
        (captured.tree.row_start, cm.query_start_loc),
        (captured.tree.positions, cm.positions),
        (captured.tree.context_lens, builder._context_lens),
        (captured.tree.suffix_len, builder._sizes),
    ):
        assert kept.data_ptr() == buffer.data_ptr()
    plain = builder.build_for_cudagraph_capture(batch([], [1, 1])[0])
    assert type(plain) is (FlashAttentionMetadata if kind == "flash" else TritonAttentionMetadata)
    assert builder.verification is None


@pytest.mark.parametrize("kind", ["flash", "triton"])
@pytest.mark.parametrize("window", [None, 24])
def test_requests_without_rows_and_rows_of_no_request_are_left_alone(
    kind: str, window: int | None
) -> None:
    """The padding of a full graph."""
    metadata, output, wanted = run(kind, TREES, [], window=window, more_requests=3)
    assert metadata.tree.suffix_len.tolist() == [len(tree) + 1 for tree in TREES] + [0, 0, 0]
    assert torch.allclose(output[:-PADDING], wanted, atol=2e-5)
    assert output[-PADDING:].isnan().all(), "wrote to rows of padding"


def test_rows_of_chains_see_their_request_up_to_themselves() -> None:
    sizes = [3, 70, 1]
    buffers = VerificationBuffers(80, 69, torch.device("cpu"))
    row_start = torch.tensor([0, 3, 73, 74, 74, 74], dtype=torch.int32)
    rows = buffers.hold_chains(row_start, 78)
    parents = torch.cat([torch.arange(size - 1) - 1 for size in sizes]).to(torch.int32)
    bounds = torch.tensor([0, 2, 71, 71], dtype=torch.int32)
    mask, _ = ops.build_super_tree(parents, bounds, 2)
    assert rows.num_requests == 5
    assert rows.num_rows == len(rows.mask) == 78
    assert torch.equal(rows.mask[:74], mask)
