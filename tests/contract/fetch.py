# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The Python files of a published wheel of vLLM, without an installation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".build" / "vllm"


class FetchError(Exception):
    """Why a wheel could not be had, as one sentence."""


def find_pip() -> list[str]:
    """A pip that can download; a virtual environment made by uv has none of its own.

    Raises:
        FetchError: if there is none.
    """
    programs = [found for name in ("pip3", "pip") if (found := shutil.which(name))]
    for candidate in ([sys.executable, "-m", "pip"], *([program] for program in programs)):
        if subprocess.run([*candidate, "--version"], capture_output=True).returncode == 0:
            return candidate
    raise FetchError("no pip was found to download with; install python3-pip")


def fetch_sources(distribution: str, version: str) -> Path:
    """The folder with the package and its metadata, downloaded unless it is there already.

    Raises:
        FetchError: if pip cannot download it in ten minutes.
    """
    folder = KEPT / f"{distribution}-{version}"
    if folder.is_dir():
        return folder
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT) as temporary:
        command = [
            *(*find_pip(), "download", "--quiet", "--no-deps", "--only-binary=:all:"),
            *("--python-version", "3.12", "--platform", "manylinux_2_28_x86_64"),
            *("--dest", temporary, f"{distribution}=={version}"),
        ]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            raise FetchError(f"{distribution} {version} did not come within ten minutes") from None
        if run.returncode:
            raise FetchError(run.stderr.strip().splitlines()[-1])
        [wheel] = Path(temporary).glob("*.whl")
        unpacked = Path(temporary) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith(".py") or ".dist-info/" in n]
            archive.extractall(unpacked, names)
        os.replace(unpacked, folder)
    return folder
