# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The norms of an engine on a CPU: `ops.rms_norm` in place of ten operators of torch each.

A step of some rows has two norms a layer, and what they take is mostly the calling of operators.
A layer gets the one operator only if it gives the bits of vLLM's there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from vllm.model_executor.layers.layernorm import RMSNorm

from echo_vllm import ops

CHECKED_ROWS = 1, 7


def fuse_norms(models: Iterable[torch.nn.Module]) -> None:
    """Replace what the `RMSNorm` layers of `models` run, where the result is the same."""
    for model in models:
        for layer in model.modules():
            if type(layer) is RMSNorm and _is_plain(layer) and _agrees(layer):
                object.__setattr__(layer, "_forward_method", _fused(layer))


def _is_plain(layer: Any) -> bool:
    weight = layer.weight
    return (
        layer.has_weight
        and layer.variance_size_override is None
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
    )


def _agrees(layer: Any) -> bool:
    """Whether both give the same bits for random rows."""
    noise = torch.Generator().manual_seed(0)
    size, dtype = len(layer.weight), layer.weight.dtype
    fused = _fused(layer)
    for rows in CHECKED_ROWS:
        x, residual = torch.randn(2, rows, size, generator=noise).to(dtype)
        wanted = [layer.forward_native(x), *layer.forward_native(x.clone(), residual.clone())]
        found = [fused(x), *fused(x.clone(), residual.clone())]
        if not all(map(torch.equal, found, wanted)):
            return False
    return True


def _fused(layer: Any) -> Callable[..., Any]:
    weight, epsilon = layer.weight.data, layer.variance_epsilon
    ops.load_library()
    run = torch.ops.echo_vllm.rms_norm.default

    def forward(x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """As vLLM's `RMSNorm.forward`; `residual` becomes the sum, as on a GPU."""
        if x.dim() != 2 or not x.is_contiguous() or x.dtype != weight.dtype:
            return layer.forward_native(x, residual)
        if residual is None:
            return run(x, None, weight, epsilon)
        if residual.dtype != x.dtype or not residual.is_contiguous():
            return layer.forward_native(x, residual)
        return run(x, residual, weight, epsilon), residual

    return forward
