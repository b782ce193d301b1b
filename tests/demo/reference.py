# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A Llama forward and a tokenizer read straight from a GGUF file, in the file's own conventions.

They are the yardstick for the converted checkpoint, so they share nothing with the converter:
the query and key rows stay in the file's order and are rotated in pairs (2i, 2i+1), and the
tokenizer is plain byte-pair merging with the two patterns that the pre-tokeniser stands for.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import regex
from gguf import GGUFReader, dequantize

Array = npt.NDArray[np.float32]

SINGLE_DIGITS = r"\p{N}"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTROL = 3


class GGUFModel:
    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self.metadata: dict[str, Any] = {k: f.contents() for k, f in reader.fields.items()}
        self.weights: dict[str, Array] = {
            t.name: np.array(dequantize(t.data, t.tensor_type), dtype=np.float32)
            for t in reader.tensors
        }

    def with_bfloat16_weights(self) -> GGUFModel:
        """The same model with every weight rounded to the nearest bfloat16, ties to even."""
        rounded = copy.copy(self)
        rounded.weights = {}
        for name, weight in self.weights.items():
            bits = weight.view(np.uint32).astype(np.uint64)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            rounded.weights[name] = nearest.astype(np.uint32).view(np.float32)
        return rounded

    def logits(self, ids: list[int]) -> Array:
        """Logits at every position of `ids`, [len(ids), vocab_size]."""
        meta, weights = self.metadata, self.weights
        heads = meta["llama.attention.head_count"]
        kv_heads = meta["llama.attention.head_count_kv"]
        epsilon = meta["llama.attention.layer_norm_rms_epsilon"]
        length = len(ids)
        x = weights["token_embd.weight"][ids]
        for layer in range(meta["llama.block_count"]):
            blk = {
                name.split(".")[2]: weight
                for name, weight in weights.items()
                if name.startswith(f"blk.{layer}.")
            }
            h = _rms_norm(x, blk["attn_norm"], epsilon)
            q = self._rotate((h @ blk["attn_q"].T).reshape(length, heads, -1))
            k = self._rotate((h @ blk["attn_k"].T).reshape(length, kv_heads, -1))
            v = (h @ blk["attn_v"].T).reshape(length, kv_heads, -1)
            attended = np.empty_like(q)
            for head in range(heads):
                kv_head = head // (heads // kv_heads)
                scores = q[:, head] @ k[:, kv_head].T / np.sqrt(q.shape[-1])
                scores[np.triu_indices(length, 1)] = -np.inf
                weight = np.exp(scores - scores.max(axis=1, keepdims=True))
                weight /= weight.sum(axis=1, keepdims=True)
                attended[:, head] = weight @ v[:, kv_head]
            x = x + attended.reshape(length, -1) @ blk["attn_output"].T
            h = _rms_norm(x, blk["ffn_norm"], epsilon)
            gate = h @ blk["ffn_gate"].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ blk["ffn_up"].T)) @ blk["ffn_down"].T
        x = _rms_norm(x, weights["output_norm.weight"], epsilon)
        logits: Array = x @ weights["token_embd.weight"].T
        return logits

    def _rotate(self, x: Array) -> Array:
        """Rotary embedding of x [length, heads, head_dim] in interleaved pairs."""
        length, _, head_dim = x.shape
        base = self.metadata["llama.rope.freq_base"]
        frequency = base ** (-np.arange(0, head_dim, 2) / head_dim)
        angle = np.arange(length)[:, None, None] * frequency
        even, odd = x[..., 0::2], x[..., 1::2]
        out = np.empty_like(x)
        out[..., 0::2] = even * np.cos(angle) - odd * np.sin(angle)
        out[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
        return out


class GGUFTokenizer:
    def __init__(self, metadata: dict[str, Any]) -> None:
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        types: list[int] = metadata["tokenizer.ggml.token_type"]
        self.ids = {token: index for index, token in enumerate(tokens)}
        self.ranks = {
            tuple(merge.split(" ")): rank
            for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])
        }
        self.special = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
        self.byte_letters = _byte_letters()

    def encode(self, text: str) -> list[int]:
        pattern = "|".join(regex.escape(token) for token in self.special)
        ids: list[int] = []
        for part in regex.split(f"({pattern})", text):
            if part in self.special:
                ids.append(self.ids[part])
            else:
                ids += [i for word in _words(part) for i in self._merge(word)]
        return ids

    def can_spell(self, text: str) -> bool:
        """Whether the vocabulary has every byte of `text`; it lacks a few rare ones."""
        return all(self.byte_letters[byte] in self.ids for byte in text.encode())

    def _merge(self, word: str) -> list[int]:
        parts = [self.byte_letters[byte] for byte in word.encode()]
        while True:
            pairs = list(itertools.pairwise(parts))
            rank, at = min(
                ((self.ranks[pair], i) for i, pair in enumerate(pairs) if pair in self.ranks),
                default=(-1, -1),
            )
            if rank < 0:
                return [self.ids[part] for part in parts]
            parts[at : at + 2] = ["".join(pairs[at])]


def _words(text: str) -> list[str]:
    """Digits stand alone first; then each piece between them is cut by GPT-2's pattern."""
    pieces = [piece for piece in regex.split(f"({SINGLE_DIGITS})", text) if piece]
    return [word for piece in pieces for word in regex.findall(WORDS, piece)]


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in of every byte: itself, or the next letter from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters.update({byte: chr(0x100 + i) for i, byte in enumerate(others)})
    return letters


def _rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)
    out: Array = x * scale * weight
    return out
