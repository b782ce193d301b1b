# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""T > 0: what the real engine samples under tree speculation has the target's distribution.

A random model with six tokens has a joint distribution of the first four generated ones that can be
enumerated with Hugging Face's Llama; four tokens reach past an accepted path and its commit. The
engine's samples are held against it by a chi-square test; bugs planted in the engine must make the
same test fail.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, engine, runner
from tests.engine.tiny import Shape, make_head, make_target

pytestmark = pytest.mark.full

PROMPT = [3, 5, 2, 4, 5]
NUM_TOKENS = 4
"""Tokens whose joint distribution is looked at."""

GENERATED = NUM_TOKENS + 2
"""More than that, because no tree is deeper than what its request may still emit."""

NUM_SAMPLES = 20_000
LEAST_P = 0.001
SEED = 20261122


@dataclass(frozen=True)
class Setting:
    """Sampling parameters, and the same thing as an independent reference sees it."""

    options: dict[str, Any] = field(default_factory=dict)

    def reference(self, logits: torch.Tensor, output: tuple[int, ...]) -> np.ndarray:
        """The distribution that a target with these logits [vocab] samples from."""
        x = logits.double().clone()
        seen_anywhere = set(PROMPT) | set(output)
        repetition = self.options.get("repetition_penalty", 1.0)
        for token in seen_anywhere:
            x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
        for token, count in Counter(output).items():
            x[token] -= self.options.get("frequency_penalty", 0.0) * count
            x[token] -= self.options.get("presence_penalty", 0.0)
        for token, bias in self.options.get("logit_bias", {}).items():
            x[token] += bias
        if allowed := self.options.get("allowed_token_ids"):
            x[[token for token in range(len(x)) if token not in allowed]] = -torch.inf
        x /= self.options.get("temperature", 1.0)
        p = torch.softmax(x, dim=0).numpy()
        if top_k := self.options.get("top_k"):
            p[np.argsort(-p, kind="stable")[top_k:]] = 0
            p /= p.sum()
        if min_p := self.options.get("min_p"):
            p[p < min_p * p.max()] = 0
            p /= p.sum()
        if top_p := self.options.get("top_p"):
            order = np.argsort(-p, kind="stable")
            before = np.cumsum(p[order]) - p[order]
            p[order[before >= top_p]] = 0
            p /= p.sum()
        return p


SETTINGS = {
    "plain": Setting(),
    "hot": Setting({"temperature": 1.5}),
    "top-k": Setting({"top_k": 3}),
    "top-p": Setting({"top_p": 0.7}),
    "penalties": Setting(
        {"presence_penalty": 0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.4}
    ),
    "min-p": Setting({"min_p": 0.15}),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder, shape = tmp_path_factory.mktemp("six"), Shape(vocab=6)
    return TinyModel(
        make_target(folder / "target", shape), make_head(folder / "head", shape), shape
    )


def enumerated_logits(
    tiny: TinyModel, prompt: list[int]
) -> Callable[[tuple[int, ...]], torch.Tensor]:
    """The target's next-token logits after a prompt and some output, by Hugging Face."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny.target, dtype=torch.float32).eval()
    known: dict[tuple[int, ...], torch.Tensor] = {}
    for length in range(NUM_TOKENS):
        outputs = list(itertools.product(range(tiny.shape.vocab), repeat=length))
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + list(o) for o in outputs])).logits[:, -1]
        known.update(zip(outputs, logits, strict=True))
    return known.__getitem__


@pytest.fixture(scope="module")
def target_logits(tiny: TinyModel) -> Callable[[tuple[int, ...]], torch.Tensor]:
    """`enumerated_logits` after PROMPT."""
    return enumerated_logits(tiny, PROMPT)


def p_value(
    samples: list[tuple[int, ...]],
    setting: Setting,
    target_logits: Callable[[tuple[int, ...]], torch.Tensor],
    vocab: int,
) -> float:
    """Chi-square p-value of `samples` against the enumerated joint distribution."""
    joint: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(NUM_TOKENS):
        joint = {
            (*output, token): p * q
            for output, p in joint.items()
            for token, q in enumerate(setting.reference(target_logits(output), output))
        }
    assert len(joint) == vocab**NUM_TOKENS
    observed = Counter(samples)
    # An impossible sequence is proof, whatever the test statistic says.
    if any(joint[sample] == 0.0 for sample in observed):
        return 0.0
    cells: list[tuple[float, float]] = []
    rest = [0.0, 0.0]
    for output, p in joint.items():
        expected = p * len(samples)
        if expected >= 5:
            cells.append((observed[output], expected))
        else:
            rest[0] += observed[output]
            rest[1] += expected
    if rest[1] > 0:
        cells.append((rest[0], rest[1]))
    got, wanted = np.array(cells).T
    return float(chisquare(got, wanted * got.sum() / wanted.sum()).pvalue)


def check_each(
    sampled: list[list[tuple[int, ...]]],
    settings: Mapping[str, Setting],
    target_logits: Callable[[tuple[int, ...]], torch.Tensor],
    vocab: int,
) -> None:
    """The samples of each of `settings` have its distribution."""
    values = {
        name: p_value(samples, setting, target_logits, vocab)
        for (name, setting), samples in zip(settings.items(), sampled, strict=True)
    }
    assert all(p > LEAST_P / len(settings) for p in values.values()), values


def sample(llm: Any, settings: list[Setting], each: int) -> list[list[tuple[int, ...]]]:
    """`each` samples of every setting, all settings mixed in the same batches."""
    from vllm import SamplingParams

    torch.manual_seed(SEED)
    params = [
        SamplingParams(
            **{"temperature": 1.0, **s.options},
            max_tokens=GENERATED,
            ignore_eos=True,
            detokenize=False,
        )
        for s in settings
    ] * each
    outputs = llm.generate([{"prompt_token_ids": PROMPT}] * len(params), params, use_tqdm=False)
    tokens = [tuple(o.outputs[0].token_ids[:NUM_TOKENS]) for o in outputs]
    return [tokens[i :: len(settings)] for i in range(len(settings))]


def tree_engine(tiny: TinyModel, **section: Any) -> Any:
    return engine(
        tiny.target,
        echo(tiny.head, 10, **{"max_depth": 3, "top_k": 3, "candidates": "best", **section}),
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=256,
    )


@pytest.fixture(scope="module")
def trees(tiny: TinyModel) -> Iterator[Any]:
    """One engine for the tests before the first that starts its own, whose end takes the process's
    parallel groups away. PROMPT is too short for the prefix cache, so that a planted bug is gone
    with its requests."""
    with tree_engine(tiny) as llm:
        yield llm


def test_samples_have_the_targets_distribution(
    trees: Any, tiny: TinyModel, target_logits: Any
) -> None:
    before = counters(trees).get("spec_decode_num_accepted_tokens", 0)
    (samples,) = sample(trees, [SETTINGS["plain"]], NUM_SAMPLES)
    accepted = counters(trees)["spec_decode_num_accepted_tokens"] - before
    assert accepted > 0.2 * NUM_SAMPLES, "nothing was at stake"
    assert p_value(samples, SETTINGS["plain"], target_logits, tiny.shape.vocab) > LEAST_P


def test_a_batch_of_mixed_settings_gives_each_its_own_distribution(
    trees: Any, tiny: TinyModel, target_logits: Any
) -> None:
    sampled = sample(trees, list(SETTINGS.values()), NUM_SAMPLES // len(SETTINGS) + 1)
    check_each(sampled, SETTINGS, target_logits, tiny.shape.vocab)
    # The settings differ: none would pass for another.
    crossed = p_value(sampled[0], SETTINGS["hot"], target_logits, tiny.shape.vocab)
    assert crossed < LEAST_P


def plant_accept_on_less_or_equal(monkeypatch: pytest.MonkeyPatch, llm: Any) -> None:
    """The walk compares with <= where it must ask for equality."""
    from echo_vllm.step.verification import _Walk

    def children(self: Any, level: int, requests: Any, sampled: Any) -> Any:
        found = []
        for request, token in zip(requests.tolist(), sampled.tolist(), strict=True):
            at = self.rows[request, level] - 1
            own = (self.owner == request) & (self.parents == at) & (self.node_tokens <= token)
            found += [(request, self.place[node]) for node in np.flatnonzero(own)[:1]]
        pairs = np.array(found, np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    monkeypatch.setattr(_Walk, "_children", children)


def plant_a_missing_ancestor_bit(monkeypatch: pytest.MonkeyPatch, llm: Any) -> None:
    """No node sees its parent (the root, at depth 1)."""
    from echo_vllm import ops

    build = ops.build_super_tree

    def without_parent(parents: torch.Tensor, cu_nodes: torch.Tensor, words: int) -> Any:
        mask, depths = build(parents, cu_nodes, words)
        rows = torch.nonzero(depths >= 1).flatten().tolist()
        cu = cu_nodes.tolist()
        for row in rows:
            request = next(i for i in range(len(cu) - 1) if row < cu[i + 1] + i + 1)
            parent = int(parents[row - request - 1])
            mask[row, 0] &= ~(1 << (parent + 1))
        return mask, depths

    monkeypatch.setattr(ops, "build_super_tree", without_parent)


def plant_positions_by_row(monkeypatch: pytest.MonkeyPatch, llm: Any) -> None:
    """Rows get the position of their slot in place of their depth."""
    from echo_vllm import ops

    build = ops.build_super_tree

    def flat(parents: torch.Tensor, cu_nodes: torch.Tensor, words: int) -> Any:
        mask, depths = build(parents, cu_nodes, words)
        own = torch.cat([torch.arange(n + 1) for n in cu_nodes.diff().tolist()])
        return mask, own.to(depths.dtype)

    monkeypatch.setattr(ops, "build_super_tree", flat)


def plant_no_commit(monkeypatch: pytest.MonkeyPatch, llm: Any) -> None:
    """The accepted path's keys and values stay in the slots where they were verified."""
    monkeypatch.setattr(runner(llm), "_commit", lambda step, verdict: None)


@pytest.mark.parametrize(
    "plant",
    [
        plant_accept_on_less_or_equal,
        plant_a_missing_ancestor_bit,
        plant_positions_by_row,
        plant_no_commit,
    ],
)
def test_planted_bugs_are_caught(
    plant: Callable[[pytest.MonkeyPatch, Any], None],
    trees: Any,
    tiny: TinyModel,
    target_logits: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a quarter of the samples that the engine itself must pass with."""
    plant(monkeypatch, trees)
    (samples,) = sample(trees, [SETTINGS["plain"]], NUM_SAMPLES // 4)
    monkeypatch.undo()
    assert p_value(samples, SETTINGS["plain"], target_logits, tiny.shape.vocab) < LEAST_P


def test_a_planted_duplicate_sibling_is_caught(
    trees: Any, tiny: TinyModel, target_logits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forest's invariants catch it; the walk itself is not biased by it.

    Rejection samplers that try siblings one after another turn (.5, .5) into (.75, .25) when a
    token stands twice. The walk samples once and looks for the token, so a duplicate costs a slot
    and nothing else - which is no reason to allow it.
    """
    policy = runner(trees).drafter.policy
    select, broken = policy.select, []

    def duplicate(pool: Any, batch: Any) -> Any:
        forest = select(pool, batch)
        first = forest.cu_nodes[:-1].to(torch.int64)
        roots = [
            torch.nonzero(forest.parents[s : s + 10] == -1).flatten() + s for s in first.tolist()
        ]
        for own in roots:
            forest.token_ids[own[-1]] = forest.token_ids[own[0]]
        try:
            forest.validate(max_nodes=10, max_depth=3)
        except ValueError as error:
            broken.append(str(error))
        return forest

    monkeypatch.setattr(policy, "select", duplicate)
    (samples,) = sample(trees, [SETTINGS["plain"]], NUM_SAMPLES // 4)
    monkeypatch.undo()
    assert broken
    assert all("stands twice under one parent" in message for message in broken)
    assert p_value(samples, SETTINGS["plain"], target_logits, tiny.shape.vocab) > LEAST_P


@pytest.mark.parametrize(
    "section",
    [
        # The budget is short, so what a request gets depends on all others' drafts.
        {"policy": "echo", "width": 5, "k_max": 500, "gates": {"1": 0.3}},
        {"policy": "auto", "width": 5, "k_max": 300, "gamma": 0.001, "online": False},
        {"policy": "evict", "width": 5, "k_max": 300, "gamma": 0.001, "online": False},
        # Candidates out of what the target said to all requests.
        {"policy": "graft", "k_max": 700, "gates": {"1": 0.6, "2": 0.5}},
    ],
    ids=lambda section: section["policy"],
)
@pytest.mark.usefixtures("free_drafting")
def test_samples_under_a_shared_budget_have_the_targets_distribution(
    section: dict[str, Any], tiny: TinyModel, target_logits: Any
) -> None:
    with tree_engine(tiny, **section) as llm:
        (samples,) = sample(llm, [SETTINGS["plain"]], NUM_SAMPLES // 2)
        found = counters(llm)
    drafts, nodes = found["spec_decode_num_drafts"], found["spec_decode_num_draft_tokens"]
    assert found["spec_decode_num_accepted_tokens"] > 0.025 * NUM_SAMPLES, "nothing was at stake"
    assert nodes < 0.7 * 10 * drafts, "the budget was never short"
    assert p_value(samples, SETTINGS["plain"], target_logits, tiny.shape.vocab) > LEAST_P
