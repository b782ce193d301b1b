# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`echo-vllm doctor` and the command itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
    for what in ("echo-vllm", "vLLM", "torch", "patches", "extension", "vLLM plug-ins"):
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


def test_patches_that_are_not_applied_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatchState, "inspect", lambda self: Report(Condition.PRISTINE, {}))
    finding = doctor_command.check_patches()
    assert finding.state == Condition.PRISTINE.value
    assert finding.remedy == "run `echo-vllm patch apply`"


def test_plug_ins_that_are_not_registered_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ())
    finding = doctor_command.check_plugins()
    assert "vllm.general_plugins and vllm.stat_logger_plugins not registered" in finding.state
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
