# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""rms_norm gives the bits of torch's operators one by one, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from echo_vllm import ops
from tests.ops.isas import ISAS

EPSILON = 1e-5
DTYPES = [torch.float32, torch.bfloat16]


def written_out(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normed rows, and x + residual."""
    wide = x.float() if residual is None else x.float() + residual.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    return (normed.to(weight.dtype) * weight).to(x.dtype), wide.to(x.dtype)


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=noise) * 3).to(dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 8, 64, 100, 576, 577, 1536, 4096, 30000])
def test_the_bits_are_those_of_torch(
    isa: str, dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECHO_VLLM_CPU_ISA", isa)
    weight = numbers(size, dtype=dtype, seed=0)
    for rows in (0, 1, 3, 90):
        x = numbers(rows, size, dtype=dtype, seed=1)
        residual = numbers(rows, size, dtype=dtype, seed=2)
        wanted, total = written_out(x, residual, weight)
        before = x.clone()
        assert torch.equal(ops.rms_norm(x, residual, weight, EPSILON), wanted)
        assert torch.equal(residual, total)
        assert torch.equal(x, before)
        wanted, _ = written_out(x, None, weight)
        assert torch.equal(ops.rms_norm(x, None, weight, EPSILON), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_numbers_pass(dtype: torch.dtype) -> None:
    x = numbers(3, 64, dtype=dtype, seed=1)
    x[0, 3], x[1, 5], x[2] = float("inf"), float("nan"), 1e30
    weight = numbers(64, dtype=dtype, seed=0)
    wanted, _ = written_out(x, None, weight)
    found = ops.rms_norm(x, None, weight, EPSILON)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_opcheck() -> None:
    x, weight = numbers(3, 40, dtype=torch.float32, seed=1), torch.ones(40)
    op = torch.ops.echo_vllm.rms_norm.default
    for residual in (None, torch.ones(3, 40)):
        assert torch.library.opcheck(op, (x, residual, weight, EPSILON))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "x must have 2 dimensions"),
        ({"x": torch.zeros(2, 8).half()}, "x must be Float or BFloat16, got Half"),
        ({"x": torch.zeros(2, 16)[:, ::2]}, "x must be contiguous"),
        ({"x": torch.zeros(2, 0)}, "x must have columns"),
        ({"weight": torch.zeros(9)}, r"weight.shape\[0\] must be 8"),
        ({"weight": torch.zeros(8).bfloat16()}, "weight must be Float"),
        ({"residual": torch.zeros(3, 8)}, r"residual.shape\[0\] must be 2"),
        ({"residual": torch.zeros(2, 16)[:, ::2]}, "residual must be contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 8),
        "residual": torch.zeros(2, 8),
        "weight": torch.zeros(8),
        "epsilon": EPSILON,
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        ops.rms_norm(**arguments)  # type: ignore[arg-type]
