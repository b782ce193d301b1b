# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Requests with a grammar get trees: exact, and only of what the grammar allows."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from echo_vllm.step.grammar import allow
from echo_vllm.trees.forest import ROOT
from tests.conftest import DEMO_HEAD, DEMO_TARGET
from tests.engine.engines import counters, echo, engine, generate, runner

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "colour": {"enum": ["red", "green", "blue"]},
            "tall": {"type": "boolean"},
        },
        "required": ["name", "colour", "tall"],
        "additionalProperties": False,
    }
)
GRAMMARS: list[dict[str, Any]] = [
    {"json": SCHEMA},
    {"regex": "(one|two|three)( (one|two|three)){3}"},
    {"choice": ["a long answer of many words", "a short one", "a long answer of few words"]},
    {"json": SCHEMA},
]


class Numbers:
    """A grammar over token ids: a token of `after[state]` may follow, and is the next state."""

    def __init__(self, after: dict[int, list[int]]) -> None:
        self.after = after
        self.states = [0]

    def is_terminated(self) -> bool:
        return not self.after.get(self.states[-1])

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return tokens if tokens[0] in self.after.get(self.states[-1], ()) else []

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self.states += tokens
        return True

    def rollback(self, count: int) -> None:
        del self.states[-count:]

    def fill_bitmask(self, masks: torch.Tensor, row: int) -> None:
        masks[row] = bits(*self.after[self.states[-1]])


class Manager:
    """What `allow` asks of vLLM's manager; reasoning ends with the token `end`, if there is one."""

    def __init__(self, end: int | None = None) -> None:
        self.end = end
        self.backend = self

    def allocate_token_bitmask(self, rows: int) -> torch.Tensor:
        return torch.zeros(rows, 1, dtype=torch.int32)

    def _get_constraint_bounds(self, request: Any, path: Any) -> Any:
        start = 0
        if self.end is not None:
            way = list(path)
            start = way.index(self.end) + 1 if self.end in way else len(way) + 1
        return SimpleNamespace(grammar_start=start, constraint_start=start)


def bits(*allowed: int) -> int:
    return sum(1 << token for token in allowed)


def request_of(grammar: Numbers) -> Any:
    return SimpleNamespace(
        request_id="r", structured_output_request=SimpleNamespace(grammar=grammar)
    )


def test_what_is_forbidden_gets_no_node_and_every_node_its_own_mask() -> None:
    grammar = Numbers({0: [1, 2], 1: [3], 2: [3, 4], 3: [5], 4: []})
    # 9 is forbidden; 3 may follow 1 and 2, 4 may follow 2 only.
    tokens, parents = [1, 9, 2, 3, 3, 4, 4, 5], [ROOT, ROOT, ROOT, 0, 2, 0, 2, 4]
    tree = allow(Manager(), request_of(grammar), tokens, parents)
    assert tree.kept == [0, 2, 3, 4, 6, 7]
    assert grammar.states == [0]
    # Behind 4 and 5 the grammar has ended: whatever follows is thrown away.
    wanted = [bits(1, 2), bits(3), bits(3, 4), bits(5), bits(5), -1, -1]
    assert tree.masks.flatten().tolist() == wanted


def test_reasoning_is_free_and_ends_inside_a_path() -> None:
    grammar = Numbers({0: [1, 2]})
    # 7 ends the reasoning: nothing is drafted behind it, and the grammar's start follows.
    tokens, parents = [5, 7, 6, 1, 7], [ROOT, ROOT, 0, 1, 2]
    tree = allow(Manager(end=7), request_of(grammar), tokens, parents)
    assert tree.kept == [0, 1, 2, 4]
    assert tree.masks.flatten().tolist() == [-1, -1, bits(1, 2), -1, bits(1, 2)]
    assert grammar.states == [0]


# --- the real engine on the demo model ------------------------------------------------------------


def constrained(temperature: float = 0.0, seed: int | None = None, **grammar: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    outputs = StructuredOutputsParams(**grammar)
    return SamplingParams(
        temperature=temperature, seed=seed, max_tokens=48, structured_outputs=outputs
    )


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    subjects = ["a dog", "the sea", "a teacher", "an old tree", "a red car", "my friend", "a robot"]
    return [f"Describe {subject} as JSON:" for subject in subjects] + ["Count:"]


def demo_engine(spec: dict[str, Any] | None, **options: Any) -> Any:
    return engine(DEMO_TARGET, spec, **{"max_model_len": 512, **options})


def count_nodes(llm: Any) -> list[int]:
    """Filled while the engine runs: nodes that were drafted for requests with a grammar."""
    model_runner, nodes = runner(llm), list[int]()
    take = model_runner.take_draft_token_ids

    def counting() -> Any:
        nodes.extend(map(len, model_runner.grammar_parents.values()))
        return take()

    model_runner.take_draft_token_ids = counting
    return nodes


@pytest.mark.full
@pytest.mark.parametrize("backend", ["xgrammar", "guidance"])
def test_trees_under_a_grammar_are_token_identical(prompts: list[str], backend: str) -> None:
    """In one batch with requests that have none; every answer fits its grammar."""
    from vllm import SamplingParams

    free = SamplingParams(temperature=0, max_tokens=24)
    params = [constrained(**GRAMMARS[i % 4]) for i in range(len(prompts))]
    asked, each = [*prompts, *prompts[:4]], [*params, *[free] * 4]
    options = {"structured_outputs_config": {"backend": backend}}
    with demo_engine(None, **options) as llm:
        wanted = generate(llm, asked, each)
        text = llm.generate(prompts[0], params[0], use_tqdm=False)[0].outputs[0].text
    assert json.loads(text).keys() == {"name", "colour", "tall"}
    spec = echo(DEMO_HEAD, 12, max_depth=4, top_k=3)
    with demo_engine(spec, **options) as llm:
        nodes = count_nodes(llm)
        assert generate(llm, asked, each) == wanted
        assert generate(llm, prompts, params, one_by_one=True) == wanted[: len(prompts)]
        found = counters(llm)
    assert sum(nodes) > 100, "no tree was drafted under a grammar"
    assert found["spec_decode_num_accepted_tokens"] > 50
    # What the grammar forbade was never verified.
    assert found["spec_decode_num_draft_tokens"] < sum(nodes)


@pytest.mark.full
def test_seeded_samples_under_a_grammar_are_those_of_plain_decoding(prompts: list[str]) -> None:
    params = [constrained(1.0, seed=i, **GRAMMARS[i % 4]) for i in range(len(prompts))]
    with demo_engine(None) as llm:
        wanted = generate(llm, prompts, params)
    with demo_engine(echo(DEMO_HEAD, 8, max_depth=3, top_k=3)) as llm:
        assert generate(llm, prompts, params) == wanted
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 10


@pytest.mark.full
def test_samples_under_a_small_grammar_have_the_target_s_distribution() -> None:
    """Chi-square of plain decoding's answers against ours, over the few answers that exist; with
    drawn candidates for the requests of the batch that have no grammar, too."""
    from vllm import SamplingParams

    grammar: dict[str, Any] = {"regex": "(yes|no|maybe) (yes|no|maybe)"}
    prompts = ["Answer with two words, yes, no or maybe:"] * 400
    constrained_ones = [constrained(1.5, **grammar)] * len(prompts)
    free = [SamplingParams(temperature=1.0, max_tokens=12)] * len(prompts)
    sampled = []
    for candidates in (None, "best", "drawn"):
        spec = None
        if candidates is not None:
            spec = echo(DEMO_HEAD, 8, max_depth=4, top_k=3, candidates=candidates)
        asked, each = prompts, constrained_ones
        if candidates == "drawn":
            asked = [prompt for prompt in prompts for _ in range(2)]
            each = [p for pair in zip(constrained_ones, free, strict=True) for p in pair]
        with demo_engine(spec, max_num_seqs=64) as llm:
            outputs = llm.generate(asked, each, use_tqdm=False)
            if spec is not None:
                assert counters(llm)["spec_decode_num_accepted_tokens"] > 25
        texts = [output.outputs[0].text for output in outputs]
        sampled.append(texts[:: len(texts) // len(prompts)])
    for ours in sampled[1:]:
        both = (sampled[0], ours)
        answers = sorted(set().union(*both))
        table = np.array([[texts.count(answer) for answer in answers] for texts in both])
        often = table.sum(0) >= 10
        table = np.column_stack([table[:, often], table[:, ~often].sum(1)])
        table = table[:, table.sum(0) > 0]
        assert table.shape[1] >= 3, answers
        assert stats.chi2_contingency(table).pvalue > 0.001


@pytest.mark.full
def test_aborts_and_preemption_leave_grammars_in_order(prompts: list[str]) -> None:
    """Few blocks, small steps: requests with a grammar stop, come back, and are given up."""
    params = [constrained(**GRAMMARS[i % 4]) for i in range(len(prompts))]
    with demo_engine(None) as llm:
        wanted = generate(llm, prompts, params)
    options = {"num_gpu_blocks_override": 10, "block_size": 32, "max_num_batched_tokens": 64}
    spec = echo(DEMO_HEAD, 8, max_depth=3, top_k=3)
    with demo_engine(spec, max_num_seqs=8, max_model_len=256, **options) as llm:
        assert generate(llm, prompts, params) == wanted
        core = llm.llm_engine
        for number, prompt in enumerate(prompts):
            core.add_request(f"gone-{number}", prompt, params[number])
        for step in range(6):
            core.step()
            core.abort_request([f"gone-{step}"])
        while core.has_unfinished_requests():
            core.step()
        assert generate(llm, prompts, params) == wanted
