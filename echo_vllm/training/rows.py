# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The data stage's product: rows of token ids with the target's answers marked.

A row is one JSON line with `input_ids` and `loss_mask` (1 on the answer's tokens), the format that
speculators takes without rendering anything anew, and says which conversation and turn it is. The
file is written line by line under another name and gets its own when it is whole. A line that a
killed process left half-written is dropped when the file is opened again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from echo_vllm.training.work import TrainingError, whole_lines, writing


@dataclass(frozen=True)
class Row:
    """A prompt and the target's answer.

    Attributes:
        conversation: number of the conversation; held-out rows are whole conversations.
        turn: of it, from 0.
        temperature: at which the answer was sampled; None if that is not known.
        input_ids: token ids of the prompt, through the chat template, and of the answer.
        loss_mask: 1 for each token of the answer, 0 for the others; as long as input_ids.
    """

    conversation: int
    turn: int
    temperature: float | None
    input_ids: list[int]
    loss_mask: list[int]

    @property
    def prompt_length(self) -> int:
        """Tokens before the answer."""
        return self.loss_mask.index(1)


def read_rows(path: Path) -> list[Row]:
    """The rows of a whole file.

    Lines without `conversation` count as a conversation each.

    Raises:
        TrainingError: the file cannot be read, a line is no row, or there is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); give a file of JSON lines") from None
    rows = [_parse(line, number, path) for number, line in enumerate(lines) if line.strip()]
    if not rows:
        raise TrainingError(f"{path} holds no row; it must have lines with input_ids and loss_mask")
    return rows


def _parse(line: str, number: int, path: Path) -> Row:
    try:
        entry = json.loads(line)
        ids, mask = entry["input_ids"], entry["loss_mask"]
        if len(ids) != len(mask) or not all(type(token) is int for token in ids):
            raise ValueError("input_ids and loss_mask must be lists of integers, equally long")
        if set(mask) - {0, 1} or 1 not in mask:
            raise ValueError("loss_mask must be of 0 and 1, with at least one 1")
        return Row(
            conversation=int(entry.get("conversation", number)),
            turn=int(entry.get("turn", 0)),
            temperature=entry.get("temperature"),
            input_ids=ids,
            loss_mask=mask,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrainingError(
            f"{path}, line {number + 1}, is no row ({error}); a row has input_ids and loss_mask"
        ) from None


class RowWriter:
    """Appends rows to a file that is not whole yet."""

    def __init__(self, path: Path) -> None:
        """Open the file, dropping a last line that is not whole.

        Raises:
            TrainingError: the file cannot be opened, or another line is not whole.
        """
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        lines = whole_lines(self.partial, str)
        self.rows = [_parse(line, number, self.partial) for number, line in enumerate(lines)]
        with writing(self.partial):
            self._file: TextIO = self.partial.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Add a row; it is on its way to the disk when this returns.

        Raises:
            TrainingError: the disk is full, or the like.
        """
        fields: dict[str, Any] = asdict(row)
        with writing(self.partial):
            self._file.write(json.dumps(fields, separators=(",", ":")) + "\n")
            self._file.flush()
        self.rows.append(row)

    def finish(self) -> None:
        """Give the file its name."""
        with writing(self.path):
            self._file.close()
            self.partial.replace(self.path)
