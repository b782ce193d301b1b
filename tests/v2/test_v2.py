# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Runs the short part of the V2 tests in a process that has Triton; `make test-v2` runs all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.v2.on_cpu import ROOT, environment


def run_pytest(*arguments: str) -> None:
    try:
        v2 = environment()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not full"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments],
        cwd=ROOT,
        env={**os.environ, **v2},
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]


def test_the_emulated_graph_the_paths_of_trees_and_what_is_drawn() -> None:
    files = [f"tests/v2/{name}.py" for name in ("graph", "paths", "drawn")]
    run_pytest(*files, "-k", "not host_waits")


@pytest.mark.full
def test_vllms_own_chain_on_v2() -> None:
    run_pytest("tests/v2/stock.py", "-k", "eagle3")


@pytest.mark.full
def test_trees_on_v2() -> None:
    files = ("trees", "budget", "learning", "drawn", "grammar", "tracing", "full")
    run_pytest(*(f"tests/v2/{name}.py" for name in files))
