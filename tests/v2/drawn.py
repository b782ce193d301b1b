# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Drawn candidates on Model Runner V2: what comes out has the target's distribution.

The pieces first, on models that are tables: the real pool, policies, slots, sharing of a budget and
rejection, thousands of requests at once, by chi-square against the enumerated distribution, with
bugs planted that the same test must catch. Then the real engine.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm.v1.worker.cpu.shm  # noqa: F401  (the pretended streams)
from scipy.stats import chisquare
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.states import SamplingStates

from echo_vllm import ops
from echo_vllm.policies import DraftBatch, DraftPolicy, make_policy, parse_section
from echo_vllm.step.attention.tree import DraftScratch
from echo_vllm.step.v2 import drawn as module
from echo_vllm.step.v2.budget import TreeBudget
from echo_vllm.step.v2.drafter import Roots
from echo_vllm.step.v2.drawn import DrawnSlots, grow_drawn
from echo_vllm.step.v2.scheduler import UnseenTreesMixin
from echo_vllm.step.v2.state import TreeSlots, VerificationBuffers, scheduled_trees
from echo_vllm.trees.drawn import NO_SLOT, DrawnPool
from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, generate
from tests.engine.test_distribution import LEAST_P, PROMPT, Setting, enumerated_logits
from tests.engine.test_drawn import plant_a_residual_that_is_not_updated
from tests.engine.test_exactness import POLICIES, greedy
from tests.engine.tiny import Shape, make_head, make_target
from tests.v2.stock import PROMPTS, TOKENS, v2_engine
from tests.v2.trees import NoHostReads, both, plain, sampling

__all__ = ["plain"]

VOCAB = 6
DRAFTED = [0, 1, 2, 4]
"""The head's vocabulary is its own."""
SEEN = 3
"""Tokens whose joint distribution is looked at."""
CPU = torch.device("cpu")

SETTINGS = {
    "cool": Setting({"temperature": 0.6}),
    "plain": Setting(),
    "top-p": Setting({"temperature": 1.5, "top_p": 0.8}),
    "top-k": Setting({"top_k": 3}),
    "min-p": Setting({"min_p": 0.15}),
}

WIDE = [[0], [1], [2], [0, 0], [1, 0], [0, 1]]

SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "chain": (3, {"policy": "chain"}),
    "static": (len(WIDE), {"policy": "static", "tree": WIDE}),
    "topn": (6, {"policy": "topn", "max_depth": 3, "top_k": 2}),
    # Gates that fire, and a budget that the batch shares by worth.
    "echo": (6, {"policy": "echo", "max_depth": 3, "top_k": 2, "width": 3, "gates": {"1": 0.3}}),
    "auto": (8, {"policy": "auto", "max_depth": 3, "top_k": 2, "width": 3}),
}
SHARED = {"echo": 3, "auto": 4}
"""Nodes a request that all of a batch share."""


def state_after(state: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of a table's rows, [...] float32: the one after a token more."""
    return state * (VOCAB + 1) + tokens + 1


class Levels:
    """What `LevelBuffers` is to a drafter: the state of each row's path is its hidden state."""

    def __init__(self) -> None:
        self.scratch = DraftScratch(1)
        self.states = torch.empty(0)

    def hold_requests(self, *_: Any) -> None:
        """No forward looks at a context."""

    def hold(self, level: Any, token_ids: torch.Tensor, positions: torch.Tensor) -> None:
        self.states = state_after(level.hidden, token_ids.unsqueeze(2)).flatten(0, 1)


@dataclass
class Tables:
    """A target and a drafter that say what their tables do, after any path from the root.

    Attributes:
        chances: [settings, rows, VOCAB] float64, what the target samples from.
        drafter: [rows, len(DRAFTED)] float32, logits.
    """

    chances: np.ndarray
    drafter: torch.Tensor

    @classmethod
    def random(cls) -> Tables:
        generator = torch.Generator().manual_seed(20261130)
        rows = (VOCAB + 1) ** SEEN
        target = 1.5 * torch.randn(rows, VOCAB, generator=generator)
        near = target[:, DRAFTED] + torch.randn(rows, len(DRAFTED), generator=generator)
        chances = [[each.reference(row, ()) for row in target] for each in SETTINGS.values()]
        return cls(np.array(chances), near)


class Engine:
    """Steps of many requests that all stand at the same root, `each` of every setting."""

    def __init__(self, policy: DraftPolicy, tables: Tables, each: int) -> None:
        self.policy, self.tables = policy, tables
        settings = list(SETTINGS.values())
        self.count = each * len(settings)
        self.setting_of = np.arange(self.count) % len(settings)
        states = SamplingStates(self.count, VOCAB)
        for slot, kind in enumerate(self.setting_of):
            states.add_request(slot, SamplingParams(seed=slot, **settings[kind].options))
        states.apply_staged_writes()
        self.slots = TreeSlots(self.count, policy.max_nodes, CPU)
        offsets = torch.tensor(DRAFTED) - torch.arange(len(DRAFTED))
        self.drawn = DrawnSlots(
            policy,
            "drawn",
            states,
            vocab=VOCAB,
            draft_vocab=len(DRAFTED),
            draft_offsets=offsets,
            device=CPU,
        )
        for slot, kind in enumerate(self.setting_of):
            self.drawn.begin(slot, SamplingParams(**settings[kind].options))
        self.tokens = torch.zeros(self.count, policy.max_nodes, dtype=torch.int64)
        # -inf where nothing may come out, as behind vLLM's processors.
        self.logits = torch.from_numpy(tables.chances).log().float()

    def draft(self) -> DrawnPool:
        levels = Levels()
        drafter: Any = SimpleNamespace(
            policy=self.policy,
            levels=levels,
            max_model_len=99,
            run_held=lambda count, width: (levels.states, levels.states),
            logits_of=lambda output: self.tables.drafter[output.flatten().long()],
        )
        nothing = torch.zeros(self.count, 1)
        slots = torch.arange(self.count)
        roots = Roots(
            nothing,
            nothing,
            token_ids=slots,
            context_lens=torch.full((self.count,), 7, dtype=torch.int32),
            # One request reads its prompt still.
            are_read=slots > 0,
            block_tables=[],
        )
        batch = DraftBatch.of(self.count)
        pool, _ = grow_drawn(drafter, self.drawn, roots, slots, slots.numpy(), batch)
        trees = self.policy.drawn_ranked(pool, batch, self.policy.drawn_cut(batch))
        self.slots.write(slots, trees)
        self.drawn.write(slots, slots.numpy(), pool, trees)
        self.tokens[:, : trees.token_ids.shape[1]] = trees.token_ids
        return pool

    def has_no_token_twice(self) -> bool:
        """Whether all children of each parent are different."""
        is_node = torch.arange(self.policy.max_nodes) < self.slots.sizes.unsqueeze(1)
        request, place = is_node.nonzero(as_tuple=True)
        parents, tokens = self.slots.parents[request, place], self.tokens[request, place]
        children = torch.stack([request, parents, tokens], 1)
        return len(np.unique(children.numpy(), axis=0)) == len(children)

    def batch(self, shared: int | None) -> Any:
        """The step that verifies, in which requests have all places of a tree, or share."""
        slots = torch.arange(self.count)
        nodes = torch.full((self.count,), self.policy.num_nodes, dtype=torch.int32)
        if shared is not None:
            budget: Any = TreeBudget.__new__(TreeBudget)
            budget.slots, budget._limit = self.slots, torch.zeros(1, dtype=torch.int32)
            most = self.policy.max_nodes
            budget._assign(nodes, slots, nodes, shared * self.count, most)
        bounds = torch.zeros(self.count + 1, dtype=torch.int32)
        bounds[1:] = (nodes + 1).cumsum(0)
        rows = int(bounds[-1])
        owner = slots.repeat_interleave(nodes + 1)
        return SimpleNamespace(
            num_reqs=self.count,
            num_draft_tokens=int(nodes.sum()),
            num_draft_tokens_per_req=nodes.numpy(),
            idx_mapping=slots,
            idx_mapping_np=slots.numpy(),
            expanded_idx_mapping=owner,
            expanded_local_pos=(torch.arange(rows) - bounds[owner]).to(torch.int32),
            positions=torch.full((rows,), 7),
            logits_indices=torch.arange(rows),
            cu_num_logits=bounds,
        )

    def verify(self, batch: Any) -> tuple[list[tuple[int, ...]], torch.Tensor]:
        """The first tokens of every request, what a step lacks of them drawn by the book; and how
        many nodes were accepted."""
        buffers = VerificationBuffers(len(batch.positions), 64, CPU)
        with NoHostReads():  # type: ignore[no-untyped-call]
            trees = scheduled_trees(
                self.slots, buffers, self.tokens, batch, are_causal=True, in_graph=False
            )
        row_of_node = (batch.expanded_local_pos > 0).nonzero().flatten()
        states = [0.0] * len(batch.positions)
        for node, row in enumerate(row_of_node.tolist()):
            above = row - int(batch.expanded_local_pos[row]) + int(trees.parents[node]) + 1
            token = int(trees.token_ids[node])
            states[row] = 0.0 if token < 0 else states[above] * (VOCAB + 1) + token + 1
        kind = torch.from_numpy(self.setting_of)[batch.expanded_idx_mapping]
        path = torch.tensor(states).long()
        path = path.where(path < self.logits.shape[1], 0)  # Deeper than anybody looks.
        logits = self.logits[kind, path]
        generator = torch.Generator().manual_seed(5)
        sampled = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()
        is_reference = ops.sample_path.__module__ != "echo_vllm.ops"
        with nullcontext() if is_reference else NoHostReads():  # type: ignore[no-untyped-call]
            sampled = self.drawn.verified(logits, sampled, batch, trees, self.slots)
        accepted, counts = ops.accept_path(
            sampled, trees.token_ids, trees.parents, trees.cu_nodes, self.policy.max_depth
        )
        rng = np.random.default_rng(6)
        found = []
        for request, (rows, count) in enumerate(zip(accepted.tolist(), counts, strict=True)):
            first = int(batch.cu_num_logits[request])
            said = [int(sampled[first + row]) for row in rows[: int(count) + 1]][:SEEN]
            state = 0
            for token in said:
                state = state * (VOCAB + 1) + token + 1
            while len(said) < SEEN:
                chances = self.tables.chances[self.setting_of[request], state]
                said.append(int(rng.choice(VOCAB, p=chances)))
                state = state * (VOCAB + 1) + said[-1] + 1
            found.append(tuple(said))
        return found, counts

    def p_values(self, found: list[tuple[int, ...]]) -> dict[str, float]:
        """Of each setting's first tokens."""
        values = {}
        for kind, name in enumerate(SETTINGS):
            said = Counter(found[i] for i in np.flatnonzero(self.setting_of == kind))
            got, wanted = [], []
            for path in itertools.product(range(VOCAB), repeat=SEEN):
                chance, state = 1.0, 0
                for token in path:
                    chance *= self.tables.chances[kind, state, token]
                    state = state * (VOCAB + 1) + token + 1
                got.append(said[path])
                wanted.append(chance * said.total())
            values[name] = chi_square(np.array(got), np.array(wanted))
        return values


def chi_square(got: np.ndarray, wanted: np.ndarray) -> float:
    if (got[wanted < 1e-6] > 0).any():
        return 0.0  # What cannot come out is proof, whatever the statistic says.
    is_large = wanted >= 5
    cells = np.append(got[is_large], got[~is_large].sum())
    expected = np.append(wanted[is_large], wanted[~is_large].sum())
    keep = expected > 0
    return float(chisquare(cells[keep], expected[keep] * cells.sum() / expected.sum()).pvalue)


def policy_of(shape: str, **fields: Any) -> DraftPolicy:
    num_nodes, section = SHAPES[shape]
    section = {**section, "candidates": "drawn", **fields}
    return make_policy(parse_section(section, num_speculative_tokens=num_nodes), num_nodes)


@pytest.fixture(scope="module")
def tables() -> Tables:
    return Tables.random()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_pieces_together_have_the_targets_distribution(shape: str, tables: Tables) -> None:
    each = 2000
    count = each * len(SETTINGS)
    fields = {"k_max": SHARED[shape] * count} if shape in SHARED else {}
    engine = Engine(policy_of(shape, **fields), tables, each)
    with NoHostReads():  # type: ignore[no-untyped-call]
        engine.draft()
    assert engine.slots.sizes[0] == 0, "who reads a prompt has no tree"
    assert engine.has_no_token_twice(), "drawn with replacement"
    batch = engine.batch(SHARED.get(shape))
    found, accepted = engine.verify(batch)
    if shape in SHARED:
        assert len(set(batch.num_draft_tokens_per_req.tolist())) >= 3, "trees are of one size"
    assert accepted.float().mean() > 0.4, "nothing is at stake"
    values = engine.p_values(found)
    assert all(value > LEAST_P / len(SHAPES) for value in values.values()), values


def plant_a_budget_that_goes_by_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who gets the batch's nodes is settled by what was drawn."""

    def promised(pool: DrawnPool) -> torch.Tensor:
        promises = pool._promises[:, 1:]
        return promises.masked_fill(pool._worths[:, 1:] == NO_SLOT, NO_SLOT)

    monkeypatch.setattr(DrawnPool, "worths", property(promised))


def plant_a_q_of_another_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = DrawnSlots.keep

    def sharper(drawn: DrawnSlots, rows: torch.Tensor, probs: torch.Tensor) -> None:
        keep(drawn, rows, probs**2 / (probs**2).sum(1, keepdim=True))

    monkeypatch.setattr(DrawnSlots, "keep", sharper)


@pytest.mark.parametrize(
    ("shape", "shared", "plant"),
    [
        ("topn", None, plant_a_residual_that_is_not_updated),
        ("topn", None, plant_a_q_of_another_temperature),
        ("auto", 1, plant_a_budget_that_goes_by_promise),
    ],
)
def test_a_planted_bug_is_caught(
    shape: str,
    shared: int | None,
    plant: Callable[[pytest.MonkeyPatch], None],
    tables: Tables,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    engine = Engine(policy_of(shape), tables, 1500)
    engine.draft()
    values = engine.p_values(engine.verify(engine.batch(shared))[0])
    assert min(values.values()) < LEAST_P / 1000, values


# ---- The engine ----


def drawn_spec(tiny: TinyModel, name: str) -> dict[str, Any]:
    num_nodes, section = POLICIES[name]
    return echo(tiny.head, num_nodes, **section, candidates="drawn")


@pytest.mark.full
@pytest.mark.parametrize("name", ["chain-5", "static-15", "topn-16", "echo-16"])
def test_greedy_requests_do_not_notice_and_seeds_give_the_same_again(
    tiny: TinyModel, plain: list[list[int]], name: str
) -> None:
    """A batch of both kinds, in slots that are used again."""
    params = [greedy(TOKENS) if i % 2 else sampling(seed=i, top_p=0.9) for i in range(len(PROMPTS))]
    with v2_engine(tiny, drawn_spec(tiny, name), async_scheduling=True) as llm:
        found = generate(llm, PROMPTS, params)
        assert found[1::2] == plain[1::2]
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 20
        drawn = slice(0, None, 2)
        alone = [generate(llm, PROMPTS[drawn], params[drawn], one_by_one=True) for _ in range(2)]
        assert alone[0] == alone[1]


@both
def test_auto_runs_with_both_kinds_and_the_host_waits_for_nothing(
    tiny: TinyModel, plain: list[list[int]], is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from echo_vllm.forecast import CostCurve, StepCost
    from echo_vllm.policies.auto import AutoPolicy
    from echo_vllm.step.v2.drafter import TreeSpeculator
    from echo_vllm.step.v2.runner import TreeVerifier

    calls, reports = [], []

    def watched(owner: Any, name: str) -> None:
        stock = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            with NoHostReads():  # type: ignore[no-untyped-call]
                return stock(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    watched(TreeSpeculator, "_draft")
    watched(TreeVerifier, "_note")
    watched(DrawnSlots, "verified")
    free = CostCurve((1.0,), (1e-6,))
    monkeypatch.setattr(
        "echo_vllm.step.v2.worker.measured_cost", lambda *_: StepCost(free, free, free)
    )
    observe = AutoPolicy.observe

    def heard(policy: AutoPolicy, step: Any) -> None:
        reports.append(step.drawn_report)
        observe(policy, step)

    monkeypatch.setattr(AutoPolicy, "observe", heard)
    spec = drawn_spec(tiny, "auto-16")
    spec["echo"]["online"] = False
    params = [greedy(TOKENS) if i % 2 else sampling(seed=i) for i in range(len(PROMPTS))]
    with v2_engine(tiny, spec, async_scheduling=is_async) as llm:
        assert generate(llm, PROMPTS, params)[1::2] == plain[1::2]
    assert set(calls) == {"_draft", "_note", "verified"}
    told = [report for report in reports if report]
    # It rests soon, as with the best candidates: this head is no good.
    assert sum(sum(report["accepted"]) for report in told) >= 3
    assert sum(report["first"][0] for report in told) >= 3


@pytest.mark.full
def test_the_engine_samples_what_the_target_does(tmp_path: Any) -> None:
    """Three settings and greedy requests in ragged batches; one is penalised for its path, and says
    what its tokens' log-probabilities are."""
    shape, each = Shape(vocab=VOCAB), 120
    tiny = TinyModel(
        make_target(tmp_path / "target", shape), make_head(tmp_path / "head", shape), shape
    )
    logits = enumerated_logits(tiny, PROMPT)
    penalised = {"presence_penalty": 0.8, "repetition_penalty": 1.4, "temperature": 0.8}
    settings = [Setting(), Setting({"temperature": 1.5, "top_p": 0.8}), Setting(penalised)]
    params = [
        sampling(
            seed=i, max_tokens=SEEN, logprobs=0 if kind == 2 else None, **settings[kind].options
        )
        for i in range(each)
        for kind in range(3)
    ] + [greedy(SEEN)] * 10
    spec = echo(tiny.head, 6, policy="topn", max_depth=2, top_k=2, candidates="drawn")
    prompt: Any = {"prompt_token_ids": PROMPT}
    options = {"max_model_len": 64, "max_num_seqs": 32, "async_scheduling": True}
    with v2_engine(tiny, spec, **options) as llm:
        outputs = llm.generate([prompt] * len(params), params, use_tqdm=False)
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 0.2 * len(params)
    completions = [output.outputs[0] for output in outputs]
    said = [tuple(completion.token_ids) for completion in completions]
    best: tuple[int, ...] = ()
    while len(best) < SEEN:
        best += (int(logits(best).argmax()),)
    assert set(said[3 * each :]) == {best}
    for kind, setting in enumerate(settings):
        count = Counter(said[kind : 3 * each : 3])
        got, wanted = [], []
        for path in itertools.product(range(VOCAB), repeat=SEEN):
            chance = 1.0
            for place, token in enumerate(path):
                chance *= setting.reference(logits(path[:place]), path[:place])[token]
            got.append(count[path])
            wanted.append(chance * each)
        assert chi_square(np.array(got), np.array(wanted)) > LEAST_P, kind
    for completion in completions[2 : 3 * each : 3]:
        tokens = tuple(completion.token_ids)
        for place, each_token in enumerate(completion.logprobs):
            known = logits(tokens[:place]).log_softmax(0)[tokens[place]]
            assert each_token[tokens[place]].logprob == pytest.approx(float(known), abs=1e-4)


def test_a_tree_that_was_not_verified_at_once_never_is() -> None:
    """Of it something may have been heard, and its size is what was drawn."""
    scheduler: Any = UnseenTreesMixin.__new__(UnseenTreesMixin)
    scheduler._fresh, scheduler._candidates, scheduler._drawn = {"1"}, "drawn", {}
    scheduler.running = [
        SimpleNamespace(request_id=str(i), spec_token_ids=[-1] * 4, sampling_params=params)
        for i, params in enumerate([sampling(), sampling(), sampling(seed=3), greedy(4)])
    ]
    scheduler._drop_stale_trees()
    assert [len(request.spec_token_ids) for request in scheduler.running] == [0, 4, 0, 4]


def test_who_comes_when_all_seats_are_taken_keeps_the_best_candidates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = policy_of("topn")
    monkeypatch.setattr(module, "MOST_BYTES", 2 * 4 * 5 * VOCAB + 7)
    states = SamplingStates(4, VOCAB)
    options: Any = {"vocab": VOCAB, "draft_vocab": VOCAB, "draft_offsets": None, "device": CPU}
    slots = module.DrawnSlots(policy, "auto", states, **options)
    assert slots.probs.shape == (2 * 5, VOCAB)

    def draws() -> list[bool]:
        found: list[bool] = slots.draws(np.arange(4, dtype=np.int32)).tolist()
        return found

    for slot, params in enumerate([sampling(), sampling(seed=1), sampling(), sampling()]):
        slots.begin(slot, params)
    assert draws() == [True, False, True, False]
    slots.begin(0, sampling(temperature=0.4))
    slots.begin(3, sampling())
    assert draws() == [False, False, True, True]
    assert sorted(slots.first_rows(np.array([2, 3], np.int32)).tolist()) == [0, 5]
