# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The linear layers of an engine on a CPU: `ops.packed_linear` where it is the faster one.

Verification is a forward over few rows, one or some ten a request, and most of its time is the
reading of weights. vLLM's product (oneDNN) takes up to twice as long for them as this one, which
also halves what is read where float32 weights came from a bfloat16 checkpoint. Both give the same
bits wherever it was tried, but for AMX, which adds up in another order. vLLM's stays with
quantised weights, in float16, on processors without AVX2, and in bfloat16 on those without
instructions for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from vllm.model_executor.layers import utils

from echo_vllm import ops

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def packed_linear_is_faster(weight: torch.Tensor) -> bool:
    """Whether a layer with this weight [N, K] should use `ops.packed_linear` on this machine."""
    if weight.is_meta or weight.device.type != "cpu" or weight.dim() != 2:
        return False
    isas = ops.supported_cpu_isas()
    if weight.dtype == torch.bfloat16:
        return "avx512_bf16" in isas
    return weight.dtype == torch.float32 and "avx2" in isas


def packed(weight: torch.Tensor) -> Linear:
    """The layer's function as vLLM calls it: (x [..., K], weight, bias) -> [..., N]."""
    columns, depth = weight.shape
    kept = ops.pack_linear(weight.detach().contiguous())
    run = torch.ops.echo_vllm.packed_linear.default

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.dim() == 2:
            return run(x, kept, columns, bias)
        return run(x.reshape(-1, depth), kept, columns, bias).view(*x.shape[:-1], columns)

    return linear


@contextmanager
def packed_linears() -> Iterator[None]:
    """Models loaded inside get packed linear layers where those are faster.

    Scoped, so that an engine without trees in the same process keeps vLLM's.
    """
    stock = utils.dispatch_cpu_unquantized_gemm

    def dispatch(layer: Any, remove_weight: bool) -> None:
        weight: torch.Tensor = layer.weight
        if not packed_linear_is_faster(weight):
            stock(layer, remove_weight)
            return
        layer.cpu_linear = packed(weight)
        if remove_weight:
            nothing = torch.empty(0, dtype=weight.dtype)
            layer.weight = torch.nn.Parameter(nothing, requires_grad=False)

    with patch.object(utils, "dispatch_cpu_unquantized_gemm", dispatch):
        yield
