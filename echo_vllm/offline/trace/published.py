# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Step costs of machines that others have measured, as far as their numbers say.

No paper publishes a cost curve. What is published are throughput ratios, and a ratio at a batch
size says how much longer a step with so many more rows took, if the tokens of a step and the share
of the drafter are known. Neither is published with the ratios, so each cost here comes with the
assumptions that it needs. They bend the answer: a replay on these curves plans an experiment, it
does not replace one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from echo_vllm.forecast import CostCurve, Hinge, StepCost, fit_hinge

EAGLE3_BATCHES = (2, 4, 8, 16, 24, 32, 48, 56, 64)
EAGLE3_RATIOS = (1.81, 1.82, 1.62, 1.48, 1.39, 1.32, 1.38, 1.34, 1.38)
"""Throughput of a chain of three over plain decoding, by batch size (EAGLE-3, arXiv 2503.01840):
LLaMA-3.1-8B, SGLang, one H100."""

EAGLE3_CHAIN = 3
H100_PLAIN_TOKENS_PER_SECOND = 158.34
"""Plain decoding of the same model on the same machine, one request (SGLang's documentation)."""

DRAFTER_SHARE = 0.08
"""One drafter forward over one target forward with the same rows. A head of one layer with a
vocabulary of 32,000 reads about 5 % of the 8 billion weights; the rest is for launching it."""

ECHO_TOKENS_PER_SECOND = 10_703.0
"""EAGLE-3, LLaMA-3.1-8B, 8 x H100, 256 requests (ECHO, arXiv 2604.09603)."""

ECHO_BATCH = 256
ECHO_BREAK_EVEN = 128
ECHO_NODES = 5
ECHO_TOKENS_PER_STEP = 2.5
ECHO_K_MAX = 128


@dataclass(frozen=True)
class PublishedCost:
    """A cost that follows from published numbers and assumptions.

    Attributes:
        name: as on the command line, after `published:`.
        cost: of a step.
        sources: what was published, and where.
        assumptions: what was not, one sentence each.
    """

    name: str
    cost: StepCost
    sources: tuple[str, ...]
    assumptions: tuple[str, ...]


def eagle3_h100() -> PublishedCost:
    """LLaMA-3.1-8B on one H100, from EAGLE-3's throughput ratios in SGLang."""
    base = 1.0 / H100_PLAIN_TOKENS_PER_SECOND
    drafting = EAGLE3_CHAIN * DRAFTER_SHARE
    # T(B * 4) + drafting * T(B) = T(B) * (1 + drafting) * ratio(2) / ratio(B), from small B on.
    rows, seconds = [1.0, 2.0 * (1 + EAGLE3_CHAIN)], [base, base]
    for batch, ratio in zip(EAGLE3_BATCHES[1:], EAGLE3_RATIOS[1:], strict=True):
        plain = CostCurve.from_points(rows, seconds)(float(batch))
        growth = (1.0 + drafting) * EAGLE3_RATIOS[0] / ratio - drafting
        rows.append(float(batch * (1 + EAGLE3_CHAIN)))
        seconds.append(plain * growth)
    measured = CostCurve.from_points(rows, seconds)
    hinge = fit_hinge(measured)
    last = measured.counts[-1]
    beyond = measured.seconds[-1] + hinge.gamma * hinge.base * last
    verify = CostCurve((*measured.counts, 2 * last), (*measured.seconds, beyond))
    return PublishedCost(
        name="eagle3-h100",
        cost=_with_drafter(verify),
        sources=(
            "EAGLE-3 (arXiv 2503.01840): throughput of a chain of 3 over plain decoding, "
            "LLaMA-3.1-8B in SGLang on one H100, at batch sizes "
            f"{', '.join(map(str, EAGLE3_BATCHES))}: {', '.join(map(str, EAGLE3_RATIOS))}.",
            "SGLang's documentation: 158.34 tokens/s of plain decoding with one request there.",
        ),
        assumptions=(
            "A step makes the same tokens at every batch size, so the ratios fall because the "
            "steps take longer.",
            f"At batch size 2 the {2 * (1 + EAGLE3_CHAIN)} rows of a verification take as long as "
            "2 rows; from there on T(4B) follows from T(B) and the ratio at B.",
            f"A drafter forward takes {DRAFTER_SHARE:.0%} of a target forward with the same rows, "
            "catch-up or level.",
            f"Up to {last:.0f} rows this is what the ratios imply, made monotone; beyond, where "
            f"nothing was measured, the slope of the fitted hinge (K_max {hinge.k_max:.0f} rows, "
            f"gamma {hinge.gamma:.4f} a row, error {hinge.error:.0%}).",
            "Context lengths, sampling and the scheduler are in the rows' cost; none is modelled.",
        ),
    )


def echo_8xh100() -> PublishedCost:
    """LLaMA-3.1-8B as in ECHO's high-load experiments: a hinge, mostly assumed."""
    rows = ECHO_BREAK_EVEN * (1 + ECHO_NODES)
    drafting = 3 * DRAFTER_SHARE
    # At 128 requests: tokens per step = step time over plain step time, plain being flat there.
    gamma = (ECHO_TOKENS_PER_STEP - 1.0 - drafting) / (rows - ECHO_K_MAX)
    relative = Hinge(float(ECHO_K_MAX), gamma, 1.0)
    plain_rows = float(ECHO_BATCH)
    step = relative(ECHO_BATCH * (1.0 + ECHO_NODES)) + drafting * relative(plain_rows)
    base = ECHO_BATCH * ECHO_TOKENS_PER_STEP / ECHO_TOKENS_PER_SECOND / step
    return PublishedCost(
        name="echo-8xh100",
        cost=_with_drafter(Hinge(float(ECHO_K_MAX), gamma, base).to_curve()),
        sources=(
            "ECHO (arXiv 2604.09603): T_verify = T_ar * (1 + gamma * max(0, K - K_max)); K_max and "
            "gamma are not published.",
            "ECHO: EAGLE-3 makes 10,703 tokens/s with LLaMA-3.1-8B and 256 requests on 8 x H100, "
            "and is slower than plain decoding at 128; the high-load setting has 5 nodes a tree "
            "and starts with depth 3.",
        ),
        assumptions=(
            f"K_max is {ECHO_K_MAX} rows: plain decoding of {ECHO_BREAK_EVEN} requests still "
            "costs what one request costs.",
            f"EAGLE-3 makes {ECHO_TOKENS_PER_STEP} tokens a step with {ECHO_NODES} nodes.",
            f"At {ECHO_BREAK_EVEN} requests EAGLE-3 is exactly as fast as plain decoding; it was "
            f"slower, so the real gamma is larger than {gamma:.5f} a row.",
            f"A drafter forward takes {DRAFTER_SHARE:.0%} of a target forward with the same rows; "
            "EAGLE-3 runs three.",
            f"T_ar is {1e3 * base:.1f} ms, so that EAGLE-3's published throughput at 256 requests "
            "comes out.",
        ),
    )


def _with_drafter(verify: CostCurve) -> StepCost:
    counts, seconds = verify.to_points()
    drafter = CostCurve(tuple(counts), tuple((DRAFTER_SHARE * np.array(seconds)).tolist()))
    return StepCost(verify=verify, draft_level=drafter, catch_up=drafter)


PUBLISHED: dict[str, Callable[[], PublishedCost]] = {
    "eagle3-h100": eagle3_h100,
    "echo-8xh100": echo_8xh100,
}
