# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Requests longer than what the head was made for: drafted for as far as its rotary table goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from echo_vllm.step import head_limits
from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, engine, generate, runner
from tests.engine.tiny import make_head

pytestmark = pytest.mark.full

LONG = {"prompt_token_ids": [2 + i * i % 9 for i in range(100)]}
SHORT = {"prompt_token_ids": [2 + i % 9 for i in range(9)]}
OPTIONS: dict[str, Any] = {"max_model_len": 256, "skip_tokenizer_init": True}


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said of the head's positions."""
    said: list[str] = []
    monkeypatch.setattr(
        head_limits.logger, "warning_once", lambda text, *args: said.append(text % args)
    )
    return said


def greedy(num_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


def plain(target: Path, num_tokens: int) -> list[list[int]]:
    with engine(target, None, **OPTIONS) as llm:
        return generate(llm, [LONG, SHORT], greedy(num_tokens), one_by_one=True)


def test_a_table_that_vllm_widens_is_drafted_from_to_the_end(
    tiny: TinyModel, tmp_path: Path, warnings: list[str]
) -> None:
    head = make_head(tmp_path / "head", tiny.shape, max_position_embeddings=64)
    with engine(tiny.target, echo(head, 8), **OPTIONS) as llm:
        tokens = generate(llm, [LONG, SHORT], greedy(60), one_by_one=True)
        counted = counters(llm)
        assert runner(llm).drafter.max_draft_len == 256
    assert tokens == plain(tiny.target, 60)
    # Both requests were drafted for; the long one begins beyond the head's own 64 positions.
    assert counted["spec_decode_num_drafts"] + counted["spec_decode_num_accepted_tokens"] > 110
    assert warnings == [
        "The draft head was made for 64 positions and requests may have 256 tokens: vLLM widens "
        "its rotary table, so what is beyond is drafted for as well, but fewer tokens may be "
        "accepted there."
    ]


@pytest.mark.parametrize("policy", ["topn", "echo"])
def test_a_table_that_ends_is_not_drafted_from_beyond(
    tiny: TinyModel,
    tmp_path: Path,
    warnings: list[str],
    policy: str,
) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    head = make_head(tmp_path / "head", tiny.shape, rope_scaling=yarn)
    with engine(tiny.target, echo(head, 8, policy=policy), **OPTIONS) as llm:
        drafter = runner(llm).drafter
        assert drafter.max_draft_len == 128
        llm.llm_engine.add_request("long", LONG, greedy(60))
        shown, committed, tokens = [], [], []
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                tokens = list(output.outputs[0].token_ids)
            shown.append(counters(llm)["echo_requests_beyond_head"])
            if len(tokens) > 30:
                committed.append(drafter.report.committed + sum(drafter.report.level_rows))
        # No step beyond does any drafting, and the metric shows the request until it ends.
        assert len(committed) == 30
        assert sum(committed) == 0
        assert shown[-1] == 0
        assert shown[:-1] == sorted(shown[:-1])
        assert set(shown) == {0, 1}
        before = counters(llm)["spec_decode_num_drafts"]
        assert 0 < before < 30
        again = generate(llm, [SHORT], greedy(60))
        assert counters(llm)["spec_decode_num_drafts"] > before
    assert [tokens, *again] == plain(tiny.target, 60)
    assert warnings == [
        "The rotary table of the draft head ends at position 128 and requests may have 256 tokens: "
        "what is beyond is not drafted for (vllm:echo_requests_beyond_head counts it)."
    ]
