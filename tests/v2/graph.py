# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The emulated graph: right for what reads persistent buffers, loud about everything else."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.input_batch import InputBuffers, prepare_pos_seq_lens

from echo_vllm import ops
from echo_vllm.step.attention.cpu import EchoCPUAttentionImpl
from echo_vllm.step.v2.graphs import TreeGraphs, holds_trees
from tests.engine.conftest import TinyModel
from tests.engine.engines import echo, engine, generate, runner
from tests.engine.test_exactness import greedy, tiny_prompts
from tests.v2.emulated_graph import CaptureError, EmulatedGraph


def test_a_replay_reads_what_stands_in_the_buffers_now() -> None:
    buffer, out = torch.zeros(4), torch.zeros(4)
    graph = EmulatedGraph([buffer, out])
    with graph.capture():
        out.copy_((buffer + 1) * 2)
    buffer.copy_(torch.arange(4.0))
    graph.replay()
    assert out.tolist() == [2, 4, 6, 8]
    assert graph.strangers == []


def test_numbers_are_those_of_the_capture() -> None:
    out = torch.zeros(1)
    graph = EmulatedGraph([out])
    budget = 3
    with graph.capture():
        out.fill_(budget)
    budget = 5
    out.zero_()
    graph.replay()
    assert out.item() == 3 != budget


def test_metadata_of_the_capture_is_spoiled_before_a_replay() -> None:
    buffer, out = torch.arange(4.0), torch.zeros(2)
    metadata = torch.tensor([0, 1])  # made for this step alone
    graph = EmulatedGraph([buffer, out])
    with graph.capture():
        out.copy_(buffer[metadata])
    assert graph.strangers == ["aten::index reads (2,) int64"]
    graph.replay()
    assert out.tolist() != [0, 1]


def test_asking_the_host_is_an_error() -> None:
    buffer = torch.ones(3)
    with (
        pytest.raises(CaptureError, match="makes the host wait"),
        EmulatedGraph([buffer]).capture(),
    ):
        buffer.sum().item()


def test_vllms_own_input_kernels_can_be_captured() -> None:
    """Positions and lengths of two batches of one shape, from one capture."""
    buffers = InputBuffers(max_num_reqs=4, max_num_tokens=16, device=torch.device("cpu"))
    slots, computed = torch.tensor([2, 0]), torch.zeros(4, dtype=torch.int32)

    def step() -> None:
        prepare_pos_seq_lens(
            slots, buffers.query_start_loc[:3], computed, buffers.positions, buffers.seq_lens
        )

    buffers.query_start_loc[:3] = torch.tensor([0, 3, 5])
    graph = EmulatedGraph([*vars_of(buffers), slots, computed])
    with graph.capture():
        step()
    slots.copy_(torch.tensor([1, 3]))
    computed.copy_(torch.tensor([0, 7, 0, 9]))
    graph.replay()
    assert graph.strangers == []
    assert buffers.positions[:5].tolist() == [7, 8, 9, 9, 10]
    assert buffers.seq_lens.tolist() == [10, 11, 0, 0]


def test_our_masks_can_be_captured() -> None:
    parents = torch.tensor([-1, 0, -1, -1], dtype=torch.int32)
    cu_nodes = torch.tensor([0, 2, 4], dtype=torch.int32)
    mask, depths = torch.zeros(6, 1, dtype=torch.int64), torch.zeros(6, dtype=torch.int32)
    graph = EmulatedGraph([parents, cu_nodes, mask, depths])
    with graph.capture():
        for kept, new in zip(
            (mask, depths), ops.build_super_tree(parents, cu_nodes, 1), strict=True
        ):
            kept.copy_(new)
    parents.copy_(torch.tensor([-1, -1, -1, 0], dtype=torch.int32))
    graph.replay()
    assert graph.strangers == []
    assert depths.tolist() == [0, 1, 1, 0, 1, 2]
    assert mask.flatten().tolist() == [0b1, 0b11, 0b101, 0b1, 0b11, 0b111]


MOST_ROWS, MOST_REQUESTS = 17, 8


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], TreeGraphs]:
    """A manager that believes to have captured all its graphs."""
    monkeypatch.setattr(
        cudagraph_utils,
        "get_pp_group",
        lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True),
    )
    monkeypatch.setattr(
        type(cudagraph_utils.current_platform), "get_global_graph_pool", lambda _: None
    )
    sizes = [1, 4, 8, 24, 64, 136]

    def make(has_plain: bool) -> TreeGraphs:
        config: Any = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=MOST_REQUESTS),
            compilation_config=SimpleNamespace(
                cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=sizes[-1]
            ),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            speculative_config=None,
            cache_config=SimpleNamespace(use_kda_recoverssm=False),
        )
        manager = TreeGraphs(
            config,
            torch.device("cpu"),
            CUDAGraphMode.FULL_AND_PIECEWISE,
            decode_query_len=MOST_ROWS,
            varlen_decode=True,
            has_plain=has_plain,
        )
        manager._graphs_captured = True
        return manager

    return make


@pytest.mark.parametrize(
    ("requests", "rows", "most", "rows_of_graph", "requests_of_graph"),
    [
        (2, 34, 17, 64, 4),  # Whole trees.
        (5, 34, 17, 64, 8),  # Some smaller ones.
        (8, 136, 17, 136, 8),
        (3, 20, 17, 24, 8),  # More requests than so many rows have whole trees.
        (2, 20, 17, 24, 2),
        (6, 6, 17, 8, 8),  # Nobody got a node, which the host did not know.
    ],
)
def test_a_batch_of_trees_has_the_graph_with_the_least_padding(
    graphs: Callable[[bool], TreeGraphs],
    requests: int,
    rows: int,
    most: int,
    rows_of_graph: int,
    requests_of_graph: int,
) -> None:
    found = graphs(True).dispatch(requests, rows, None, 0, most)
    assert holds_trees(found)
    assert (found.num_tokens, found.num_reqs) == (rows_of_graph, requests_of_graph)


def test_plain_decoding_has_its_own_graphs_where_stock_attention_can_be_captured(
    graphs: Callable[[bool], TreeGraphs],
) -> None:
    found = graphs(True).dispatch(3, 3, 1, 0, 1)
    assert found.cg_mode is CUDAGraphMode.FULL
    assert not holds_trees(found)
    assert (found.num_tokens, found.num_reqs, found.uniform_token_count) == (4, 4, 1)
    assert holds_trees(graphs(False).dispatch(3, 3, 1, 0, 1))


def test_a_batch_that_reads_a_prompt_is_in_no_full_graph(
    graphs: Callable[[bool], TreeGraphs],
) -> None:
    assert graphs(True).dispatch(2, 20, None, 0, None).cg_mode is CUDAGraphMode.PIECEWISE
    assert graphs(True).dispatch(2, 20, None, 0, 18).cg_mode is CUDAGraphMode.PIECEWISE


@pytest.mark.full
def test_tree_verification_replays_with_other_trees(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One capture of a layer's attention in an engine. The batches behind it have as many rows, and
    other trees of other sizes, other contexts and other blocks, which the device alone knows."""
    nodes, seen = 20, []
    spec = echo(tiny.head, 16, policy="echo", k_max=nodes, gates={"1": 0.2, "2": 0.1})
    with engine(
        tiny.target, spec, skip_tokenizer_init=True, max_model_len=256, max_num_seqs=4
    ) as llm:
        stock: Any = EchoCPUAttentionImpl.forward
        of_engine = runner(llm)
        groups = [group for groups in of_engine.attn_groups for group in groups]
        drafter = of_engine.speculator.draft_attn_layer_names
        first = next(n for group in groups for n in group.layer_names if n not in drafter)
        persistent = [
            *vars_of(of_engine.input_buffers),
            *vars_of(of_engine.tree_buffers),
            *(held for group in groups for held in vars_of(group.get_metadata_builder())),
            *of_engine.block_tables.input_block_tables,
        ]
        graph: EmulatedGraph | None = None
        inputs: list[torch.Tensor] = []

        def forward(
            impl: Any,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            cache: torch.Tensor,
            metadata: Any,
            output: torch.Tensor,
            **scales: Any,
        ) -> Any:
            nonlocal graph, inputs
            result = stock(impl, layer, query, key, value, cache, metadata, output, **scales)
            tree = getattr(metadata, "tree", None)
            if layer.layer_name != first or tree is None or tree.num_rows != 4 + nodes:
                return result
            assert metadata.rest is None
            seen.append(tuple(tree.suffix_len.tolist()))
            if graph is None:
                inputs = [query.clone(), key.clone(), value.clone(), torch.zeros_like(output)]
                graph = EmulatedGraph([*persistent, *inputs, cache])
                with graph.capture():
                    stock(impl, layer, *inputs[:3], cache, metadata, inputs[3])
                assert graph.strangers == []
                return result
            for held, new in zip(inputs, (query, key, value), strict=False):
                held.copy_(new)
            inputs[3].fill_(float("nan"))
            graph.replay()
            assert torch.equal(inputs[3][: tree.num_rows], output[: tree.num_rows])
            return result

        monkeypatch.setattr(EchoCPUAttentionImpl, "forward", forward)
        generate(llm, tiny_prompts(4), greedy(24))
    assert len(seen) > 6
    assert len(set(seen)) > 4


@pytest.mark.full
def test_a_level_of_drafting_replays_at_other_depths_and_for_other_trees(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One capture of the drafter's forward and of its best tokens in an engine serves all levels of
    as many rows, of this drafting and of later ones."""
    from vllm.model_executor.layers.attention import attention

    from echo_vllm.step.v2.drafter import TreeSpeculator

    names = "unified_kv_cache_update", "unified_attention_with_output"
    opened = {f"vllm::{name}": getattr(attention, name) for name in names}
    spec = echo(tiny.head, 16, policy="topn", max_depth=5, top_k=3)
    with engine(
        tiny.target, spec, skip_tokenizer_init=True, max_model_len=256, max_num_seqs=4
    ) as llm:
        of_engine = runner(llm)
        drafter = of_engine.speculator
        drafter.profile_level()  # which vLLM does on a GPU alone
        stock, levels = TreeSpeculator.run_held, drafter.levels
        persistent = [
            *vars_of(levels),
            *levels._block_tables,
            *(held for pair in levels.scratch.layers.values() for held in pair),
            *drafter.model.parameters(),
            *drafter.model.buffers(),
            *of_engine.kv_caches,
            *(held for module in drafter.model.modules() for held in prepared(module)),
        ]
        graph: EmulatedGraph | None = None
        outputs: list[torch.Tensor] = []
        seen: list[int] = []

        def whole(count: int, width: int) -> tuple[torch.Tensor, ...]:
            output, features = stock(drafter, count, width)
            return output, features, *drafter.top_tokens(output, 3)

        def run_held(
            _: TreeSpeculator, count: int, width: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal graph, outputs
            hidden = levels.hidden.clone()  # which a norm may add to
            results = whole(count, width)
            if (count, width) != (4, 3):
                return results[0], results[1]
            seen.append(int(levels.attention(0, count, width).suffix_len[0]))
            levels.hidden.copy_(hidden)
            if graph is None:
                outputs = [torch.zeros_like(result) for result in results]
                graph = EmulatedGraph([*persistent, *outputs], opened)
                with graph.capture():
                    for kept, new in zip(outputs, whole(count, width), strict=True):
                        kept.copy_(new)
                assert graph.strangers == []
                return results[0], results[1]
            for kept in outputs:
                kept.fill_(-1)
            graph.replay()
            for kept, result in zip(outputs, results, strict=True):
                assert torch.equal(kept, result)
            return results[0], results[1]

        monkeypatch.setattr(TreeSpeculator, "run_held", run_held)
        generate(llm, tiny_prompts(4), greedy(12))
    assert len(seen) > 12
    assert set(seen) == {3, 6, 9, 12}


def prepared(module: Any) -> list[torch.Tensor]:
    """What vLLM's linear layers keep on a CPU beside their weights."""
    closure = getattr(getattr(module, "cpu_linear", None), "__closure__", None) or ()
    held = [getattr(cell.cell_contents, "handler_tensor", None) for cell in closure]
    return [tensor for tensor in held if tensor is not None]


def vars_of(buffers: object) -> list[torch.Tensor]:
    return [value for value in vars(buffers).values() if isinstance(value, torch.Tensor)]
