# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The data stage, with an engine that is a function instead of a model."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from echo_vllm.conversations import Chat, Question, read_conversations
from echo_vllm.training.data import TEMPERATURE, DataSettings, check_plan, make_data
from echo_vllm.training.rows import Row, RowWriter, read_rows
from echo_vllm.training.self_prompts import Unseen
from echo_vllm.training.work import TrainingError, Work
from tests.training.targets import add_tokenizer, write_prompts

EOS = 1


class Killed(Exception):
    """Stands for the end of the process."""


class Echoes:
    """An engine that answers with the last words of the prompt, or writes numbered prompts."""

    max_model_len = 200

    def __init__(self, die_after: int | None = None) -> None:
        self.asked: list[Question] = []
        self.die_after = die_after

    def answer(self, questions: Any, on_answer: Callable[[Any, list[int], bool], Any]) -> None:
        for question in questions:
            following = question
            while following is not None:
                if len(self.asked) == self.die_after:
                    raise Killed
                self.asked.append(following)
                words = [5 + (following.seed // 2) % 50, 6, 7, EOS]  # Each prompt comes twice.
                if following.name.startswith("answer"):
                    words = [*following.prompt_ids[-4:-2], EOS]
                following = on_answer(following, words, True)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return Chat(str(add_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    return DataSettings(
        target="tiny",
        dtype="float32",
        prompts=[str(write_prompts(tmp_path / "prompts.jsonl", 20, seed=1, turns=3))],
        self_prompts=0,
        prompt_tokens=16,
        max_tokens=8,
        chat_template=None,
        max_model_len=None,
        seed=0,
    )


def make(settings: DataSettings, folder: Path, chat: Chat, engine: Echoes) -> list[Row]:
    work = Work(folder / "head")
    work.make()
    make_data(settings, work, chat, lambda: engine)
    return read_rows(work.rows)


def test_a_row_holds_prompt_and_answer_with_the_answer_marked(
    settings: DataSettings, tmp_path: Path, chat: Chat
) -> None:
    engine = Echoes()
    rows = make(settings, tmp_path, chat, engine)
    assert len(rows) == len(engine.asked) == 20 + 4 * 2
    for row, asked in zip(rows, engine.asked, strict=True):
        assert row.input_ids[: row.prompt_length] == asked.prompt_ids
        assert row.input_ids[-1] == EOS
        assert row.loss_mask == [0] * len(asked.prompt_ids) + [1, 1, 1]


def test_later_turns_follow_the_answers_to_earlier_ones(
    settings: DataSettings, tmp_path: Path, chat: Chat
) -> None:
    rows = [row for row in make(settings, tmp_path, chat, Echoes()) if row.conversation == 5]
    turns = read_conversations(Path(settings.prompts[0]))[5]
    assert [row.turn for row in rows] == [0, 1, 2]
    answers = [chat.decode(row.input_ids[row.prompt_length :]) for row in rows]
    messages = [turns[0], answers[0], turns[1], answers[1], turns[2]]
    assert rows[2].input_ids[: rows[2].prompt_length] == chat.encode(messages)


def test_a_quarter_of_the_conversations_is_sampled(
    settings: DataSettings, tmp_path: Path, chat: Chat
) -> None:
    rows = make(settings, tmp_path, chat, Echoes())
    assert {row.conversation for row in rows if row.temperature == TEMPERATURE} == {
        3,
        7,
        11,
        15,
        19,
    }
    assert {row.temperature for row in rows} == {0.0, TEMPERATURE}


@pytest.mark.parametrize("died_after", [0, 1, 7, 22])
def test_an_interrupted_run_goes_on_to_the_same_rows(
    settings: DataSettings, tmp_path: Path, chat: Chat, died_after: int
) -> None:
    whole = make(settings, tmp_path, chat, Echoes())
    work = Work(tmp_path / "again")
    work.make()
    with pytest.raises(Killed):
        make_data(settings, work, chat, lambda: Echoes(die_after=died_after))
    assert not work.rows.exists()
    assert not work.data.exists()
    partial = work.rows.with_name("rows.jsonl.partial")
    with partial.open("a") as file:
        file.write('{"conversation":19,"turn":0,"tempera')  # Half a line.
    engine = Echoes()
    make_data(settings, work, chat, lambda: engine)
    assert len(engine.asked) == len(whole) - died_after
    by_turn = {(row.conversation, row.turn): row for row in read_rows(work.rows)}
    assert by_turn == {(row.conversation, row.turn): row for row in whole}


def test_prompts_written_by_the_target_are_all_different(
    settings: DataSettings, tmp_path: Path, chat: Chat
) -> None:
    engine = Echoes()
    rows = make(replace(settings, prompts=[], self_prompts=12), tmp_path, chat, engine)
    assert len({tuple(row.input_ids) for row in rows}) == len(rows) == 12
    openings = [asked for asked in engine.asked if asked.name.startswith("prompt")]
    assert len(openings) == 23  # Every prompt is written twice, and the last is enough once.
    # System prompts of as many words look alike to a tokenizer that knows none of them.
    assert len({tuple(asked.prompt_ids) for asked in openings}) == 4


def test_a_target_that_repeats_itself_is_said_to(
    settings: DataSettings, tmp_path: Path, chat: Chat
) -> None:
    with pytest.raises(TrainingError, match="wrote only 50 different prompts"):
        make(replace(settings, prompts=[], self_prompts=60), tmp_path, chat, Echoes())


def test_prompts_that_leave_no_room_are_left_out(
    settings: DataSettings, tmp_path: Path, chat: Chat
) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "w1 " * 300}) + "\n" + json.dumps({"prompt": "w1 w2"}))
    rows = make(replace(settings, prompts=[str(long)]), tmp_path, chat, Echoes())
    assert [row.conversation for row in rows] == [1]
    long.write_text(json.dumps({"prompt": "w1 " * 300}))
    with pytest.raises(TrainingError, match="none of the 1 prompts leaves room"):
        make(replace(settings, prompts=[str(long)]), tmp_path / "other", chat, Echoes())


def test_repeated_prompts_are_told_by_their_words() -> None:
    unseen = Unseen()
    assert unseen.add("What is rain?")
    assert not unseen.add("  what IS\nrain ")
    assert not unseen.add("?!")
    assert unseen.add("What is snow?")


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files of this process cannot grow beyond 2000 bytes; like a full disk, an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_in_one_sentence_and_leaves_no_whole_file(
    tmp_path: Path, small_disk: None
) -> None:
    writer = RowWriter(tmp_path / "rows.jsonl")
    row = Row(0, 0, 0.0, list(range(100)), [0] * 50 + [1] * 50)

    def fill() -> None:
        for _ in range(10):
            writer.append(row)

    with pytest.raises(TrainingError, match=r"cannot be written \(.*\); free or choose another"):
        fill()
    written = len(writer.rows)
    assert not (tmp_path / "rows.jsonl").exists()
    assert 1 <= written < 10
    assert RowWriter(tmp_path / "rows.jsonl").rows == [row] * written


def test_an_unfinished_run_is_not_taken_for_another(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    check_plan(plan, {"target": "a", "seed": 0}, resume=False)
    with pytest.raises(TrainingError, match="holds an unfinished run; go on with --resume"):
        check_plan(plan, {"target": "a", "seed": 0}, resume=False)
    with pytest.raises(TrainingError, match="--resume goes on with seed 0"):
        check_plan(plan, {"target": "a", "seed": 1}, resume=True)
    check_plan(plan, {"target": "a", "seed": 0}, resume=True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "is no row"),
        ('{"input_ids":[1,2],"loss_mask":[1]}', "equally long"),
        ('{"input_ids":[1,2],"loss_mask":[0,0]}', "at least one 1"),
        ('{"input_ids":[1,2.5],"loss_mask":[0,1]}', "lists of integers"),
        ('{"input_ids":[1,2]}', "is no row"),
        ("[1, 2]", "is no row"),
    ],
)
def test_lines_that_are_no_rows_are_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input_ids":[1,2],"loss_mask":[0,1]}\n' + (line or "{") + "\n")
    with pytest.raises(TrainingError, match=f"line 2, {'.*' + reason if reason else ''}"):
        read_rows(path)
