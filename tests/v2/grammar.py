# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Trees under a grammar on Model Runner V2: the tokens of plain V2, and only what is allowed."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu.async_utils import async_copy_to_np

from echo_vllm.step.grammar import FORCED, AllowedTree, allow, masks_of
from echo_vllm.step.v2 import grammar, runner, scheduler
from echo_vllm.step.v2.grammar import TreesToHost
from echo_vllm.step.v2.runner import TreeVerifier
from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, engine, free_blocks, generate
from tests.engine.test_exactness import POLICIES, tiny_prompts
from tests.engine.tiny import Shape, add_letters, make_head, make_target
from tests.v2 import full
from tests.v2.trees import NoHostReads, both, metric

TOKENS = 24
END = "</s>"
LETTERS = ["a", END, *"bcdefghi", "<think>", "</think>"]
REPETITIVE = {"regex": "(abcd(e|f)ghi(a|b))+"}
GRAMMARS: list[dict[str, Any]] = [
    {"regex": "((ab|cd|ef|bc)(g|h|i)){12}"},
    REPETITIVE,
    {"choice": ["abcdefghi", "abcdihgfeabcd", "ihgfedcba"]},
    {"regex": "[a-e]*[f-i]{4}"},
]
PROMPTS = tiny_prompts(8)


@pytest.fixture(scope="session")
def spelled(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A tiny target whose tokens are letters, and its head."""
    folder, shape = tmp_path_factory.mktemp("spelled"), Shape()
    target = add_letters(make_target(folder / "target", shape), LETTERS, eos_token=END)
    return TinyModel(target, make_head(folder / "head", shape), shape)


def v2_engine(spelled: TinyModel, spec: dict[str, Any] | None, **options: Any) -> Any:
    options = {"max_model_len": 256, "max_num_seqs": 4, "async_scheduling": False, **options}
    return engine(spelled.target, spec, **options)


def trees(spelled: TinyModel, name: str) -> dict[str, Any]:
    num_nodes, section = POLICIES[name]
    return echo(spelled.head, num_nodes, **section)


def constrained(of_grammar: dict[str, Any], **options: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    outputs = StructuredOutputsParams(**of_grammar)
    usual = {"temperature": 0.0, "max_tokens": TOKENS}
    return SamplingParams(structured_outputs=outputs, **{**usual, **options})


def asked(temperature: float = 0.0) -> list[Any]:
    """Every second one of eight requests has a grammar."""
    from vllm import SamplingParams

    params = []
    for i in range(len(PROMPTS)):
        own: dict[str, Any] = {"temperature": temperature, "seed": i}
        own["max_tokens"] = TOKENS if temperature == 0 else TOKENS // 2
        if i % 2:
            params.append(SamplingParams(**own, ignore_eos=True))
        else:
            params.append(constrained(GRAMMARS[i // 2], **own))
    return params


def in_letters(tokens: list[list[int]]) -> list[str]:
    return ["".join(LETTERS[token] for token in each) for each in tokens]


@pytest.fixture(scope="module")
def plain(spelled: TinyModel) -> list[str]:
    with v2_engine(spelled, None) as llm:
        return in_letters(generate(llm, PROMPTS, asked()))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts nodes of requests with a grammar: drafted, allowed of these, forced, verified; and
    checks that each that is verified is one that its grammar allows behind its parent."""
    count = Counter[str]()
    follow, verify = allow, TreeVerifier.__call__

    def followed(manager: Any, request: Any, tokens: Any, *args: Any, **limits: Any) -> AllowedTree:
        tree = follow(manager, request, tokens, *args, **limits)
        forced = tree.nodes.count(FORCED)
        count.update(drafted=len(tokens), allowed=len(tree.nodes) - forced, forced=forced)
        return tree

    def verified(self: TreeVerifier, logits: torch.Tensor, batch: Any, *args: Any) -> Any:
        found = self.runner.trees
        assert found is not None
        bounds, firsts = found.cu_nodes.tolist(), batch.cu_num_logits.tolist()
        for i, req_id in enumerate(batch.req_ids):
            if (tree := self.runner.rewritten.get(req_id)) is None:
                continue
            nodes = range(bounds[i], bounds[i + 1])
            tokens = [int(found.token_ids[node]) for node in nodes]
            n = min(len(tokens), len(tree.nodes))
            # The slot has what was allowed, and nothing behind it.
            assert tokens == tree.token_ids[:n] + [-1] * (len(tokens) - n)
            assert [int(found.parents[node]) for node in nodes][:n] == tree.parents[:n]
            for token, parent in zip(tokens[:n], tree.parents[:n], strict=True):
                assert logits[firsts[i] + 1 + parent, token] > -torch.inf, "a forbidden node"
            count["verified"] += n
        return verify(self, logits, batch, *args)

    monkeypatch.setattr(scheduler, "allow", followed)
    monkeypatch.setattr(TreeVerifier, "__call__", verified)
    return count


@pytest.mark.parametrize(("name", "is_async"), [("topn-16", True), ("echo-16", False)])
def test_trees_under_a_grammar_are_exact(
    spelled: TinyModel, plain: list[str], name: str, is_async: bool, seen: Counter[str]
) -> None:
    """In one batch with requests that have none."""
    with v2_engine(spelled, trees(spelled, name), async_scheduling=is_async) as llm:
        free = free_blocks(llm)
        assert in_letters(generate(llm, PROMPTS, asked())) == plain
        assert free_blocks(llm) == free
    assert plain[0][2] in "ghi"
    assert plain[4] in [f"{x}{END}" for x in GRAMMARS[2]["choice"]]
    # Most of what a random head drafts is forbidden, and much of these texts is forced.
    assert 20 < seen["allowed"] < 0.6 * seen["drafted"]
    assert seen["forced"] > 20
    assert seen["verified"] > 50


@both
@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["chain-5", "static-15", "topn-64", "auto-16", "evict-16", "graft-16"]
)
def test_every_policy_is_exact_under_a_grammar(
    spelled: TinyModel, plain: list[str], name: str, is_async: bool, seen: Counter[str]
) -> None:
    with v2_engine(spelled, trees(spelled, name), async_scheduling=is_async) as llm:
        assert in_letters(generate(llm, PROMPTS, asked())) == plain
    assert seen["verified"] > 10
    assert (seen["forced"] == 0) == (name == "chain-5")


@pytest.fixture(scope="module")
def plain_seeded(spelled: TinyModel) -> list[str]:
    with v2_engine(spelled, None) as llm:
        return in_letters(generate(llm, PROMPTS, asked(1.0)))


@pytest.mark.full
@pytest.mark.parametrize(("name", "is_async"), [("topn-16", False), ("echo-16", True)])
def test_seeded_samples_under_a_grammar_are_plain_decoding_s(
    spelled: TinyModel, plain_seeded: list[str], name: str, is_async: bool, seen: Counter[str]
) -> None:
    with v2_engine(spelled, trees(spelled, name), async_scheduling=is_async) as llm:
        assert in_letters(generate(llm, PROMPTS, asked(1.0))) == plain_seeded
    assert seen["verified"] > 15


@pytest.mark.full
def test_drawn_candidates_stand_beside(
    spelled: TinyModel, plain: list[str], plain_seeded: list[str], seen: Counter[str]
) -> None:
    """In one batch, in which requests with a grammar keep the best ones, sampled ones as well."""
    spec = trees(spelled, "echo-16")
    spec["echo"]["candidates"] = "drawn"
    params = asked(1.0)
    params[::4] = asked()[::4]
    with v2_engine(spelled, spec, async_scheduling=True) as llm:
        found = in_letters(generate(llm, PROMPTS, params))
    assert found[::4] == plain[::4]
    assert found[2::4] == plain_seeded[2::4]
    assert seen["verified"] > 15


@pytest.mark.full
def test_full_graphs_read_the_trees_that_a_grammar_has_left(
    spelled: TinyModel, seen: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [constrained(each, max_tokens=10) for each in GRAMMARS]
    with v2_engine(spelled, None) as llm:
        wanted = generate(llm, PROMPTS[:4], params)
    monkeypatch.setattr(full, "v2_engine", v2_engine)
    spec = trees(spelled, "topn-16")
    with full.in_graphs(spelled, monkeypatch, spec, async_scheduling=True) as in_graphs:
        assert generate(in_graphs.llm, PROMPTS[:4], params) == wanted
        assert in_graphs.replays
    assert seen["verified"] > 20


@both
@pytest.mark.full
def test_a_repetitive_grammar_is_accepted_by_the_word(spelled: TinyModel, is_async: bool) -> None:
    params = constrained(REPETITIVE, max_tokens=64)
    with v2_engine(spelled, None) as llm:
        wanted = generate(llm, PROMPTS[:4], params)
    with v2_engine(spelled, trees(spelled, "topn-16"), async_scheduling=is_async) as llm:
        assert generate(llm, PROMPTS[:4], params) == wanted
        count = counters(llm)
    assert count["spec_decode_num_accepted_tokens"] > 2 * count["spec_decode_num_drafts"]


CONDITIONS: dict[str, dict[str, Any]] = {
    "prompts come in chunks": {"max_num_batched_tokens": 40, "long_prefill_token_threshold": 12},
    "requests are preempted": {"num_gpu_blocks_override": 9, "block_size": 32},
}


@both
@pytest.mark.full
@pytest.mark.parametrize("condition", CONDITIONS)
def test_grammars_stay_in_order_where(
    spelled: TinyModel, plain: list[str], condition: str, is_async: bool, seen: Counter[str]
) -> None:
    """And when requests are given up in the middle."""
    spec, options = trees(spelled, "echo-16"), CONDITIONS[condition]
    with v2_engine(spelled, spec, async_scheduling=is_async, **options) as llm:
        assert in_letters(generate(llm, PROMPTS, asked())) == plain
        core, free = llm.llm_engine, free_blocks(llm)
        for number, (prompt, params) in enumerate(zip(PROMPTS, asked(), strict=True)):
            core.add_request(f"gone-{number}", prompt, params)
        for step in range(12):
            core.step()
            if step > 3:
                core.abort_request([f"gone-{step - 4}"])
        while core.has_unfinished_requests():
            core.step()
        assert free_blocks(llm) == free
        assert in_letters(generate(llm, PROMPTS, asked())) == plain
        if condition == "requests are preempted":
            assert metric(llm, "vllm:num_preemptions") > 0
    assert seen["verified"] > 50


@both
@pytest.mark.full
def test_reasoning_ends_inside_a_path(
    spelled: TinyModel, is_async: bool, seen: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows its last token is the grammar's, from there on."""
    ends = Counter[bool]()
    written = grammar.write_allowed

    def watched(slots: Any, drafts: Any, places: Any, told: list[AllowedTree]) -> None:
        last = LETTERS.index("</think>")
        ends.update(last in tree.token_ids for tree in told)
        written(slots, drafts, places, told)

    monkeypatch.setattr(runner, "write_allowed", watched)
    prompts = [{"prompt_token_ids": [2, 3, 4 + i]} for i in range(6)]
    params = [constrained(GRAMMARS[i % 4], max_tokens=64) for i in range(len(prompts))]
    thinking = {"structured_outputs_config": {"reasoning_parser": "deepseek_r1"}}
    with v2_engine(spelled, None, **thinking) as llm:
        wanted = in_letters(generate(llm, prompts, params))
    assert any(0 < text.find("</think>") < len(text) - len("</think>") for text in wanted)
    spec = trees(spelled, "topn-16")
    with v2_engine(spelled, spec, async_scheduling=is_async, **thinking) as llm:
        assert in_letters(generate(llm, prompts, params)) == wanted
    assert ends[True] > 3


@pytest.mark.full
def test_a_back_end_that_cannot_go_back_gets_no_tree(
    spelled: TinyModel, plain: list[str], seen: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echo_vllm.step.v1.slots.FOLLOWED_BACKENDS", frozenset())
    with v2_engine(spelled, trees(spelled, "topn-16"), async_scheduling=True) as llm:
        assert in_letters(generate(llm, PROMPTS, asked())) == plain
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 5
    assert not seen


@both
@pytest.mark.full
def test_a_tree_that_nobody_has_followed_is_not_verified(
    spelled: TinyModel,
    plain: list[str],
    is_async: bool,
    seen: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if requests were left out of the step behind each second drafting of theirs."""
    came = itertools.cycle([True, False])

    def dropped(drafts: Any) -> Any:
        return grammar.drafted_of(drafts) if next(came) else {}

    monkeypatch.setattr(scheduler, "drafted_of", dropped)
    with v2_engine(spelled, trees(spelled, "echo-16"), async_scheduling=is_async) as llm:
        assert in_letters(generate(llm, PROMPTS, asked())) == plain
    assert seen["verified"] > 20


@pytest.mark.full
def test_only_these_trees_come_to_the_host_and_nothing_is_waited_for(
    spelled: TinyModel, plain: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other requests' never do, and where nobody has a grammar no batch is held."""
    copied: list[list[str]] = []
    held = Counter[bool]()
    bring, write, copy = (
        TreesToHost.set_draft_tokens,
        grammar.write_allowed,
        async_copy_to_np,
    )
    execute = runner.EchoRunnerV2Mixin.execute_model

    def bringing(self: TreesToHost, batch: Any, drafts: torch.Tensor) -> None:
        with NoHostReads():  # type: ignore[no-untyped-call]
            bring(self, batch, drafts)
        copied.append(list(self._names))

    def writing(*args: Any) -> None:
        with NoHostReads():  # type: ignore[no-untyped-call]
            write(*args)

    def copying(values: torch.Tensor) -> Any:
        assert values.shape[1] == 1 + 2 * 16
        return copy(values)

    def executing(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        result = execute(self, scheduler_output, *args, **kwargs)
        held[self._held is not None] += 1
        return result

    monkeypatch.setattr(TreesToHost, "set_draft_tokens", bringing)
    monkeypatch.setattr(runner, "write_allowed", writing)
    monkeypatch.setattr(grammar, "async_copy_to_np", copying)
    monkeypatch.setattr(runner.EchoRunnerV2Mixin, "execute_model", executing)
    with v2_engine(spelled, trees(spelled, "echo-16"), async_scheduling=True) as llm:
        assert in_letters(generate(llm, PROMPTS, asked())) == plain
        assert held[True] > 10
        constrained_ids = {name for names in copied for name in names}
        assert len(constrained_ids) == 4
        copied.clear()
        held.clear()
        free = [params for params in asked() if params.structured_outputs is None]
        generate(llm, PROMPTS[1::2], free)
    assert copied
    assert not any(copied)
    assert held[False]
    assert not held[True]


# --- bugs that the tests above catch --------------------------------------------------------------


def test_a_mask_of_another_node_is_noticed(
    spelled: TinyModel, plain: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(stock: Any, scheduler_output: Any, own: dict[str, AllowedTree]) -> Any:
        for tree in own.values():
            tree.masks[1:] = tree.masks[1:].roll(1, 0)
        return masks_of(stock, scheduler_output, own)

    monkeypatch.setattr(scheduler, "masks_of", shifted)
    with v2_engine(spelled, trees(spelled, "topn-16"), async_scheduling=True) as llm:
        assert in_letters(generate(llm, PROMPTS, asked())) != plain


@pytest.mark.full
def test_a_forbidden_draft_that_keeps_its_node_is_noticed(
    spelled: TinyModel, monkeypatch: pytest.MonkeyPatch, seen: Counter[str]
) -> None:
    def kept(manager: Any, request: Any, tokens: Any, parents: Any, **limits: Any) -> AllowedTree:
        tree = allow(manager, request, tokens, parents, **limits)
        n = min(len(tokens), limits["max_nodes"])
        masks = torch.full((1 + n, tree.masks.shape[1]), -1, dtype=torch.int32)
        masks[0] = tree.masks[0]
        return AllowedTree(list(range(n)), list(tokens[:n]), list(parents[:n]), masks)

    monkeypatch.setattr(scheduler, "allow", kept)
    spec = trees(spelled, "topn-16")
    with (
        pytest.raises(AssertionError, match="a forbidden node"),
        v2_engine(spelled, spec, async_scheduling=True) as llm,
    ):
        generate(llm, PROMPTS, asked())
