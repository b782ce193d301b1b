# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Requests with a grammar get trees: exact, and only of what the grammar allows."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from vllm.v1.core.sched.output import GrammarOutput

from echo_vllm.step.grammar import FORCED, AllowedTree, allow, forced_token, masks_of
from echo_vllm.trees.forest import ROOT
from tests.conftest import DEMO_HEAD, DEMO_TARGET
from tests.engine.engines import counters, echo, engine, generate, runner
from tests.engine.test_elastic_engine import AUTO, dictate, scheduler

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
    # Digits are tokens of their own here, so that there is no other way to write most of it.
    {"regex": "On 2026-11-29 at 17:45:30 (one|two|three) of 1234567890"},
]


class Numbers:
    """A grammar over token ids: a token of `after[state]` may follow, and is the next state."""

    def __init__(self, after: dict[int, list[int]]) -> None:
        self.after = after
        self.states = [0]
        self.ll_matcher: Any = None

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


def follow(
    grammar: Numbers, tokens: list[int], parents: list[int], end: int | None = None, **limits: int
) -> AllowedTree:
    """What `grammar` makes of a draft; its state is then what it was."""
    limits = {"max_nodes": 16, "max_depth": 8, **limits}
    tree = allow(Manager(end), request_of(grammar), tokens, parents, **limits)
    assert grammar.states == [0]
    return tree


def test_what_is_forbidden_gets_no_node_and_every_node_its_own_mask() -> None:
    grammar = Numbers({0: [1, 2], 1: [3, 7], 2: [3, 4], 3: [5, 7], 4: [], 5: [], 7: []})
    # 9 is forbidden; 3 may follow 1 and 2, 4 may follow 2 only.
    tokens, parents = [1, 9, 2, 3, 3, 4, 4, 5], [ROOT, ROOT, ROOT, 0, 2, 0, 2, 4]
    tree = follow(grammar, tokens, parents)
    assert tree.nodes == [0, 2, 3, 4, 6, 7]
    assert tree.token_ids == [1, 2, 3, 3, 4, 5]
    assert tree.parents == [ROOT, ROOT, 0, 1, 1, 3]
    # Behind 4 and 5 the grammar has ended: whatever follows is thrown away.
    wanted = [bits(1, 2), bits(3, 7), bits(3, 4), bits(5, 7), bits(5, 7), -1, -1]
    assert tree.masks.flatten().tolist() == wanted


def test_reasoning_is_free_and_ends_inside_a_path() -> None:
    grammar = Numbers({0: [1, 2]})
    # 7 ends the reasoning: nothing is drafted behind it, and the grammar's start follows.
    tokens, parents = [5, 7, 6, 1, 7], [ROOT, ROOT, 0, 1, 2]
    tree = follow(grammar, tokens, parents, end=7)
    assert tree.nodes == [0, 1, 2, 4]
    assert tree.masks.flatten().tolist() == [-1, -1, bits(1, 2), -1, bits(1, 2)]


def test_reasoning_does_not_end_with_what_the_grammar_cannot_begin_with() -> None:
    """As in vLLM 0.33.0, whose manager says which tokens those are."""
    manager = Manager(end=7)
    manager._masked_reasoning_ends = lambda request: (2, 31)  # type: ignore[attr-defined]
    grammar = Numbers({0: [1]})
    tree = allow(manager, request_of(grammar), [5, 7], [ROOT, 0], max_nodes=4, max_depth=4)
    free = np.array([-1], np.int32).view(np.uint32) & ~np.uint32(bits(2, 31))
    assert tree.nodes == [0, 1]
    assert tree.masks[1:].numpy().view(np.uint32).flatten().tolist() == [int(free[0]), bits(1)]


@pytest.mark.parametrize("width", [1, 4])
def test_masks_lie_as_the_release_has_them(width: int) -> None:
    """Before vLLM 0.33.0 a request has as many rows as it has drafts, and one; then all as many."""
    roots = np.full((3 * width, 1), -1, np.int32)
    roots[::width, 0] = 1, 2, 3
    output = SimpleNamespace(scheduled_spec_decode_tokens={"b": [-1] * 3, "c": [-1]})

    def stock(given: Any) -> GrammarOutput:
        assert given.scheduled_spec_decode_tokens == {}
        return GrammarOutput(["a", "b", "c"], roots, [0, 0, 0])

    masks = torch.tensor([[9], [21], [22]], dtype=torch.int32)
    trees = {"b": AllowedTree([0, 1], [5, 6], [ROOT, 0], masks)}
    found = masks_of(stock, output, trees)
    assert found is not None
    assert found.num_acceptable_drafts == [0, 3, 1]
    wanted = {1: [1, 2, 21, 22, -1, 3, -1], 4: [1, -1, -1, -1, 2, 21, 22, -1, 3, -1, -1, -1]}
    assert found.grammar_bitmask.flatten().tolist() == wanted[width]
    assert output.scheduled_spec_decode_tokens.keys() == {"b", "c"}
    assert masks_of(lambda _: None, output, trees) is None


# After 1 come 2, 3, 4 and nothing else; then 5 or 6, which leads to 8 and the end.
NARROW = {0: [1, 9], 1: [2], 2: [3], 3: [4], 4: [5, 6], 5: [1], 6: [8], 8: [], 9: [1]}


def test_forced_tokens_follow_their_parent_whatever_was_drafted() -> None:
    # The drafter thought of 1, of 2 behind it, and of a wrong token behind that.
    tree = follow(Numbers(NARROW), [1, 9, 2, 5], [ROOT, ROOT, 0, 2], max_depth=4)
    assert tree.token_ids == [1, 9, 1, 2, 3, 2, 3, 4]
    assert tree.nodes == [0, 1, FORCED, FORCED, FORCED, 2, FORCED, FORCED]
    assert tree.parents == [ROOT, ROOT, 1, 2, 3, 0, 5, 6]
    wanted = [bits(1, 9), bits(2), bits(1), bits(2), bits(3), bits(4), bits(3), bits(4), bits(5, 6)]
    assert tree.masks.flatten().tolist() == wanted
    assert tree.has_forced


def test_a_chain_is_forced_where_nothing_was_drafted() -> None:
    grammar = Numbers({**NARROW, 0: [1]})
    tree = follow(grammar, [], [])
    assert (tree.token_ids, tree.parents) == ([1, 2, 3, 4], [ROOT, 0, 1, 2])
    assert follow(grammar, [], [], max_nodes=3).token_ids == [1, 2, 3]
    assert follow(grammar, [], [], max_depth=2).token_ids == [1, 2]
    assert not follow(Numbers(NARROW), [], []).nodes


def test_forced_nodes_take_the_places_of_the_last_drafted_ones() -> None:
    grammar = Numbers({0: [1, 9], 1: [2], 2: [3], 3: [4, 5], 9: [6, 7], 6: [6], 7: [8, 9]})
    tree = follow(grammar, [1, 9, 7], [ROOT, ROOT, 1], max_nodes=3)
    assert tree.token_ids == [1, 2, 3]
    assert tree.masks.flatten().tolist() == [bits(1, 9), bits(2), bits(3), bits(4, 5)]


def test_a_forced_token_that_ends_the_answer_gets_no_node() -> None:
    assert not follow(Numbers({0: [8], 8: []}), [], []).nodes


def test_a_forced_text_is_a_chain_from_the_root() -> None:
    """Also where the target could write it with other tokens; what the masks forbid is left out."""
    grammar = Numbers({0: [1, 9], 1: [2, 7], 2: [3, 4], 3: [5, 6]})
    grammar.ll_matcher = SimpleNamespace(compute_ff_tokens=lambda: [1, 2, 8])
    tree = follow(grammar, [9, 1], [ROOT, ROOT])
    assert (tree.token_ids, tree.nodes) == ([9, 1, 2], [0, 1, FORCED])
    tree = follow(grammar, [9], [ROOT])
    assert (tree.token_ids, tree.parents) == ([1, 2, 9], [ROOT, 0, ROOT])


@pytest.mark.parametrize("token", [0, 1, 31, 32, 95])
def test_the_one_token_of_a_mask_is_found(token: int) -> None:
    mask = torch.zeros(3, dtype=torch.int64)
    mask[token // 32] = 1 << token % 32
    assert forced_token(mask.to(torch.int32)) == token
    for other in {(token + 1) % 96, (token + 32) % 96}:
        more = mask.clone()
        more[other // 32] |= 1 << other % 32
        assert forced_token(more.to(torch.int32)) is None
    assert forced_token(torch.zeros(3, dtype=torch.int32)) is None


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


def count_nodes(llm: Any) -> Counter[str]:
    """Filled while the engine runs: nodes that were drafted for requests with a grammar, those of
    them that were verified, and those that were verified because the grammar forces them."""
    model_runner, core, counts = runner(llm), scheduler(llm), Counter[str]()
    take, schedule = model_runner.take_draft_token_ids, core.schedule

    def taking() -> Any:
        counts["drafted"] += sum(map(len, model_runner.grammar_parents.values()))
        return take()

    def scheduling(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        for tree in output.echo_allowed.values():
            forced = tree.nodes.count(FORCED)
            counts["forced"] += forced
            counts["verified"] += len(tree.nodes) - forced
        return output

    model_runner.take_draft_token_ids, core.schedule = taking, scheduling
    return counts


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
    assert nodes["drafted"] > 100, "no tree was drafted under a grammar"
    assert nodes["forced"] > 20, "nothing was forced"
    assert found["spec_decode_num_accepted_tokens"] > 50
    # What the grammar forbade was never verified.
    assert nodes["verified"] < nodes["drafted"]


@pytest.mark.full
def test_what_is_forced_comes_without_a_drafter(prompts: list[str]) -> None:
    """With a policy that rests all the time; most of it is accepted, though the target writes some
    of a forced text with other tokens."""
    params = constrained(**GRAMMARS[3])
    with demo_engine(None) as llm:
        wanted = generate(llm, prompts[:4], params)
    with demo_engine(echo(DEMO_HEAD, 8, **AUTO)) as llm:
        nodes = count_nodes(llm)
        dictate(llm, itertools.repeat((0, 0)))
        assert generate(llm, prompts[:4], params) == wanted
        found = counters(llm)
    assert nodes["drafted"] == 0
    assert nodes["forced"] > 40
    assert found["spec_decode_num_accepted_tokens"] > 0.5 * nodes["forced"]


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

    prompt = "Answer with two words, yes, no or maybe:"
    with_grammar = constrained(1.5, regex="(yes|no|maybe) (yes|no|maybe)")
    free = SamplingParams(temperature=1.0, max_tokens=8)
    sampled = []
    for candidates in (None, "best", "drawn"):
        spec = None
        if candidates is not None:
            spec = echo(DEMO_HEAD, 5, max_depth=3, top_k=3, candidates=candidates)
        each = [with_grammar] * 4 + [free] * (candidates == "drawn")
        each *= 100
        with demo_engine(spec, max_num_seqs=64) as llm:
            outputs = llm.generate([prompt] * len(each), each, use_tqdm=False)
            if spec is not None:
                assert counters(llm)["spec_decode_num_accepted_tokens"] > 25
        pairs = zip(outputs, each, strict=True)
        sampled.append([answer.outputs[0].text for answer, asked in pairs if asked is with_grammar])
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
