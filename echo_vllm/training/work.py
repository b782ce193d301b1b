# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The files of a training: where they lie, and what is said where one cannot be used."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from echo_vllm import atomic

T = TypeVar("T")


class TrainingError(ValueError):
    """One sentence on what is wrong and what to do."""


@dataclass(frozen=True)
class Work:
    """The folder beside a head that holds what its training needs again after an interruption.

    It is not inside the head's folder, so that this holds nothing but the head, and can be removed
    when the head is done.
    """

    head: Path

    @property
    def folder(self) -> Path:
        return self.head.with_name(self.head.name + ".work")

    @property
    def data(self) -> Path:
        """What the data stage has made: settings, counts. There only once the data are whole."""
        return self.folder / "data.json"

    @property
    def data_plan(self) -> Path:
        """The settings with which the data stage was begun."""
        return self.folder / "data_plan.json"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def prompts(self) -> Path:
        """The prompts that the target has written itself."""
        return self.folder / "self_prompts.jsonl"

    @property
    def dataset(self) -> Path:
        """The rows as speculators reads them, an Arrow dataset, and `hidden_states/` in it."""
        return self.folder / "dataset"

    @property
    def train_plan(self) -> Path:
        return self.folder / "train_plan.json"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def make(self) -> None:
        """Make the folder.

        Raises:
            TrainingError: it cannot be made.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def writing(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """What writes to `path`, and so may raise OSErrors, or errors of `kinds`.

    Raises:
        TrainingError: in place of these.
    """
    kinds = (OSError, *kinds)
    try:
        yield
    except kinds as error:
        where = getattr(error, "filename", None) or path
        raise TrainingError(
            f"{where} cannot be written ({getattr(error, 'strerror', None) or error}); free or "
            "choose another place, and run the same command with --resume"
        ) from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that is there whole or as it was before.

    Raises:
        TrainingError: it could not be written.
    """
    with writing(path):
        atomic.write_json(path, content)


def whole_lines(path: Path, parse: Callable[[str], T]) -> list[T]:
    """Lines of a file that a killed process may have left, which is cut behind the last whole one;
    none if there is no file.

    Raises:
        TrainingError: it cannot be read.
    """
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        return [parse(line) for line in whole.decode().splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); remove it and run again") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None if there is none.

    Raises:
        TrainingError: the file is not what it should be.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); remove it and run again") from None
    if not isinstance(content, dict):
        raise TrainingError(f"{path} holds no JSON object; remove it and run again")
    return content
