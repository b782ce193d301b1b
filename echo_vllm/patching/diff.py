# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A strict reader and applier of unified diffs.

The series is made for one release of vLLM, so every context line must match: no fuzz, no new and
no deleted files. A hunk may stand at another line than it says, because the CPU and the CUDA
distribution of a release differ a little, but only where it fits in exactly one place. What does
not fit is an error, never a guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class PatchError(Exception):
    """Why nothing was changed, as one sentence with what to do."""


@dataclass(frozen=True)
class Hunk:
    """Consecutive lines of one file, without their line ends.

    Attributes:
        start: 1-based line number of the first old line.
        old: the lines before, context and removed lines.
        new: the lines after, context and added lines.
    """

    start: int
    old: tuple[str, ...]
    new: tuple[str, ...]


@dataclass(frozen=True)
class FileDiff:
    """The hunks of one file, in order; `path` is relative to the folder that holds vLLM."""

    path: str
    hunks: tuple[Hunk, ...]

    def apply(self, text: str) -> str:
        """The patched text.

        Raises:
            PatchError: if the lines of a hunk are not found, or found more than once.
        """
        lines = text.split("\n")
        patched: list[str] = []
        done = 0
        for number, hunk in enumerate(self.hunks, start=1):
            begin = _locate(hunk, lines, done)
            if begin is None:
                raise PatchError(
                    f"hunk {number} of {self.path} (line {hunk.start}) does not fit in exactly "
                    "one place"
                )
            patched += lines[done:begin]
            patched += hunk.new
            done = begin + len(hunk.old)
        return "\n".join(patched + lines[done:])


def _locate(hunk: Hunk, lines: list[str], done: int) -> int | None:
    """Where the old lines of a hunk stand after the first `done` lines, if that is unambiguous."""
    size = len(hunk.old)
    found = [
        begin
        # What stands after the last line end is not a line.
        for begin in range(done, len(lines) - size)
        if lines[begin] == hunk.old[0] and tuple(lines[begin : begin + size]) == hunk.old
    ]
    return found[0] if len(found) == 1 else None


def parse_diff(text: str) -> tuple[FileDiff, ...]:
    """Read the file diffs of a patch; whatever stands before the first `---` line is its header.

    Raises:
        PatchError: for anything but changes of existing text files under `a/` and `b/`.
    """
    lines = text.split("\n")
    files: list[FileDiff] = []
    index = 0
    while index < len(lines):
        if not lines[index].startswith("--- a/"):
            if files and lines[index].strip():
                raise PatchError(f"line {index + 1} of a patch is not part of a diff")
            index += 1
            continue
        path = lines[index].removeprefix("--- a/").split("\t")[0]
        if index + 1 >= len(lines) or lines[index + 1].split("\t")[0] != f"+++ b/{path}":
            raise PatchError(f"the diff of {path} does not change that file in place")
        index += 2
        hunks: list[Hunk] = []
        while index < len(lines) and (match := _HUNK.match(lines[index])):
            hunk, index = _parse_hunk(lines, index, match)
            hunks.append(hunk)
        if not hunks:
            raise PatchError(f"the diff of {path} has no hunk")
        files.append(FileDiff(path, tuple(hunks)))
    if not files:
        raise PatchError("a patch holds no diff")
    return tuple(files)


def _parse_hunk(lines: list[str], index: int, match: re.Match[str]) -> tuple[Hunk, int]:
    start, old_count, _, new_count = (int(group or 1) for group in match.groups())
    if not old_count:
        raise PatchError(f"the hunk in line {index + 1} of a patch has no line to stand at")
    old: list[str] = []
    new: list[str] = []
    index += 1
    while len(old) < old_count or len(new) < new_count:
        line = lines[index] if index < len(lines) else ""
        kind, rest = line[:1], line[1:]
        if kind not in (" ", "-", "+"):
            raise PatchError(f"line {index + 1} of a patch cannot stand in a hunk")
        if kind != "+":
            old.append(rest)
        if kind != "-":
            new.append(rest)
        index += 1
    if (len(old), len(new)) != (old_count, new_count):
        raise PatchError(f"the hunk before line {index + 1} of a patch has a wrong length")
    return Hunk(start, tuple(old), tuple(new)), index
