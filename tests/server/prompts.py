# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The project's own prompts, `tests/data/prompts.jsonl`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "data" / "prompts.jsonl"


@dataclass(frozen=True)
class Prompt:
    """One line of the file."""

    id: int
    category: str
    prompt: str


def read_prompts() -> list[Prompt]:
    """All prompts, in the order of the file."""
    return [Prompt(**json.loads(line)) for line in FILE.read_text("utf-8").splitlines()]
