# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Which implementation runs an operator, and what is said where none of the good ones does."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from echo_vllm import ops
from echo_vllm.ops import dispatch, reference

OPERATORS = {
    "tree_attention", "suffix_attention", "merge_attention", "commit_kv", "build_super_tree",
    "accept_path", "select_budget", "sample_path",
}  # fmt: skip
FOREST = (torch.tensor([-1, 0], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No cached choice, none forced, and none left behind."""
    monkeypatch.delenv("ECHO_VLLM_OPS", raising=False)
    dispatch.implementation.cache_clear()
    yield
    dispatch.implementation.cache_clear()


def break_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("the library is not built")

    monkeypatch.setattr(dispatch, "load_library", refuse)


def test_the_table_has_every_operator_and_ends_in_the_reference() -> None:
    assert set(dispatch.ORDER) == OPERATORS
    for op, orders in dispatch.ORDER.items():
        assert set(orders) == set(dispatch.DEVICES)
        for order in orders.values():
            assert order[0] == "extension"
            assert "reference" in order
            assert set(order) <= set(dispatch.NAMES)
        assert callable(getattr(reference, op))


def test_the_extension_runs_every_operator_on_a_cpu() -> None:
    for op in OPERATORS:
        assert dispatch.choose(op, "cpu") == dispatch.Choice("extension", {})
        assert dispatch.implementation(op, False) == getattr(torch.ops.echo_vllm, op).default


def test_one_implementation_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    break_the_library(monkeypatch)
    monkeypatch.setenv("ECHO_VLLM_OPS", "reference")
    assert dispatch.implementation("build_super_tree", False) is reference.build_super_tree
    mask, _ = ops.build_super_tree(*FOREST, 1)
    assert mask.tolist() == [[1], [3], [7]]


def test_a_wrong_value_names_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHO_VLLM_OPS", "fast")
    message = (
        "ECHO_VLLM_OPS must be unset or one of extension, triton, flash, xformers, reference, "
        "got 'fast'"
    )
    with pytest.raises(ValueError, match=message):
        ops.build_super_tree(*FOREST, 1)


def test_a_forced_one_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHO_VLLM_OPS", "xformers")
    with pytest.raises(RuntimeError, match=r"=xformers: tree_attention .* on cpu: xformers has no"):
        dispatch.implementation("tree_attention", False)
    assert dispatch.choose("commit_kv", "cpu").name == "extension", "xFormers has no commit_kv"

    monkeypatch.setenv("ECHO_VLLM_OPS", "triton")
    monkeypatch.setattr(dispatch, "_is_installed", lambda package: False)
    with pytest.raises(RuntimeError, match=r"ECHO_VLLM_OPS=triton: .* triton is not installed"):
        dispatch.implementation("commit_kv", False)
    monkeypatch.setattr(dispatch, "_is_installed", lambda package: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="only in its interpreter"):
        dispatch.implementation("commit_kv", False)
    assert dispatch.choose("select_budget", "cpu").name == "extension"


def test_without_the_library_the_reference_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    break_the_library(monkeypatch)
    with caplog.at_level(logging.WARNING, "echo_vllm.ops.dispatch"):
        for _ in range(3):
            ops.build_super_tree(*FOREST, 1)
    [record] = caplog.records
    assert "build_super_tree on cpu runs on the plain-torch reference" in record.message
    assert "the library is not built" in record.message


def test_on_a_gpu_the_next_best_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def sources(**reasons: str) -> dict[str, dispatch._Source]:
        return {
            name: dispatch._Source(
                lambda op, device, name=name: reasons.get(name, ""),  # type: ignore[misc]
                lambda op: getattr(reference, op),
            )
            for name in dispatch.NAMES
        }

    monkeypatch.setattr(dispatch, "_SOURCES", sources(extension="no compiler"))
    assert dispatch.choose("commit_kv", "cuda") == dispatch.Choice(
        "triton", {"extension": "no compiler"}
    )
    assert dispatch.choose("select_budget", "cuda").name == "reference"
    monkeypatch.setattr(dispatch, "_SOURCES", sources(extension="no compiler", triton="gone"))
    assert dispatch.choose("tree_attention", "cuda").name == "flash"
    monkeypatch.setattr(
        dispatch, "_SOURCES", sources(extension="no compiler", triton="gone", flash="gone")
    )
    assert dispatch.choose("tree_attention", "cuda").name == "xformers"
    assert dispatch.choose("commit_kv", "cuda").name == "reference"


def test_what_lacks_a_feature_is_passed_over_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everything = {
        name: dispatch._Source(lambda op, device: "", lambda op: getattr(reference, op))
        for name in dispatch.NAMES
    }
    everything["extension"] = dispatch._Source(
        lambda op, device: "no compiler", lambda op: getattr(reference, op)
    )
    monkeypatch.setattr(dispatch, "_SOURCES", everything)
    choice = dispatch.choose("tree_attention", "cuda", ("fp8 cache",))
    assert choice.name == "xformers"
    assert choice.passed_over["triton"].startswith("fp8 cache: its kernels read caches of")
    assert choice.passed_over["flash"].startswith("fp8 cache: FlashAttention reads")
    assert dispatch.choose("tree_attention", "cuda", dispatch.FEATURES).name == "reference"
    assert dispatch.choose("tree_attention", "cuda", ("window",)).name == "triton"
    assert dispatch.choose("tree_attention", "cuda", ("float32",), "flash").name == "triton"
    # One that is asked for first goes first, where it can.
    assert dispatch.choose("tree_attention", "cuda", (), "flash").name == "flash"
    assert dispatch.choose("tree_attention", "cuda", ("window",), "flash").name == "triton"
    monkeypatch.setenv("ECHO_VLLM_OPS", "flash")
    with pytest.raises(RuntimeError, match=r"=flash: tree_attention .* window: FlashAttention"):
        dispatch.choose("tree_attention", "cuda", ("window",))


def test_every_feature_that_is_lacked_is_one() -> None:
    assert set(dispatch.LACKS) < set(dispatch.NAMES)
    assert {feature for lacks in dispatch.LACKS.values() for feature in lacks} == set(
        dispatch.FEATURES
    )


def test_the_report_is_plain_data(monkeypatch: pytest.MonkeyPatch) -> None:
    report = dispatch.report()
    assert set(report) == set(dispatch.DEVICES)
    assert {entry["op"] for entry in report["cpu"]} == OPERATORS
    assert all(entry["name"] == "extension" for entry in report["cpu"])
    monkeypatch.setenv("ECHO_VLLM_OPS", "fast")
    assert all("ECHO_VLLM_OPS" in entry["error"] for entry in dispatch.report()["cuda"])
