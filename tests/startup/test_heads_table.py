# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Every published form of an EAGLE-3 head: what stock vLLM runs runs here, the rest is refused.

Stock `eagle3` and method `echo` start on each form of `head_forms.FORMS` in this process. Where
stock drafts, so does `echo`, and its tokens are those of plain decoding; where stock ends in a
traceback, `echo` says one sentence.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from echo_vllm import ops
from echo_vllm.config import EchoConfigError
from tests.engine.engines import counters, echo, engine, generate
from tests.engine.tiny import Shape, make_target
from tests.startup.head_forms import FORMS, HIDDEN, LAYERS, LENGTH, VOCAB, write

pytestmark = pytest.mark.full

TARGETS = {
    "plain": Shape(layers=LAYERS),
    "broad": Shape(layers=LAYERS, hidden=2 * HIDDEN),
    "wide": Shape(layers=LAYERS, vocab=VOCAB + 2),
    "widest": Shape(layers=LAYERS, vocab=VOCAB + 100),
    "small": Shape(layers=LAYERS, vocab=VOCAB - 2),
}
PROMPTS = [{"prompt_token_ids": [2 + (i * j) % 8 for j in range(9 + i)]} for i in range(1, 4)]
NUM_TOKENS = 24


@pytest.fixture(autouse=True, scope="module")
def collected_once() -> Iterator[None]:
    """An engine's start and end collect garbage eleven times, which is most of their time."""
    collect, gc.collect = gc.collect, lambda *args: 0
    yield
    gc.collect = collect
    gc.collect()


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("targets")
    return {name: make_target(folder / name, shape) for name, shape in TARGETS.items()}


def run(target: Path, spec: dict[str, Any] | None) -> tuple[list[list[int]], dict[str, float]]:
    """Tokens and counters of an engine that answers PROMPTS."""
    from vllm import SamplingParams

    options = {
        "max_model_len": LENGTH // 2,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 2**24,
        "skip_tokenizer_init": True,
    }
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
    with engine(target, spec, **options) as llm:
        return generate(llm, PROMPTS, params), counters(llm)


@pytest.fixture(scope="module")
def plain(targets: dict[str, Path]) -> dict[str, list[list[int]]]:
    """What each target answers without speculation."""
    return {name: run(target, None)[0] for name, target in targets.items()}


@contextlib.contextmanager
def torn_down() -> Iterator[None]:
    """Clear what an engine that failed to start leaves in the process."""
    try:
        yield
    finally:
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


@pytest.mark.parametrize("name", FORMS)
def test_echo_runs_what_stock_runs_and_refuses_the_rest_in_one_sentence(
    name: str, targets: dict[str, Path], plain: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    form = FORMS[name]
    if name == "quantised" and ops.supported_cpu_isas()[-1] == "amx":
        # vLLM's product of integers takes no float32 there.
        form = replace(form, refused="has layers in int8")
    head, target = write(tmp_path / "head", form), targets[form.target]
    stock = {"method": "eagle3", "model": str(head), "num_speculative_tokens": 3}
    if form.refused:
        with pytest.raises(EchoConfigError) as error:
            run(target, echo(head, 8))
        assert form.refused in str(error.value)
        assert str(error.value).startswith(f'speculative_config.model "{head}" ')
        if not form.why_stock_starts:
            with torn_down(), pytest.raises(Exception):  # noqa: B017, PT011 - of any kind
                run(target, stock)
        return
    tokens, counted = run(target, stock)
    chains = counted["spec_decode_num_accepted_tokens"]
    assert tokens == plain[form.target]
    tokens, counted = run(target, echo(head, 8))
    assert tokens == plain[form.target]
    # A tree of 8 nodes holds more than a chain of 3: a head that was loaded as stock loads it is
    # right more often with it.
    assert counted["spec_decode_num_accepted_tokens"] > chains > 0


def test_a_head_given_as_the_model_drafts_trees_for_the_target_that_it_names(
    targets: dict[str, Path], plain: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    form = FORMS["Eagle3Speculator"]
    format_ = form.config["speculators_config"]
    names = {**format_, "verifier": {"name_or_path": str(targets["plain"])}}
    config = {**form.config, "speculators_config": names}
    head = write(tmp_path / "head", replace(form, config=config))
    spec = {"method": "echo", "num_speculative_tokens": 8, "echo": {"policy": "topn"}}
    tokens, counted = run(head, spec)
    assert tokens == plain["plain"]
    assert counted["spec_decode_num_draft_tokens"] > 6 * counted["spec_decode_num_drafts"] > 0


def test_tokens_that_a_head_has_no_embedding_for_are_read_all_the_same(
    targets: dict[str, Path], plain: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """Stock vLLM ends at the first such token; embeddings are padded to 64 rows."""
    assert any(token >= 64 for tokens in plain["widest"] for token in tokens)
    head = write(tmp_path / "head", FORMS["target with added tokens, own embeddings"])
    tokens, counted = run(targets["widest"], echo(head, 8))
    assert tokens == plain["widest"]
    assert counted["spec_decode_num_drafts"] > 0
