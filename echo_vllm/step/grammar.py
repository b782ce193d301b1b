# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Trees of requests with a grammar: what of a draft the grammar allows, and the mask of every node.

vLLM follows a grammar along one line of tokens. A tree is followed depth first: a node's token is
accepted, its children are visited, and the token is rolled back, so the grammar's state is in the
end what it was. A draft that the grammar forbids never gets a node. The masks are made on the same
way: the state at verification is the same, because a grammar advances only by tokens that were
generated.

While a request still reasons, nothing is constrained; a path in which the reasoning ends goes no
further, and what follows it is masked by the grammar's first state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from echo_vllm.trees.forest import ROOT

FOLLOWED_BACKENDS = frozenset({"xgrammar", "guidance"})
"""vLLM's grammar back ends whose states can be rolled back token by token; a request with another
one is served without drafts."""


@dataclass
class AllowedTree:
    """The part of a request's draft that its grammar allows.

    Attributes:
        kept: nodes of the drafted tree, ascending, so that each stands behind its parent.
        masks: [1 + n, words] int32, on the host: for the root and each node of `kept` the tokens
            that may follow, a bit each.
    """

    kept: list[int] = field(default_factory=list)
    masks: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int32))


def allow(manager: Any, request: Any, tokens: Sequence[int], parents: Sequence[int]) -> AllowedTree:
    """Follow a drafted tree with the request's grammar.

    Args:
        manager: vLLM's StructuredOutputManager.
        request: vLLM's Request, with a compiled grammar.
        tokens, parents: of the tree's nodes; a parent is an index of a node before, or ROOT.
    """
    return _Walk(manager, request, tokens, parents).run()


class _Walk:
    """One walk through a tree; the grammar's state is that of the node that is visited."""

    def __init__(
        self, manager: Any, request: Any, tokens: Sequence[int], parents: Sequence[int]
    ) -> None:
        self._manager = manager
        self._request = request
        self._grammar = request.structured_output_request.grammar
        self._tokens = tokens
        self._children: dict[int, list[int]] = {}
        for node, parent in enumerate(parents):
            self._children.setdefault(parent, []).append(node)
        self._masks = manager.backend.allocate_token_bitmask(1 + len(tokens))
        self._masks.fill_(-1)  # Every token may follow.
        self._kept: list[int] = []

    def run(self) -> AllowedTree:
        if self._starts_at(()).constraint_start == 0:
            self._visit(ROOT)
        else:
            self._visit_reasoning(ROOT, [])
        kept = sorted(self._kept)
        return AllowedTree(kept, self._masks[[0, *(node + 1 for node in kept)]])

    def _visit(self, node: int) -> None:
        """Mask what may follow `node`, and visit those of its children that may."""
        if self._grammar.is_terminated():
            return  # The request ends here.
        self._grammar.fill_bitmask(self._masks, node + 1)
        for child in self._children.get(node, ()):
            token = self._tokens[child]
            if not self._grammar.validate_tokens([token]):
                continue
            self._kept.append(child)
            self._grammar.accept_tokens(self._request.request_id, [token])
            self._visit(child)
            self._grammar.rollback(1)

    def _visit_reasoning(self, node: int, path: list[int]) -> None:
        """Visit the children of a node behind which the request still reasons."""
        for child in self._children.get(node, ()):
            way = [*path, self._tokens[child]]
            self._kept.append(child)
            starts = self._starts_at(way)
            if starts.constraint_start > len(way):
                self._visit_reasoning(child, way)
            elif starts.grammar_start < len(way):
                # The last token ended the reasoning and is the grammar's first.
                if not self._grammar.validate_tokens(way[-1:]):
                    self._kept.pop()
                    continue
                self._grammar.accept_tokens(self._request.request_id, way[-1:])
                if not self._grammar.is_terminated():
                    self._grammar.fill_bitmask(self._masks, child + 1)
                self._grammar.rollback(1)
            else:
                self._grammar.fill_bitmask(self._masks, child + 1)

    def _starts_at(self, path: Sequence[int]) -> Any:
        """Where in `path` the grammar begins; behind its end where the request still reasons."""
        return self._manager._get_constraint_bounds(self._request, path)
