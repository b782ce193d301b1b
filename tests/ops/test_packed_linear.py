# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""packed_linear against float64, on every instruction set of this machine."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from echo_vllm import ops
from tests.ops.isas import ISAS

PAIR_ISAS = [isa for isa in ops.supported_cpu_isas() if isa in ("avx512_bf16", "amx")]
"""Those that multiply bfloat16 numbers in pairs."""
needs_pairs = pytest.mark.skipif(not PAIR_ISAS, reason="this processor has no AVX-512 for bfloat16")
SHAPES = [(960, 576), (576, 1536), (37, 48), (1, 1), (31, 2500), (64, 1024), (65, 1025)]
"""(N, K): whole panels and not, one depth range and several."""


def weights(shape: tuple[int, int], *, lossless: bool, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    return weight.bfloat16().float() if lossless else weight


def rows(count: int, depth: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, depth, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setenv("ECHO_VLLM_CPU_ISA", name)
    return name


@pytest.fixture(params=PAIR_ISAS or ["avx512_bf16"])
def pair_isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setenv("ECHO_VLLM_CPU_ISA", name)
    return name


@pytest.mark.parametrize("lossless", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_product(isa: str, shape: tuple[int, int], lossless: bool) -> None:
    weight = weights(shape, lossless=lossless)
    packed = ops.pack_linear(weight)
    assert packed.dtype == (torch.bfloat16 if lossless else torch.float32)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(2))
    for count in (1, 2, 3, 5, 6, 7, 11, 12, 13, 24, 25, 97, 200):
        x = rows(count, shape[1])
        wanted = x.double() @ weight.double().T
        # Of a sum of K products the rounding grows with the root of K at most.
        scale = x.double().abs() @ weight.double().abs().T + bias.abs()
        for added in (None, bias):
            found = ops.packed_linear(x, packed, shape[0], added)
            assert found.shape == (count, shape[0])
            error = (found - (wanted if added is None else wanted + bias)).abs() / scale
            assert error.max() < 1e-6, (count, added is None)


@needs_pairs
@pytest.mark.parametrize("shape", [*SHAPES, (576, 1537), (100, 3000)], ids=str)
def test_bfloat16_is_rounded_once(pair_isa: str, shape: tuple[int, int]) -> None:
    weight = weights(shape, lossless=True).bfloat16()
    packed = ops.pack_linear(weight)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(2)).bfloat16()
    for count in (1, 2, 3, 7, 8, 9, 16, 17, 33, 97, 300):
        x = rows(count, shape[1]).bfloat16()
        exact = x.double() @ weight.double().T
        scale = x.double().abs() @ weight.double().abs().T + bias.double().abs()
        for added in (None, bias):
            wanted = exact if added is None else exact + bias.double()
            found = ops.packed_linear(x, packed, shape[0], added)
            assert found.dtype == torch.bfloat16
            # Half a unit in the last place of the result, and of sums what float32 rounds.
            error = (found.double() - wanted).abs() - wanted.abs() / 256
            assert (error <= 1e-6 * scale).all(), (count, added is None)


@needs_pairs
@pytest.mark.parametrize("depth", [1300, 577])
def test_a_row_of_bfloat16_does_not_depend_on_the_others(pair_isa: str, depth: int) -> None:
    packed = ops.pack_linear(weights((100, depth), lossless=True).bfloat16())
    x = rows(300, depth).bfloat16()
    whole = ops.packed_linear(x, packed, 100)
    for first, last in ((7, 8), (7, 20), (100, 130), (100, 137), (3, 298)):
        assert torch.equal(ops.packed_linear(x[first:last], packed, 100), whole[first:last])


@needs_pairs
def test_what_stands_behind_rows_and_weights_of_bfloat16_does_not_count(pair_isa: str) -> None:
    """Rows that are apart, a depth and columns that fill no register."""
    wide = torch.full((21, 200), torch.nan).bfloat16()
    wide[:, :77] = rows(21, 77).bfloat16()
    weight = weights((50, 77), lossless=True).bfloat16()
    packed = ops.pack_linear(weight)
    found = ops.packed_linear(wide[:, :77], packed, 50)
    assert torch.equal(found, ops.packed_linear(wide[:, :77].contiguous(), packed, 50))
    wanted = wide[:, :77].float() @ weight.float().T
    torch.testing.assert_close(found.float(), wanted, rtol=0.01, atol=0.01)


@needs_pairs
def test_bfloat16_needs_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.ones(4, 6).bfloat16(), torch.ones(2, 6).bfloat16()
    packed = ops.pack_linear(weight)
    with pytest.raises(RuntimeError, match="packed must be BFloat16, got Float"):
        ops.packed_linear(x, packed.float(), 4)
    with pytest.raises(RuntimeError, match=r"packed.shape\[1\] must be 4"):
        ops.packed_linear(torch.ones(2, 7).bfloat16(), packed, 4)
    monkeypatch.setenv("ECHO_VLLM_CPU_ISA", "avx2")
    with pytest.raises(RuntimeError, match="bfloat16 needs a processor with AVX-512"):
        ops.pack_linear(weight)
    with pytest.raises(RuntimeError, match="bfloat16 needs a processor with AVX-512"):
        ops.packed_linear(x, packed, 4)


def test_rows_without_columns_are_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r"packed_linear: x must have columns, got shape \[2, 0\]"
    ):
        ops.packed_linear(torch.zeros(2, 0), ops.pack_linear(torch.zeros(8, 0)), 8)


@pytest.mark.parametrize("lossless", [True, False], ids=["bfloat16", "float32"])
def test_a_row_does_not_depend_on_the_others(isa: str, lossless: bool) -> None:
    packed = ops.pack_linear(weights((100, 1300), lossless=lossless))
    x = rows(130, 1300)
    whole = ops.packed_linear(x, packed, 100)
    for count in range(1, 31):
        assert torch.equal(ops.packed_linear(x[7 : 7 + count], packed, 100), whole[7 : 7 + count])


def test_half_the_memory_gives_the_same_bits(isa: str) -> None:
    """One weight that is no bfloat16, in a column of its own, makes the whole weight float32."""
    weight = weights((64, 1300), lossless=True)
    spoilt = torch.cat([weight, torch.full((1, 1300), 0.1)])
    halves, floats = ops.pack_linear(weight), ops.pack_linear(spoilt)
    assert (halves.dtype, floats.dtype) == (torch.bfloat16, torch.float32)
    x = rows(9, 1300)
    found = ops.packed_linear(x, halves, 64)
    assert torch.equal(found, ops.packed_linear(x, floats, 65)[:, :64])


def test_rows_may_be_apart_and_none() -> None:
    packed = ops.pack_linear(weights((48, 64), lossless=True))
    wide = rows(5, 200)
    apart = wide[:, 100:164]
    assert torch.equal(
        ops.packed_linear(apart, packed, 48), ops.packed_linear(apart.contiguous(), packed, 48)
    )
    assert ops.packed_linear(wide[:0, :64], packed, 48).shape == (0, 48)


def test_special_numbers_pass() -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = float("inf")
    weight[2, 0] = float("nan")
    found = ops.packed_linear(torch.ones(1, 4), ops.pack_linear(weight), 3)[0]
    assert found[0] == 4
    assert found[1] == float("inf")
    assert found[2].isnan()


def test_a_weight_packed_for_another_instruction_set_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, x = weights((40, 50), lossless=False), rows(4, 50)
    for isa in ISAS:
        monkeypatch.setenv("ECHO_VLLM_CPU_ISA", isa)
        packed = ops.pack_linear(weight)
        monkeypatch.delenv("ECHO_VLLM_CPU_ISA")
        torch.testing.assert_close(ops.packed_linear(x, packed, 40), x @ weight.T)


def test_opcheck() -> None:
    packed = ops.pack_linear(weights((40, 50), lossless=False))
    op = torch.ops.echo_vllm.packed_linear.default
    for bias in (None, torch.randn(40)):
        assert torch.library.opcheck(op, (rows(4, 50), packed, 40, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "x must have 2 dimensions"),
        ({"x": torch.zeros(2, 50).double()}, "x must be Float or BFloat16, got Double"),
        ({"x": torch.zeros(50, 2).T}, "the last dimension of x must be contiguous"),
        ({"x": torch.zeros(2, 49)}, r"packed.shape\[1\] must be 49"),
        ({"packed": torch.zeros(3, 50, 7)}, r"packed.shape\[2\] must be a panel .* got 7"),
        ({"packed": torch.zeros(3, 50, 16).int()}, "packed must be Float or BFloat16"),
        ({"num_columns": 400}, "num_columns must fit"),
        ({"num_columns": 0}, "num_columns must fit"),
        ({"bias": torch.zeros(41)}, r"bias.shape\[0\] must be 40"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    packed = ops.pack_linear(weights((40, 50), lossless=False))
    arguments = {"x": torch.zeros(2, 50), "packed": packed, "num_columns": 40, **change}
    with pytest.raises(RuntimeError, match=message):
        ops.packed_linear(**arguments)  # type: ignore[arg-type]


def test_a_weight_that_does_not_fit_is_refused() -> None:
    for weight, message in (
        (torch.zeros(4), "2 dimensions"),
        (torch.zeros(4, 4).half(), "must be Float"),
        (torch.zeros(4, 8)[:, ::2], "contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.pack_linear(weight)


def test_large_outputs_share_no_memory_while_they_live_and_leave_it_for_later_ones() -> None:
    # In a process of its own: what earlier tests left in the pool would be taken first.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(_check_large_outputs).result()


def _check_large_outputs() -> None:
    weight = weights((131072, 16), lossless=True)
    packed = ops.pack_linear(weight)

    def product(seed: int, count: int = 80) -> torch.Tensor:  # 40 MiB
        return ops.packed_linear(rows(count, 16, seed), packed, 131072)

    first = product(1)
    part, place = first[3:5], first.data_ptr()
    wanted = part.clone()
    del first
    second = product(2)  # While a part of the first one is there.
    assert second.data_ptr() != place
    assert torch.equal(part, wanted)
    del part
    third = product(3, 70)
    assert third.data_ptr() == place
    assert torch.equal(second, product(2))
    assert torch.equal(third, product(3, 70))
