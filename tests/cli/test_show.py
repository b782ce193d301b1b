# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`echo-vllm show`: its drawings, and one prompt through a real engine."""

from __future__ import annotations

import html.parser
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from echo_vllm.cli.show import page, step_tree, summary
from echo_vllm.offline.steps_of_prompt import Candidate, Shown, ShownStep
from tests.conftest import ROOT

STEP = ShownStep(
    root=" is",
    candidates=(
        Candidate(" Paris", -1, 1, 0.8, verified=True, accepted=True),
        Candidate("<script>", -1, 1, 0.1, verified=True),
        Candidate(" Rome", 0, 2, 0.01),
    ),
    tokens=(" Paris", "\n"),
    num_accepted=1,
    verify_s=0.02,
    draft_s=0.01,
)
SHOWN = Shown("m", "Where?", {"model": "a/head"}, (ShownStep(tokens=(" is",)), STEP))


def drawn(**options: bool) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(step_tree(2, STEP, **options))
    return console.export_text()


def test_a_step_shows_what_was_verified_and_the_targets_own_token() -> None:
    text = drawn()
    assert "3 drafted, 2 verified, 1 accepted; 10 + 20 ms" in text
    accepted, own = (text.index(token) for token in ("·Paris", "⏎"))
    assert accepted < own < text.index("<script>"), "the target's own token ends the accepted path"
    assert "·Rome" not in text
    assert "·Rome" in drawn(whole=True)


def test_the_summary_leaves_the_prompts_step_out() -> None:
    assert dict(summary(SHOWN)) == {
        "steps": "1, of which 0 without a draft",
        "tokens": "2, 2.00 a step (plain decoding has 1)",
        "nodes": "2 verified, 1 accepted",
        "time": "0.03 s, 66.7 tokens per second",
        "depth 1": "accepted in 1 of 1 trees",
    }


def test_the_page_stands_alone_and_escapes_what_the_model_says() -> None:
    text = page(SHOWN)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    for outside in ("http://", "https://", "src=", "<link"):
        assert outside not in text
    html.parser.HTMLParser().feed(text)
    assert text.count('<li class="left">') == 1


@pytest.mark.full
def test_a_prompt_is_shown_by_a_real_engine(
    demo_target: Path, demo_head: Path, tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    arguments = ["show", "What is the capital of France?", "--tokens", "12", "--html", str(out)]
    # A process of its own, because the engine stays in the one that has started it.
    done = subprocess.run(
        [sys.executable, "-m", "echo_vllm.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    text = out.read_text("utf-8")
    assert '<span class="accepted">' in text, "nothing of the demo's answer was drafted"
    assert "Paris" in text
