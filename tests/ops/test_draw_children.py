# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The kernel draws what torch's operators draw, with the same numbers, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chisquare

from echo_vllm import ops
from echo_vllm.forecast import gains
from echo_vllm.forecast.gains import PowerCurve, draw_and_weigh, usual_acceptance
from echo_vllm.ops import dispatch
from echo_vllm.trees import draws
from echo_vllm.trees.draws import Draws, Sampling, root_keys
from tests.ops.isas import ISAS

Found = tuple[Draws, torch.Tensor, torch.Tensor]


def logits_of(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    noise = torch.Generator().manual_seed(vocab)
    return (3 * torch.randn(rows, vocab, generator=noise)).to(dtype)


def by_operators(
    monkeypatch: pytest.MonkeyPatch, logits: torch.Tensor, k: int, sampling: Sampling
) -> Found:
    """`draw_and_weigh` where there is no kernel."""
    with monkeypatch.context() as patch:
        for module in (draws, gains):
            patch.setattr(module, "has_kernel", lambda logits: False)
        return draw_and_weigh(logits, k, keys_of(logits), sampling, usual_acceptance)


def keys_of(logits: torch.Tensor) -> torch.Tensor:
    return root_keys(torch.arange(len(logits)), torch.full((len(logits),), 7))


def assert_alike(found: Found, wanted: Found) -> None:
    (ours, *our_worths), (theirs, *their_worths) = found, wanted
    assert torch.equal(ours.token_ids, theirs.token_ids)
    assert torch.equal(ours.keys, theirs.keys)
    torch.testing.assert_close(ours.probs, theirs.probs, rtol=1e-5, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-5, atol=1e-5)
    # Estimates; what nearly the whole of q has been drawn from leaves few digits.
    for mine, others in zip(our_worths, their_worths, strict=True):
        torch.testing.assert_close(mine, others, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [5, 31, 32, 128, 130, 1000, 16384])
def test_the_draws_are_those_of_torchs_operators(
    isa: str, dtype: torch.dtype, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECHO_VLLM_CPU_ISA", isa)
    for rows, temperature in ((1, None), (3, 0.6), (24, 1.5)):
        logits = logits_of(rows, vocab, dtype)
        heat = None if temperature is None else torch.full((rows,), temperature)
        sampling = Sampling(heat)
        found = draw_and_weigh(logits, 4, keys_of(logits), sampling, usual_acceptance)
        assert_alike(found, by_operators(monkeypatch, logits, 4, sampling))
        assert found[0].probs.sum(1) == pytest.approx(torch.ones(rows), abs=1e-5)


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.05}], ids=str)
def test_what_is_cut_off_is_never_drawn(
    options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = logits_of(40, 300)
    sampling = Sampling(
        torch.full((40,), 0.9), **{k: torch.full((40,), v) for k, v in options.items()}
    )
    found = draw_and_weigh(logits, 4, keys_of(logits), sampling, usual_acceptance)
    assert_alike(found, by_operators(monkeypatch, logits, 4, sampling))
    drawn = found[0]
    assert (drawn.probs.gather(1, drawn.token_ids.clamp(min=0))[drawn.token_ids >= 0] > 0).all()


def test_rows_without_a_distribution_have_no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(6, 200)
    logits[0, 130], logits[1, 199], logits[2] = math.nan, math.inf, -math.inf
    logits[3, 1:] = -math.inf  # One token: the others have nothing left to draw.
    found = draw_and_weigh(logits, 3, keys_of(logits), Sampling(), usual_acceptance)
    assert_alike(found, by_operators(monkeypatch, logits, 3, Sampling()))
    drawn, expected, reaches = found
    assert (drawn.token_ids[:3] == -1).all()
    assert drawn.token_ids[3].tolist() == [0, -1, -1]
    assert (drawn.token_ids[4:] >= 0).all()
    assert torch.equal(expected[:3], torch.zeros(3, 3))
    assert torch.equal(reaches[:3], torch.zeros(3, 3))
    assert drawn.logprobs[3].tolist() == [0.0, -math.inf, -math.inf]


def test_more_children_than_tokens_are_missing_behind_the_last_one() -> None:
    logits = logits_of(8, 3)
    drawn = draws.draw_children(logits, 5, keys_of(logits), Sampling())
    assert (drawn.token_ids[:, :3].sort(1).values == torch.arange(3)).all()
    assert (drawn.token_ids[:, 3:] == -1).all()


def test_first_draws_over_many_blocks_come_as_often_as_q_says() -> None:
    rows = 40_000
    logits = logits_of(1, 400).expand(rows, -1)
    drawn = draws.draw_children(logits, 1, keys_of(logits), Sampling())
    expected = rows * drawn.probs[0].double()
    common = expected > 5
    observed = torch.bincount(drawn.token_ids.flatten(), minlength=400).double()
    counts = torch.cat([observed[common], observed[~common].sum().view(1)])
    wanted = torch.cat([expected[common], expected[~common].sum().view(1)])
    assert chisquare(counts, wanted * counts.sum() / wanted.sum()).pvalue > 0.001


def test_another_curve_is_weighed_by_torchs_operators() -> None:
    logits = logits_of(4, 300)
    arguments = logits, 3, keys_of(logits), Sampling()
    by_kernel = draw_and_weigh(*arguments, PowerCurve(0.9, 0.4))
    assert_alike(by_kernel, draw_and_weigh(*arguments, lambda q: 0.9 * q**0.4))
    _, ones, _ = draw_and_weigh(*arguments, None)
    assert torch.equal(ones, torch.ones(4, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 4, dtype=torch.float64)}, "logits must be Float or BFloat16"),
        ({"logits": torch.zeros(4, 3).T}, "last dimension of logits must be contiguous"),
        ({"logits": torch.zeros(3, 0)}, "logits must have between 1 and"),
        ({"keys": torch.zeros(2, dtype=torch.int64)}, r"keys.shape\[0\] must be 3"),
        ({"keys": torch.zeros(3)}, "keys must be Long"),
        ({"temperature": torch.ones(3).double()}, "temperature must be Float"),
        ({"temperature": torch.ones(2)}, r"temperature.shape\[0\] must be 3"),
        ({"k": 0}, "k must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "logits": torch.zeros(3, 4),
        "temperature": None,
        "keys": torch.zeros(3, dtype=torch.int64),
        "k": 2,
    }
    with pytest.raises(RuntimeError, match=message):
        ops.draw_children(**{**arguments, **change})  # type: ignore[arg-type]


def test_the_reference_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.has_extension.cache_clear()
    monkeypatch.setenv("ECHO_VLLM_OPS", "reference")
    try:
        assert not ops.has_extension("draw_children")
    finally:
        dispatch.has_extension.cache_clear()
    monkeypatch.delenv("ECHO_VLLM_OPS")
    assert ops.has_extension("draw_children")
