# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What a benchmark runs: configurations, prompts, and the clocks of the step profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quick import CONFIGURATIONS
from benchmarks.timers import FRONT_END, StageTimers
from echo_vllm.conversations import CHATS, PROMPTS, read_conversations, shuffled
from echo_vllm.forecast.drafter_profile import FILE_NAME, DepthProfile, DrafterProfile
from echo_vllm.offline.bench.configurations import (
    MAX_DEPTH,
    SAME_CHAIN,
    STATIC_TREE,
    built_in,
    choose,
    is_fixed,
)
from echo_vllm.policies.registry import parse_section, policy_names

HEAD = Path("some/head")


def test_plain_decoding_is_always_there_and_first() -> None:
    assert [c.name for c in choose(["topn-8", "plain"], HEAD)] == ["plain", "topn-8"]
    assert choose([], HEAD)[0].speculation is None


def test_a_configuration_can_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"method": "eagle3", "num_speculative_tokens": 1}')
    mine = choose([str(path)], HEAD)[1]
    assert mine.name == "mine"
    assert mine.speculation == {"method": "eagle3", "num_speculative_tokens": 1}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["topn-9"], "unknown configuration 'topn-9'"),
        (["absent.json"], "unknown configuration 'absent.json'"),
        (["topn-8", "topn-8"], "'topn-8' is asked for twice"),
    ],
)
def test_a_wrong_name_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(names, HEAD)


def test_every_built_in_echo_section_is_valid() -> None:
    policies = set()
    for configuration in built_in(HEAD).values():
        speculation = configuration.speculation
        if speculation and speculation["method"] == "echo":
            section = parse_section(
                speculation["echo"],
                num_speculative_tokens=speculation["num_speculative_tokens"],
            )
            policies.add(section.policy)
    assert policies == set(policy_names())
    assert len(STATIC_TREE) == 15


def test_ablations_take_their_gates_from_the_profile(tmp_path: Path) -> None:
    rest: dict[str, Any] = {"samples": 9, "auc": 0.8, "acceptance": 0.5}
    rest |= {"survival_logprobs": (-1.0,), "survival_probs": (0.5,)}
    rest |= {"ece_before": 0.1, "ece_after": 0.1}
    taus = {2: 0.25, 5: 0.5}
    depths = [
        DepthProfile(depth=d, is_gate=d in taus, tau=taus.get(d), **rest) for d in range(1, 7)
    ]
    DrafterProfile(
        target="t",
        drafter="d",
        dtype="float32",
        created="2026-01-01",
        prompts="some",
        num_steps=9,
        delta=0.7,
        objective="o",
        depths=tuple(depths),
    ).save(tmp_path / FILE_NAME)
    assert gates_of("echo-one-tau", tmp_path) == {"2": 0.2, "5": 0.2}
    dense = {"1": 0.25, "2": 0.25, "3": 0.25, "4": 0.5, "5": 0.5, "6": 0.5}
    assert gates_of("echo-dense-gates", tmp_path) == dense


def test_ablations_without_a_profile_have_the_same_gate_at_every_depth() -> None:
    expected = {str(depth): 0.2 for depth in range(1, MAX_DEPTH + 1)}
    assert gates_of("echo-one-tau", HEAD) == gates_of("echo-dense-gates", HEAD) == expected


def gates_of(name: str, head: Path) -> dict[str, float]:
    speculation = built_in(head)[name].speculation
    assert speculation is not None
    gates: dict[str, float] = speculation["echo"]["gates"]
    return gates


def test_what_adapts_to_the_load_is_not_a_fixed_configuration() -> None:
    fixed = [name for name in built_in(HEAD) if is_fixed(name)]
    assert {"plain", "rest", "eagle3-k5", "ngram", "static-15", "topn-8"} <= set(fixed)
    assert not {"eagle3-adaptive", "topn-equal", "auto-no-online", "echo-no-width"} & set(fixed)


def test_the_quick_table_is_of_known_configurations() -> None:
    assert set(CONFIGURATIONS) <= set(built_in(HEAD))


def test_paired_chains_have_the_same_length() -> None:
    known = built_in(HEAD)
    for pair in SAME_CHAIN:
        ours, theirs = (known[name].speculation for name in pair)
        assert ours is not None
        assert theirs is not None
        assert ours["num_speculative_tokens"] == theirs["num_speculative_tokens"]


def test_prompts_are_read_from_both_forms_in_a_fixed_order(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    entries = [{"prompt": f"p{i}"} for i in range(5)] + [{"turns": ["first", "second"]}]
    path.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    conversations = shuffled(read_conversations(path))
    assert sorted(conversations) == [["first", "second"], ["p0"], ["p1"], ["p2"], ["p3"], ["p4"]]
    assert conversations == shuffled(read_conversations(path)) != read_conversations(path)
    assert sorted(read_conversations(path, path)) == sorted(conversations * 2)


def test_a_line_without_a_prompt_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"line 2, holds no prompt; each line must be like"):
        read_conversations(path)
    path.write_text('{"prompt": "a"}\n{')
    with pytest.raises(ValueError, match=r"line 2, is not JSON"):
        read_conversations(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_conversations(path)


def test_the_projects_own_prompts_are_in_the_package() -> None:
    assert len(read_conversations(PROMPTS)) > 100
    assert all(2 <= len(turns) <= 4 for turns in read_conversations(CHATS))
    assert len(read_conversations(CHATS)) >= 48


def test_a_stage_excludes_the_stages_inside_it() -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    timers = StageTimers(clock=lambda: now)
    inner = timers._wrap(lambda: sleep(2.0), "inner")

    def work() -> None:
        sleep(1.0)
        inner()
        sleep(3.0)

    outer = timers._wrap(work, "outer")
    sleep(0.5)
    outer()
    timers._end_step(True)
    outer()
    timers._end_step(False)  # A step that is not full does not count.
    assert timers._kept == {FRONT_END: 0.5, "outer": 4.0, "inner": 2.0}
    assert timers._steps == 1


def test_time_of_a_failed_stage_is_booked_to_it() -> None:
    ticks = iter(range(100))
    timers = StageTimers(clock=lambda: float(next(ticks)))

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        timers._wrap(fail, "stage")()
    assert timers._stack == [FRONT_END]
    assert timers._step["stage"] == 1.0
