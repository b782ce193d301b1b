# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Trees of requests with a grammar: what of a draft the grammar allows, and the mask of every node.

vLLM follows a grammar along one line of tokens. A tree is followed depth first: a node's token is
accepted, its children are visited, and the token is rolled back, so the grammar's state is in the
end what it was. A draft that the grammar forbids never gets a node. The masks are made on the same
way: the state at verification is the same, because a grammar advances only by tokens that were
generated.

What the grammar forces gets nodes whether the drafter has thought of it or not: a token that is the
only one of its mask, which is accepted with its parent, and from the root on the tokens of a text
without alternative, which the target may write with other tokens. Both cost no drafting.

While a request still reasons, nothing is constrained; a path in which the reasoning ends goes no
further, and what follows it is masked by the grammar's first state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

from echo_vllm.trees.forest import ROOT

FOLLOWED_BACKENDS = frozenset({"xgrammar", "guidance"})
"""vLLM's grammar back ends whose states can be rolled back token by token; a request with another
one is served without drafts."""


_Key = tuple[int, int]
_ROOT_KEY = (ROOT, 0)

FORCED = -1
"""Stands in `AllowedTree.nodes` for a node that the grammar has added."""


def takes_trees(params: SamplingParams) -> bool:
    """Whether drafts of a request can be verified: a thinking budget, and the grammars of some
    backends, know one token after the other, not trees."""
    grammar = params.structured_outputs
    return params.thinking_token_budget is None and (
        grammar is None or grammar._backend in FOLLOWED_BACKENDS
    )


@dataclass
class AllowedTree:
    """The tree that a request with a grammar goes on with, of n nodes; any prefix is a tree.

    Attributes:
        nodes: of each node, its place in the drafted tree, or FORCED.
        token_ids, parents: of each node; a parent is a place in these lists, or ROOT.
        masks: [1 + n, words] int32, on the host: for the root and each node the tokens that may
            follow, a bit each; empty in what goes to the worker, which gets them another way.
    """

    nodes: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    masks: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int32))

    @property
    def has_forced(self) -> bool:
        return FORCED in self.nodes

    def without_masks(self, size: int) -> AllowedTree:
        """Its first `size` nodes."""
        return AllowedTree(self.nodes[:size], self.token_ids[:size], self.parents[:size])


def allow(
    manager: Any,
    request: Any,
    tokens: Sequence[int],
    parents: Sequence[int],
    *,
    max_nodes: int,
    max_depth: int,
) -> AllowedTree:
    """Follow a drafted tree with the request's grammar.

    Args:
        manager: vLLM's StructuredOutputManager.
        request: vLLM's Request, with a compiled grammar.
        tokens, parents: of the tree's nodes, maybe none; a parent is an index of a node before, or
            ROOT.
        max_nodes: of the result; forced nodes come first, right behind their parents.
        max_depth: of a forced node; 0 for none.
    """
    return _Walk(manager, request, tokens, parents, max_nodes, max_depth).run()


def masks_of(
    stock: Callable[[SchedulerOutput], GrammarOutput | None],
    scheduler_output: SchedulerOutput,
    trees: Mapping[str, AllowedTree],
) -> GrammarOutput | None:
    """The masks of a batch: for each request with a grammar its root's, then one for each draft.

    Args:
        stock: vLLM's `get_grammar_bitmask`.
        trees: of the requests whose drafts are trees; a draft behind the last node of its
            request's tree is none, and may be followed by anything.
    """
    scheduled = scheduler_output.scheduled_spec_decode_tokens
    # Without their drafts, so that vLLM makes the masks of the roots only.
    scheduler_output.scheduled_spec_decode_tokens = {}
    try:
        roots = stock(scheduler_output)
    finally:
        scheduler_output.scheduled_spec_decode_tokens = scheduled
    if roots is None:
        return None
    req_ids = roots.structured_output_request_ids
    counts = [len(scheduled.get(req_id, ())) for req_id in req_ids]
    # As many rows for every request from vLLM 0.33.0 on, before that a root's alone.
    width = len(roots.grammar_bitmask) // len(req_ids)

    def rows(place: int) -> NDArray[np.int32]:
        root: NDArray[np.int32] = roots.grammar_bitmask[place * width :][:1]
        tree = trees.get(req_ids[place])
        nodes = root[:0] if tree is None else tree.masks[1 : 1 + counts[place]].numpy()
        missing = max(width, 1 + counts[place]) - 1 - len(nodes)
        anything = np.full((missing, root.shape[1]), -1, np.int32)
        return np.concatenate([root, nodes, anything])

    return GrammarOutput(req_ids, np.concatenate([rows(i) for i in range(len(req_ids))]), counts)


def forced_text(manager: Any, grammar: Any) -> list[int]:
    """The tokens, as the tokenizer writes them, of the text without alternative from here on."""
    if (matcher := getattr(grammar, "ll_matcher", None)) is not None:  # guidance
        return list(matcher.compute_ff_tokens())
    tokenizer = getattr(manager, "tokenizer", None)
    if (matcher := getattr(grammar, "matcher", None)) is None or tokenizer is None:
        return []
    text = matcher.find_jump_forward_string()
    return list(_tokens_of(tokenizer, text)) if text else []


@functools.lru_cache(4096)
def _tokens_of(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The same keys and brackets come again and again."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def is_allowed(mask: torch.Tensor, token: int) -> bool:
    """Whether `token` is one of `mask` [words] int32."""
    return token < 32 * len(mask) and bool(int(mask[token // 32]) >> token % 32 & 1)


def forced_token(mask: torch.Tensor) -> int | None:
    """The one token that `mask` [words] int32 allows, None where there are more or none."""
    words = mask.numpy().view(np.uint32)
    places = words.nonzero()[0]
    if len(places) != 1:
        return None
    word = int(words[places[0]])
    return None if word & (word - 1) else 32 * int(places[0]) + word.bit_length() - 1


@dataclass
class _Walk:
    """One walk through a tree; the grammar's state is that of the node that is visited.

    A node's key is (the drafted node that it is or hangs under, how far below that it is): sorted
    by it, parents come first, drafted nodes keep their order, and forced ones follow their parent.
    The arguments are those of `allow`.
    """

    manager: Any
    request: Any
    tokens: Sequence[int]
    parents: Sequence[int]
    max_nodes: int
    max_depth: int

    def __post_init__(self) -> None:
        self._grammar = self.request.structured_output_request.grammar
        self._num_forced = 0
        self._children: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            self._children.setdefault(parent, []).append(node)
        rows = 1 + len(self.tokens) + self.max_nodes
        self._masks = self.manager.backend.allocate_token_bitmask(rows)
        self._masks.fill_(-1)  # Every token may follow.
        self._found: list[tuple[_Key, int, _Key, int]] = []
        """Of each node: its key, its token, its parent's key, its row of the masks."""

    def run(self) -> AllowedTree:
        if self._starts_at(()).constraint_start == 0:
            is_free = self.max_depth > 0
            text = forced_text(self.manager, self._grammar) if is_free else ()
            self._visit(_ROOT_KEY, 0, 0, text)
        else:
            self._visit_reasoning(_ROOT_KEY, [])
        found = sorted(self._found)[: self.max_nodes]
        place = {key: i for i, (key, *_) in enumerate(found)} | {_ROOT_KEY: ROOT}
        return AllowedTree(
            [node if below == 0 else FORCED for (node, below), *_ in found],
            [token for _, token, *_ in found],
            [place[parent] for _, _, parent, _ in found],
            self._masks[[0, *(row for *_, row in found)]],
        )

    def _keep(self, key: _Key, token: int, parent: _Key) -> int:
        """A new node; returns its row of the masks."""
        row = 1 + len(self._found)
        self._found.append((key, token, parent, row))
        return row

    def _visit(self, key: _Key, row: int, depth: int, ahead: Sequence[int]) -> None:
        """Mask what may follow a node, and visit those of its children that may.

        Args:
            ahead: tokens of the forced text from here on.
        """
        if self._grammar.is_terminated():
            return  # The request ends here.
        self._grammar.fill_bitmask(self._masks, row)
        mask, (node, below) = self._masks[row], key
        forced = ahead[0] if ahead and is_allowed(mask, ahead[0]) else forced_token(mask)
        rest = ahead[1:] if ahead and forced == ahead[0] else ()
        for child in self._children.get(node, ()) if below == 0 else ():
            token = self.tokens[child]
            if is_allowed(mask, token):
                self._step((child, 0), token, key, depth, rest if token == forced else ())
                if token == forced:
                    forced = None
        if forced is None or depth >= self.max_depth or self._num_forced == self.max_nodes:
            return
        self._num_forced += 1
        self._step((node, below + 1), forced, key, depth, rest)

    def _step(self, key: _Key, token: int, parent: _Key, depth: int, ahead: Sequence[int]) -> None:
        """Visit a new node, and come back."""
        if not self._grammar.accept_tokens(self.request.request_id, [token]):
            return
        # A forced token that ends the answer comes of itself, as the bonus token.
        if key[1] == 0 or not self._grammar.is_terminated():
            self._visit(key, self._keep(key, token, parent), depth + 1, ahead)
        self._grammar.rollback(1)

    def _visit_reasoning(self, key: _Key, path: list[int]) -> None:
        """Visit the children of a node behind which the request still reasons."""
        for child in self._children.get(key[0], ()):
            token = self.tokens[child]
            way = [*path, token]
            starts = self._starts_at(way)
            if starts.constraint_start > len(way):
                self._reason_on(self._keep((child, 0), token, key))
                self._visit_reasoning((child, 0), way)
            elif starts.grammar_start < len(way):
                # The last token ended the reasoning and is the grammar's first.
                if not self._grammar.validate_tokens([token]):
                    continue
                row = self._keep((child, 0), token, key)
                self._grammar.accept_tokens(self.request.request_id, [token])
                if not self._grammar.is_terminated():
                    self._grammar.fill_bitmask(self._masks, row)
                self._grammar.rollback(1)
            else:
                self._grammar.fill_bitmask(self._masks, self._keep((child, 0), token, key))

    def _reason_on(self, row: int) -> None:
        """Mask what vLLM does while a request reasons: from 0.33.0 on tokens that would end it
        and begin nothing that the grammar knows."""
        ends = getattr(self.manager, "_masked_reasoning_ends", None)
        words = self._masks[row].numpy().view(np.uint32)
        for token in () if ends is None else ends(self.request):
            words[token // 32] &= ~np.uint32(1 << token % 32)

    def _starts_at(self, path: Sequence[int]) -> Any:
        """Where in `path` the grammar begins; behind its end where the request still reasons."""
        return self.manager._get_constraint_bounds(self.request, path)
