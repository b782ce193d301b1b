# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What a benchmark runs: configurations, prompts, and the clocks of the step profile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.configurations import SAME_CHAIN, STATIC_TREE, built_in, choose
from benchmarks.prompts import read_prompts, window
from benchmarks.timers import FRONT_END, StageTimers
from echo_vllm.config import EchoConfig

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
            section = EchoConfig.from_section(
                speculation["echo"],
                num_speculative_tokens=speculation["num_speculative_tokens"],
            )
            policies.add(section.policy)
    assert policies == {"chain", "static", "topn"}
    assert len(STATIC_TREE) == 15


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
    prompts = read_prompts(path)
    assert sorted(prompts) == ["first", "p0", "p1", "p2", "p3", "p4"]
    assert prompts == read_prompts(path)


def test_a_line_without_a_prompt_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r":2: neither 'prompt' nor 'turns'"):
        read_prompts(path)


def test_a_window_begins_again_at_the_end() -> None:
    assert window([[0], [1], [2]], 2, 4) == [[2], [0], [1], [2]]


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
