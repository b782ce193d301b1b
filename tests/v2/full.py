# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A whole engine in full graphs, emulated, with padded batches: target, first forward of the
drafter, levels.

vLLM's own managers capture and replay; only torch's graph itself is another one. What a graph read
and is not persistent holds NaN and numbers that nobody meant when it is replayed, and so does
everything in it that nobody wrote, rows of padding among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch

from echo_vllm.forecast import CostCurve, StepCost
from echo_vllm.step.attention.backend import TreeMetadataBuilder
from echo_vllm.step.v2.drafter import TreeSpeculator
from echo_vllm.step.v2.graphs import CatchUpGraphs, LevelGraphs
from echo_vllm.step.v2.runner import EchoRunnerV2Mixin
from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, generate, runner
from tests.engine.test_exactness import greedy
from tests.v2.emulated_graph import CapturedEngines, capturing
from tests.v2.graph import prepared
from tests.v2.stock import PROMPTS, v2_engine
from tests.v2.trees import sampling, trees

SIZES = [4, 16, 40, 68]
LENGTH = 12
SMALL = {"num_gpu_blocks_override": 48, "block_size": 32}


def params() -> list[Any]:
    """Greedy requests and seeded ones, of different lengths."""
    return [
        sampling(seed=i, temperature=0.9, max_tokens=LENGTH + i) if i % 2 else greedy(LENGTH + i)
        for i in range(len(PROMPTS))
    ]


@dataclass
class InGraphs:
    """An engine that has captured its graphs.

    Attributes:
        llm, captured: the engine, and its graphs.
        replays: of the target, each graph and its batch.
        others: managers of the replays of the drafter, by name.
    """

    llm: Any
    captured: CapturedEngines
    replays: list[tuple[BatchExecutionDescriptor, InputBatch]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


@contextmanager
def in_graphs(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any], **options: Any
) -> Iterator[InGraphs]:
    """An engine of these; every replay is watched."""
    make_caches, run_held = EchoRunnerV2Mixin.initialize_kv_cache, TreeSpeculator.run_held
    replay = CudaGraphManager.run_fullgraph

    def initialize_kv_cache(of_engine: Any, *args: Any, **kwargs: Any) -> None:
        compilation = of_engine.compilation_config
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        compilation.cudagraph_capture_sizes = SIZES
        compilation.max_cudagraph_capture_size = max(SIZES)
        make_caches(of_engine, *args, **kwargs)

    with capturing(monkeypatch) as captured:
        monkeypatch.setattr(EchoRunnerV2Mixin, "initialize_kv_cache", initialize_kv_cache)
        with v2_engine(tiny, spec, **SMALL, **options) as llm:
            seen, of_engine = InGraphs(llm, captured), runner(llm)
            manager, prepare = of_engine.cudagraph_manager, of_engine.prepare_attn
            packed = [
                held
                for model in (of_engine.model, of_engine.speculator.model)
                for module in model.modules()
                for held in prepared(module)
            ]

            def also_persistent() -> list[torch.Tensor]:
                made = [manager.hidden_states, *manager.aux_hidden_states]
                return packed + [held for held in made if held is not None]

            captured.also_persistent = also_persistent
            captured.begin()
            of_engine.capture_model(profile_only=True)
            batches: list[InputBatch] = []

            def prepare_attn(batch: InputBatch) -> Any:
                batches.append(batch)
                return prepare(batch)

            def run_fullgraph(self: Any, graph: BatchExecutionDescriptor) -> None:
                caches = [cache.clone() for cache in of_engine.kv_caches]
                drafter = of_engine.speculator
                read = drafter.hidden_states.clone(), drafter.input_buffers.positions.clone()
                replay(self, graph)
                if self is manager:
                    seen.replays.append((graph, batches[-1]))
                else:
                    seen.others.append(type(self).__name__)
                if isinstance(self, CatchUpGraphs):
                    assert_as_eager(drafter, batches[-1], *read)
                rows = 0 if isinstance(self, LevelGraphs) else batches[-1].num_tokens
                slots = of_engine.block_tables.slot_mappings[0, :rows]
                assert_only_written(caches, of_engine.kv_caches, slots // 32)

            def run_both(self: TreeSpeculator, count: int, width: int) -> Any:
                hidden = self.levels.hidden.clone()  # which a norm may add to
                eager = self._run_level_of(count, width)
                self.levels.hidden.copy_(hidden)
                found = run_held(self, count, width)
                for one, other in zip(found, eager, strict=True):
                    torch.testing.assert_close(one, other)
                return found

            monkeypatch.setattr(of_engine, "prepare_attn", prepare_attn)
            monkeypatch.setattr(CudaGraphManager, "run_fullgraph", run_fullgraph)
            monkeypatch.setattr(TreeSpeculator, "run_held", run_both)
            yield seen


def assert_as_eager(
    drafter: TreeSpeculator, batch: InputBatch, hidden: torch.Tensor, positions: torch.Tensor
) -> None:
    """A first forward has just run in its graph, and read the last two."""
    kept = drafter._output, drafter.hidden_states, drafter.input_buffers.positions
    found = [held.clone() for held in kept]
    drafter.hidden_states.copy_(hidden)
    drafter.input_buffers.positions.copy_(positions)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CatchUpGraphs, "dispatch", CudaGraphManager.dispatch)
        metadata = drafter._first_metadata(batch)
    rows = drafter.block_tables.slot_mappings[:, : batch.num_tokens]
    drafter._prefill(
        batch.num_reqs,
        batch.num_tokens,
        metadata,
        build_slot_mappings_by_layer(rows, drafter.kv_cache_config),
        None,
    )
    for eager, in_graph in zip(kept, found, strict=True):
        torch.testing.assert_close(in_graph[: batch.num_reqs], eager[: batch.num_reqs])


def assert_only_written(
    before: list[torch.Tensor], after: list[torch.Tensor], blocks: torch.Tensor
) -> None:
    """Of the paged caches [blocks, ...], nothing but `blocks`, and numbers."""
    for old, new in zip(before, after, strict=True):
        changed = (old != new).flatten(1).any(1).nonzero().flatten().tolist()
        assert set(changed) <= set(blocks.tolist())
        assert new.isfinite().all()


@pytest.fixture(scope="module")
def plain(tiny: TinyModel) -> list[list[int]]:
    """Tokens of vLLM's own decoding."""
    with v2_engine(tiny, None) as llm:
        return generate(llm, PROMPTS, params())


def check(seen: InGraphs, plain: list[list[int]]) -> float:
    """Tokens that were accepted on the way to `plain`."""
    assert [graph.strangers for graph in seen.captured.graphs if graph.strangers] == []
    assert generate(seen.llm, PROMPTS, params()) == plain
    assert any(graph.num_tokens > batch.num_tokens for graph, batch in seen.replays)
    assert any((graph.num_reqs or 0) > batch.num_reqs for graph, batch in seen.replays)
    assert {"CatchUpGraphs", "LevelGraphs"} <= set(seen.others)
    accepted = counters(seen.llm)["spec_decode_num_accepted_tokens"]
    assert accepted > 5
    return accepted


def test_an_engine_in_full_graphs_drafts_and_says_what_it_does_without_them(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, plain: list[list[int]]
) -> None:
    with in_graphs(tiny, monkeypatch, trees(tiny), async_scheduling=False) as seen:
        accepted = check(seen, plain)
    monkeypatch.undo()
    with v2_engine(tiny, trees(tiny), **SMALL, async_scheduling=False) as llm:
        assert generate(llm, PROMPTS, params()) == plain
        assert counters(llm)["spec_decode_num_accepted_tokens"] == accepted


@pytest.mark.full
@pytest.mark.parametrize("name", ["chain-5", "static-15", "echo-16", "graft-16", "auto-16"])
def test_every_policy_is_exact_in_full_graphs(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, plain: list[list[int]], name: str
) -> None:
    if name == "auto-16":  # The interpreter's times would have it rest.
        free = CostCurve((1.0,), (1e-6,))
        monkeypatch.setattr(
            "echo_vllm.step.v2.worker.measured_cost", lambda *_: StepCost(free, free, free)
        )
    with in_graphs(tiny, monkeypatch, trees(tiny, name), async_scheduling=True) as seen:
        check(seen, plain)


@pytest.mark.full
def test_metadata_of_one_batch_is_found_out(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A builder that makes a tensor for every batch."""
    build = TreeMetadataBuilder.build

    def forgetful(self: TreeMetadataBuilder, *args: Any, **kwargs: Any) -> Any:
        metadata = build(self, *args, **kwargs)
        if tree := getattr(metadata, "tree", None):
            tree.context_lens = tree.context_lens.clone()
        return metadata

    monkeypatch.setattr(TreeMetadataBuilder, "build", forgetful)
    with in_graphs(tiny, monkeypatch, trees(tiny)) as seen:
        strangers = {read for graph in seen.captured.graphs for read in graph.strangers}
    assert any("tree_attention reads" in read for read in strangers)


@pytest.mark.full
def test_padding_that_is_part_of_a_graph_is_found_out(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would make padding of the requests of every later level, and nothing but the drafts, which
    nobody checks, would tell."""
    stock = LevelGraphs.capture_levels

    def capture_levels(graphs: LevelGraphs, prepare: Any, run: Any) -> None:
        def both(count: int, width: int) -> None:
            prepare(count, width)
            run(count, width)

        stock(graphs, lambda *_: None, both)

    monkeypatch.setattr(LevelGraphs, "capture_levels", capture_levels)
    with (
        in_graphs(tiny, monkeypatch, trees(tiny), async_scheduling=False) as seen,
        pytest.raises(AssertionError, match="not close"),
    ):
        generate(seen.llm, PROMPTS, params())
