# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the commands share: messages on stderr, models by folder or name, files of step costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from echo_vllm.forecast import StepCost
    from echo_vllm.offline.recording import Recording

errors = Console(stderr=True, soft_wrap=True, highlight=False)


def note(sentence: str) -> None:
    errors.print(Text(sentence))


def fail(sentence: str, status: int = 2) -> NoReturn:
    """What is wrong and what to do, in one line; status 2 is for arguments that make no sense."""
    note(f"error: {sentence}")
    raise typer.Exit(status)


def last_line(error: BaseException) -> str:
    """vLLM's validation errors put their reason there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def located(model: str) -> str:
    """A folder by its absolute path, so that engines elsewhere find it; a name as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def read_step_cost(option: str, path: Path) -> StepCost:
    """A step cost, or a file of the engine's cache, which has one under a key of its own."""
    from echo_vllm.forecast import CostError, StepCost

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{option} {path} cannot be read ({error}); give a file of the cost cache")
    try:
        return StepCost.from_dict(data.get("cost", data))
    except (CostError, AttributeError) as error:
        fail(f"{option} {path} is not a step cost: {error}")


def record_prompts(recording: Recording, conversations: list[list[str]]) -> tuple[int, int]:
    """Record the engine on the first turns that fit; returns (prompts answered, tokens)."""
    from echo_vllm.offline.bench.prompts import Tokenizer
    from echo_vllm.offline.recording import record

    try:
        tokenizer = Tokenizer(recording.model)
    except (ValueError, OSError) as error:
        fail(f"MODEL has no tokenizer that can be loaded: {last_line(error)}")
    room = recording.max_model_len - recording.max_tokens
    encoded = [tokenizer.encode(turns[:1]) for turns in conversations]
    fitting = [ids for ids in encoded if len(ids) <= room]
    if not fitting:
        fail(
            f"no prompt leaves room for {recording.max_tokens} tokens in --max-model-len "
            f"{recording.max_model_len}; raise it, or lower --tokens"
        )
    if len(fitting) < len(encoded):
        note(f"note: {len(encoded) - len(fitting)} prompts are too long")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("prompts"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors) as progress:
        task = progress.add_task("starting the engine", total=len(fitting))
        try:
            tokens = record(
                recording,
                fitting,
                lambda: progress.update(task, advance=1, description="recording"),
            )
        except (ValueError, OSError) as error:
            progress.stop()
            fail(f"the engine cannot record: {last_line(error)}")
    return len(fitting), tokens
