# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What a resting step does beyond plain decoding, and what memory steps with trees take, counted by
the operators that they run, in the real engine on a tiny model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from echo_vllm.step.attention.backend import TreeAttentionMetadata
from echo_vllm.step.attention.cpu import MANY, EchoCPUAttentionImpl
from echo_vllm.step.verification import MAX_SAMPLED_ROWS
from tests.engine.conftest import TinyModel
from tests.engine.engines import echo, generate, runner
from tests.engine.test_elastic_engine import AUTO, dictate, scheduler
from tests.engine.test_exactness import greedy, tiny_engine, tiny_prompts
from tests.engine.test_gpu_paths import draw_at_once
from tests.engine.tiny import Shape, make_head, make_target

MORE_OPERATORS = 35
"""Of which a third are views; a step of plain decoding of the tiny model has about 320."""


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run, and the bytes of the largest tensor that one made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.largest: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        self.counts[name] += 1
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if is_dense(x)}
        for made in tree_leaves(result):
            if is_dense(made) and made.untyped_storage().data_ptr() not in inputs:
                self.largest[name] = max(self.largest.get(name, 0), made.nbytes)
        return result


def is_dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


@contextmanager
def counted_steps(llm: Any) -> Iterator[list[Counter[str]]]:
    """The operators of every step of the model runner that decodes one token a request, between the
    target's forward and the step's output."""
    steps: list[Counter[str]] = []
    model_runner = runner(llm)
    execute, sample = model_runner.execute_model, model_runner.sample_tokens
    is_decoding = [False]

    def executing(scheduler_output: Any, *args: Any) -> Any:
        counts = scheduler_output.num_scheduled_tokens.values()
        is_decoding[0] = set(counts) == {1}
        with Operators() as operators:
            result = execute(scheduler_output, *args)
        if is_decoding[0]:
            steps.append(operators.counts)
        return result

    def sampling(*args: Any) -> Any:
        with Operators() as operators:
            result = sample(*args)
        if is_decoding[0]:
            steps[-1] += operators.counts
        return result

    model_runner.execute_model, model_runner.sample_tokens = executing, sampling
    yield steps


@pytest.mark.full
def test_a_resting_step_is_plain_decoding_and_one_copy(tiny: TinyModel) -> None:
    prompts, params = tiny_prompts(8), greedy(24)
    with tiny_engine(tiny, None) as llm, counted_steps(llm) as plain:
        wanted = generate(llm, prompts, params)
    with (
        tiny_engine(tiny, echo(tiny.head, 12, linear="stock", **AUTO)) as llm,
        counted_steps(llm) as rests,
    ):
        dictate(llm, itertools.repeat((0, 0)))
        drafter, core = runner(llm).drafter, scheduler(llm)
        forwards: list[int] = []
        drafter._forward = lambda *args: forwards.append(1)
        messages: list[int] = []
        core.update_draft_token_ids = lambda drafts: messages.append(1)
        assert generate(llm, prompts, params) == wanted
        assert runner(llm).window is not None
    assert not forwards, "the drafter ran although it rests"
    assert not messages, "drafts were sent although there are none"
    usual, resting = plain[len(plain) // 2], rests[len(rests) // 2]
    more = resting - usual
    # The copy of the features, one layer after the other; what the target does to hand out three of
    # its hidden states; and `argmax_of_rows`, which takes the place of the sampler's maximum.
    assert sum(n for name, n in more.items() if "index_copy" in name) == 3, more
    assert sum(more.values()) <= MORE_OPERATORS, more
    heavy = ("sort", "softmax", "mm", "attention", "topk", "linear", "embedding")
    assert not [name for name in more if any(word in name for word in heavy)], more


@pytest.mark.full
def test_a_resting_step_reads_prompts_without_the_drafter(tiny: TinyModel) -> None:
    """Of any length, with prefix caching, which is vLLM's default."""
    prompts = [{"prompt_token_ids": (p["prompt_token_ids"] * 8)[:200]} for p in tiny_prompts(6)]
    with tiny_engine(tiny, echo(tiny.head, 12, **AUTO)) as llm:
        dictate(llm, itertools.repeat((0, 0)))
        runner(llm).drafter._forward = None  # would raise
        first = generate(llm, prompts, greedy(4))
        assert generate(llm, prompts, greedy(4)) == first


@pytest.mark.full
def test_several_resting_requests_decode_in_tree_attention(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the faster one for them, and with one or two vLLM's is; tokens are the same."""
    forward = EchoCPUAttentionImpl.forward
    rows: dict[type, set[int]] = {}

    def noted(
        self: Any,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if args and args[0] is not None:
            rows.setdefault(type(args[0]), set()).add(len(query))
        return forward(self, layer, query, key, value, kv_cache, *args, **kwargs)

    few, several = tiny_prompts(2), tiny_prompts(8)
    with tiny_engine(tiny, None) as llm:
        wanted = [generate(llm, prompts, greedy(24)) for prompts in (few, several)]
    monkeypatch.setattr(EchoCPUAttentionImpl, "forward", noted)
    with tiny_engine(tiny, echo(tiny.head, 12, **AUTO)) as llm:
        dictate(llm, itertools.repeat((0, 0)))
        assert [generate(llm, prompts, greedy(24)) for prompts in (few, several)] == wanted
    trees = rows.pop(TreeAttentionMetadata)
    assert 8 in trees
    assert min(trees) >= MANY
    (stock,) = rows.values()
    assert 2 in stock
    assert 8 not in stock


def test_attention_keeps_no_view_of_the_cache(tiny: TinyModel) -> None:
    """vLLM takes the caches away when an engine ends; what its layers keep stays for longer."""
    with tiny_engine(tiny, echo(tiny.head, 4, policy="topn")) as llm:
        generate(llm, tiny_prompts(2), greedy(4))
        made = runner(llm)
        caches = {cache.untyped_storage().data_ptr() for cache in made.kv_caches}
        impls = [x.impl for x in made.compilation_config.static_forward_context.values()]
        assert any(isinstance(impl, EchoCPUAttentionImpl) for impl in impls)
        kept = filter(is_dense, tree_leaves([list(vars(impl).values()) for impl in impls]))
        assert not caches & {tensor.untyped_storage().data_ptr() for tensor in kept}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Shape]:
    """A tiny model with a vocabulary that shows in the size of tensors."""
    folder, shape = tmp_path_factory.mktemp("wide"), Shape(vocab=3000)
    return make_target(folder / "target", shape), make_head(folder / "head", shape), shape


@pytest.mark.full
def test_no_step_makes_a_tensor_that_vllm_s_memory_profile_does_not_know(
    wide: tuple[Path, Path, Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features are kept in memory that is there before the paged cache; rows are sampled, and the
    drafter catches up, in pieces that do not grow with the trees."""
    from vllm import SamplingParams

    from tests.engine.engines import engine

    target, head, shape = wide
    draw_at_once(monkeypatch)
    num_requests, nodes, most_tokens = 24, 32, 512
    spec = echo(head, nodes, policy="auto", max_depth=3, top_k=4, width=8)
    options = {
        "max_num_seqs": num_requests, "max_num_batched_tokens": most_tokens,
        "max_model_len": 512, "block_size": 32, "skip_tokenizer_init": True,
    }  # fmt: skip
    prompts = [{"prompt_token_ids": [3 + i, *range(5, 150)]} for i in range(num_requests)]
    sampled = SamplingParams(
        temperature=1.0, top_p=0.9, max_tokens=40, ignore_eos=True, detokenize=False
    )
    with engine(target, spec, **options) as llm:
        model_runner = runner(llm)
        features = 3 * shape.hidden * 4
        assert model_runner.ring.nbytes == num_requests * (32 + 32) * features
        # All read and rest for a while, then all catch up and draft.
        dictate(llm, itertools.chain([(0, 0)] * 26, itertools.repeat((None, 0))))
        with Operators() as operators:
            sample, draft = model_runner._sample, model_runner.propose_draft_token_ids
            inside: list[Operators] = []

            def watched(call: Any) -> Any:
                def calling(*args: Any) -> Any:
                    with Operators() as own:
                        result = call(*args)
                    inside.append(own)
                    return result

                return calling

            model_runner._sample, model_runner.propose_draft_token_ids = (
                watched(sample), watched(draft)
            )  # fmt: skip
            generate(llm, prompts, sampled)
    assert operators.counts
    largest = max(max(own.largest.values(), default=0) for own in inside)
    rows = MAX_SAMPLED_ROWS * shape.vocab * 8  # a piece, sorted: values and their places
    caught_up = most_tokens * max(features, 4 * shape.vocab)
    assert largest <= max(rows, caught_up)
    assert num_requests * (1 + nodes) * shape.vocab * 8 > max(rows, caught_up)
