# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Prompts that users give in files: JSON lines with `prompt`, or `turns` for several."""

from __future__ import annotations

import json
from pathlib import Path

REMEDY = 'each line must be like {"prompt": "..."} or {"turns": ["...", "..."]}'


def read_conversations(path: Path) -> list[list[str]]:
    """The user's turns of every line.

    Raises:
        ValueError: the file cannot be read, a line has neither, or there is none; one sentence that
            begins with the path.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); give a file of JSON lines"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; give a file of JSON lines") from None
    conversations = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}, is not JSON ({error.msg}); {REMEDY}"
            ) from None
        turns = entry.get("turns", [entry.get("prompt")]) if isinstance(entry, dict) else None
        if (
            not isinstance(turns, list)
            or not turns
            or not all(isinstance(turn, str) and turn.strip() for turn in turns)
        ):
            raise ValueError(f"{path}, line {number}, holds no prompt; {REMEDY}")
        conversations.append(turns)
    if not conversations:
        raise ValueError(f"{path} holds no prompt; {REMEDY}")
    return conversations
