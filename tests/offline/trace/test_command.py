# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`echo-vllm trace`, all but the engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from echo_vllm.cli.trace import FULL, FULL_NODES, _speculation, trace_app
from echo_vllm.conversations import Question
from echo_vllm.forecast import CostCurve, StepCost
from echo_vllm.offline.trace import chats
from echo_vllm.policies.registry import parse_section
from echo_vllm.trace_format import TraceHeader, TraceRequest, TraceStep, TraceWriter

COST = StepCost(
    verify=CostCurve((1, 64), (0.01, 0.02)),
    draft_level=CostCurve((1, 64), (0.001, 0.002)),
    catch_up=CostCurve((1, 64), (0.001, 0.002)),
)
# Depth 2, width 2, fully verified; the accepted path differs from step to step.
PATHS: tuple[list[int], ...] = ([], [0], [0, 2], [0, 3], [1], [1, 4])
STEPS = [
    TraceStep(
        step=number,
        rows=7,
        decoding=1,
        prefill_tokens=0,
        verify_s=0.02,
        draft_s=0.01,
        draft_levels=[2],
        plan=None,
        requests=[
            TraceRequest(
                id="0",
                context=9,
                parents=[-1, -1, 0, 0, 1, 1],
                logprobs=[-0.5, -1.0, -0.75, -2.5, -1.5, -3.0],
                level_starts=[0, 2],
                selected=[0, 2, 1, 4, 3, 5],
                accepted=path,
            )
        ],
    )
    for number, path in enumerate(PATHS)
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write(tmp_path / "trace.jsonl.gz", STEPS)


def write(path: Path, steps: list[TraceStep]) -> Path:
    config = parse_section({"policy": "topn", "max_depth": 2, "top_k": 2}, num_speculative_tokens=6)
    echo = config.model_dump(mode="json", exclude={"trace"})
    header = TraceHeader("target", "head", "float32", 6, echo, "2026-01-01")
    with TraceWriter(path, header) as writer:
        for step in steps:
            writer.append(step)
    return path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(trace_app, [str(argument) for argument in arguments])


def test_show_says_what_is_in_a_trace(trace: Path) -> None:
    result = run("show", trace)
    assert result.exit_code == 0
    assert "target with head, float32" in result.stdout
    assert "6 steps, 6 trees (1.0 a step), 100% of them fully verified" in result.stdout
    assert "accepted by depth: 83%, 50%" in result.stdout


def test_replay_prints_a_table_and_writes_its_figures(trace: Path, tmp_path: Path) -> None:
    cost = tmp_path / "cost.json"
    cost.write_text(json.dumps({"key": {}, "cost": COST.to_dict()}))
    output, markdown = tmp_path / "out.json", tmp_path / "out.md"
    result = run(
        "replay", trace, "--policy", "plain", "--policy", 'topn:6:{"max_depth": 2, "top_k": 2}',
        "--concurrency", "1,4", "--cost", cost, "--request-steps", 600, "--output", output,
        "--markdown", markdown,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "1 requests" in result.stdout
    assert "4 requests" in result.stdout
    figures = json.loads(output.read_text())
    assert figures["trace"] == "trace.jsonl.gz"
    first, tree, *references = figures["results"]
    assert [figure["concurrency"] for figure in figures["results"]] == [1] * 5 + [4] * 5
    assert references[1]["policy"] == "oracle"
    assert references[1]["share_of_oracle"]["middle"] == 1
    assert first["tokens_per_second"] == pytest.approx(1 / COST.plain_step(1))
    mean = 1 + sum(len(path) for path in PATHS) / len(PATHS)
    assert tree["tokens"] == pytest.approx(mean, rel=0.1)
    assert tree["nodes"] == 6
    assert "Share of the oracle's gain over plain decoding" in result.stdout
    text = markdown.read_text()
    assert "- step cost: cost.json" in text
    assert "| oracle | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |" in text


def test_replay_compares_the_usual_policies_by_default(trace: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    result = run("replay", trace, "--concurrency", "2", "--request-steps", 64, "--output", output)
    assert result.exit_code == 0, result.output
    assert "assumed: " in result.stdout
    names = [figure["policy"] for figure in json.loads(output.read_text())["results"]]
    assert names[0] == "plain"
    assert {"echo:6", "auto:6", "evict:6"} <= set(names)
    assert names[-3].startswith("best table: ")
    assert names[-2:] == ["oracle", "oracle tree"]


def test_an_exact_replay_agrees_with_itself(trace: Path) -> None:
    result = run("replay", trace, "--exact")
    assert result.exit_code == 0, result.output
    assert "6 equal, 0 cut by the engine, 0 different" in result.stdout


def test_an_exact_replay_that_differs_fails(tmp_path: Path) -> None:
    swapped = replace(STEPS[0].requests[0], selected=[1, 0, 2, 3, 4, 5])
    trace = write(tmp_path / "t.jsonl", [replace(STEPS[0], requests=[swapped]), *STEPS[1:]])
    result = run("replay", trace, "--exact")
    assert result.exit_code == 1
    assert "1 different" in result.stdout
    assert "error: step 0, request 0: [0, 2, 1, 4, 3, 5] was selected" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--concurrency", "1,x"], "--concurrency must be whole numbers from 1 on"),
        (["--concurrency", "0"], "--concurrency must be whole numbers from 1 on"),
        (["--cost", "published:moon"], "must name one of published:eagle3-h100, published:echo-"),
        (["--cost", "none.json"], "--cost none.json cannot be read"),
        (["--policy", "best"], "a policy must be plain, best table, oracle"),
        (["--policy", "chain:3"], "the policy drafts 3 levels and the trace has 2"),
        (["--policy", "tpon:3"], "echo.policy must be one of"),
        (["--profile", "none.json"], "which cannot be read"),
        (
            [
                "--request-steps",
                1,
                "--concurrency",
                1,
                "--policy",
                "chain:1",
                "--markdown",
                "no/x.md",
            ],
            "--markdown no/x.md cannot be written",
        ),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(
    trace: Path, options: list[str], message: str
) -> None:
    result = run("replay", trace, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_what_is_not_a_trace_is_status_2(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    for arguments in (("show",), ("replay",), ("replay", "--exact")):
        result = run(arguments[0], tmp_path / "x", *arguments[1:])
        assert result.exit_code == 2
        assert "is not a trace of echo-vllm" in result.stderr


def test_a_trace_of_a_policy_at_work_is_not_for_replays(tmp_path: Path) -> None:
    partly = [replace(s, requests=[replace(s.requests[0], selected=[0, 1], accepted=[])])
              for s in STEPS]  # fmt: skip
    result = run("replay", write(tmp_path / "t.jsonl", partly))
    assert result.exit_code == 2
    assert "were verified with all candidates" in result.stderr


# --- what a recording asks the engine for --------------------------------------------------


def test_the_default_recording_verifies_every_candidate(tmp_path: Path) -> None:
    spec = _speculation("head", tmp_path / "t.jsonl.gz", None)
    assert spec["echo"] == {**FULL, "trace": str(tmp_path / "t.jsonl.gz")}
    config = parse_section(spec["echo"], num_speculative_tokens=FULL_NODES)
    assert config.top_k + (config.max_depth - 1) * config.top_k**2 == FULL_NODES
    assert (spec["method"], spec["model"]) == ("echo", "head")


def test_a_recording_takes_a_config_and_adds_the_trace(tmp_path: Path) -> None:
    spec = _speculation("head", tmp_path / "t.jsonl", Path("examples/topn.json"))
    assert spec["num_speculative_tokens"] == 16
    assert spec["echo"]["policy"] == "topn"
    assert spec["echo"]["trace"] == str(tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "--config must be a JSON file with a speculative config"),
        ("[]", "--config must be a JSON file with a speculative config"),
        ("{}", "num_speculative_tokens is required with method echo and must be an integer"),
        ('{"num_speculative_tokens": "16"}', 'an integer between 1 and 256, got "16"'),
        ('{"num_speculative_tokens": 4, "echo": {"policy": "best"}}', "policy must be one of"),
    ],
)
def test_a_wrong_config_is_refused_before_the_engine_starts(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "c.json").write_text(content)
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    result = run(
        "record", "model", "--drafter", "head", "--prompts", tmp_path / "p.jsonl",
        "--config", tmp_path / "c.json",
    )  # fmt: skip
    assert result.exit_code == 2
    assert message in result.stderr


def test_prompts_that_are_not_there_are_refused(tmp_path: Path) -> None:
    result = run("record", "model", "--drafter", "head", "--prompts", tmp_path / "none.jsonl")
    assert result.exit_code == 2
    assert "none.jsonl" in result.stderr


# --- long contexts -------------------------------------------------------------------------


class Words:
    """A chat of words that are token ids."""

    def encode(self, messages: list[str]) -> list[int]:
        return [int(word) for text in messages for word in text.split()]

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))


class Nines:
    """An engine that answers 9 to everything."""

    def __init__(self, model: str, **options: Any) -> None:
        self.asked: list[list[int]] = []

    def __enter__(self) -> Nines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def answer(self, questions: list[Question], on_answer: Any) -> None:
        while questions:
            self.asked.append(questions[0].prompt_ids)
            more = on_answer(questions[0], [9], True)
            questions = [*questions[1:], *([more] if more else [])]


def test_turns_are_asked_until_a_prompt_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "LocalEngine", Nines)
    conversations = [["1 2", "3", "4", "5"], ["1"], ["1 2 3 4 5 6", "7"], ["1", "2 2 2 2"]]
    prompts = chats.long_prompts(
        "model", Words(), conversations, min_context=6, max_tokens=1  # type: ignore[arg-type]
    )  # fmt: skip
    assert prompts == [
        [1, 2, 9, 3, 9, 4],
        # The second has one turn, which is too short; the third begins long enough.
        [1, 2, 3, 4, 5, 6],
        [1, 9, 2, 2, 2, 2],
    ]
