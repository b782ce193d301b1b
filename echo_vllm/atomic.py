# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Files that a reader, or a process that is killed, finds whole or as they were before.

Every file of the package that is written in one go is written here: to a new file beside it, which
is flushed to the disk and then takes its name. Journals and traces, which grow, are not.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(*paths: str | Path) -> Iterator[list[Path]]:
    """New files to write to; when the block ends without an error they take the places of `paths`.

    The new files end in `.new`, and get the permissions of what they replace. All are written
    before the first is renamed; of several, the last one is gone in between, so name the one last
    without which the others are not used: a kill can leave the set without it, but never a mixture
    of old and new.

    Raises:
        OSError: a file cannot be written. Whatever ends the block, the old files are still there.
    """
    targets = [Path(path) for path in paths]
    staged: list[Path] = []
    try:
        modes = []
        for target in targets:
            staged.append(_beside(target))
            modes.append(stat.S_IMODE((target if target.exists() else staged[-1]).stat().st_mode))
        yield staged
        for fresh, mode in zip(staged, modes, strict=True):
            fresh.chmod(mode)  # Some libraries make files that only the owner can read.
            _to_disk(fresh)
        if len(targets) > 1:
            targets[-1].unlink(missing_ok=True)
        for fresh, target in zip(staged, targets, strict=True):
            fresh.replace(target)
    finally:
        for fresh in staged:
            fresh.unlink(missing_ok=True)


def stage(path: str | Path, content: bytes) -> Path:
    """A new file beside `path` with `content` and its permissions, ready for `os.replace`.

    For whoever has to put many files in place, or take them back; else see `write_bytes`.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    target = Path(path)
    fresh = _beside(target)
    try:
        fresh.write_bytes(content)
        if target.exists():
            fresh.chmod(stat.S_IMODE(target.stat().st_mode))
        _to_disk(fresh)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    return fresh


def write_bytes(path: str | Path, content: bytes) -> None:
    """Give `path` this content.

    Raises:
        OSError: it cannot be written, and is as it was.
    """
    with replacing(path) as [fresh]:
        fresh.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, content: Mapping[str, Any] | list[Any], indent: int = 1) -> None:
    """`write_text` of JSON with a line end."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def _beside(target: Path) -> Path:
    """An empty file that nobody else has, with the permissions that new files get."""
    # Not with the target's suffix: what a kill leaves behind must not be taken for one of its kind.
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}.new")
    fresh.touch(exist_ok=False)
    return fresh


def _to_disk(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
