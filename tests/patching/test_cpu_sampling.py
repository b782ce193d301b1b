# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Stock speculative decoding on a CPU samples from the target's distribution (patches 1 and 2).

vLLM's own rejection sampler runs on known draft and target distributions; every output position
must follow the target's, whatever the draft. The same checks must fail with the kernels as vLLM
0.32.0 publishes them, or they prove nothing.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

VOCABULARY = 8
NUM_DRAFTS = 2
NUM_REQUESTS = 20_000
DRAFT_PROBS = torch.softmax(torch.tensor([[2.0, 1, 0, 0, -1, 1, 0, 0.5]] * NUM_DRAFTS), dim=-1)
# Of each draft position and of the bonus token after them.
TARGET_LOGITS = torch.tensor(
    [
        [0.0, 2.5, 1.0, -1.0, 0.5, 2.0, -0.5, 1.5],
        [1.5, 0.0, 0.3, 2.0, -1.0, 1.0, 0.8, -0.4],
        [0.2, 0.4, 2.2, -0.6, 1.1, 0.0, 1.7, 0.9],
    ]
)


@pytest.fixture(scope="module")
def sampler_module() -> Any:
    """vLLM's rejection sampler with the CPU stand-ins for its Triton kernels."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON
    from vllm.triton_utils.dispatcher import _registry

    if not current_platform.is_cpu() or HAS_TRITON:
        pytest.skip("the stand-ins are used on a CPU without Triton only")
    if "vllm.v1.sample.rejection_sampler.expand_kernel" not in _registry:
        current_platform.register_triton_kernel_overrides()
    from vllm.v1.sample import rejection_sampler

    return rejection_sampler


@pytest.fixture
def use_published_kernels(
    sampler_module: Any, published_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], None]:
    """Puts the stand-ins in place as vLLM publishes them, until the test ends."""

    def use() -> None:
        published = types.ModuleType("published_cpu_triton_utils")
        exec(published_files["vllm/utils/cpu_triton_utils.py"], published.__dict__)
        for owner, name in (
            (sampler_module._expand, "_expand_kernel_impl"),
            (sampler_module._rejection_random_sample, "_rejection_random_sample_kernel_impl"),
        ):
            monkeypatch.setattr(owner.kernel, "_impl", getattr(published, name))

    return use


def sampling_metadata(temperature: torch.Tensor, **limits: torch.Tensor) -> Any:
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    num_requests = len(temperature)
    return SamplingMetadata(
        temperature=temperature,
        all_greedy=bool((temperature == 0).all()),
        all_random=bool((temperature > 0).all()),
        top_p=limits.get("top_p"),
        top_k=limits.get("top_k"),
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=torch.zeros(num_requests),
        presence_penalties=torch.zeros(num_requests),
        repetition_penalties=torch.ones(num_requests),
        output_token_ids=[[] for _ in range(num_requests)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def sample(
    sampler_module: Any,
    drafts: torch.Tensor,
    draft_probs: torch.Tensor | None,
    temperature: torch.Tensor,
    **limits: torch.Tensor,
) -> torch.Tensor:
    """[requests, drafts + 1] output tokens, -1 after the first rejection."""
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    num_requests = len(drafts)
    rows = torch.arange(num_requests * (NUM_DRAFTS + 1), dtype=torch.int32)
    rows = rows.view(num_requests, NUM_DRAFTS + 1)
    ends = torch.arange(1, num_requests + 1, dtype=torch.int32)
    metadata = SpecDecodeMetadata(
        draft_token_ids=drafts.flatten().to(torch.int32),
        num_draft_tokens=[NUM_DRAFTS] * num_requests,
        cu_num_draft_tokens=ends * NUM_DRAFTS,
        cu_num_sampled_tokens=ends * (NUM_DRAFTS + 1),
        target_logits_indices=rows[:, :NUM_DRAFTS].flatten(),
        bonus_logits_indices=rows[:, NUM_DRAFTS].flatten(),
        logits_indices=rows.flatten(),
    )
    output = sampler_module.RejectionSampler(Sampler())(
        metadata,
        None if draft_probs is None else draft_probs.repeat(num_requests, 1),
        TARGET_LOGITS.repeat(num_requests, 1),
        sampling_metadata(temperature, **limits),
    )
    tokens: torch.Tensor = output.sampled_token_ids
    return tokens


def target_probs(temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """[drafts + 1, vocabulary] what every position must follow, computed the plain way."""
    rows = []
    for logits in TARGET_LOGITS.double() / temperature:
        probs = logits.softmax(0)
        order = probs.argsort(descending=True)
        keep = VOCABULARY if top_k is None else top_k
        if top_k is not None:
            probs[order[top_k:]] = 0
            probs /= probs.sum()
        if top_p is not None:
            keep = int((probs[order].cumsum(0) < top_p).sum()) + 1
        probs[order[keep:]] = 0
        rows.append(probs / probs.sum())
    return torch.stack(rows)


def check_distribution(tokens: torch.Tensor, probs: torch.Tensor) -> None:
    """Chi-square of the tokens [n] against probs [vocabulary] at p > 0.001."""
    counts = torch.bincount(tokens.long(), minlength=VOCABULARY)
    assert int(counts[probs == 0].sum()) == 0, "a token was sampled that has no probability"
    possible = probs > 0
    expected = probs[possible] * len(tokens)
    if len(expected) > 1:
        result = chisquare(counts[possible].numpy(), expected.numpy())
        assert result.pvalue > 1e-3, (counts, probs * len(tokens))


def check_exactness(
    sampler_module: Any,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    drafts_have_probs: bool,
) -> None:
    torch.manual_seed(55005)
    size = (NUM_REQUESTS,)
    if drafts_have_probs:
        drafts = torch.multinomial(DRAFT_PROBS, NUM_REQUESTS, replacement=True).T
    else:
        drafts = torch.tensor([[1, 3]]).expand(NUM_REQUESTS, NUM_DRAFTS)
    limits = {}
    if top_k is not None:
        limits["top_k"] = torch.full(size, top_k, dtype=torch.int32)
    if top_p is not None:
        limits["top_p"] = torch.full(size, top_p)
    tokens = sample(
        sampler_module,
        drafts,
        DRAFT_PROBS if drafts_have_probs else None,
        torch.full(size, temperature),
        **limits,
    )
    for position, probs in enumerate(target_probs(temperature, top_k, top_p)):
        reached = tokens[:, position][tokens[:, position] >= 0]
        assert len(reached) > 100, "the check would see nothing at this position"
        check_distribution(reached, probs)


SETTINGS = [(1.0, None, None), (0.6, None, None), (0.8, 3, None), (1.4, None, 0.85)]


@pytest.mark.parametrize("drafts_have_probs", [True, False])
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_every_position_follows_the_target(
    sampler_module: Any,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    drafts_have_probs: bool,
) -> None:
    check_exactness(sampler_module, temperature, top_k, top_p, drafts_have_probs)


def check_mixed_batch(sampler_module: Any) -> None:
    """Greedy requests between random ones keep to the best token, and the others to theirs."""
    torch.manual_seed(1)
    temperature = torch.tensor([0.0, 0.6, 1.3]).repeat(NUM_REQUESTS // 3)
    drafts = torch.multinomial(DRAFT_PROBS, len(temperature), replacement=True).T
    tokens = sample(sampler_module, drafts, DRAFT_PROBS, temperature)
    assert bool((tokens[0::3, 0] == TARGET_LOGITS[0].argmax()).all())
    for start, value in ((1, 0.6), (2, 1.3)):
        check_distribution(tokens[start::3, 0], target_probs(value, None, None)[0])


def test_requests_of_a_mixed_batch_keep_their_own_settings(sampler_module: Any) -> None:
    check_mixed_batch(sampler_module)


def check_expansion(sampler_module: Any) -> None:
    ends = torch.tensor([2, 2, 3, 6], dtype=torch.int32)
    for values, expected in (
        (torch.tensor([0.7, 0.2, 0.0, 1.3]), torch.tensor([0.7, 0.7, 1, 1.3, 1.3, 1.3])),
        (torch.tensor([5, 7, 0, 3], dtype=torch.int32), torch.tensor([5, 5, 1, 3, 3, 3])),
        (torch.tensor([5, 7, 0, 3]), torch.tensor([5, 5, 1, 3, 3, 3])),
    ):
        expanded = sampler_module.expand_batch_to_tokens(values, ends, 6, 0, 1)
        assert expanded.dtype == values.dtype
        assert torch.equal(expanded, expected.to(values.dtype))


def test_per_request_values_are_spread_over_the_draft_tokens(sampler_module: Any) -> None:
    check_expansion(sampler_module)


def check_padding(sampler_module: Any) -> None:
    """The row before a padded token ends with a probability of 1, which nothing may look at."""
    probs = torch.zeros(3, VOCABULARY)
    probs[:, -1] = 1
    output = torch.full((3, 2), -1, dtype=torch.int32)
    for draft_probs in (None, torch.full((3, VOCABULARY), 1 / VOCABULARY)):
        sampler_module._rejection_random_sample(
            output,
            torch.tensor([1, 2, 3], dtype=torch.int32),
            torch.tensor([-1, -1, -1], dtype=torch.int32),
            draft_probs,
            probs,
            torch.tensor([[4], [4], [4]]),
            torch.tensor([7, 7, 7], dtype=torch.int32),
            torch.full((3,), 0.5, dtype=torch.float64),
            torch.zeros(3, dtype=torch.bool),
            1,
            None,
        )
        assert output.tolist() == [[7, -1], [7, -1], [7, -1]]


def test_padded_draft_tokens_are_rejected(sampler_module: Any) -> None:
    check_padding(sampler_module)


@pytest.mark.parametrize("check", [check_expansion, check_padding, check_mixed_batch])
def test_the_published_kernels_fail_these_checks(
    sampler_module: Any,
    use_published_kernels: Callable[[], None],
    check: Callable[[Any], None],
) -> None:
    use_published_kernels()
    with pytest.raises((AssertionError, RuntimeError)):
        check(sampler_module)


def test_the_published_kernels_do_not_sample_from_the_target(
    sampler_module: Any, use_published_kernels: Callable[[], None]
) -> None:
    use_published_kernels()
    with pytest.raises((AssertionError, RuntimeError)):
        check_exactness(sampler_module, *SETTINGS[1], drafts_have_probs=True)
