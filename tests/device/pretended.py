# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A pretended GPU: tensors that say they are on one, and compute on the CPU.

Inside `pretended_gpu()` code that means to run on a GPU runs for real, with real values, and three
of its mistakes show that a CPU forgives: tensors of host and device in one operation, which raise
`MixedDevices`; operations that PyTorch has for a CPU only, as far as one was met, which raise
`NotImplementedError`; and places where the host waits for the device, which are counted by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from echo_vllm import ops

GPU = torch.device("meta")
"""PyTorch without CUDA has no tensor that says it is on a GPU; nothing here is on this device."""

aten = torch.ops.aten

WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten._unique2.default,
}
"""Operations whose result, or the size of it, the host must know."""

NOT_OF_TRUTH_VALUES = {aten.scatter_reduce.two, aten.scatter_reduce_.two}
"""Operations that CUDA has for numbers only."""

FACTORIES = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.arange, torch.tensor),
    *(torch.rand, torch.randn, torch.randint),
}


class MixedDevices(AssertionError):
    """An operation had tensors of the host and of the device."""


class OnGPU(torch.Tensor):
    """A tensor that says it is on the GPU; `held` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGPU:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=GPU,
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return f"OnGPU({self.held})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        hosts = [x for x in tensors if not isinstance(x, OnGPU) and x.dim() > 0]
        if func is aten.copy_.default:
            if hosts:
                Waits.count(f"copy_ between host and device {_non_blocking(args, kwargs)}")
        elif hosts:
            raise MixedDevices(f"{func} of host tensors {[tuple(x.shape) for x in hosts]}")
        if func in NOT_OF_TRUTH_VALUES and args[0].dtype == torch.bool:
            raise NotImplementedError(f"{func} of truth values")
        to_host = kwargs.get("device") is not None and kwargs["device"].type == "cpu"
        if to_host:
            Waits.count("to the host")
        elif func in WAITS or _waits_by_its_arguments(func, args, kwargs):
            Waits.count(str(func))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        result = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
        if to_host:
            return result.clone()
        wrappers = {id(x.held): x for x in tensors if isinstance(x, OnGPU)}

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            known = wrappers.get(id(value))
            return OnGPU(value) if known is None else known

        return tree_map(wrap, result)


def _unwrap(value: Any) -> Any:
    return value.held if isinstance(value, OnGPU) else value


def _non_blocking(args: Any, kwargs: Any) -> str:
    return "async" if (len(args) > 2 and args[2]) or kwargs.get("non_blocking") else "blocking"


def _waits_by_its_arguments(func: Any, args: Any, kwargs: Any) -> bool:
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        masked = any(i is not None and i.dtype == torch.bool for i in args[1])
        fills = func is not aten.index.Tensor and args[2].dim() == 0  # a masked_fill
        return masked and not fills
    return False


class Waits(TorchFunctionMode):
    """Stands in for what PyTorch does with a GPU, and counts where the host waits for it."""

    active: ClassVar[list[Waits]] = []

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._pinned: list[torch.Tensor] = []

    @classmethod
    def count(cls, place: str) -> None:
        if cls.active:
            cls.active[-1].places[place] += 1

    @property
    def total(self) -> int:
        return sum(self.places.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in FACTORIES and _is_gpu(kwargs.get("device")):
            if func is torch.tensor:
                self.count("torch.tensor")
            kwargs["device"] = torch.device("cpu")
            return OnGPU(func(*args, **kwargs))
        if func is torch.Tensor.to and any(map(_is_gpu, [*args[1:], *kwargs.values()])):
            return self._upload(args, kwargs)
        if func is torch.Tensor.__setitem__ and not isinstance(args[2], torch.Tensor):
            # PyTorch would put the number on the device, where it had no value.
            args = (*args[:2], torch.tensor(args[2], dtype=args[0].dtype))
        if func is torch.where:
            args = tuple(x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in args)
        if func is torch.Tensor.tolist and isinstance(args[0], OnGPU):
            self.count("tolist")
            return args[0].held.tolist()
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and isinstance(args[0], OnGPU):
            raise TypeError("a tensor of the GPU has no numpy view")
        return func(*args, **kwargs)

    def pin(self, values: torch.Tensor) -> torch.Tensor:
        self._pinned.append(values.clone())
        return self._pinned[-1]

    def _upload(self, args: Any, kwargs: Any) -> torch.Tensor:
        (dtype,) = [x for x in [*args[1:], *kwargs.values()] if isinstance(x, torch.dtype)] or [
            args[0].dtype
        ]
        if isinstance(args[0], OnGPU):
            return args[0].to(dtype)
        if not kwargs.get("non_blocking") or not any(args[0] is held for held in self._pinned):
            self.count("upload from pageable memory")
        return OnGPU(args[0].to(dtype, copy=True))


def _is_gpu(device: Any) -> bool:
    return isinstance(device, torch.device) and device == GPU


@contextmanager
def pretended_gpu() -> Iterator[Waits]:
    """Inside, `GPU` has tensors, and the operators' CPU kernels take them."""
    with pytest.MonkeyPatch.context() as patch:
        ops.load_library()
        patch.setattr(
            ops,
            "implementation",
            lambda op, is_cuda, *features: getattr(torch.ops.echo_vllm, op).default,
        )
        waits = Waits()
        # Not by the mode: vLLM's CPU runner, once imported, has replaced this method for good.
        patch.setattr(torch.Tensor, "pin_memory", lambda values: waits.pin(values))
        Waits.active.append(waits)
        try:
            with torch.inference_mode(False), torch.no_grad(), waits:
                yield waits
        finally:
            Waits.active.pop()


def on_gpu(values: torch.Tensor) -> torch.Tensor:
    """`values` as if they had always been on the GPU."""
    return OnGPU(values.clone())


def held(values: torch.Tensor) -> torch.Tensor:
    """What a tensor of the GPU holds, without waiting for it."""
    assert isinstance(values, OnGPU)
    return values.held
