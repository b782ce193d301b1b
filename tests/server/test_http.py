# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A server with tree speculation, through the `openai` client: its API, under load, its metrics.

One file, because the runner hands out tests by file and all of these share one server. Up to the
part on load, requests are sent one at a time, so that a repeated request meets the same batch and
its answer can be compared byte for byte although the model may compute in bfloat16.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Completion
from tokenizers import Tokenizer

from tests.conftest import Server
from tests.server import kinds
from tests.server.conftest import MAX_MODEL_LEN, MODEL, AsyncClient
from tests.server.metrics import Metrics

pytestmark = pytest.mark.full

PROMPT = "The old lighthouse stood on a rock in the sea, and every night the keeper"
QUESTION = "What is the capital of France? Answer with one short sentence."


@pytest.fixture(scope="session")
def tokenizer(demo_target: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_target / "tokenizer.json"))


@pytest.fixture
def complete(client: openai.OpenAI) -> Callable[..., Completion]:
    """Completes PROMPT greedily, with token ids; keyword arguments change or add fields."""

    def complete(prompt: Any = PROMPT, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
        fields = {"temperature": 0, "max_tokens": 32, **fields}
        body = {"return_token_ids": True, **(extra or {})}
        return client.completions.create(model=MODEL, prompt=prompt, extra_body=body, **fields)

    return complete


def token_ids(completion: Completion, choice: int = 0) -> list[int]:
    """vLLM's addition to a choice."""
    ids: list[int] = completion.choices[choice].token_ids  # type: ignore[attr-defined]
    return ids


def chat_messages(text: str) -> Any:
    return [{"role": "user", "content": text}]


# ---- Answers and their counts ----


def test_a_completion_counts_its_tokens(
    complete: Callable[..., Completion], tokenizer: Tokenizer
) -> None:
    completion = complete(max_tokens=32, extra={"ignore_eos": True})
    [choice] = completion.choices
    usage = completion.usage
    assert usage is not None
    assert usage.prompt_tokens == len(tokenizer.encode(PROMPT).ids)
    assert usage.completion_tokens == len(token_ids(completion)) == 32
    assert usage.total_tokens == usage.prompt_tokens + 32
    assert choice.finish_reason == "length"
    assert choice.text == tokenizer.decode(token_ids(completion))


def test_a_chat_answers_the_question(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=chat_messages(QUESTION), temperature=0, max_tokens=64
    )
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert "Paris" in (choice.message.content or "")
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 16])
def test_max_tokens_is_exact(complete: Callable[..., Completion], max_tokens: int) -> None:
    """An accepted path that goes on is cut."""
    completion = complete(max_tokens=max_tokens, extra={"ignore_eos": True})
    assert completion.usage is not None
    assert completion.usage.completion_tokens == len(token_ids(completion)) == max_tokens
    assert completion.choices[0].finish_reason == "length"


def test_min_tokens_and_ignore_eos_keep_the_end_away(client: openai.OpenAI) -> None:
    def ask(**extra: Any) -> Any:
        return client.chat.completions.create(
            model=MODEL,
            messages=chat_messages(QUESTION),
            temperature=0,
            max_tokens=40,
            extra_body=extra,
        )

    short = ask()
    assert short.choices[0].finish_reason == "stop"
    assert short.usage.completion_tokens < 30, "the question must have a short answer"
    longer = ask(min_tokens=30)
    assert 30 <= longer.usage.completion_tokens <= 40
    full = ask(ignore_eos=True)
    assert full.choices[0].finish_reason == "length"
    assert full.usage.completion_tokens == 40


# ---- Streaming ----


def test_the_chunks_of_a_stream_join_to_the_whole_answer(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": MODEL,
        "messages": chat_messages("Tell me how bread is made, step by step."),
        "temperature": 0,
        "max_tokens": 64,
    }
    whole = client.chat.completions.create(**request)
    assert whole.usage is not None
    *chunks, last = client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_chunk_may_hold_several_tokens(
    client: openai.OpenAI, complete: Callable[..., Completion]
) -> None:
    """One chunk is one step, and a step gives all tokens that it accepted."""
    whole = complete(max_tokens=64, extra={"ignore_eos": True})
    stream = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        temperature=0,
        max_tokens=64,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    chunks: list[list[int]] = [token_ids(chunk) for chunk in stream]
    assert [token for chunk in chunks for token in chunk] == token_ids(whole)
    assert max(map(len, chunks)) > 1
    assert len(chunks) < 64


# ---- Log-probabilities ----


def test_logprobs_of_a_completion_have_one_entry_a_token(
    complete: Callable[..., Completion],
) -> None:
    completion = complete(logprobs=3)
    [choice] = completion.choices
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    count = len(token_ids(completion))
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == count
    assert len(logprobs.top_logprobs) == len(logprobs.text_offset) == count
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen <= 0
        assert chosen == max(top.values()), "at temperature 0 the best token is chosen"
        assert len(top) == 3
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.text_offset == [0, *accumulate(map(len, logprobs.tokens[:-1]))]
    assert choice.text == complete().choices[0].text, "asking for logprobs changes no token"


def test_logprobs_of_a_chat_have_one_entry_a_token(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=chat_messages("Name four rivers."),
        temperature=0,
        max_tokens=32,
        logprobs=True,
        top_logprobs=2,
    )
    [choice] = answer.choices
    assert answer.usage is not None
    assert choice.logprobs is not None
    entries = choice.logprobs.content
    assert entries is not None
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 2
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
    if choice.finish_reason == "stop":
        entries = entries[:-1]  # The end-of-sequence token has no text in the answer.
    text = b"".join(bytes(entry.bytes or b"") for entry in entries).decode()
    assert text == choice.message.content


def test_logprobs_of_the_prompt_come_with_those_of_the_answer(
    complete: Callable[..., Completion], tokenizer: Tokenizer
) -> None:
    # Without token ids, for which vLLM leaves the text of the prompt out.
    fields: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 8}
    completion = complete(**fields, extra={"return_token_ids": False})
    [choice] = completion.choices
    assert choice.text.startswith(PROMPT)
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    first, *others = choice.logprobs.token_logprobs
    assert str(first) == "None", "nothing comes before the first token"
    assert len(others) == len(tokenizer.encode(PROMPT).ids) - 1 + 8
    assert all(value <= 0 for value in others)


# ---- Sampling ----


def test_two_choices_are_two_samples(complete: Callable[..., Completion]) -> None:
    completion = complete(n=2, temperature=1.0, seed=7, max_tokens=24, extra={"ignore_eos": True})
    assert [choice.index for choice in completion.choices] == [0, 1]
    first, second = completion.choices
    assert first.text != second.text
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 48
    assert len(token_ids(completion, 0)) == len(token_ids(completion, 1)) == 24


def test_a_seed_repeats_the_text(complete: Callable[..., Completion]) -> None:
    def sample(seed: int) -> str:
        return complete(temperature=1.0, seed=seed, max_tokens=40).choices[0].text

    first = sample(11)
    assert sample(11) == first
    assert sample(12) != first


def test_logit_bias_forces_a_token(
    complete: Callable[..., Completion], tokenizer: Tokenizer
) -> None:
    [banana] = tokenizer.encode(" banana").ids
    completion = complete(max_tokens=12, logit_bias={str(banana): 100})
    assert token_ids(completion) == [banana] * 12
    assert completion.choices[0].text == " banana" * 12


def test_logit_bias_bans_a_token(complete: Callable[..., Completion]) -> None:
    """Also where the tree holds it, since every row of the tree gets the bias."""
    plain = token_ids(complete(max_tokens=48))
    banned = max(set(plain), key=plain.count)
    assert plain.count(banned) > 1
    without = token_ids(complete(max_tokens=48, logit_bias={str(banned): -100}))
    assert banned not in without
    first = plain.index(banned)
    assert without[:first] == plain[:first]


def test_min_p_of_one_is_greedy(
    complete: Callable[..., Completion], settled: Callable[[], Metrics]
) -> None:
    """Up to the first exact tie of the two best tokens, between which min_p=1 draws."""

    def regrets(completion: Completion) -> Iterator[float]:
        logprobs = completion.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
            yield max(top.values()) - chosen

    fields: dict[str, Any] = {"max_tokens": 48, "logprobs": 2, "seed": 3}
    greedy = complete(**fields)
    logprobs = greedy.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    ties = [i for i, top in enumerate(logprobs.top_logprobs) if len({*top.values()}) == 1]
    until = min(ties, default=48)
    assert until >= 3, "the two best tokens of PROMPT's greedy answer tie too early"

    before = settled()
    strict = complete(**fields, temperature=1.0, extra={"min_p": 1.0})
    assert (settled() - before).total("echo_trees_total") > 0, "min_p must not turn drafts off"
    assert token_ids(strict)[:until] == token_ids(greedy)[:until]
    assert max(regrets(strict)) == 0
    assert max(regrets(complete(**fields, temperature=1.0))) > 0, "min_p made no difference"


def test_bad_words_do_not_appear(complete: Callable[..., Completion], tokenizer: Tokenizer) -> None:
    def tokens(**more: Any) -> list[str]:
        logprobs = complete(max_tokens=48, logprobs=1, **more).choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        return logprobs.tokens

    # A word of one token with a space and without: vLLM bans both spellings only where they have
    # equally many.
    words = {token.strip() for token in tokens() if token.strip().isalpha()}
    word = max(sorted(w for w in words if len(tokenizer.encode(w).ids) == 1), key=len)
    assert {word, f" {word}"}.isdisjoint(tokens(extra={"bad_words": [word]}))


# ---- Ends ----


def test_a_stop_string_ends_the_answer_before_it(
    client: openai.OpenAI, complete: Callable[..., Completion]
) -> None:
    whole = complete(max_tokens=64).choices[0].text
    # From the middle of a word to the middle of the next: it spans tokens of an accepted path.
    middle = whole.index(" ", len(whole) // 3)
    stop = whole[middle - 2 : middle + 3]
    expected = whole[: whole.index(stop)]

    stopped = complete(max_tokens=64, stop=[stop])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == expected

    chunks = list(
        client.completions.create(
            model=MODEL, prompt=PROMPT, temperature=0, max_tokens=64, stop=[stop], stream=True
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"

    kept = complete(max_tokens=64, stop=[stop], extra={"include_stop_str_in_output": True})
    assert kept.choices[0].text == expected + stop


def test_a_stop_token_ends_the_answer_at_it(complete: Callable[..., Completion]) -> None:
    whole = token_ids(complete(max_tokens=64))
    stop = whole[20]
    expected = whole[: whole.index(stop) + 1]
    stopped = complete(max_tokens=64, extra={"stop_token_ids": [stop]})
    assert stopped.choices[0].finish_reason == "stop"
    assert token_ids(stopped) == expected
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens == len(expected)


def test_a_prompt_beyond_the_model_length_is_refused(
    complete: Callable[..., Completion], served: Server
) -> None:
    with pytest.raises(openai.BadRequestError, match=str(MAX_MODEL_LEN)):
        complete([42] * (MAX_MODEL_LEN + 1))
    assert served.is_healthy()


@pytest.mark.parametrize("room", [1, 2, 5, 40])
def test_a_request_can_fill_the_model_length(
    complete: Callable[..., Completion], tokenizer: Tokenizer, room: int
) -> None:
    """Trees end where the model ends; the last tokens come one by one."""
    ids = tokenizer.encode(PROMPT * 100).ids[: MAX_MODEL_LEN - room]
    completion = complete(ids, max_tokens=room, extra={"ignore_eos": True})
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == room
    assert completion.usage.total_tokens == MAX_MODEL_LEN


# ---- Structured output ----

ANIMAL = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": ["cat", "dog", "goat"]},
        "legs": {"type": "integer", "enum": [2, 3, 4]},
    },
    "required": ["kind", "legs"],
    "additionalProperties": False,
}


def test_structured_output_is_valid_and_has_trees(
    client: openai.OpenAI, settled: Callable[[], Metrics]
) -> None:
    before = settled()
    answer = client.chat.completions.create(
        model=MODEL,
        messages=chat_messages("Describe a goat as JSON with its kind and number of legs."),
        temperature=0,
        max_tokens=128,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "animal", "schema": ANIMAL, "strict": True},
        },
    )
    assert answer.choices[0].finish_reason == "stop"
    animal = json.loads(answer.choices[0].message.content or "")
    assert animal.keys() == {"kind", "legs"}
    assert animal["kind"] in ("cat", "dog", "goat")
    assert animal["legs"] in (2, 3, 4)
    assert (settled() - before).total("echo_trees_total") > 0


# ---- Load ----


@pytest.mark.timeout(1800)
def test_two_hundred_requests_of_all_kinds_leave_nothing_behind(
    async_client: AsyncClient,
    settled: Callable[[], Metrics],
    served: Server,
    prompts: list[str],
) -> None:
    choose = random.Random(200)
    functions, weights = zip(*kinds.KINDS, strict=True)
    chosen = [*functions, *choose.choices(functions, weights, k=200 - len(functions))]
    choose.shuffle(chosen)

    async def send_all() -> list[str]:
        async with async_client() as client:
            return await kinds.in_flight(
                [kind(client, prompts[i % len(prompts)]) for i, kind in enumerate(chosen)]
            )

    before = settled()
    assert asyncio.run(send_all()) == ["whole"] * 200
    counted = settled() - before  # Idle again: no request runs, no KV block is in use.
    assert counted.total("echo_accepted_tokens_total") > 0
    assert served.is_healthy()


def test_streams_given_up_half_way_leave_nothing_behind(
    async_client: AsyncClient,
    settled: Callable[[], Metrics],
    served: Server,
    prompts: list[str],
) -> None:
    """A third of 36 streams is closed after one to twenty chunks; the others are whole."""
    choose = random.Random(60)

    async def send_all() -> list[str]:
        async with async_client() as client:
            return await kinds.in_flight(
                [
                    kinds.stream(
                        client,
                        choose.choice(prompts),
                        stop_after=choose.randint(1, 20) if i % 3 == 0 else None,
                    )
                    for i in range(36)
                ]
            )

    before = settled()
    assert Counter(asyncio.run(send_all())) == {"given up": 12, "whole": 24}
    counted = settled() - before
    # vLLM counts no aborted request.
    most = 24 * kinds.TOKENS + 12 * kinds.LONG  # had the streams run on
    assert counted.total("generation_tokens_total") < 0.75 * most
    assert served.is_healthy()


def test_a_structured_request_keeps_no_other_from_drafting(
    async_client: AsyncClient, settled: Callable[[], Metrics], prompts: list[str]
) -> None:
    """It stays in the batch from the first to the last step of its neighbours."""
    digits = {"regex": "[0-9]{120}"}

    async def send_all() -> list[Any]:
        async with async_client() as client:
            long = kinds.complete(
                client,
                "Digits:",
                temperature=0,
                max_tokens=200,
                extra={"structured_outputs": digits, "ignore_eos": False},
            )
            return await asyncio.gather(
                long, *(kinds.greedy(client, prompt) for prompt in prompts[10:14])
            )

    before = settled()
    constrained, *_ = asyncio.run(send_all())
    assert re.fullmatch("[0-9]{120}", constrained.choices[0].text)
    assert (settled() - before).total("echo_trees_total") > 0


# ---- Metrics ----


@dataclass(frozen=True)
class Traffic:
    """Some requests, all of `max_tokens` tokens, and what was counted meanwhile."""

    requests: int
    tokens: int
    counted: Metrics


@pytest.fixture(scope="module")
def shared() -> dict[Server, Traffic]:
    """The traffic of this module, by server."""
    return {}


@pytest.fixture
def traffic(
    shared: dict[Server, Traffic],
    served: Server,
    client: openai.OpenAI,
    settled: Callable[[], Metrics],
    prompts: list[str],
) -> Traffic:
    """Eight greedy requests of 48 tokens, four at a time."""
    if served in shared:
        return shared[served]

    def ask(prompt: str) -> int:
        answer = client.completions.create(
            model=MODEL,
            prompt=prompt,
            temperature=0,
            max_tokens=48,
            extra_body={"ignore_eos": True},
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    before = settled()
    with ThreadPoolExecutor(4) as pool:
        tokens = list(pool.map(ask, prompts[20:28]))
    shared[served] = Traffic(len(tokens), sum(tokens), settled() - before)
    return shared[served]


def test_vllms_counters_are_true_for_trees(traffic: Traffic) -> None:
    """A draft is a tree, its draft tokens are the nodes that were verified."""
    counted = traffic.counted
    assert counted.total("spec_decode_num_drafts_total") > 0
    for theirs, ours in (
        ("spec_decode_num_drafts_total", "echo_trees_total"),
        ("spec_decode_num_draft_tokens_total", "echo_verified_nodes_total"),
        ("spec_decode_num_accepted_tokens_total", "echo_accepted_tokens_total"),
    ):
        assert counted.total(theirs) == counted.total(ours), theirs


def test_a_position_is_a_depth(traffic: Traffic, num_nodes: int, max_depth: int) -> None:
    counted = traffic.counted
    by_position = counted.by_label("spec_decode_num_accepted_tokens_per_pos_total", "position")
    positions = [by_position[str(i)] for i in range(num_nodes)]
    assert len(by_position) == num_nodes
    assert sum(positions) == counted.total("echo_accepted_tokens_total") > 0
    assert counted.total("echo_trees_total") >= positions[0]
    assert all(above >= below for above, below in pairwise(positions))
    assert positions[max_depth:] == [0] * (num_nodes - max_depth)


def test_shapes_agree_with_the_counters(traffic: Traffic, num_nodes: int, max_depth: int) -> None:
    counted = traffic.counted
    trees, nodes = counted.total("echo_trees_total"), counted.total("echo_verified_nodes_total")
    assert 0 < nodes <= counted.total("echo_budget_nodes_total") <= trees * num_nodes
    for shape in ("echo_tree_depth", "echo_tree_width", "echo_accepted_depth"):
        assert counted.total(f"{shape}_count") == trees
    depth, width = counted.total("echo_tree_depth_sum"), counted.total("echo_tree_width_sum")
    assert trees <= depth <= nodes
    assert trees <= width <= nodes
    assert counted.total("echo_tree_depth_bucket", le=f"{float(max_depth)}") == trees
    accepted = counted.total("echo_accepted_tokens_total")
    assert counted.total("echo_accepted_depth_sum") == accepted <= depth
    assert nodes > depth, "the served configuration must make trees, not chains"


def test_trees_account_for_the_tokens(traffic: Traffic) -> None:
    """Tokens = trees (a bonus token each) + accepted tokens + tokens of steps without a tree.

    Without a tree are a request's first step and perhaps its last; what goes beyond max_tokens is
    neither generated nor counted.
    """
    counted = traffic.counted
    from_trees = counted.total("echo_trees_total") + counted.total("echo_accepted_tokens_total")
    without = traffic.tokens - from_trees
    assert traffic.requests <= without <= traffic.requests * 2
    assert counted.total("generation_tokens_total") >= traffic.tokens


def test_the_log_has_a_line_of_statistics(traffic: Traffic, served: Server, num_nodes: int) -> None:
    deadline = time.monotonic() + 15
    pattern = re.compile(
        r"ECHO: (\d+) trees verified, ([\d.]+) nodes a tree, ([\d.]+) tokens a step and request, "
        r"([\d.]+|inf) verified nodes per accepted token, (\d+)% of the budget used"
    )
    while not (lines := pattern.findall(served.log.read_text(errors="replace"))):
        assert time.monotonic() < deadline, "no line of statistics in the log"
        time.sleep(0.5)
    assert traffic.requests
    for trees, nodes, tokens, _, used in lines:
        assert int(trees) > 0
        assert 0 < float(nodes) <= num_nodes
        assert float(tokens) >= 1
        assert abs(int(used) - 100 * float(nodes) / num_nodes) <= 1
