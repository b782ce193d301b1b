# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The GPU benchmark without a GPU: its inputs, its baselines against the reference, its report.

No time that these tests measure means anything.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import attention_baselines, gpu
from benchmarks.attention_baselines import MODELS, AttentionInputs, Case, Model, Unavailable
from echo_vllm.ops import attention_table, load_library, reference

CPU = torch.device("cpu")
TINY = Model("tiny", 4, 2, 32, 3)
CASE = Case(TINY, requests=3, context=37, rows=9)


@pytest.fixture(autouse=True, scope="module")
def extension() -> None:
    load_library()


@pytest.fixture
def inputs() -> AttentionInputs:
    torch.manual_seed(0)
    return AttentionInputs(CASE, CPU, torch.float32, block_size=8)


def expected_rows(inputs: AttentionInputs, **changes: Any) -> Tensor:
    out = torch.full_like(inputs.arguments["query"], float("nan"))
    reference.tree_attention(**{**inputs.arguments, **changes, "out": out})
    return out


@pytest.mark.parametrize("name", ["dense", "flex"])
def test_baselines_compute_tree_attention(inputs: AttentionInputs, name: str) -> None:
    actual = attention_baselines.BASELINES[name](inputs)()
    torch.testing.assert_close(actual, expected_rows(inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["extension", "reference"])
def test_our_implementations_are_called_by_name(inputs: AttentionInputs, name: str) -> None:
    actual = attention_baselines.by_implementation(name)(inputs)()
    torch.testing.assert_close(actual, expected_rows(inputs), atol=1e-5, rtol=1e-4)


def test_the_causal_baseline_is_attention_along_a_chain(inputs: AttentionInputs) -> None:
    assert attention_baselines.causal_backend()[0] == "torch SDPA"
    chain = torch.tensor([(2 << row) - 1 for row in range(CASE.rows)])[:, None]
    wanted = expected_rows(inputs, mask=chain.repeat(CASE.requests, 1))
    actual = attention_baselines.causal_flash(inputs)()
    torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("package", ["vllm.vllm_flash_attn", "flash_attn"])
def test_the_causal_baseline_calls_flash_attention_as_it_wants(
    inputs: AttentionInputs, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    def varlen(
        q: Tensor, k: Tensor, v: Tensor, *positional: Any, causal: bool, softmax_scale: float,
        block_table: Tensor | None = None, seqused_k: Tensor | None = None, **named: Any,
    ) -> Tensor:  # fmt: skip
        assert causal
        total = CASE.context + CASE.rows
        if block_table is None:
            assert positional[1].tolist() == [0, total, 2 * total, 3 * total]
            keys = [x.view(CASE.requests, total, 2, 32).repeat_interleave(2, 2) for x in (k, v)]
        else:
            assert seqused_k is not None
            assert seqused_k.tolist() == [total] * 3
            keys = [
                x[block_table.long()].flatten(1, 2)[:, :total].repeat_interleave(2, 2)
                for x in (k, v)
            ]
        rows = q.view(CASE.requests, CASE.rows, 4, 32)
        scores = torch.einsum("rnhd,rkhd->rhnk", rows, keys[0]) * softmax_scale
        hidden = ~torch.ones(CASE.rows, total, dtype=torch.bool).tril(CASE.context)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("rhnk,rkhd->rnhd", weights, keys[1]).flatten(0, 1)

    monkeypatch.setattr(attention_baselines, "causal_backend", lambda: (package, varlen))
    actual = attention_baselines.causal_flash(inputs)()
    monkeypatch.undo()
    torch.testing.assert_close(
        actual, attention_baselines.causal_flash(inputs)(), atol=1e-5, rtol=1e-4
    )


def test_xformers_gets_one_tree_and_the_gathered_cache(
    inputs: AttentionInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tree_attention(
        q: Tensor, spec_k: Tensor, spec_v: Tensor, cache_k: Tensor, cache_v: Tensor,
        spec_attn_bias: Tensor, prefix_attn_bias: Any,
    ) -> Tensor:  # fmt: skip
        assert prefix_attn_bias == ([CASE.rows] * 3, [CASE.context] * 3, CASE.context)
        # As xFormers does: the whole cache seen as one sequence.
        cache_k.view(1, 3 * CASE.context, 2, 2, 32)
        key, value = torch.cat([cache_k, spec_k], 1), torch.cat([cache_v, spec_v], 1)
        scores = torch.einsum("bmghk,bnghk->bghmn", q, key) * q.shape[-1] ** -0.5
        scores[..., CASE.context :] += spec_attn_bias
        return torch.einsum("bghmn,bnghk->bmghk", scores.softmax(-1), value)

    mask = SimpleNamespace(
        from_seqlens=lambda q_seqlen, kv_seqlen, kv_padding: (q_seqlen, kv_seqlen, kv_padding)
    )
    stubs = {
        "xformers.ops.tree_attention": SimpleNamespace(tree_attention=tree_attention),
        "xformers.ops.fmha.attn_bias": SimpleNamespace(BlockDiagonalPaddedKeysMask=mask),
    }
    for name, stub in stubs.items():
        monkeypatch.setitem(sys.modules, name, stub)
    actual = attention_baselines.xformers_tree(inputs)()
    torch.testing.assert_close(actual, expected_rows(inputs), atol=1e-5, rtol=1e-4)


def test_what_is_not_installed_says_so(
    inputs: AttentionInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops.tree_attention", None)
    with pytest.raises(Unavailable, match="xformers has no tree attention here"):
        attention_baselines.xformers_tree(inputs)
    with pytest.raises(Unavailable, match="flash is not in the table"):
        attention_baselines.by_implementation("flash")(inputs)


def test_the_telling_shapes_come_first_and_every_shape_once() -> None:
    cases = gpu.attention_cases(MODELS)
    assert len(set(cases)) == len(cases) == 4 * 5 * 4 * 5
    first = cases[: 4 * 5]
    assert [case.model for case in first[:4]] == MODELS
    assert {(c.requests, c.context, c.rows) for c in first[:8]} == {(16, 4096, 33), (64, 4096, 16)}
    assert {c.requests for c in cases} == {1, 4, 16, 64, 256}
    assert min(c.context for c in cases) == 512
    assert max(c.context for c in cases) == 32768
    assert {min(c.rows for c in cases), max(c.rows for c in cases)} == {1, 64}


def test_floors_count_what_must_move() -> None:
    case = Case(MODELS[0], requests=2, context=100, rows=3)
    assert case.cache_bytes() == 2 * 2 * 100 * 8 * 128 * 2
    assert case.cache_bytes(element=1) == case.cache_bytes() // 2
    own = 2 * 3 * 128 * 2 * (2 * 8 + 2 * 32)
    assert case.moved_bytes() == case.cache_bytes() + own
    assert case.flops() == 2 * 2 * (2 * 3) * 103 * 32 * 128


@pytest.fixture
def timer() -> gpu.Timer:
    return gpu.Timer(CPU, runs=2, flush_bytes=64)


def run_benchmark(timer: gpu.Timer, folder: Path, cases: list[Case]) -> gpu.Report:
    rates = gpu.measure_rates(timer, size=32)
    report = gpu.Report("no GPU", rates, [TINY], folder / "out.json", folder / "table.json")
    budget = gpu.Budget(time.monotonic() + 300, 1 << 20)
    for stage in (
        gpu.time_attention(timer, rates, cases, budget),
        gpu.time_attention(timer, rates, cases[:1], budget, fp8_cache=True),
        gpu.time_forest(timer, rates, [(2, 9)]),
        gpu.time_commit(timer, rates, [TINY], (2,)),
    ):
        for result in stage:
            report.add(result)
    return report


def test_a_run_is_written_and_read_back(timer: gpu.Timer, tmp_path: Path) -> None:
    torch.manual_seed(1)
    report = run_benchmark(timer, tmp_path, [CASE, Case(TINY, 1, 64, 1)])
    written = json.loads((tmp_path / "out.json").read_text())
    assert [r["op"] for r in written["results"]] == [
        "tree_attention", "tree_attention", "tree_attention fp8", "build_super_tree",
        "accept_path", "select_budget", "commit_kv",
    ]  # fmt: skip
    assert written["causal"] == "torch SDPA"
    first, second = written["results"][:2]
    assert {"causal", "dense", "flex"} <= set(first["others"])
    assert "flex" not in second["others"], "it is prepared once a model"
    assert set(first["unavailable"]) >= {"flash", "xformers"}
    assert all(r["microseconds"] > 0 and r["floor_microseconds"] > 0 for r in written["results"])
    table = attention_table.read_table(tmp_path / "table.json")
    assert table.best(2, 32, 3, 9) == "extension"
    assert len(table.measurements) == 2
    assert len(report.results) == 7


def test_a_run_that_is_out_of_time_keeps_what_it_had(
    timer: gpu.Timer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = gpu.Rates(1e9, 1e12)
    report = gpu.Report("no GPU", rates, [TINY], tmp_path / "out.json")
    budget = gpu.Budget(time.monotonic() + 300, 1 << 20)
    for result in gpu.time_attention(timer, rates, [Case(TINY, 1, 8, 2)] * 3, budget):
        report.add(result)
        budget.until = 0.0
    assert len(json.loads((tmp_path / "out.json").read_text())["results"]) == 1
    assert "time is up: tiny 1 x 8" in capsys.readouterr().out


def test_a_cache_that_does_not_fit_is_left_out(timer: gpu.Timer) -> None:
    budget = gpu.Budget(time.monotonic() + 300, CASE.cache_bytes() - 1)
    assert not list(gpu.time_attention(timer, gpu.Rates(1e9, 1e12), [CASE], budget))


def test_a_baseline_that_differs_is_reported(
    timer: gpu.Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(inputs: AttentionInputs) -> Any:
        return lambda: inputs.arguments["query"] + 100

    monkeypatch.setitem(attention_baselines.BASELINES, "dense", wrong)
    budget = gpu.Budget(time.monotonic() + 300, 1 << 20)
    (result,) = gpu.time_attention(timer, gpu.Rates(1e9, 1e12), [CASE], budget)
    assert re.fullmatch(
        r"WRONG: it and the kernel differ by 1\.\de\+02", result.unavailable["dense"]
    )
    assert "dense" not in result.others


def test_claims_are_judged_by_their_worst_number() -> None:
    def attention(time_of_ours: float, causal: float, floor: float) -> gpu.Result:
        return gpu.Result(
            "tree_attention", MODELS[0].name, 16, 4096, 33, time_of_ours, floor, {"causal": causal}
        )

    results = [attention(110.0, 100.0, 90.0), attention(120.0, 100.0, 80.0)]
    results.append(gpu.Result("tree_attention", MODELS[0].name, 1, 512, 1, 9.0, 1.0))
    operators = ("build_super_tree", "accept_path", "select_budget", "commit_kv")
    results += [gpu.Result(op, "-", 64, 0, 9, 20.0, 1.0) for op in operators]
    price, share, of_step = gpu.claims(results, gpu.Rates(2 * gpu.PARAMETERS_8B / 4e-3, 1e15))
    assert (price["worst"], price["median"], price["met"]) == (1.2, pytest.approx(1.15), False)
    assert (share["worst"], share["met"]) == (80 / 120, False)
    assert share["count"] == 2, "a short context counts for no claim"
    assert (of_step["worst"], of_step["met"]) == (pytest.approx(80 / 4000), True)
    assert gpu.claims([], gpu.Rates(1.0, 1.0)) == []
