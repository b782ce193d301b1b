# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A CUDA graph that a CPU can capture, strict about what a real one would get wrong in silence.

A graph keeps addresses and numbers: when it is replayed, every kernel reads the tensors that it was
launched with, whatever Python has made since. The emulation records the operators and Triton
launches of a block with their arguments, numbers among them, and runs that list again. Before the
first replay it spoils every tensor that the block read, did not make and that is not in one of the
persistent buffers: on a GPU somebody else would have that memory by then. Before every replay it
spoils what the block made, because graphs share that memory. Asking the host for a value inside the
block is an error, as it is for CUDA.

`capturing` puts it in the place of torch's, for all that vLLM captures of an engine.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

HOST_READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")
"""Operators for which the host waits; `nonzero` because its result's size depends on values."""

UNWRITTEN = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty")
"""Operators that make memory for somebody to write to."""


class CaptureError(RuntimeError):
    """What could not be part of a graph, as one sentence."""


def tensors_in(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class EmulatedGraph:
    """Usage: `with graph.capture(): step()`, then `graph.replay()` as often as wanted.

    Args:
        persistent: tensors whose memory lives as long as the graph; views of it are fine.
        opened: operator -> the function behind it, of operators that hide what they launch and find
            what they read in a context of Python's, as vLLM's attention does.
    """

    def __init__(
        self,
        persistent: Iterable[torch.Tensor],
        opened: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        self.opened = opened or {}
        self._persistent = list(persistent)
        self._known = {memory_of(tensor) for tensor in self._persistent}
        self._launches: list[Callable[[], None]] = []
        self._inside: dict[int, torch.Tensor] = {}
        self._numbers: set[int] = set()
        self._strangers: dict[int, tuple[torch.Tensor, str]] = {}
        self._spoiled = False

    @property
    def strangers(self) -> list[str]:
        """What the block read although it may be gone at replay, and which operator read it."""
        return [
            f"{operator} reads {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            for tensor, operator in self._strangers.values()
        ]

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Record what runs in the block; it runs as well."""
        with _TritonLaunches(self), _Operators(self):
            yield

    def replay(self) -> None:
        """Run the recorded list again, on the memory of the recording."""
        if not self._spoiled:
            self._spoiled = True
            for tensor, _ in self._strangers.values():
                spoil(tensor)
        for memory, tensor in self._inside.items():
            if memory not in self._numbers:
                spoil(tensor)
        for launch in self._launches:
            launch()

    def read(self, operator: str, arguments: Any) -> None:
        for tensor in tensors_in(arguments):
            memory = memory_of(tensor)
            if memory not in self._known and memory not in self._inside:
                self._strangers.setdefault(memory, (tensor, operator))

    def made(self, result: Any) -> None:
        for tensor in tensors_in(result):
            memory = memory_of(tensor)
            if memory not in self._known and memory not in self._strangers:
                self._inside[memory] = tensor

    def made_number(self, arguments: Any) -> None:
        """What Python writes somewhere: a graph keeps it."""
        self.made(arguments)
        self._numbers |= {memory_of(tensor) for tensor in tensors_in(arguments)}

    def launch(self, again: Callable[[], None]) -> None:
        self._launches.append(again)


def spoil(tensor: torch.Tensor) -> None:
    """Overwrite with values that nobody meant: NaN, the negated truth, or -2, which is neither a
    slot nor padding."""
    whole = tensor.untyped_storage()
    flat = torch.empty(0, dtype=tensor.dtype).set_(whole)
    if tensor.dtype == torch.bool:
        flat.logical_not_()
    else:
        flat.fill_(float("nan") if tensor.dtype.is_floating_point else -2)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, graph: EmulatedGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if opened := self.graph.opened.get(name):
            with self:
                return opened(*args, **kwargs)
        if name in HOST_READS:
            raise CaptureError(f"{name} makes the host wait, which a graph cannot hold")
        if name == "aten::lift_fresh" and not args[0].dim():
            self.graph.made_number(args)
        self.graph.read(name, (args, kwargs))
        before = {memory_of(tensor) for tensor in tensors_in((args, kwargs))}
        result = func(*args, **kwargs)
        self.graph.made(result)
        # Views and results in place already are the memory of the recording.
        fresh = [memory_of(tensor) not in before for tensor in tensors_in(result)]
        if name in UNWRITTEN:
            return result  # and nothing to run again: it stays spoiled

        def again() -> None:
            outcome = tensors_in(func(*args, **kwargs))
            for old, new, is_fresh in zip(tensors_in(result), outcome, fresh, strict=True):
                if is_fresh:
                    old.copy_(new)

        self.graph.launch(again)
        return result


class _TritonLaunches:
    """Records launches of Triton kernels in the interpreter, which no operator shows."""

    def __init__(self, graph: EmulatedGraph) -> None:
        self.graph = graph

    def __enter__(self) -> None:
        from triton.runtime.interpreter import InterpretedFunction

        self._function, self._stock = InterpretedFunction, InterpretedFunction.run
        graph, stock = self.graph, self._stock

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            graph.read(kernel.__name__, (args, kwargs))

            def again() -> None:
                with _disable_current_modes():  # what the interpreter does is no operator
                    stock(kernel, *args, grid=grid, warmup=warmup, **kwargs)

            again()
            graph.launch(again)

        InterpretedFunction.run = run

    def __exit__(self, *exception: object) -> None:
        self._function.run = self._stock


class CapturedEngines:
    """Stands in for torch's graphs, in this process.

    Args:
        opened: as of `EmulatedGraph`.

    Attributes:
        graphs: all that were captured.
        also_persistent: what the garbage collector does not see, or what a warm-up makes.
    """

    def __init__(self, opened: Mapping[str, Callable[..., Any]]) -> None:
        self.opened = opened
        self.graphs: list[EmulatedGraph] = []
        self.also_persistent: Callable[[], list[torch.Tensor]] = list
        self._alive: list[torch.Tensor] = []

    def begin(self) -> None:
        """All tensors that there are now count as persistent; what is made later for one batch does
        not."""
        gc.unfreeze()  # vLLM hides what it has made from the collector
        self._alive = [held for held in gc.get_objects() if isinstance(held, torch.Tensor)]

    def make(self) -> EmulatedGraph:
        graph = EmulatedGraph([*self._alive, *self.also_persistent()], self.opened)
        self.graphs.append(graph)
        return graph


@contextmanager
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[CapturedEngines]:
    """vLLM's own manager of graphs captures and replays emulated ones."""
    from vllm.model_executor.layers.attention import attention
    from vllm.v1.worker.gpu import cudagraph_utils

    names = "unified_kv_cache_update", "unified_attention_with_output"
    captured = CapturedEngines({f"vllm::{name}": getattr(attention, name) for name in names})

    def graph(made: EmulatedGraph, *_: Any, **__: Any) -> Any:
        return made.capture()

    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "CUDAGraph", captured.make)
        patched.setattr(torch.cuda, "graph", graph)
        patched.setattr(cudagraph_utils, "graph_capture", lambda **_: nullcontext())
        patched.setattr(cudagraph_utils, "capture_pool", lambda *_: nullcontext())
        patched.setattr(
            type(cudagraph_utils.current_platform), "get_global_graph_pool", lambda _: None
        )
        yield captured
