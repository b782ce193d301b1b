# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Says once, in the log, that nearly nothing of what is drafted is accepted.

Such a server is exact and slow, and nothing else would tell its owner why.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

TREES = 512
"""Trees that are looked at together."""

LEAST = 0.1
"""Accepted tokens a tree below which a head is of no use. Heads that fit have 0.5 and more; one
that does not is still right about some commas."""


class AcceptanceWatch:
    """Counts in windows of TREES trees, and warns at the first that has fewer than LEAST."""

    def __init__(self, head: str) -> None:
        """Args: head: as the user named it."""
        self._head = head
        self._trees = self._accepted = 0
        self._has_warned = False

    def observe(self, accepted: Sequence[int]) -> None:
        """Count the accepted tokens of each tree of a step."""
        self._trees += len(accepted)
        self._accepted += sum(accepted)
        if self._trees < TREES:
            return
        if self._accepted < LEAST * self._trees and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "Of the last %d trees %d tokens were accepted: the draft head %s slows this server "
                "down. Usual causes: it was trained for another model or another revision of it, "
                "it reads other layers (eagle_aux_hidden_state_layer_ids in its config.json), or "
                "the prompts are not in the chat template that it was trained with.",
                self._trees,
                self._accepted,
                self._head,
            )
        self._trees = self._accepted = 0
