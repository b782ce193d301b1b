# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the command says about input that makes no sense: one sentence, and no file."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.predicted_acceptance import Acceptance, walk
from echo_vllm.cli import app
from tests.training.targets import SHAPE, TEMPLATE, add_tokenizer, write_prompts

Command = Callable[..., str]
needs_speculators = pytest.mark.skipif(
    find_spec("speculators") is None, reason="speculators is not installed: make train-setup"
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target without weights: nothing here may get as far as loading them."""
    folder = add_tokenizer(tmp_path_factory.mktemp("target"))
    config = {"model_type": "llama", "num_hidden_layers": SHAPE.layers, "vocab_size": SHAPE.vocab}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def refused(tmp_path: Path) -> Command:
    """Run `train-drafter`, which must refuse; gives its last line."""

    def run(*arguments: object) -> str:
        words = ["train-drafter", *map(str, arguments), "-o", str(tmp_path / "head")]
        result = CliRunner().invoke(app, words)
        assert result.exit_code in (1, 2), result.output
        lines = result.stderr.strip().splitlines()
        assert lines[-1].startswith("error: ")
        assert not any("Traceback" in line for line in lines)
        assert not (tmp_path / "head").exists()
        return lines[-1]

    return run


def test_each_stage_of_the_whole_is_told_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[list[str]] = []

    def call(words: list[str]) -> int:
        stages.append(words[words.index("train-drafter") + 1 :])
        return 0

    monkeypatch.setattr("echo_vllm.cli.train_drafter.subprocess.call", call)
    given = ["--prompts", "a", "--prompts", "b", "--hours", "2", "--aux-layers", "1,2,3"]
    given += ["--chat-template", "t", "--eval-prompts", "x=y", "--resume"]
    result = CliRunner().invoke(app, ["train-drafter", "T", "-o", "H", *given])
    assert result.exit_code == 0, result.output
    data, train, evaluation = (" ".join(words) for words in stages)
    assert data.startswith("data T -o H --dtype auto --chat-template t --prompts a --prompts b")
    assert data.endswith("--resume")
    assert "--hours 2.0 --aux-layers 1,2,3" in train
    assert "--prompts" not in train
    assert train.endswith("--epochs 10 --ttt-steps 3 --resume")
    assert evaluation == "eval T -o H --dtype auto --chat-template t --eval-prompts x=y"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "holds no prompt; each line must be like"),
        ("\n\n", "holds no prompt"),
        ('{"prompt": "w1"}\n{"prompt"\n', "line 2, is not JSON"),
        ('{"text": "w1"}\n', "line 1, holds no prompt"),
        ('["w1"]\n', "line 1, holds no prompt"),
        ("17\n", "line 1, holds no prompt"),
        ('{"turns": []}\n', "line 1, holds no prompt"),
        ('{"turns": ["w1", 2]}\n', "line 1, holds no prompt"),
        ('{"prompt": " "}\n', "line 1, holds no prompt"),
    ],
)
def test_prompts_that_are_none(
    target: Path, refused: Command, tmp_path: Path, content: str, reason: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(content)
    assert reason in refused("data", target, "--prompts", prompts)


def test_prompts_that_cannot_be_read(target: Path, refused: Command, tmp_path: Path) -> None:
    missing = tmp_path / "missing.jsonl"
    assert "No such file" in refused("data", target, "--prompts", missing)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in refused("data", target, "--prompts", binary)
    assert "there is nothing to answer" in refused("data", target)


def test_a_chat_template_that_does_not_do(target: Path, refused: Command, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3, seed=0)
    data = ("data", target, "--prompts", prompts, "--chat-template")
    sentence = refused(*data, tmp_path / "missing.jinja")
    assert "cannot be read (No such file or directory); give a file with a Jinja" in sentence
    broken = tmp_path / "broken.jinja"
    broken.write_text(TEMPLATE.replace("{% endfor %}", ""))
    assert "the chat template cannot be applied" in refused(*data, broken)
    bare = add_tokenizer(tmp_path / "bare", template=None)
    sentence = refused("data", bare, "--prompts", prompts)
    assert "has no chat template; give one with --chat-template FILE" in sentence


def test_a_target_that_is_none(refused: Command, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3, seed=0)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no tokenizer" in refused("data", empty, "--prompts", prompts)


@needs_speculators
def test_training_for_a_target_that_is_none(refused: Command, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "does not load" in refused("train", empty)


@needs_speculators
def test_a_target_with_too_few_layers(target: Path, refused: Command) -> None:
    sentence = refused("train", target)
    assert "has 4 layers" in sentence
    assert "the default [2, 2, 1]" in sentence
    assert "name others with --aux-layers" in sentence
    assert "--aux-layers [1, 2, 5]" in refused("train", target, "--aux-layers", "1,2,5")
    assert "--aux-layers must be whole numbers" in refused("train", target, "--aux-layers", "1,x")


@needs_speculators
def test_training_without_whole_data(target: Path, refused: Command, tmp_path: Path) -> None:
    work = tmp_path / "head.work"
    work.mkdir()
    (work / "rows.jsonl.partial").write_text('{"input_ids":[1,2],"loss_mask":[0,1]}\n')
    assert "holds no whole data" in refused("train", target, "--aux-layers", "1,2,3")


def test_the_walk_counts_what_an_engine_would() -> None:
    # The prompt is 9 8, the answer 1 2 3 4 5 6; drafts from each position, three deep.
    ids = [9, 8, 1, 2, 3, 4, 5, 6]
    drafts = [
        [0, 0, 0],
        [2, 3, 0],  # after 1: two right
        [0, 0, 0],
        [0, 0, 0],
        [5, 6, 7],  # after 4: two right, and then the answer ends
        [0, 0, 0],
        [0, 0, 0],
    ]
    assert walk(ids, drafts, 2, 3, 6) == Acceptance(2, [2, 2, 0])
    assert walk(ids, drafts, 2, 3, 5) == Acceptance(2, [2, 1, 0])
    assert Acceptance(2, [2, 1, 0]).length == 2.5
