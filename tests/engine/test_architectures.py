# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Targets and caches that are not plain: token-identical with every policy, at T = 0 in FP32.

A kind is a tiny random target of an architecture, with the engine's options that it needs. Each is
asked what the same engine without speculation says, 64 prompts sixteen at a time, some of them one
by one. vLLM's classes of multimodal targets import torchvision, which `make setup` leaves out: they
run in a process that finds it beside .venv.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, engine, generate, runner
from tests.engine.mrope import SECTION, make_mrope_target
from tests.engine.test_exactness import POLICIES, check_forests, greedy, tiny_prompts
from tests.engine.tiny import (
    Shape,
    make_gpt_oss,
    make_head,
    make_llava,
    make_qwen3_vl,
    make_target,
)

pytestmark = pytest.mark.full

TOKENS = 24


@dataclass(frozen=True)
class Kind:
    """How to make a target and its head, and what else the engine needs."""

    make: Callable[..., Path]
    options: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)


KINDS = {
    # A head with M-RoPE of its own, as SpecForge's templates for such targets have it.
    "m-rope": Kind(make_mrope_target, head={"rope_parameters": SECTION}),
    "qwen3-vl": Kind(make_qwen3_vl, {"language_model_only": True}),
    "llava": Kind(make_llava, {"language_model_only": True}),
    "gpt-oss": Kind(make_gpt_oss, {"block_size": 32}),
    "fp8-cache": Kind(make_target, {"kv_cache_dtype": "fp8"}),
}

MULTIMODAL = {"qwen3-vl", "llava"}
TORCHVISION = ROOT / ".build" / "torchvision"
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
HERE = KINDS if HAS_TORCHVISION else [name for name in KINDS if name not in MULTIMODAL]

# One of each policy.
NAMES = ("chain-5", "static-15", "topn-16", "echo-16", "auto-16", "evict-16", "graft-16")
# Of LLaVA only some: inside is the Llama that goes through all of them elsewhere.
CASES = [(kind, name) for kind in HERE for name in NAMES if kind != "llava" or name in NAMES[2:5]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TinyModel, list[list[int]]]]:
    """Of the kinds asked for so far: the model, and what it says without speculation."""
    return {}


@pytest.fixture
def model(
    kind: str, made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyModel, list[list[int]]]:
    if kind == "fp8-cache" and not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM has an FP8 cache on CPUs with AVX-512 only, and this is none")
    if kind not in made:
        folder, shape = tmp_path_factory.mktemp(kind), Shape()
        wanted = KINDS[kind]
        target = wanted.make(folder / "target", shape)
        tiny = TinyModel(target, make_head(folder / "head", shape, **wanted.head), shape)
        with kind_engine(kind, tiny, None) as llm:
            made[kind] = tiny, generate(llm, tiny_prompts(64), greedy(TOKENS))
    found: tuple[TinyModel, list[list[int]]] = made[kind]
    return found


def kind_engine(kind: str, tiny: TinyModel, spec: dict[str, Any] | None, **more: Any) -> Any:
    options = {"skip_tokenizer_init": True, "max_model_len": 256, **KINDS[kind].options, **more}
    return engine(tiny.target, spec, **options)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_it_is_token_identical(
    kind: str, name: str, model: tuple[TinyModel, list[list[int]]]
) -> None:
    tiny, plain = model
    num_nodes, section = POLICIES[name]
    prompts = tiny_prompts(64)
    with kind_engine(kind, tiny, echo(tiny.head, num_nodes, **section)) as llm:
        check_forests(llm, num_nodes)
        assert generate(llm, prompts, greedy(TOKENS)) == plain
        found = counters(llm)
        assert generate(llm, prompts[:4], greedy(TOKENS), one_by_one=True) == plain[:4]
        check_kind(kind, llm)
    drafts, accepted = found["spec_decode_num_drafts"], found["spec_decode_num_accepted_tokens"]
    assert accepted > 0.05 * drafts, "hardly a draft was accepted"


def check_kind(kind: str, llm: Any) -> None:
    """Whether the engine has what its kind stands for."""
    model_runner = runner(llm)
    context = model_runner.compilation_config.static_forward_context
    layers = [layer for layer in context.values() if hasattr(layer, "impl")]
    if kind == "m-rope":
        assert model_runner.uses_mrope
        assert model_runner.drafter.uses_mrope
    elif kind in MULTIMODAL:
        assert model_runner.uses_mrope == (kind == "qwen3-vl")
        assert model_runner.model_config.is_multimodal_model
        assert not model_runner.supports_mm_inputs
    elif kind == "gpt-oss":
        assert sum(layer.impl.sinks is not None for layer in layers) == 4
        assert sum(layer.impl.sliding_window > 0 for layer in layers) == 2
        assert len(model_runner.kv_cache_config.kv_cache_groups) > 1
    elif kind == "fp8-cache":
        assert all(layer.kv_cache.element_size() == 1 for layer in layers)


@pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is here, so they ran in this process")
def test_multimodal_targets_as_text() -> None:
    if not (TORCHVISION / "torchvision").is_dir():
        pytest.skip("needs torchvision, which `make setup FOR_TESTS=1` could not fetch")
    folders = [str(Path(__file__).parent / "vision"), str(TORCHVISION)]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=5"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__, "-k", " or ".join(MULTIMODAL)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=False,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(NAMES) + 3} passed" in run.stdout
