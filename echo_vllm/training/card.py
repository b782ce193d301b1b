# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What a head's folder says about the head: `training.json` for programs, README.md for people.

Both are written from the same facts: the train stage begins them, the eval stage adds its figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echo_vllm import atomic
from echo_vllm.training.work import TrainingError, read_json, unwritable, write_json

FILE_NAME = "training.json"
OURS = "Made by `echo-vllm train-drafter` with the library speculators."
"""Stands in every card that is written here; one without it is somebody's own, and stays."""


def add_facts(head: Path, **facts: Any) -> None:
    """Put facts into `training.json` and write the card anew, unless somebody else wrote it.

    Raises:
        TrainingError: a file cannot be read or written.
    """
    content = {**(read_json(head / FILE_NAME) or {}), **facts}
    write_json(head / FILE_NAME, content)
    card = head / "README.md"
    try:
        if not card.exists() or OURS in card.read_text(encoding="utf-8"):
            atomic.write_text(card, _card(head, content))
    except OSError as error:
        raise TrainingError(unwritable(card, error)) from None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def evaluation_rows(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row for each way to draft, prompt set and temperature."""
    return [
        [
            str(run["drafts"]),
            str(run["prompts"]),
            f"{run['temperature']:g}",
            f"{run['acceptance_length']:.2f}",
            ", ".join(f"{100 * share:.0f} %" for share in run["accepted_per_position"]),
            # Runs by an earlier version have none, and heads that do not tell their vocabulary.
            "-" if (share := run.get("in_draft_vocabulary")) is None else f"{100 * share:.1f} %",
        ]
        for run in runs
    ]


def _card(head: Path, facts: Mapping[str, Any]) -> str:
    target = facts.get("target", "unknown")
    parts = [
        "---",
        "tags: [eagle3, speculative-decoding]",
        "---",
        f"# EAGLE-3 draft head for {Path(str(target)).name}",
        "",
        f"{OURS} It has the layout that vLLM 0.32.0 loads by itself (`LlamaForCausalLMEagle3`): "
        "its method `eagle3`, or `echo`.",
        "",
    ]
    simple = {
        name: value
        for name, value in facts.items()
        if isinstance(value, (str, int, float)) or (isinstance(value, list) and _flat(value))
    }
    parts += [table(["", ""], [[name, _shown(value)] for name, value in simple.items()]), ""]
    for name in ("data", "settings"):
        if isinstance(facts.get(name), Mapping):
            rows = [[key, _shown(value)] for key, value in facts[name].items()]
            parts += [f"## {name.capitalize()}", "", table(["", ""], rows), ""]
    evaluation = facts.get("evaluation")
    if isinstance(evaluation, Mapping):
        header = [
            *("drafts", "prompts", "temperature", "acceptance length", "accepted at 1, 2, ..."),
            "tokens that can be drafted",
        ]
        parts += [
            "## Acceptance",
            "",
            f"In the real engine ({evaluation['engine']}), {evaluation['dtype']}, up to "
            f"{evaluation['max_tokens']} tokens an answer. The acceptance length counts the bonus "
            "token, so 1 means that no draft token was ever accepted.",
            "",
            table(header, evaluation_rows(evaluation["runs"])),
            "",
            f"    {evaluation['command']}",
            "",
        ]
    return "\n".join(parts)


def _flat(value: list[Any]) -> bool:
    return all(isinstance(item, (str, int, float)) for item in value)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(item)}" for key, item in value.items())
    return "-" if value is None else str(value)
