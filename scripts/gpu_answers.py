# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A small target's chats with itself on one GPU, as rows for `train-drafter data --rows`.

    python scripts/gpu_answers.py TARGET --prompts prompts.jsonl --seconds 70 -o rows.jsonl

An engine's scheduler takes longer over a target of 135 M parameters than the GPU does. Here
thousands of chats run in waves, all at the same position, so that a step is one batch without
padding or masks. A chat begins with a prompt of the file or one that the target writes after its
template's user header; when an answer ends the target writes the user's next turn, until the wave's
length is full. Answers of every fourth chat are sampled, the others greedy. Only answers count in
the loss mask.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from echo_vllm.drafter_training.data import SAMPLED, TEMPERATURE
from echo_vllm.drafter_training.prompts import MARK, Chat, Unseen, read_prompts
from echo_vllm.drafter_training.rows import Row, RowWriter

USER_TEMPERATURE = 0.8
USER_TOKENS = 160
"""Of a turn that the target writes for the user, at most."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values in memory of its own, which is not copied when it grows."""

    def __init__(self, slots: int, length: int, heads: int, size: int, like: torch.Tensor) -> None:
        super().__init__()
        self._all = like.new_empty(2, slots, heads, length, size)
        self.is_initialized = True
        self.dtype, self.device = like.dtype, like.device
        self.forget()

    def forget(self) -> None:
        self.keys, self.values = self._all[:, :, :, :0]

    def update(self, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        begin, end = self.keys.shape[2], self.keys.shape[2] + key.shape[2]
        self._all[0, :, :, begin:end] = key
        self._all[1, :, :, begin:end] = value
        self.keys, self.values = self._all[:, :, :, :end]
        return self.keys, self.values


def glue(chat: Chat) -> tuple[list[int], list[int]]:
    """Token ids between a user's turn and the assistant's, and the other way round; the end of turn
    comes first in both."""
    marks = [f"{MARK}{i}" for i in range(3)]
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    rest = chat.tokenizer.apply_chat_template(turns, tokenize=False).partition(marks[0])[2]
    to_assistant, _, rest = rest.partition(marks[1])
    to_user = rest.partition(marks[2])[0]
    encode = chat.tokenizer.encode
    return tuple(encode(text, add_special_tokens=False) for text in (to_assistant, to_user))


class Waves:
    """Runs waves of chats on one target."""

    def __init__(self, target: str, chat: Chat, args: argparse.Namespace, device: str) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).to(device)
        self.model.eval()
        self.args, self.device = args, device
        config = self.model.config
        like = torch.empty(0, dtype=dtype, device=device)
        shape = (args.slots, args.length, config.num_key_value_heads, config.head_dim)
        self.layers = [GrowingLayer(*shape, like) for _ in range(config.num_hidden_layers)]
        self.to_assistant, self.to_user = (torch.tensor(x, device=device) for x in glue(chat))
        self.end = int(self.to_user[0])
        if self.end != int(self.to_assistant[0]) or self.end != chat.tokenizer.eos_token_id:
            raise SystemExit("the chat template does not end turns by the end-of-text token")

    @torch.inference_mode()
    def run(self, openings: list[tuple[list[int], bool]], until: float) -> tuple[Any, Any]:
        """One wave.

        Args:
            openings: token ids each chat begins with, and whether an answer comes next.
            until: of time.monotonic(); a wave that has no time left ends early.

        Returns:
            Token ids and loss mask, [slots, length so far], on the CPU.
        """
        slots, length, device = self.args.slots, self.args.length, self.device
        plan = torch.full((slots, length + 16), -1, device=device)
        for slot, (ids, _) in enumerate(openings):
            plan[slot, : len(ids)] = torch.tensor(ids, device=device)
        answering = torch.tensor([answer for _, answer in openings], device=device)
        greedy = torch.arange(slots, device=device) % SAMPLED != SAMPLED - 1
        turn = torch.zeros(slots, dtype=torch.long, device=device)  # tokens of the turn so far
        most = torch.tensor([USER_TOKENS, self.args.answer_tokens], device=device)
        tokens = plan[:, :length].clone()
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        for layer in self.layers:
            layer.forget()
        cache = Cache(layers=self.layers)
        done = length
        for at in range(length - 1):
            logits = self.model(
                input_ids=tokens[:, at : at + 1], past_key_values=cache, use_cache=True
            ).logits[:, 0]
            logits = logits.float()
            noise = torch.empty_like(logits).exponential_()
            heat = torch.where(answering, TEMPERATURE, USER_TEMPERATURE)[:, None]
            sampled = (logits / heat - noise.log()).argmax(-1)
            best = torch.where(answering & greedy, logits.argmax(-1), sampled)
            planned = plan[:, at + 1]
            free = planned < 0
            tokens[:, at + 1] = torch.where(free, best, planned)
            mask[:, at + 1] = free & answering
            turn = torch.where(free, turn + 1, 0)
            ended = free & (best == self.end)
            cut = free & ~ended & (turn >= most[answering.long()])
            for event, skip in ((ended, 1), (cut, 0)):
                for was, ids in ((False, self.to_assistant), (True, self.to_user)):
                    chosen = event & (answering if was else ~answering)
                    place = plan[:, at + 2 : at + 2 + len(ids) - skip]
                    following = ids[skip : skip + place.shape[1]]
                    place.copy_(torch.where(chosen[:, None], following, place))
            answering = answering ^ (ended | cut)
            if at % 32 == 0 and time.monotonic() > until:
                done = at + 2
                break
        return tokens[:, :done].cpu(), mask[:, :done].cpu()


def keep(writer: RowWriter, chat: Chat, unseen: Unseen, tokens: Any, mask: Any, first: int) -> int:
    """Append a wave's chats, numbered from `first`; how many tokens their answers have."""
    count = 0
    for slot, (ids, marks) in enumerate(zip(tokens.tolist(), mask.int().tolist(), strict=True)):
        if 1 not in marks or not unseen.add(chat.decode(ids[: marks.index(1)])):
            continue
        last = len(marks) - marks[::-1].index(1)
        temperature = TEMPERATURE if slot % SAMPLED == SAMPLED - 1 else 0.0
        writer.append(Row(first + slot, 0, temperature, ids[:last], marks[:last]))
        count += sum(marks)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with turns")
    parser.add_argument("--seconds", type=float, required=True, help="of generating")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--slots", type=int, default=2048, help="chats of a wave")
    parser.add_argument("--length", type=int, default=640, help="tokens of a chat")
    parser.add_argument("--answer-tokens", type=int, default=320, help="of an answer at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    chat = Chat(args.target)
    waves = Waves(args.target, chat, args, device)
    given = iter(read_prompts(args.prompts))
    headers, unseen = chat.openings(), Unseen()
    begin = time.monotonic()
    first = count = 0
    args.output.with_name(args.output.name + ".partial").unlink(missing_ok=True)
    writer = RowWriter(args.output)
    while time.monotonic() - begin < args.seconds:
        openings: list[tuple[list[int], bool]] = []
        while len(openings) < args.slots:
            turns = next(given, None) if len(openings) % 2 else None
            if turns is None:
                openings.append((headers[len(openings) // 2 % len(headers)], False))
            elif len(ids := chat.encode(turns[:1])) < args.length // 2:
                openings.append((ids, True))
        found = waves.run(openings, begin + args.seconds)
        count += keep(writer, chat, unseen, *found, first)
        first += args.slots
        took = time.monotonic() - begin
        print(f"{took:.0f} s: {len(writer.rows)} chats, {count} answer tokens", flush=True)
    writer.finish()


if __name__ == "__main__":
    main()
