# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Verification, commit and the runner's share of a step on a pretended GPU."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata

from echo_vllm import ops
from echo_vllm.step.attention.tree import VerificationRows
from echo_vllm.step.clock import DeviceClock, StepClock, clock_of
from echo_vllm.step.v1.runner import EchoRunnerMixin, Step
from echo_vllm.step.verification import NO_TOKEN, Drawing, Verdict, verify
from echo_vllm.trees.forest import DraftForest
from tests.device.pretended import GPU, OnGPU, held, on_gpu, pretended_gpu

VOCAB = 11
FOREST = DraftForest.from_parents(
    [[3, 4, 5, 6], [7, 8], [], [1, 2, 3]],
    [[-1, -1, 1, 2], [-1, 0], [], [-1, 0, 0]],
)
# The target's token at every row [root, nodes...]; request 0 takes 4, 5, 6, request 3 takes 1, 3.
TARGET = [4, 0, 5, 6, 9, 7, 0, 8, 2, 1, 3, 0, 10]
TOKENS = [
    [4, 5, 6, 9],
    [7, 0, NO_TOKEN, NO_TOKEN],
    [2, NO_TOKEN, NO_TOKEN, NO_TOKEN],
    [1, 3, 10, NO_TOKEN],
]
ROWS = [[0, 2, 3, 4], [0, 1, -1, -1], [0, -1, -1, -1], [0, 1, 3, -1]]


def logits_of(tokens: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), VOCAB).float() * 40


def sampling_of(device: torch.device, **options: Any) -> SamplingMetadata:
    temperature = torch.tensor([0.5, 1.0, 0.7, 2.0])
    if device == GPU:
        temperature = on_gpu(temperature)
    usual: dict[str, Any] = {
        "temperature": temperature, "all_greedy": False, "all_random": True, "top_p": None,
        "top_k": None, "generators": {}, "max_num_logprobs": None, "no_penalties": True,
        "prompt_token_ids": None, "frequency_penalties": temperature,
        "presence_penalties": temperature, "repetition_penalties": temperature,
        "output_token_ids": [], "allowed_token_ids_mask": None, "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
    }  # fmt: skip
    return SamplingMetadata(**{**usual, **options})


class Sampler:
    """Samples the one token that has all of the probability."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> SamplerOutput:
        self.rows.append(len(logits))
        assert sampling_metadata.temperature is not None
        scaled = logits / sampling_metadata.temperature.unsqueeze(1)
        tokens = scaled.argmax(1, keepdim=True).to(torch.int32)
        logprobs = None
        if sampling_metadata.max_num_logprobs is not None:
            ranks = tokens.squeeze(1)
            logprobs = LogprobsTensors(tokens, scaled.gather(1, tokens.long()), ranks)
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)


def run(
    sampling: SamplingMetadata,
    logits: torch.Tensor,
    *,
    by_level: Sequence[bool] = (False,) * 4,
    is_random: Sequence[bool] = (True,) * 4,
    skipped: Sequence[bool] = (False,) * 4,
) -> tuple[Verdict, list[int]]:
    sampler: Any = Sampler()
    histories: list[list[int]] = [[], [1], [], [2, 2]]
    no, level, drawing = (np.array(values) for values in (skipped, by_level, is_random))
    verdict = verify(sampler, logits, FOREST, sampling, histories, no, level, drawing)
    assert histories == [[], [1], [], [2, 2]]
    return verdict, sampler.rows


def check(verdict: Verdict) -> None:
    assert verdict.sampler_output.sampled_token_ids.tolist() == TOKENS
    assert verdict.sampler_output.sampled_token_ids.dtype == torch.int32
    assert verdict.accepted_rows.tolist() == ROWS
    assert verdict.num_accepted.tolist() == [3, 1, 0, 2]


def test_greedy_verification_waits_once_for_all_that_the_host_needs() -> None:
    with pretended_gpu() as waits:
        sampling = sampling_of(GPU, all_greedy=True, all_random=False, temperature=None)
        verdict, rows = run(sampling, on_gpu(logits_of(TARGET)), is_random=[False] * 4)
        assert not rows
        assert waits.total == 0, waits.places
        assert isinstance(verdict.accepted_rows, OnGPU)
        verdict = verdict.on_host()
    assert waits.total == 1, waits.places
    check(verdict)


def test_rows_that_need_no_path_are_sampled_at_once_without_waiting() -> None:
    with pretended_gpu() as waits:
        verdict, rows = run(sampling_of(GPU), on_gpu(logits_of(TARGET)))
        assert rows == [len(TARGET)]
        assert waits.total == 0, waits.places
        verdict = verdict.on_host()
    check(verdict)


def test_at_once_and_level_by_level_accept_the_same() -> None:
    cpu = torch.device("cpu")
    walked, levels = run(sampling_of(cpu), logits_of(TARGET), by_level=[True] * 4)
    at_once, rows = run(sampling_of(cpu), logits_of(TARGET))
    check(walked)
    check(at_once)
    assert (levels, rows) == ([4, 3, 2, 1], [len(TARGET)])


@pytest.mark.parametrize("device", [torch.device("cpu"), GPU])
@pytest.mark.parametrize("walker", range(4))
@pytest.mark.parametrize("others_draw", [True, False])
def test_one_request_that_walks_leaves_the_others_as_they_are(
    device: torch.device, walker: int, others_draw: bool
) -> None:
    """Its own rows alone are sampled level by level: as many as its path has."""
    with pretended_gpu():
        logits = logits_of(TARGET)
        flags = [request == walker for request in range(4)]
        verdict, rows = run(
            sampling_of(device),
            on_gpu(logits) if device == GPU else logits,
            by_level=flags,
            is_random=[True] * 4 if others_draw else flags,
        )
        verdict = verdict.on_host()
    check(verdict)
    path = sum(row >= 0 for row in ROWS[walker])
    own_rows = 1 + int(FOREST.cu_nodes.diff()[walker])
    assert rows == [len(TARGET) - own_rows] * others_draw + [1] * path


def test_a_request_that_generates_nothing_draws_nothing() -> None:
    sampling = sampling_of(torch.device("cpu"))
    skipped = [False, False, True, False]
    verdict, rows = run(sampling, logits_of(TARGET), by_level=[True] * 4, skipped=skipped)
    assert rows == [3, 3, 2, 1]
    assert verdict.sampler_output.sampled_token_ids[2].tolist() == [NO_TOKEN] * 4


def test_many_rows_are_sampled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echo_vllm.step.verification.MAX_SAMPLED_ROWS", 5)
    verdict, rows = run(sampling_of(torch.device("cpu")), logits_of(TARGET))
    assert rows == [5, 5, 3]
    check(verdict)


def test_parameters_say_whether_a_request_walks() -> None:
    def flags(**options: Any) -> tuple[bool, bool]:
        drawing = Drawing.of(SamplingParams(**options))
        return drawing.is_random, drawing.by_level

    assert flags(temperature=0) == (False, False)
    assert flags(temperature=0, seed=1, min_p=0.1, top_k=5) == (False, False)
    assert flags(temperature=0.7, top_p=0.9, top_k=3) == (True, False)
    assert flags(temperature=0.7, seed=1) == (True, True)
    assert flags(temperature=0.7, min_p=0.1) == (True, True)
    for option in (
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1},
        {"min_tokens": 2},
        {"logprobs": 0},
        {"logit_bias": {1: 2.0}},
        {"allowed_token_ids": [1, 2]},
    ):
        assert flags(temperature=0, **option) == (False, True), option


@pytest.mark.parametrize("options", [{}, {"max_num_logprobs": 0}])
def test_what_depends_on_the_path_walks_with_one_transfer_a_level(options: dict[str, Any]) -> None:
    with pretended_gpu() as waits:
        logits = on_gpu(logits_of(TARGET))
        verdict, rows = run(sampling_of(GPU, **options), logits, by_level=[True] * 4)
        assert rows == [4, 3, 2, 1]
        verdict = verdict.on_host()
    assert waits.total == 4, waits.places
    check(verdict)
    logprobs = verdict.sampler_output.logprobs_tensors
    if "max_num_logprobs" in options:
        assert logprobs is not None
        tokens = held(logprobs.logprob_token_ids).view(4, 4)
        expected = torch.tensor(TOKENS)
        assert torch.equal(tokens[expected >= 0].long(), expected[expected >= 0])


# --- the runner's share: rows, positions, commit, committed rows ---------------------------------

BASES, BLOCK = [5, 17, 3, 30], 16


def runner_of(device: torch.device) -> Any:
    """What the mix-in's methods look at in a runner: a batch of FOREST, trees first."""
    sizes = FOREST.cu_nodes.diff() + 1
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), sizes.cumsum(0).to(torch.int32)])
    slots = torch.cat(
        [
            torch.arange(base, base + int(size)) + 64 * request
            for request, (base, size) in enumerate(zip(BASES, sizes, strict=True))
        ]
    )
    draw = torch.Generator().manual_seed(0)
    cache = torch.randn(16, 2, BLOCK, 8, generator=draw)
    there = on_gpu if device == GPU else torch.clone
    group = types.SimpleNamespace(layer_names=["a", "drafter"])
    return types.SimpleNamespace(
        device=device,
        num_computed_tokens=there(torch.tensor(BASES, dtype=torch.int32)),
        query_start_loc=types.SimpleNamespace(gpu=there(starts), cpu=starts),
        attn_groups=[[group]],
        input_batch=types.SimpleNamespace(
            block_table=[types.SimpleNamespace(slot_mapping=types.SimpleNamespace(gpu=there(slots)))]
        ),
        compilation_config=types.SimpleNamespace(
            static_forward_context={"a": types.SimpleNamespace(kv_cache=there(cache))}
        ),
        drafter=types.SimpleNamespace(_draft_attn_layer_names={"drafter"}),
    )  # fmt: skip


def bind(runner: Any, name: str) -> Any:
    return types.MethodType(getattr(EchoRunnerMixin, name), runner)


def step_of(rows: VerificationRows | None) -> Step:
    starts = np.concatenate([[0], np.cumsum((FOREST.cu_nodes.diff() + 1).numpy())])
    logits_rows = torch.arange(int(starts[-1]))  # Every row is a root or a node.
    slots, begins = np.arange(4), np.array(BASES)
    return Step(slots, begins, starts.astype(np.int64), FOREST, rows, logits_rows)


def test_masks_are_built_on_the_device_without_waiting() -> None:
    with pretended_gpu() as waits:
        rows = bind(runner_of(GPU), "_tree_rows")(FOREST, 2)
    assert waits.total == 0, waits.places
    assert (rows.num_requests, rows.num_rows) == (2, 8)
    mask, depths = ops.build_super_tree(FOREST.parents[:6], FOREST.cu_nodes[:3], 1)
    assert torch.equal(held(rows.mask), mask)
    assert torch.equal(held(rows.depths), depths)
    assert held(rows.row_start).tolist() == [0, 5, 8]


@pytest.mark.parametrize("most", [8192, 3])
def test_the_commit_moves_what_was_accepted_without_waiting(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echo_vllm.step.commit.MAX_MOVES", most)
    caches = {}
    for device in (torch.device("cpu"), GPU):
        with pretended_gpu() as waits:
            runner = runner_of(device)
            cache = runner.compilation_config.static_forward_context["a"].kv_cache
            before = (held(cache) if device == GPU else cache).clone()
            rows = bind(runner, "_tree_rows")(FOREST, 4)
            there = on_gpu if device == GPU else torch.clone
            accepted = there(torch.tensor(ROWS, dtype=torch.int32))
            count = there(torch.tensor([3, 1, 0, 2], dtype=torch.int32))
            output = SamplerOutput(there(torch.tensor(TOKENS)), None)
            bind(runner, "_commit")(step_of(rows), Verdict(output, accepted, count))
        assert waits.total == 0, waits.places
        caches[device] = held(cache) if device == GPU else cache

    def tokens(cache: torch.Tensor) -> torch.Tensor:
        return cache.transpose(1, 2).flatten(0, 1)  # by slot

    expected, flat = tokens(before).clone(), tokens(before)
    for request, path in enumerate(ROWS):
        for place, row in enumerate(path):
            if row > 0:
                slot = 64 * request + BASES[request]
                expected[slot + place] = flat[slot + row]
    for cache in caches.values():
        assert torch.equal(tokens(cache), expected)


def test_the_drafter_gets_the_rows_of_the_paths_and_then_those_of_the_chains() -> None:
    with pretended_gpu() as waits:
        step = step_of(bind(runner_of(GPU), "_tree_rows")(FOREST, 2))
        step.verdict = Verdict(
            SamplerOutput(torch.tensor(TOKENS), None),
            torch.tensor(ROWS, dtype=torch.int32),
            torch.tensor([3, 1, 0, 2], dtype=torch.int32),
        )
        committed = step.committed()
    assert waits.total == 0, waits.places
    assert committed.rows.tolist() == [0, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert committed.owners.tolist() == [0, 0, 0, 0, 1, 1, 2, 3, 3, 3]
    assert committed.positions.tolist() == [5, 6, 7, 8, 17, 18, 3, 30, 31, 32]
    assert committed.counts.tolist() == [4, 2, 1, 3]
    assert committed.stops.tolist() == [9, 19, 4, 33]


# --- the clock ------------------------------------------------------------------------------------


class Stream:
    """A device that has done everything up to `done`; its events are numbers."""

    def __init__(self) -> None:
        self.now = self.done = 0.0
        self.waited: list[float] = []

    def event(self) -> Any:
        stream = self

        class Event:
            at = 0.0

            def record(self) -> None:
                self.at = stream.now

            def query(self) -> bool:
                return self.at <= stream.done

            def synchronize(self) -> None:
                stream.waited.append(self.at)
                stream.done = max(stream.done, self.at)

            def elapsed_time(self, other: Event) -> float:
                assert self.query()
                assert other.query(), "CUDA raises here"
                return 1000 * (other.at - self.at)

        return Event()


@pytest.mark.parametrize("waited", [True, False])
@pytest.mark.parametrize("ended", [True, False])
def test_the_clock_of_a_device_never_waits_for_the_drafter(waited: bool, ended: bool) -> None:
    stream = Stream()
    clock = DeviceClock(stream.event)
    stream.now = 1.0
    clock.begin()
    stream.now = stream.done = 3.0  # the host has waited for the tokens
    clock.verified()
    stream.now = 7.0
    if waited:
        stream.done = 7.0  # and for the draft
    clock.drafted(waited=waited)
    if ended:
        stream.done = 9.0
    clock.end()
    assert clock.verify_s == pytest.approx(2.0)
    if waited or ended:
        assert clock.draft_s == pytest.approx(4.0)
    else:
        assert clock.draft_s is None
    assert stream.waited == ([3.0, 7.0] if waited else [3.0])


def test_a_cpu_has_the_host_s_clock() -> None:
    assert type(clock_of(torch.device("cpu"))) is StepClock
