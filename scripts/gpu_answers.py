# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A small target's chats with itself on one GPU, as rows for `train-drafter data --rows`.

    python scripts/gpu_answers.py TARGET --prompts prompts.jsonl --seconds 70 -o rows.jsonl

An engine's scheduler takes longer over a target of 135 M parameters than the GPU does. Here
thousands of chats run in waves, all at the same position, so that a step is one batch without
padding or masks. A third of the chats begin with a prompt of the file, a third with the first words
of one, after which the target goes on writing as the user, and a third with the user's header only.
When an answer ends the target writes the user's next turn, until the wave's length is full. Answers
of every fourth chat are sampled, the others greedy. Only answers count in the loss mask.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from echo_vllm.conversations import Chat, read_conversations
from echo_vllm.training.data import SAMPLED, TEMPERATURE
from echo_vllm.training.packing import BACKENDS
from echo_vllm.training.rows import Row, RowWriter
from echo_vllm.training.self_prompts import MARK, Unseen
from echo_vllm.training.self_prompts import openings as openings_of

USER_TEMPERATURE = 0.8
USER_TOKENS = 96
"""Of a turn that the target writes for the user, at most."""

FIRST_WORDS = 6
"""Of a prompt that the target ends by itself, at most."""

GROUPED = "one_query_grouped"
"""Under which transformers knows `one_query_grouped`."""


def one_query_grouped(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token: the query heads that share keys are queries of one head, so that
    keys and values are read once and never repeated.

    Args:
        module: the layer's attention.
        query: [slots, heads, 1, size].
        key: [slots, kv_heads, length, size].
        value: as key.
        attention_mask: not used; all is seen.
        scaling: of the scores.

    Returns:
        [slots, 1, heads, size], and no weights.
    """
    slots, kv_heads, size = key.shape[0], key.shape[1], key.shape[3]
    grouped = query.reshape(slots, kv_heads, -1, size)
    found = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, scale=scaling)
    return found.reshape(slots, 1, -1, size), None


AttentionInterface.register(GROUPED, one_query_grouped)


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
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            target, dtype=dtype, attn_implementation=GROUPED
        )
        self.model.to(device).eval()
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
        plan = torch.full((slots, length + 16), -1)
        for slot, (given, _) in enumerate(openings):
            plan[slot, : len(given)] = torch.tensor(given)
        plan = plan.to(device)
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
            with sdpa_kernel(BACKENDS):
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


class Keeper:
    """Writes waves as rows, in a process of its own, while the next wave runs."""

    def __init__(self, target: str, output: Path) -> None:
        output.with_name(output.name + ".partial").unlink(missing_ok=True)
        self.chat, self.writer, self.unseen = Chat(target), RowWriter(output), Unseen()
        self.answer_tokens = 0

    def keep(self, tokens: Any, mask: Any, first: int) -> str:
        """Append a wave's chats, numbered from `first`; how much there is now."""
        lists = zip(tokens.tolist(), mask.astype(int).tolist(), strict=True)
        for slot, (ids, marks) in enumerate(lists):
            if 1 not in marks or not self.unseen.add(self.chat.decode(ids[: marks.index(1)])):
                continue
            last = len(marks) - marks[::-1].index(1)
            temperature = TEMPERATURE if slot % SAMPLED == SAMPLED - 1 else 0.0
            self.writer.append(Row(first + slot, 0, temperature, ids[:last], marks[:last]))
            self.answer_tokens += sum(marks)
        return f"{len(self.writer.rows)} chats, {self.answer_tokens} answer tokens"


_keeper: Keeper
"""Of the writing process."""


def _begin_keeping(target: str, output: Path) -> None:
    global _keeper
    _keeper = Keeper(target, output)


def _keep(tokens: Any, mask: Any, first: int) -> str:
    return _keeper.keep(tokens, mask, first)


def _finish() -> None:
    _keeper.writer.finish()


def openings(
    chat: Chat, prompts: list[list[str]], longest: int, draw: random.Random
) -> Iterator[tuple[list[int], bool]]:
    """What chats begin with, and whether an answer comes next, without end.

    Args:
        chat: of the target.
        prompts: user's turns.
        longest: tokens of a prompt that is taken.
        draw: of the first words.
    """
    headers = openings_of(chat)
    whole = iter(prompts)
    parts = iter(draw.sample(prompts, len(prompts)))
    number = 0
    while True:
        if (turns := next(whole, None)) and len(ids := chat.encode(turns[:1])) <= longest:
            yield ids, True
        if turns := next(parts, None):
            words = turns[0].split(" ")
            begin = " ".join(words[: draw.randint(1, FIRST_WORDS)])
            encoded = chat.tokenizer.encode(begin, add_special_tokens=False)
            if len(encoded) <= longest // 2:
                yield headers[0] + list(encoded), False
        yield headers[number % len(headers)], False
        number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with turns")
    parser.add_argument("--seconds", type=float, required=True, help="of generating")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--slots", type=int, default=4096, help="chats of a wave")
    parser.add_argument("--length", type=int, default=448, help="tokens of a chat")
    parser.add_argument("--answer-tokens", type=int, default=256, help="of an answer at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    chat = Chat(args.target)
    prompts = read_conversations(args.prompts)
    begins = openings(chat, prompts, args.length // 2, random.Random(args.seed))
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), _begin_keeping, (args.target, args.output)
    ) as process:
        waves = Waves(args.target, chat, args, device)
        begin = time.monotonic()
        kept: list[Future[str]] = []
        while time.monotonic() - begin < args.seconds:
            chosen = [next(begins) for _ in range(args.slots)]
            tokens, mask = waves.run(chosen, begin + args.seconds)
            kept.append(process.submit(_keep, tokens.numpy(), mask.numpy(), len(kept) * args.slots))
            took = time.monotonic() - begin
            before = kept[-2].result() if len(kept) > 1 else "nothing"
            print(f"{took:.0f} s: {len(kept)} waves; before the last, {before}", flush=True)
        print(kept[-1].result(), flush=True)
        process.submit(_finish).result()


if __name__ == "__main__":
    main()
