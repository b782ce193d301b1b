# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The demo target is the model in the GGUF file: same logits, same tokens, sensible answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from echo_vllm.demo.checkpoint import rows_of_half_rotation
from echo_vllm.demo.fetch import fetch_gguf
from tests.demo.reference import GGUFModel, GGUFTokenizer

PROMPTS = [
    "The capital of France is",
    "def quicksort(items):\n    if len(items) < 2:\n        return items\n",
    "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time there was a lighthouse keeper who " * 12,
]

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two spaces,\ttabs\r\nand\n\n\nnew lines   \n",
    "I'm sure they've said it's 12345.67 - we'd ask, you're right, I'll go",
    "x=3+4;y2=10**-7 # 2024-11-22",
    "naïve café, Größe, Ελληνικά, русский, 你好, مرحبا, हिन्दी",
    "½ of ٣٤ and Ⅷ, x² and ①",
    "emoji 🙂👩‍👩‍👧 and a no-break\u00a0space, em\u2014dash \u201cquotes\u201d",
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|not_special|><|endoftext|>",
    "\u0001\u007f control \ufffd",
    "ALLCAPS camelCase snake_case __dunder__ a.b.c(d)[e]{f}",
]


@pytest.fixture(scope="module")
def gguf_model() -> GGUFModel:
    return GGUFModel(fetch_gguf())


@pytest.fixture(scope="module")
def rounded_gguf_model(gguf_model: GGUFModel) -> GGUFModel:
    return gguf_model.with_bfloat16_weights()


@pytest.fixture(scope="module")
def tokenizer(demo_target: Path) -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(demo_target)
    return loaded


@pytest.fixture(scope="module")
def reference_tokenizer(gguf_model: GGUFModel) -> GGUFTokenizer:
    return GGUFTokenizer(gguf_model.metadata)


@pytest.fixture(scope="module")
def model(demo_target: Path) -> torch.nn.Module:
    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(demo_target, dtype=torch.float32)
    return loaded.eval()


def logits_of(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([ids])).logits[0])


@pytest.mark.parametrize("prompt", PROMPTS, ids=["fact", "code", "chat", "long"])
def test_logits_equal_the_gguf_forward(
    prompt: str,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    gguf_model: GGUFModel,
    rounded_gguf_model: GGUFModel,
) -> None:
    ids = tokenizer(prompt)["input_ids"]
    ours = logits_of(model, ids)
    # Rounding the weights to bfloat16 is the one intended difference, and it moves logits a little;
    assert np.abs(ours - gguf_model.logits(ids)).mean() < 0.05
    # with the reference's weights rounded too, nothing but the order of fp32 additions is left.
    np.testing.assert_allclose(ours, rounded_gguf_model.logits(ids), atol=2e-3, rtol=0)


def test_every_weight_is_the_dequantised_one_rounded_once(
    model: torch.nn.Module, gguf_model: GGUFModel
) -> None:
    ours = model.get_parameter("model.layers.29.mlp.down_proj.weight").detach()
    theirs = torch.from_numpy(gguf_model.weights["blk.29.ffn_down.weight"])
    assert torch.equal(ours, theirs.to(torch.bfloat16).float())


def test_rows_of_half_rotation_splits_even_and_odd_rows_of_each_head() -> None:
    weight = np.arange(8, dtype=np.float32)[:, None]
    assert rows_of_half_rotation(weight, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_equal_the_gguf_tokenizer(
    text: str, tokenizer: PreTrainedTokenizerFast, reference_tokenizer: GGUFTokenizer
) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == reference_tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40) | st.text(alphabet=" \t\n'sdtmrevl019aZ_-.,é你🙂", max_size=40))
def test_tokens_equal_the_gguf_tokenizer_on_any_text(
    text: str, tokenizer: PreTrainedTokenizerFast, reference_tokenizer: GGUFTokenizer
) -> None:
    assume(reference_tokenizer.can_spell(text))
    ids = tokenizer(text)["input_ids"]
    assert ids == reference_tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_those_of_the_gguf_file(
    demo_target: Path, tokenizer: PreTrainedTokenizerFast, gguf_model: GGUFModel
) -> None:
    meta = gguf_model.metadata
    assert tokenizer.eos_token_id == meta["tokenizer.ggml.eos_token_id"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.bos_token_id == meta["tokenizer.ggml.bos_token_id"]
    assert tokenizer.pad_token_id == meta["tokenizer.ggml.padding_token_id"]
    generation = json.loads((demo_target / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    # Nothing is put in front of a prompt; the chat template writes what is needed.
    assert tokenizer("a")["input_ids"] == [tokenizer.convert_tokens_to_ids("a")]


def test_greedy_answer_knows_the_capital_of_france(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast
) -> None:
    message = {"role": "user", "content": "What is the capital of France?"}
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert isinstance(prompt, str)
    ids: list[int] = tokenizer(prompt)["input_ids"]
    answer: list[int] = []
    while len(answer) < 32 and tokenizer.eos_token_id not in answer:
        answer.append(int(logits_of(model, ids + answer)[-1].argmax()))
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
