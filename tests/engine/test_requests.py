# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What a request may ask for gives the same answer with trees as without.

Each test runs one batch of mixed requests through an engine without speculation and through one
with trees, and compares token for token. At T > 0 the requests are seeded: a request draws once
per generated token either way, so its tokens do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, engine, free_blocks, runner
from tests.engine.prompts import chat
from tests.engine.test_exactness import greedy, tiny_prompts

pytestmark = pytest.mark.full

NUM_TOKENS = 48

REQUESTS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{"temperature": 0}],
    "seeded": [{"temperature": 1.0, "seed": 11}, {"temperature": 1.7, "seed": 12}],
    "top-p-top-k": [
        {"temperature": 1.0, "top_p": 0.6, "seed": 21},
        {"temperature": 1.2, "top_k": 3, "seed": 22},
        {"temperature": 1.2, "top_k": 5, "top_p": 0.8, "seed": 23},
    ],
    "penalties": [
        {"temperature": 0, "presence_penalty": 1.5},
        {"temperature": 0, "frequency_penalty": 0.7},
        {"temperature": 0, "repetition_penalty": 1.6},
        {"temperature": 0.9, "seed": 31, "frequency_penalty": 1.1, "repetition_penalty": 1.2},
    ],
    "allowed-tokens": [{"temperature": 0, "allowed_token_ids": [2, 4, 6, 8]}],
    "min-tokens": [
        {"temperature": 0, "min_tokens": 20, "stop_token_ids": [3, 5, 7], "ignore_eos": False},
        {"temperature": 1.0, "seed": 41, "min_tokens": 9, "stop_token_ids": [2, 4, 6, 8]},
    ],
    "stop-tokens": [
        {"temperature": 0, "stop_token_ids": [3]},
        {"temperature": 0, "ignore_eos": False},
        {"temperature": 1.0, "seed": 51, "stop_token_ids": [9, 10]},
    ],
    "lengths": [
        {"temperature": 0, "max_tokens": 1},
        {"temperature": 0, "max_tokens": 2},
        {"temperature": 0, "max_tokens": 3},
        {"temperature": 1.0, "seed": 61, "max_tokens": 7},
    ],
    "logprobs": [
        {"temperature": 0, "logprobs": 3},
        {"temperature": 1.0, "seed": 71, "logprobs": 0},
        {"temperature": 0, "prompt_logprobs": 2, "logprobs": 1},
    ],
    "several-completions": [{"temperature": 1.0, "seed": 81, "n": 3}],
}


def requests_of(names: list[str], copies: int = 3) -> tuple[list[Any], list[Any]]:
    """Prompts and parameters of the named kinds, interleaved."""
    from vllm import SamplingParams

    wanted = [r for _ in range(copies) for name in names for r in REQUESTS[name]]
    params = [
        SamplingParams(**{"max_tokens": NUM_TOKENS, "ignore_eos": True, **r}, detokenize=False)
        for r in wanted
    ]
    return tiny_prompts(len(params)), params


def answers(outputs: list[Any]) -> list[Any]:
    """Everything that must not depend on speculation."""
    return [
        [(list(c.token_ids), c.finish_reason, c.stop_reason) for c in o.outputs] for o in outputs
    ]


def assert_close_logprobs(one: list[Any], other: list[Any]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        for at_a, at_b in zip(a or [], b or [], strict=True):
            assert (at_a is None) == (at_b is None)
            if at_a is None:
                continue
            assert at_a.keys() == at_b.keys()
            for token in at_a:
                assert at_a[token].rank == at_b[token].rank
                assert at_a[token].logprob == pytest.approx(at_b[token].logprob, abs=2e-4)


@pytest.fixture(scope="module")
def plain(tiny: TinyModel) -> dict[str, list[Any]]:
    """Outputs without speculation, per kind and for all kinds in one batch."""
    with engine(tiny.target, None, skip_tokenizer_init=True, max_model_len=256) as llm:
        found = {}
        for names in [[name] for name in REQUESTS] + [list(REQUESTS)]:
            prompts, params = requests_of(names)
            found["+".join(names)] = llm.generate(prompts, params, use_tqdm=False)
        return found


@pytest.fixture(scope="module")
def trees(tiny: TinyModel) -> Iterator[Any]:
    """For the tests before the first that starts an engine of its own: the end of that one takes
    the process's parallel groups away."""
    spec = echo(tiny.head, 12, max_depth=4, top_k=4)
    with engine(tiny.target, spec, skip_tokenizer_init=True, max_model_len=256) as llm:
        yield llm


@pytest.mark.parametrize("names", [[n] for n in REQUESTS] + [list(REQUESTS)], ids="+".join)
def test_answers_do_not_depend_on_trees(names: list[str], plain: Any, trees: Any) -> None:
    wanted = plain["+".join(names)]
    before = counters(trees)["spec_decode_num_accepted_tokens"]
    blocks = free_blocks(trees)
    outputs = trees.generate(*requests_of(names), use_tqdm=False)
    assert answers(outputs) == answers(wanted)
    for one, other in zip(outputs, wanted, strict=True):
        assert_close_logprobs(
            [c.logprobs for c in one.outputs], [c.logprobs for c in other.outputs]
        )
        assert_close_logprobs([one.prompt_logprobs], [other.prompt_logprobs])
    assert counters(trees)["spec_decode_num_accepted_tokens"] > before
    assert free_blocks(trees) == blocks


def test_aborted_requests_leave_no_block_and_no_tree(trees: Any) -> None:
    trees.generate(tiny_prompts(1), greedy(4), use_tqdm=False)
    blocks = free_blocks(trees)
    core = trees.llm_engine
    ids = [f"abort-{i}" for i in range(16)]
    for request_id, prompt in zip(ids, tiny_prompts(16), strict=True):
        core.add_request(request_id, prompt, greedy(150))
    for step in range(40):
        core.step()
        if step % 3 == 0 and ids:
            core.abort_request([ids.pop(len(ids) // 2)])
    core.abort_request(ids)
    while core.has_unfinished_requests():
        core.step()
    # Finished requests are forgotten with the next batch.
    trees.generate(tiny_prompts(1), greedy(4), use_tqdm=False)
    assert free_blocks(trees) == blocks
    assert len(runner(trees).slots) <= 1


@pytest.mark.parametrize("method", ["echo", "eagle3", "plain"])
def test_seeded_requests_survive_chunked_prefill(method: str, tiny: TinyModel, plain: Any) -> None:
    """Partial prefills draw nothing, so a seeded request's tokens do not depend on chunks."""
    spec = {
        "echo": echo(tiny.head, 12, max_depth=4, top_k=4),
        "eagle3": {"method": "eagle3", "model": str(tiny.head), "num_speculative_tokens": 3},
        "plain": None,
    }[method]
    options = {"max_num_batched_tokens": 32, "max_num_seqs": 8, "max_model_len": 256}
    with engine(tiny.target, spec, skip_tokenizer_init=True, **options) as llm:
        outputs = llm.generate(*requests_of(["seeded"]), use_tqdm=False)
    if method == "eagle3":  # Its rejection sampler draws more than once a token.
        assert [len(o.outputs[0].token_ids) for o in outputs] == [NUM_TOKENS] * len(outputs)
    else:
        assert answers(outputs) == answers(plain["seeded"])


def test_bad_words_and_structured_output_and_stop_strings(demo_target: Any, demo_head: Any) -> None:
    """With a tokenizer: bad words along the path, a grammar for one request, stop strings."""
    import json

    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    prompts = chat(
        demo_target,
        [
            "Name the capital of France and one famous building there.",
            "Count from one to twenty in words.",
            "Describe a city as JSON with its name and its population.",
            "Write two sentences about rain.",
        ],
    )
    params = [
        SamplingParams(temperature=0, max_tokens=48, bad_words=["Paris", " the", " is"]),
        SamplingParams(temperature=0, max_tokens=48, stop=["words", "sentence"]),
        SamplingParams(
            temperature=0, max_tokens=48, structured_outputs=StructuredOutputsParams(json=schema)
        ),
        SamplingParams(temperature=0, max_tokens=48),
    ]
    options = {"max_model_len": 512, "max_num_seqs": 4}
    with engine(demo_target, None, **options) as llm:
        wanted = llm.generate(prompts, params, use_tqdm=False)
    with engine(demo_target, echo(demo_head, 12, max_depth=4, top_k=3), **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert counters(llm)["spec_decode_num_accepted_tokens"] > 10
    assert [o.outputs[0].text for o in outputs] == [o.outputs[0].text for o in wanted]
    assert answers(outputs) == answers(wanted)
    assert "Paris" not in outputs[0].outputs[0].text
    assert outputs[1].outputs[0].stop_reason in ("words", "sentence")
    assert json.loads(outputs[2].outputs[0].text).keys() == {"city", "people"}
