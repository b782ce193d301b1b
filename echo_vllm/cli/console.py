# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the commands share: lines on stdout, messages on stderr, what options and files say."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from echo_vllm.conversations import Chat, PromptError, read_conversations, shuffled
from echo_vllm.forecast import CostError, StepCost

Target = Annotated[str, typer.Argument(help="Target: a folder or a name.", show_default=False)]
Drafter = Annotated[str, typer.Option(help="EAGLE-3 head: a folder or a name.", show_default=False)]
Number = TypeVar("Number", int, float)
# Not wrapped at the width of a terminal, so that paths and sentences can be copied and searched.
out = Console(soft_wrap=True, highlight=False)
errors = Console(stderr=True, soft_wrap=True, highlight=False)


def say(line: str) -> None:
    out.print(Text(line))


def note(sentence: str) -> None:
    errors.print(Text(sentence))


def fail(sentence: str, status: int = 2) -> NoReturn:
    """What is wrong and what to do, in one line; status 2 is for arguments that make no sense."""
    note(f"error: {sentence}")
    raise typer.Exit(status)


@contextlib.contextmanager
def refusing(*kinds: type[Exception], status: int = 2) -> Iterator[None]:
    """Fail with the sentence of an error of these kinds."""
    try:
        yield
    except kinds as error:
        fail(str(error), status)


def last_line(error: BaseException) -> str:
    """vLLM's validation errors put their reason there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def located(model: str) -> str:
    """A folder by its absolute path, so that engines elsewhere find it; a name as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def numbers(
    option: str, text: str, kind: Callable[[str], Number], least: float
) -> tuple[Number, ...]:
    """`1,2,4` without repetitions, of an option."""
    try:
        values = tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        values = ()
    if not values or not all(least <= value < float("inf") for value in values):
        what = "whole numbers" if kind is int else "numbers"
        fail(f"{option} must be {what} from {least:g} on, with commas between, got {text!r}")
    return values


def read_prompts(paths: Sequence[Path]) -> list[list[str]]:
    """The conversations of all files, shuffled, always in the same way."""
    with refusing(PromptError):
        return shuffled(read_conversations(*paths))


def counting(unit: str) -> Progress:
    """A bar on stderr that counts."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=errors,
    )


def read_step_cost(option: str, path: Path) -> StepCost:
    """A step cost, or a file of the engine's cache, which has one under a key of its own."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{option} {path} cannot be read ({error}); give a file of the cost cache")
    try:
        return StepCost.from_dict(data.get("cost", data))
    except (CostError, AttributeError) as error:
        fail(f"{option} {path} is not a step cost: {error}")


def record_prompts(
    model: str,
    speculation: dict[str, Any],
    conversations: list[list[str]],
    *,
    min_context: int = 0,
    **options: Any,
) -> tuple[int, int]:
    """Record the engine on the first turns that fit; returns (prompts answered, tokens).

    Args:
        model, speculation, options: of `offline.recording.record`.
        conversations: user's turns.
        min_context: tokens that a prompt must have; where it has fewer, a later turn is recorded.
    """
    from echo_vllm.offline.recording import record

    tokens, longest = options["max_tokens"], options["max_model_len"]
    try:
        chat = Chat(model)
        if min_context:
            encoded = _long_prompts(model, chat, conversations, min_context, options)
        else:
            encoded = [chat.encode(turns[:1]) for turns in conversations]
    except PromptError as error:
        fail(str(error))
    fitting = [ids for ids in encoded if len(ids) <= longest - tokens]
    if not fitting:
        fail(
            f"no prompt leaves room for {tokens} tokens in --max-model-len {longest}; raise it, or "
            "lower --tokens"
        )
    if len(fitting) < len(encoded):
        note(f"note: {len(encoded) - len(fitting)} prompts are too long")
    with counting("prompts") as progress:
        task = progress.add_task("starting the engine", total=len(fitting))
        try:
            generated = record(
                model,
                speculation,
                fitting,
                lambda: progress.update(task, advance=1, description="recording"),
                **options,
            )
        except (ValueError, OSError) as error:
            progress.stop()
            fail(f"the engine cannot record: {last_line(error)}")
    return len(fitting), generated


def _long_prompts(
    model: str,
    chat: Chat,
    conversations: list[list[str]],
    min_context: int,
    options: dict[str, Any],
) -> list[list[int]]:
    from echo_vllm.offline.trace.chats import long_prompts

    with errors.status("answering the turns before"):
        prompts = long_prompts(
            model,
            chat,
            conversations,
            min_context=min_context,
            max_tokens=options["max_tokens"],
            dtype=options["dtype"],
            max_model_len=options["max_model_len"],
            max_num_seqs=options["concurrency"],
            kv_cache_memory_bytes=options["kv_cache_bytes"],
        )
    if not prompts:
        fail(
            f"no prompt has --min-context {min_context} tokens; lower it, raise --tokens, or give "
            "conversations of more turns"
        )
    if len(prompts) < len(conversations):
        note(f"note: {len(conversations) - len(prompts)} conversations have too few turns")
    return prompts
