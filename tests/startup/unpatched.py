# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A vLLM as published beside the patched one of the environment, for a process with PYTHONPATH."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from echo_vllm.patching import Condition, PatchState, find_installation, load_series
from echo_vllm.patching.state import STATE_FOLDER


def write_unpatched_vllm(folder: Path) -> Path:
    """Copy the installed vLLM by hard links and revert the copy, which leaves the installed files
    alone: the patch tool never writes in place. Returns `folder`."""
    installed = find_installation().root
    for name in ("vllm", STATE_FOLDER, *(path.name for path in installed.glob("vllm*.dist-info"))):
        shutil.copytree(installed / name, folder / name, copy_function=_link)
    state = PatchState(find_installation(folder), load_series())
    condition, restored = state.revert()
    assert condition is Condition.APPLIED
    assert restored
    # As published, the command line looks for the version of a distribution called "vllm".
    metadata = folder / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    return folder


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another file system
        shutil.copy2(source, target)
