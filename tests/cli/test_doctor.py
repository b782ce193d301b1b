# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`echo-vllm doctor` and the command itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from echo_vllm import VLLM_VERSION, __version__
from echo_vllm.cli import app
from echo_vllm.cli import doctor as doctor_command
from echo_vllm.patching import PatchError, PatchState
from echo_vllm.patching.state import Condition, Report

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


@pytest.mark.full
def test_the_installation_that_the_tests_use_is_healthy() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    rows = ("echo-vllm", "vLLM", "torch", "patches", "extension", "vLLM plug-in")
    for what in (*rows, "operators on cpu", "operators on cuda"):
        assert what in result.output
    assert f"{VLLM_VERSION}" in result.output


def test_one_finding_with_a_remedy_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [
        doctor_command.Finding("one", "fine"),
        doctor_command.Finding("two", "broken [bold]", "mend it"),
    ]
    checks = tuple(lambda finding=finding: finding for finding in findings)
    monkeypatch.setattr(doctor_command, "CHECKS", checks)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    [line] = [line for line in result.output.splitlines() if "two" in line]
    assert "broken [bold]" in line
    assert "mend it" in line


def test_a_vllm_that_does_not_fit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(root: Path | None = None) -> None:
        raise PatchError("vLLM is not installed; install it.")

    monkeypatch.setattr(doctor_command, "find_installation", fail)
    for check in (doctor_command.check_vllm, doctor_command.check_patches):
        finding = check()
        assert finding.remedy == "vLLM is not installed; install it."


def test_builds_for_cuda_beside_torch_for_cpus_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.11.1+cpu"}
    monkeypatch.setattr(doctor_command, "_version", installed.get)
    finding = doctor_command.check_torch()
    assert finding.state == "2.13.0+cpu, but torchvision 0.28.0 are not builds for it"
    assert finding.remedy.startswith("run `pip uninstall torchvision`")
    installed["torchvision"] = "0.28.0+cpu"
    assert not doctor_command.check_torch().remedy


def test_patches_that_are_not_applied_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatchState, "inspect", lambda self: Report(Condition.PRISTINE, {}))
    finding = doctor_command.check_patches()
    assert finding.state == Condition.PRISTINE.value
    assert finding.remedy == "run `echo-vllm patch apply`"


def report(gpu: bool = False, **cuda: Any) -> dict[str, Any]:
    entry = {"op": "commit_kv", "name": "extension", "passed_over": {}}
    other = {"op": "accept_path", "name": "extension", "passed_over": {}}
    return {"gpu": gpu, "devices": {"cpu": [entry, other], "cuda": [{**entry, **cuda}, other]}}


def test_operators_name_their_implementation_and_why_not_a_better_one() -> None:
    finding = doctor_command.describe_operators("cpu", report())
    assert finding == doctor_command.Finding("operators on cpu", "extension for all")
    passed_over = {"extension": "no cuda kernel"}
    triton = report(True, name="triton", passed_over=passed_over)
    assert doctor_command.describe_operators("cuda", triton) == doctor_command.Finding(
        "operators on cuda",
        "triton for commit_kv, extension for accept_path; not extension: no cuda kernel",
    )


def test_the_reference_is_a_fault_where_there_is_a_device_only() -> None:
    slow = {"name": "reference", "passed_over": {"extension": "not built"}}
    assert doctor_command.describe_operators("cuda", report(True, **slow)).remedy
    finding = doctor_command.describe_operators("cuda", report(False, **slow))
    assert finding.state.startswith("no GPU here; with one: reference for commit_kv")
    assert not finding.remedy


def test_a_wrong_choice_of_operators_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHO_VLLM_OPS", "fast")
    finding = doctor_command.describe_operators(
        "cpu", doctor_command.report_operators.__wrapped__()
    )
    assert "ECHO_VLLM_OPS must be unset or one of extension, triton" in finding.state
    assert finding.remedy == "change or unset ECHO_VLLM_OPS"


def test_a_plug_in_that_is_not_registered_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ())
    finding = doctor_command.check_plugin()
    assert finding.state == "vllm.general_plugins not registered"
    assert finding.remedy


def test_the_version_names_both() -> None:
    output = subprocess.check_output(
        [sys.executable, "-m", "echo_vllm.cli", "--version"], cwd=ROOT, text=True
    )
    assert output == f"echo-vllm {__version__} for vLLM {VLLM_VERSION}\n"


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, echo_vllm, echo_vllm.config; "
        "assert not {'torch', 'vllm', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
