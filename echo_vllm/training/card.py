# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What a head's folder says about the head: `training.json` for programs, README.md for people.

Both are written from the same facts: the train stage begins them, the eval stage adds its figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from echo_vllm import atomic
from echo_vllm.training.work import read_json, write_json, writing

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
    with writing(card):
        if not card.exists() or OURS in card.read_text(encoding="utf-8"):
            atomic.write_text(card, _card(content))


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


def _card(facts: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["shown"] = _shown
    environment.filters["evaluation_rows"] = evaluation_rows
    return environment.get_template("card.md.j2").render(
        ours=OURS,
        target=Path(str(facts.get("target", "unknown"))).name,
        simple={
            name: value
            for name, value in facts.items()
            if all(
                isinstance(item, (str, int, float))
                for item in (value if isinstance(value, list) else [value])
            )
        },
        sections={
            name: facts[name]
            for name in ("data", "settings")
            if isinstance(facts.get(name), Mapping)
        },
        evaluation=facts.get("evaluation"),
    )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(item)}" for key, item in value.items())
    return "-" if value is None else str(value)
