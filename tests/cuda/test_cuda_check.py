# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The CUDA sources compile without warnings and without spills.

The library that they make loads beside a CPU build of torch.

What did not change since an earlier run is not compiled again (.build/cuda-check).
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import cuda_check

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_every_kernel_compiles_and_none_spills() -> None:
    """For one of the three architectures of `make cuda-check`: no source differs between them, and
    each takes half a minute."""
    result = subprocess.run(
        [sys.executable, "scripts/cuda_check.py", "--link", "--archs", "90a"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if result.stdout.startswith("cuda-check: skipped"):
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    assert "sm_90a" in result.stdout
    library = re.search(r"(\S+_C_cuda\.abi3\.so): ([\d.]+) MiB", result.stdout)
    assert library is not None
    assert float(library[2]) < 40, "the CUDA library has grown"
    check = [sys.executable, "-c", LOAD_BESIDE_A_CPU_BUILD, library[1]]
    loaded = subprocess.run(check, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr


LOAD_BESIDE_A_CPU_BUILD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
ops = ["tree_attention", "suffix_attention", "merge_attention", "commit_kv", "build_super_tree",
       "accept_path", "select_budget", "sample_path"]
for op in ops:
    for device in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"echo_vllm::{op}", device), op
parents, bounds = (torch.tensor(x, dtype=torch.int32) for x in ([-1, 0], [0, 2]))
mask, depths = torch.ops.echo_vllm.build_super_tree(parents, bounds, 1)
assert mask.tolist() == [[1], [3], [7]] and depths.tolist() == [0, 1, 2]
"""


@pytest.fixture
def unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A source with headers, and a compiler that writes down that it ran."""
    # What build_settings replaces is put back.
    setuptools: Any = importlib.import_module("setuptools")
    monkeypatch.setattr(setuptools, "setup", setuptools.setup)
    monkeypatch.setattr(sys, "path", [*sys.path])
    settings = cuda_check.build_settings()
    monkeypatch.setattr(cuda_check, "ROOT", tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "deep.h").write_text("int deep;")
    (tmp_path / "near.h").write_text('#pragma once\n#include "deep.h"\n#include <vector>\n')
    (tmp_path / "kernel.cu").write_text('#include "near.h"\n')
    script = 'echo ran >> runs; echo "$@" | grep -q -- --fail && exit 1; touch "${@: -1}"; echo log'
    command = ["bash", "-c", script, "nvcc"]
    source = tmp_path / "kernel.cu"
    inputs = settings["sources_of"](source)
    assert [path.name for path in inputs] == ["deep.h", "kernel.cu", "near.h"]
    return cuda_check.Unit(source, inputs, command, tmp_path / "out", "13.0")


def runs(unit: Any) -> int:
    return len((unit.source.parent / "runs").read_text().splitlines())


def test_only_what_changed_is_compiled_again(unit: Any) -> None:
    assert unit.compile() == (0, "log\n", False)
    assert unit.compile() == (0, "log\n", True)
    for changed in ("deep.h", "kernel.cu"):
        path = unit.source.parent / changed
        path.write_text(path.read_text() + "\n// changed")
        assert unit.compile() == (0, "log\n", False)
        assert unit.compile() == (0, "log\n", True)
    newer = dataclasses.replace(unit, compiler="13.1")
    assert newer.compile() == (0, "log\n", False)
    other = dataclasses.replace(unit, command=[*unit.command, "-O1"])
    assert other.compile() == (0, "log\n", False)
    assert runs(unit) == 5
    assert len(list(unit.folder.iterdir())) == 2, "what is stale goes"


def test_what_failed_is_compiled_again(unit: Any) -> None:
    failing = dataclasses.replace(unit, command=[*unit.command, "--fail"])
    assert failing.compile() == (1, "", False)
    assert failing.compile() == (1, "", False)
    assert runs(unit) == 2
    assert not list(unit.folder.iterdir())
