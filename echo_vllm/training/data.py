# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The data stage: prompts, and the target's answers to them, as rows.

A head learns to guess what its target would say, so all answers are the target's own: three
quarters greedy, one quarter sampled, because both are asked for when it is served. An engine that
answers comes from outside; nothing here knows vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from echo_vllm.conversations import Chat, Question, next_turn, read_conversations
from echo_vllm.training.rows import Row, RowWriter
from echo_vllm.training.self_prompts import Unseen, openings
from echo_vllm.training.work import (
    TrainingError,
    Work,
    read_json,
    whole_lines,
    write_json,
    writing,
)

SAMPLED = 4
"""One conversation in so many is sampled, the others are greedy."""
TEMPERATURE = 0.8
PROMPT_TEMPERATURE = 1.0
PROMPT_TOP_P = 0.95
ATTEMPTS = 8
"""Prompts that a target may write for each that is wanted, before it counts as repeating itself."""


@dataclass(frozen=True)
class DataSettings:
    """What the data depend on; the same again is needed to resume.

    Attributes:
        target: a folder or a name.
        dtype: as in vLLM.
        prompts: files of JSON lines.
        self_prompts: how many prompts the target writes itself.
        prompt_tokens: of such a prompt at most.
        max_tokens: of an answer at most.
        chat_template: a file, or None for the tokenizer's own.
        max_model_len: tokens of a request; None for the target's own.
        seed: of sampling.
    """

    target: str
    dtype: str
    prompts: list[str]
    self_prompts: int
    prompt_tokens: int
    max_tokens: int
    chat_template: str | None
    max_model_len: int | None
    seed: int


class Engine(Protocol):
    """What answers: `echo_vllm.offline.engine.LocalEngine`, or a test's own."""

    @property
    def max_model_len(self) -> int: ...

    def answer(
        self,
        questions: Iterable[Question],
        on_answer: Callable[[Question, list[int], bool], Question | None],
    ) -> None: ...


def check_plan(plan: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Begin a stage with these settings, or go on with one that was begun with the same.

    Raises:
        TrainingError: there is an unfinished stage and `resume` is not set, or its settings differ.
    """
    begun = read_json(plan)
    if begun is None:
        write_json(plan, settings)
    elif not resume:
        raise TrainingError(
            f"{plan.parent} holds an unfinished run; go on with --resume, or remove that folder"
        )
    else:
        for name, value in settings.items():
            if begun.get(name) != value:
                raise TrainingError(
                    f"--resume goes on with {name} {begun.get(name)!r} of {plan}, but {value!r} "
                    "was asked for; give the same again, or remove that folder and start anew"
                )


def make_data(
    settings: DataSettings,
    work: Work,
    chat: Chat,
    start_engine: Callable[[], Engine],
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Write `work.rows`, going on where an earlier run stopped; returns what data.json holds.

    Args:
        settings: of the stage.
        work: where.
        chat: of the target.
        start_engine: called once, after the prompts have been read.
        on_progress: called with what is made, how many are done, and of how many.

    Raises:
        TrainingError, PromptError: the prompts do not do, or a file cannot be written.
    """
    conversations = read_conversations(*map(Path, settings.prompts))
    engine = start_engine()
    if settings.self_prompts:
        written = _write_prompts(settings, work, chat, engine, on_progress)
        conversations += [[prompt] for prompt in written]
    unseen = Unseen()
    unique = [turns for turns in conversations if unseen.add("\n".join(turns))]
    rows, skipped = _answer(settings, work, chat, engine, unique, on_progress)
    facts = {
        **asdict(settings),
        "conversations": len(unique),
        "repeated_prompts": len(conversations) - len(unique),
        "too_long_prompts": skipped,
        "rows": len(rows),
        "tokens": sum(len(row.input_ids) for row in rows),
        "answer_tokens": sum(sum(row.loss_mask) for row in rows),
        "sampled": f"every {SAMPLED}th conversation at temperature {TEMPERATURE}, others greedy",
    }
    write_json(work.data, facts)
    return facts


def _write_prompts(
    settings: DataSettings,
    work: Work,
    chat: Chat,
    engine: Engine,
    on_progress: Callable[[str, int, int], None],
) -> list[str]:
    """Prompts by the target itself, no two alike."""
    wanted = settings.self_prompts
    unseen = Unseen()
    lines = whole_lines(work.prompts, json.loads)
    found = [line["prompt"] for line in lines]
    for prompt in found:
        unseen.add(prompt)
    first = 1 + max((line["attempt"] for line in lines), default=-1)
    last = ATTEMPTS * wanted
    beginnings = openings(chat)

    def questions() -> Iterator[Question]:
        for attempt in range(first, last):
            if len(found) >= wanted:
                return
            yield Question(
                name=f"prompt-{attempt}",
                prompt_ids=beginnings[attempt % len(beginnings)],
                temperature=PROMPT_TEMPERATURE,
                top_p=PROMPT_TOP_P,
                max_tokens=settings.prompt_tokens,
                seed=settings.seed + attempt,
            )

    with writing(work.prompts), work.prompts.open("a", encoding="utf-8") as file:

        def keep(asked: Question, ids: list[int], stopped: bool) -> None:
            # One that was cut off is no prompt.
            prompt = chat.decode(ids)
            if stopped and len(found) < wanted and unseen.add(prompt):
                found.append(prompt)
                attempt = int(asked.name.rpartition("-")[2])
                file.write(json.dumps({"attempt": attempt, "prompt": prompt}) + "\n")
                file.flush()
                on_progress("prompts", len(found), wanted)

        engine.answer(questions(), keep)
    if len(found) < wanted:
        raise TrainingError(
            f"--self-prompts {wanted}: the target wrote only {len(found)} different prompts that "
            f"end within {settings.prompt_tokens} tokens in {last} attempts; ask for fewer, raise "
            "--prompt-tokens, or give prompts with --prompts"
        )
    return found


def _answer(
    settings: DataSettings,
    work: Work,
    chat: Chat,
    engine: Engine,
    conversations: Sequence[Sequence[str]],
    on_progress: Callable[[str, int, int], None],
) -> tuple[list[Row], int]:
    """The rows, one for each turn, and how many prompts were too long."""
    writer = RowWriter(work.rows)
    # Turns are answered in order, so the last row of a conversation says where to go on.
    done = {row.conversation: row for row in writer.rows}
    total = sum(len(turns) for turns in conversations)
    skipped = 0

    def ask(number: int, before: Row | None) -> Question | None:
        nonlocal skipped
        turns = conversations[number]
        turn = 0 if before is None else before.turn + 1
        if turn == len(turns):
            return None
        ids = chat.encode(next_turn(turns, answers.get(number, [])))
        room = engine.max_model_len - len(ids)
        if room < 2:
            skipped += 1
            return None
        sampled = number % SAMPLED == SAMPLED - 1
        return Question(
            name=f"answer-{number}-{turn}",
            prompt_ids=ids,
            temperature=TEMPERATURE if sampled else 0.0,
            max_tokens=min(settings.max_tokens, room),
            seed=settings.seed + number,
        )

    answers: dict[int, list[str]] = {}
    for row in writer.rows:
        text = chat.decode(row.input_ids[row.prompt_length :])
        answers.setdefault(row.conversation, []).append(text)

    def questions() -> Iterator[Question]:
        for number in range(len(conversations)):
            asked = ask(number, done.get(number))
            if asked is not None:
                yield asked

    def keep(asked: Question, ids: list[int], stopped: bool) -> Question | None:
        _, number, turn = asked.name.split("-")
        if not ids:
            return None
        row = Row(
            conversation=int(number),
            turn=int(turn),
            temperature=asked.temperature,
            input_ids=asked.prompt_ids + ids,
            loss_mask=[0] * len(asked.prompt_ids) + [1] * len(ids),
        )
        writer.append(row)
        on_progress("answers", len(writer.rows), total)
        answers.setdefault(row.conversation, []).append(chat.decode(ids))
        return ask(row.conversation, row)

    engine.answer(questions(), keep)
    if not writer.rows:
        raise TrainingError(
            f"none of the {len(conversations)} prompts leaves room for an answer in "
            f"{engine.max_model_len} tokens; give shorter ones, or raise --max-model-len"
        )
    writer.finish()
    return writer.rows, skipped
