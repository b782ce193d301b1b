# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""sample_path: kernels against the reference, and the cases in which numbers run out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from echo_vllm import ops
from echo_vllm.ops import AcceptRule, reference
from tests.ops.drawn_cases import KINDS, assert_same_path, cases, make_case, near_every_boundary

EVERY = (ops.sample_path, reference.sample_path)
LAST_UNIFORM = 1 - 2**-53


@pytest.mark.parametrize("isa", ops.supported_cpu_isas())
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_decides_as_the_reference(
    kind: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECHO_VLLM_CPU_ISA", isa)
    for case in cases(kind, 15):
        assert_same_path(ops.sample_path, case)


@pytest.mark.parametrize("isa", ops.supported_cpu_isas())
@pytest.mark.parametrize("kind", ["many-tokens", "temperatures", "ragged"])
def test_logits_in_bfloat16_are_read_as_the_numbers_that_they_are(
    kind: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECHO_VLLM_CPU_ISA", isa)
    for seed, case in enumerate(cases(kind, 5)):
        narrow = near_every_boundary(
            replace(case, target_logits=case.target_logits.bfloat16()), seed
        )
        assert_same_path(ops.sample_path, narrow)


def test_one_request_is_walked_as_it_is_in_a_batch() -> None:
    case = make_case(3, draft_vocab=25, trees=[[-1, -1, 0], [-1, 0, 0, -1], [-1]])
    rows, accepted, last = ops.sample_path(*case.arguments())
    for request in range(3):
        begin, end = case.cu_nodes[request : request + 2].tolist()
        own_rows, own = slice(begin + request, end + request + 1), slice(begin, end)
        alone = replace(
            case,
            target_rows=case.target_rows[own_rows],
            draft_rows=case.draft_rows[own_rows],
            rules=case.rules[request : request + 1],
            uniforms=case.uniforms[own_rows],
            token_ids=case.token_ids[own],
            parents=case.parents[own],
            cu_nodes=torch.tensor([0, end - begin], dtype=torch.int32),
        )
        result = ops.sample_path(*alone.arguments())
        assert [x[0].tolist() for x in result] == [
            x[request].tolist() for x in (rows, accepted, last)
        ]


def one_row(
    p: list[float], q: list[float], tokens: list[int], uniforms: list[float], rule: AcceptRule
) -> tuple[Any, ...]:
    """A root with children `tokens`; the uniforms are of the root, then of the children."""
    nodes = len(tokens)
    return (
        torch.tensor([p] * (nodes + 1), dtype=torch.float64).log().float(),
        torch.arange(nodes + 1, dtype=torch.int32),
        torch.tensor([q]),
        torch.tensor([0, *[-1] * nodes], dtype=torch.int32),
        None,
        torch.tensor([rule], dtype=torch.int32),
        torch.tensor(uniforms, dtype=torch.float64),
        torch.tensor(tokens, dtype=torch.int32),
        torch.full((nodes,), -1, dtype=torch.int32),
        torch.tensor([0, nodes], dtype=torch.int32),
        3,
    )


@pytest.mark.parametrize("op", EVERY, ids=["kernel", "reference"])
@pytest.mark.parametrize(
    ("p", "q", "tokens", "uniforms", "accepted", "last"),
    [
        # p = q: the first child is always accepted; here it is the token of its own row.
        ([0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [1], [0.0, 0.9999], [0, 1], 0),
        # The target does not allow the child; what is left is the target's own.
        ([0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [2], [0.6, 0.0], [0], 1),
        # The draft's one token is rejected: the residual holds the other.
        ([0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0], [0.0, 0.5], [0], 1),
        ([0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0], [0.0, 0.49], [0, 1], 0),
        # A token that q cannot have drawn is passed over, and the next one is a first draw.
        ([0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1, 0], [0.7, 0.0, 0.5], [0], 1),
        # The same token twice: its second coming has no probability left.
        ([0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0, 0], [0.7, 0.5, 0.0], [0], 1),
        # Two draws from q = (1/2, 1/2): the second has q = 1, and r = (0, 0.2, 0.8).
        ([0.3, 0.2 + 0.3, 0.2], [0.5, 0.5, 0.0], [0, 1], [0.5, 0.7, 0.5], [0], 2),
        # A single token on either side.
        ([0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1], [0.0, LAST_UNIFORM], [0, 1], 1),
        ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0], [LAST_UNIFORM, 0.0], [0], 1),
    ],
)
def test_numbers_that_run_out(
    op: Any,
    p: list[float],
    q: list[float],
    tokens: list[int],
    uniforms: list[float],
    accepted: list[int],
    last: int,
) -> None:
    rows, counts, lasts = op(*one_row(p, q, tokens, uniforms, AcceptRule.DRAWN))
    assert rows[0, : int(counts) + 1].tolist() == accepted
    assert int(lasts) == last
    assert p[int(lasts)] > 0


@pytest.mark.parametrize("op", EVERY, ids=["kernel", "reference"])
def test_what_rounding_leaves_is_a_token_of_the_target(op: Any) -> None:
    """p = q by rounding, uniforms at their ends: nothing that the target forbids comes out."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        p = torch.softmax(4 * torch.randn(12, generator=generator), 0)
        p[torch.rand(12, generator=generator) < 0.5] = 0.0
        p[3] += 1e-3
        tokens = torch.multinomial(p, min(4, int((p > 0).sum())), generator=generator).tolist()
        ends = [0.0, LAST_UNIFORM]
        for root in ends:
            uniforms = [root, *[LAST_UNIFORM] * len(tokens)]
            arguments = one_row(
                (p / p.sum()).tolist(), p.tolist(), tokens, uniforms, AcceptRule.DRAWN
            )
            _, _, last = op(*arguments)
            assert p[int(last)] > 0


@pytest.mark.parametrize("op", EVERY, ids=["kernel", "reference"])
def test_a_row_without_logits_ends_the_walk(op: Any) -> None:
    """Level by level, as where penalties depend on the path: a child has no logits yet."""
    arguments = list(one_row([0.5, 0.5], [0.5, 0.5], [1], [0.9, 0.0], AcceptRule.DRAWN))
    arguments[1] = torch.tensor([0, -1], dtype=torch.int32)
    rows, counts, last = op(*arguments)
    assert (rows.tolist(), counts.tolist(), last.tolist()) == ([[0, 1, -1, -1]], [1], [-1])
    arguments[5] = torch.tensor([AcceptRule.BEST], dtype=torch.int32)
    assert op(*arguments)[2].tolist() == [-1]


@pytest.mark.parametrize("op", EVERY, ids=["kernel", "reference"])
def test_greedy_takes_the_first_of_equals_and_forbids_nothing_but_what_is_forbidden(
    op: Any,
) -> None:
    nothing = float("-inf")
    logits = torch.tensor([[1.0, 3.0, 3.0, nothing], [nothing] * 4])
    for row, token in ((0, 1), (1, 0)):
        for rule in AcceptRule:
            if row == 0 and rule is not AcceptRule.GREEDY:
                continue
            _, _, last = op(
                logits,
                torch.tensor([row], dtype=torch.int32),
                torch.zeros(0, 4),
                torch.tensor([-1], dtype=torch.int32),
                None,
                torch.tensor([rule], dtype=torch.int32),
                torch.tensor([0.5], dtype=torch.float64),
                torch.empty(0, dtype=torch.int32),
                torch.empty(0, dtype=torch.int32),
                torch.tensor([0, 0], dtype=torch.int32),
                2,
            )
            assert last.tolist() == [token]


def test_known_tokens_and_sampled_ones_take_one_walk() -> None:
    """GREEDY is accept_path over the argmax of every row."""
    for seed in range(30):
        case = make_case(seed, vocab=4, rules=None)
        case = replace(case, rules=torch.zeros_like(case.rules))
        best = case.target_logits[::2].argmax(1)
        rows, counts = ops.accept_path(
            best, case.token_ids, case.parents, case.cu_nodes, case.max_depth
        )
        own_rows, own_counts, last = ops.sample_path(*case.arguments())
        assert torch.equal(own_rows, rows)
        assert torch.equal(own_counts, counts)
        ends = rows.gather(1, counts.long().unsqueeze(1)).squeeze(1)
        first = case.cu_nodes[:-1] + torch.arange(len(counts))
        assert torch.equal(last.long(), best[first + ends])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": torch.tensor([3], dtype=torch.int32)}, "the rule of request 0 must be 0"),
        ({"target_rows": torch.tensor([0, 9], dtype=torch.int32)}, "target_rows must be -1 or a r"),
        ({"draft_rows": torch.tensor([0, -2], dtype=torch.int32)}, "draft_rows must be -1 or a ro"),
        ({"token_ids": torch.tensor([40], dtype=torch.int32)}, "token_ids must be below the 40 co"),
        ({"token_ids": torch.tensor([4])}, "token_ids must be Int, got Long"),
        ({"uniforms": torch.rand(2)}, "uniforms must be Double, got Float"),
        ({"uniforms": torch.rand(3).double()}, r"uniforms.shape\[0\] must be 2"),
        ({"draft_ids": torch.full((40,), 40, dtype=torch.int32)}, "draft_ids must be below the 40"),
        ({"draft_ids": torch.zeros(39, dtype=torch.int32)}, r"draft_ids.shape\[0\] must be 40"),
        ({"draft_probs": torch.rand(2, 39)}, "without draft_ids the vocabularies must be one"),
        ({"target_logits": torch.rand(4, 40).double()}, "target_logits must be Float, got Double"),
        ({"max_depth": -1}, "max_depth must be >= 0, got -1"),
        ({"temperatures": torch.ones(2)}, r"temperatures.shape\[0\] must be 1"),
        ({"temperatures": torch.ones(1).double()}, "temperatures must be Float, got Double"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    case = replace(make_case(0, trees=[[-1]]), **changes)
    with pytest.raises(RuntimeError, match=message):
        ops.sample_path(*case.arguments())
