# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Which full CUDA graphs there are, of target and drafter, and which one a batch runs in.

A graph of vLLM's for varying rows takes any batch of decoding requests: up to so many rows and
requests, each with one row to the N + 1 of the largest tree. What a batch has less is padding:
requests without rows, and rows of no request, whose keys and values have no slot. vLLM captures one
such graph for each number of rows, with as many requests as there can be. Attention kernels are
chosen and divided by these numbers, so that two more are captured beside it: one of whole trees,
with as few requests as so many rows may have, and one of plain decoding, a row a request, which is
that of stock attention and sees no trees at all.

The drafter's first forward has the rows of the target's, and graphs like it. A level has as many
rows for every request; what it has less than its graph are whole requests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CudaGraphManager,
    ModelCudaGraphManager,
)
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)


def holds_trees(graph: BatchExecutionDescriptor) -> bool:
    """Whether a batch's graph is a full one in which attention may see trees."""
    return graph.cg_mode is CUDAGraphMode.FULL and graph.max_query_len is not None


class TreeGraphs(ModelCudaGraphManager):
    """vLLM's manager of the target's graphs, with graphs for trees.

    Args:
        has_plain: whether stock attention can be captured for plain decoding.
        args, kwargs: vLLM's.
    """

    _capture_descs: dict[CUDAGraphMode, list[BatchExecutionDescriptor]]
    _candidates: dict[tuple[int, int], list[BatchExecutionDescriptor]]

    def __init__(self, *args: Any, has_plain: bool, **kwargs: Any) -> None:
        self._has_plain = has_plain
        super().__init__(*args, **kwargs)

    def _init_candidates(self) -> None:
        super()._init_candidates()
        self._capture_descs = {
            mode: [shape for graph in graphs for shape in self._shapes(graph)]
            for mode, graphs in self._capture_descs.items()
        }
        self._candidates = {
            key: [shape for graph in graphs for shape in self._shapes(graph)]
            for key, graphs in self._candidates.items()
        }

    def _shapes(self, graph: BatchExecutionDescriptor) -> list[BatchExecutionDescriptor]:
        """`graph`, and before it what serves fewer batches and these better."""
        rows = graph.num_tokens
        if not holds_trees(graph):
            return [graph]
        shapes = [graph]
        whole = replace(graph, num_reqs=-(-rows // self.decode_query_len))
        if whole != graph:
            shapes.insert(0, whole)
        if self._has_plain and rows <= self.max_num_reqs:
            plain = replace(graph, num_reqs=rows, uniform_token_count=1, max_query_len=None)
            shapes.insert(0, plain)
        return shapes


class CatchUpGraphs(SpeculatorCudaGraphManager):
    """Of the drafter's first forward.

    Args:
        args: vLLM's.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, varlen_decode=True)
        self.most_rows: int | None = None
        """Of a request of the batch that is dispatched next, which vLLM's speculator does not say;
        None keeps it out of full graphs."""

    def dispatch(
        self,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        num_active_loras: int,
        max_query_len: int | None = None,
        num_ubatches: int = 1,
    ) -> BatchExecutionDescriptor:
        return super().dispatch(
            num_reqs, num_tokens, None, num_active_loras, self.most_rows, num_ubatches
        )


class LevelGraphs(CudaGraphManager):
    """Of the drafter's levels, attention and all; what its head reads comes after.

    Args:
        vllm_config, device, cudagraph_mode: vLLM's.
        widths: rows that a request may have in a level.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        cudagraph_mode: CUDAGraphMode,
        widths: Collection[int],
    ) -> None:
        self._widths = widths
        self._of_width: dict[int, list[BatchExecutionDescriptor]] = {}
        mode = CUDAGraphMode.NONE
        if cudagraph_mode.decode_mode() is CUDAGraphMode.FULL:
            mode = CUDAGraphMode.FULL_DECODE_ONLY
        super().__init__(vllm_config, device, mode, decode_query_len=1)

    def _init_candidates(self) -> None:
        sizes = self.compilation_config.cudagraph_capture_sizes
        if not (self.cudagraph_mode and sizes):
            return
        counts = {*(size for size in sizes if size <= self.max_num_reqs), self.max_num_reqs}
        graphs = [
            BatchExecutionDescriptor(
                CUDAGraphMode.FULL, count * width, count, uniform_token_count=width
            )
            for count in counts
            for width in self._widths
            if count * width <= max(sizes)
        ]
        graphs.sort(key=lambda graph: graph.num_tokens, reverse=True)
        self._capture_descs = {CUDAGraphMode.FULL: graphs}
        for graph in reversed(graphs):
            assert graph.uniform_token_count is not None
            self._of_width.setdefault(graph.uniform_token_count, []).append(graph)

    def find(self, count: int, width: int) -> BatchExecutionDescriptor | None:
        """The smallest graph for `count` requests with `width` rows each, if there is one."""
        for graph in self._of_width.get(width, ()) if self._graphs_captured else ():
            if graph.num_tokens >= count * width:
                return graph
        return None

    def capture_levels(
        self, prepare: Callable[[int, int], None], run: Callable[[int, int], None]
    ) -> None:
        """Capture `run`, of a number of requests and of rows that each has; `prepare` comes before
        it, and is no part of the graph."""

        def forward_of(graph: BatchExecutionDescriptor, warmup: bool) -> Callable[..., None]:
            count, width = graph.num_reqs, graph.uniform_token_count
            assert count is not None
            assert width is not None
            prepare(count, width)
            return lambda _: run(count, width)

        self.capture(forward_of, "Capturing levels of the drafter")
