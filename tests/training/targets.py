# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Tiny random targets with a tokenizer and a chat template, and prompts for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.engine.tiny import Shape, make_target

if TYPE_CHECKING:
    from echo_vllm.training.trainer import TrainSettings

SPECIAL = ["<bos>", "<eos>", "<user>", "<assistant>", "<system>"]
WORDS = 64 - len(SPECIAL)
SHAPE = Shape(vocab=64)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def add_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A tokenizer of words `w0` to `w58`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, *(f"w{i}" for i in range(WORDS))]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<bos>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def make_llama(folder: Path) -> Path:
    """A target whose next token is mostly a function of the last one, which a head can learn."""
    from safetensors.torch import load_file, save_file

    make_target(folder, SHAPE)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "o_proj" in name:
            weights[name] *= 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return add_tokenizer(folder)


def make_qwen3(folder: Path) -> Path:
    """The same sizes as a Qwen3, whose attention norms its queries and keys."""
    import torch
    from safetensors.torch import load_file, save_file

    make_target(folder, SHAPE, seed=7)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    path.write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for layer in range(SHAPE.layers):
        for name in ("q_norm", "k_norm"):
            weights[f"model.layers.{layer}.self_attn.{name}.weight"] = torch.full(
                (SHAPE.head_dim,), 1.5
            )
    save_file(weights, folder / "model.safetensors")
    return add_tokenizer(folder)


def write_prompts(path: Path, count: int, seed: int, turns: int = 1) -> Path:
    """Prompts of a few random words; every fifth has `turns` turns."""
    generator = random.Random(seed)

    def prompt() -> str:
        return " ".join(f"w{generator.randrange(WORDS)}" for _ in range(generator.randint(2, 6)))

    lines = [{"turns": [prompt() for _ in range(turns if i % 5 == 0 else 1)]} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def train_settings(target: Path, **changes: Any) -> TrainSettings:
    """Settings of a small training in float32; needs speculators."""
    from echo_vllm.training.trainer import TrainSettings

    settings: dict[str, Any] = {
        "target": str(target),
        "dtype": "float32",
        "aux_layers": [1, 2, 3],
        "draft_vocab": 48,
        "ttt_steps": 3,
        "step_decay": 0.8,
        "loss": "kl_div",
        "lm_head": "trained",
        "intermediate_size": None,
        "batch_tokens": 512,
        "learning_rate": 0.0,
        "held_out": 0.1,
        "seed": 3,
        "init": None,
    }
    return TrainSettings(**settings | changes)
