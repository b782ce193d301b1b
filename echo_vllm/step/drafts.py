# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What a step's output brings from the worker to the scheduler besides its statistics."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.v1.outputs import DraftTokenIds


@dataclass(frozen=True)
class Drafts:
    """The trees that were drafted at the end of a step.

    Attributes:
        token_ids: the requests of the batch and the tokens of each one's tree, maybe none.
        parents: of the requests with a grammar, which the scheduler follows through the tree: the
            parent of each node, an index into the request's tokens, or ROOT.
    """

    token_ids: DraftTokenIds
    parents: dict[str, list[int]] = field(default_factory=dict)
