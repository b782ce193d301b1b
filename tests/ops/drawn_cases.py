# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Random inputs for `sample_path`, and uniforms that lie on either side of every decision.

Random uniforms would hardly ever come near a boundary. Here they are chosen from the reference's
own probabilities: a child's is just below or just above the chance at which it is accepted, a
token's is in the middle of its piece of [0, 1). A kernel whose probabilities are off by more than
the margin decides otherwise somewhere.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from echo_vllm.ops import AcceptRule, reference

MARGIN = 1e-4
"""Of a chance, relative: what float32 exponentials and sums may be off by is some 1e-6."""


@dataclass(frozen=True)
class PathCase:
    """Arguments of `sample_path`, in its order."""

    target_logits: Tensor
    target_rows: Tensor
    draft_probs: Tensor
    draft_rows: Tensor
    draft_ids: Tensor | None
    rules: Tensor
    uniforms: Tensor
    token_ids: Tensor
    parents: Tensor
    cu_nodes: Tensor
    max_depth: int
    temperatures: Tensor | None = None

    def arguments(self, device: str = "cpu") -> tuple[Any, ...]:
        values = (getattr(self, name) for name in self.__dataclass_fields__)
        return tuple(x.to(device) if isinstance(x, Tensor) else x for x in values)

    def p(self, row: int) -> Tensor:
        """float64 [V], the target's distribution at a row of the batch."""
        logits = self.target_logits[int(self.target_rows[row])].double()
        if self.temperatures is not None:
            first_rows = self.cu_nodes[:-1] + torch.arange(len(self.temperatures))
            logits = logits / self.temperatures[int((first_rows <= row).sum()) - 1]
        return torch.softmax(logits, 0)

    def q(self, row: int) -> Tensor:
        """float64 [V], the draft's; zeros where there is none."""
        spread = torch.zeros(self.target_logits.shape[1], dtype=torch.float64)
        ids = self.draft_ids
        if ids is None:
            ids = torch.arange(len(spread), dtype=torch.int32)
        if (draft_row := int(self.draft_rows[row])) >= 0:
            known = ids >= 0
            spread[known] = self.draft_probs[draft_row].double()[ids[known].long()]
        return spread


def make_case(
    seed: int,
    *,
    vocab: int = 40,
    draft_vocab: int | None = None,
    trees: list[list[int]] | None = None,
    rules: list[AcceptRule] | None = None,
    truncated: bool = False,
    alike: bool = False,
    at_temperatures: bool = False,
    max_depth: int = 8,
) -> PathCase:
    """Trees whose children were drawn without replacement from random distributions.

    Args:
        seed: of everything.
        vocab, draft_vocab: V and V_draft; None: one vocabulary.
        trees: parents of each request; random ones by default.
        rules: one a request; DRAWN by default.
        truncated: p and q lack tokens, each its own (top-k, top-p, min-p).
        alike: q is p as far as the draft vocabulary goes.
        at_temperatures: one a request, not 1.
        max_depth: as of the operator.
    """
    draw = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)
    if trees is None:
        trees = []
        for _ in range(draw.randint(1, 5)):
            size = draw.randint(0, 9)
            trees.append([draw.randint(max(-1, node - 4), node - 1) for node in range(size)])
    rows = sum(len(tree) + 1 for tree in trees)
    ids = None
    known = torch.arange(vocab)
    if draft_vocab is not None:
        known = torch.randperm(vocab, generator=noise)[:draft_vocab].sort().values
        ids = torch.full((vocab,), -1, dtype=torch.int32)
        ids[known] = torch.arange(draft_vocab, dtype=torch.int32)
    # Rows of others between ours, and strides of their own: NaN must not be read.
    logits = torch.full((2 * rows, vocab + 3), float("nan"))[:, :vocab]
    logits[::2] = 2.0 * torch.randn(rows, vocab, generator=noise)
    of_draft = 1.0 * torch.randn(rows, len(known), generator=noise)
    of_draft = logits[::2][:, known].clone() if alike else of_draft + logits[::2][:, known] / 2
    if truncated:
        kept = torch.rand(rows, vocab, generator=noise) < 0.4
        kept[:, 0] = True
        logits[::2] = logits[::2].masked_fill(~kept, float("-inf"))
        kept = torch.rand(rows, len(known), generator=noise) < 0.4
        kept[:, -1] = True
        of_draft = of_draft.masked_fill(~kept, float("-inf"))
    probs = torch.softmax(of_draft, 1)
    tokens: list[int] = []
    first = 0
    for tree in trees:
        taken: dict[int, list[int]] = {}
        for parent in tree:
            weights = probs[first + parent + 1].clone()
            weights[taken.setdefault(parent, [])] = 0.0
            if float(weights.sum()) > 0:
                place = int(torch.multinomial(weights, 1, generator=noise))
            else:  # q has no more tokens: one that it cannot have drawn
                place = draw.randrange(len(known))
            taken[parent].append(place)
            tokens.append(int(known[place]))
        first += len(tree) + 1
    bounds = torch.tensor([0, *(len(tree) for tree in trees)], dtype=torch.int32).cumsum(0)
    return PathCase(
        target_logits=logits,
        target_rows=torch.arange(0, 2 * rows, 2, dtype=torch.int32),
        draft_probs=probs,
        draft_rows=torch.arange(rows, dtype=torch.int32),
        draft_ids=ids,
        rules=torch.tensor(rules or [AcceptRule.DRAWN] * len(trees), dtype=torch.int32),
        uniforms=torch.rand(rows, generator=noise, dtype=torch.float64),
        token_ids=torch.tensor(tokens, dtype=torch.int32),
        parents=torch.tensor([parent for tree in trees for parent in tree], dtype=torch.int32),
        cu_nodes=bounds.to(torch.int32),
        max_depth=max_depth,
        temperatures=0.3 + torch.rand(len(trees), generator=noise) if at_temperatures else None,
    )


def _middle(distribution: Tensor, token: int) -> float:
    through = distribution.cumsum(0)
    return float((through[token] - distribution[token] / 2) / through[-1])


def near_every_boundary(case: PathCase, seed: int) -> PathCase:
    """The case with uniforms that lead along a random path, each close to where it would turn."""
    draw = random.Random(seed)
    uniforms = case.uniforms.clone()
    bounds = case.cu_nodes.tolist()
    for request, (begin, end) in enumerate(itertools.pairwise(bounds)):
        first, above = begin + request, case.parents[begin:end].tolist()
        tokens, rule = case.token_ids[begin:end].tolist(), int(case.rules[request])
        row: int | None = 0
        depth = 0
        while row is not None:
            p = case.p(first + row)
            children = [n for n, parent in enumerate(above) if parent == row - 1]
            children = children if depth < case.max_depth else []
            ends_at, row = row, None
            depth += 1
            distribution = p
            if rule == AcceptRule.DRAWN:
                own = [tokens[n] for n in children]
                chances, distribution = reference.rejection(p, case.q(first + ends_at), own)
                for node, chance in zip(children, chances, strict=True):
                    accept = chance > 1 - MARGIN or (draw.random() < 0.4 and chance > 0)
                    turn = chance * (1 - MARGIN if accept else 1 + MARGIN)
                    uniforms[first + node + 1] = turn
                    if accept:
                        row = node + 1
                        break
            # A token of some weight; with BEST a child's where there is one.
            likely = (distribution > 1e-3 * distribution.max()).nonzero().flatten().tolist()
            inner = [tokens[n] for n in children if tokens[n] in likely]
            token = draw.choice(inner if inner and draw.random() < 0.7 else likely)
            if rule == AcceptRule.BEST:
                uniforms[first + ends_at] = _middle(distribution, token)
                row = next((n + 1 for n in children if tokens[n] == token), None)
            elif rule == AcceptRule.DRAWN and row is None:
                uniforms[first] = _middle(distribution, token)
            elif rule == AcceptRule.GREEDY:
                best = int(p.argmax())
                row = next((n + 1 for n in children if tokens[n] == best), None)
    return replace(case, uniforms=uniforms)


KINDS: dict[str, dict[str, Any]] = {
    "one-vocabulary": {},
    "draft-vocabulary": {"draft_vocab": 25},
    "truncated": {"draft_vocab": 25, "truncated": True},
    "alike": {"alike": True},
    "alike-truncated": {"alike": True, "truncated": True, "vocab": 9},
    "many-tokens": {"vocab": 5000, "draft_vocab": 2500},
    "chain": {"trees": [[-1, 0, 1, 2, 3], [-1], []], "max_depth": 3},
    "wide": {"trees": [[-1] * 12, [-1, -1, 0, 0, 1, 1]], "vocab": 17},
    "temperatures": {"draft_vocab": 25, "truncated": True, "at_temperatures": True},
    "ragged-temperatures": {
        "trees": [[-1, -1, 0], [-1, 0, 0], [-1]],
        "rules": [AcceptRule.BEST, AcceptRule.GREEDY, AcceptRule.DRAWN],
        "vocab": 6,
        "at_temperatures": True,
    },
    "ragged": {
        "trees": [[-1, -1, 0, 1], [-1, 0, 0], [-1, -1, 1], []],
        "rules": [AcceptRule.DRAWN, AcceptRule.BEST, AcceptRule.GREEDY, AcceptRule.BEST],
        "vocab": 6,
    },
}
"""Name -> arguments of `make_case`."""


def cases(kind: str, count: int) -> list[PathCase]:
    """`count` cases of a kind, each by random uniforms and near its boundaries."""
    plain = [make_case(seed, **KINDS[kind]) for seed in range(count)]
    return plain + [near_every_boundary(case, seed) for seed, case in enumerate(plain)]


def assert_same_path(operator: object, case: PathCase, device: str = "cpu") -> None:
    """The operator decides as the reference does."""
    assert callable(operator)
    expected = reference.sample_path(*case.arguments())
    actual = operator(*case.arguments(device))
    for name, one, other in zip(("rows", "accepted", "last"), actual, expected, strict=True):
        assert one.dtype == torch.int32
        assert torch.equal(one.cpu(), other), (name, one.tolist(), other.tolist())
