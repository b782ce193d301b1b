# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""How the load will change: answers end, and others begin.

What each running request may still generate is known, but answers end earlier than they must; and
who comes next is not known, but about as many come as did lately. The scheduler tells what happens
and asks for the load that is ahead (`Load.ahead`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from echo_vllm.forecast.plan import AHEAD

STEPS = 64
"""Steps after which a request that came counts half."""

ANSWERS = 32
"""Answers after which one that ended counts half."""

PRIOR = 4.0
"""Answers that count as used in full from the start."""


class Turnover:
    """What is learned of the length of answers and of how many requests come."""

    def __init__(self) -> None:
        self._coming = 0.0
        self._used = self._allowed = 0.0

    def step(self, num_new: int) -> None:
        """A step passed, with which `num_new` requests began."""
        keep = math.exp2(-1 / STEPS)
        self._coming = keep * self._coming + (1 - keep) * num_new

    def ended(self, used: int, allowed: int) -> None:
        """An answer of at most `allowed` tokens ended after `used`."""
        keep = math.exp2(-1 / ANSWERS)
        self._used = keep * self._used + used / max(1, allowed)
        self._allowed = keep * self._allowed + 1

    @property
    def share(self) -> float:
        """Of the tokens that an answer may have, those that it is expected to use."""
        return (self._used + PRIOR) / (self._allowed + PRIOR)

    def ahead(self, left: Sequence[int], queued: int, places: int) -> tuple[float, ...]:
        """Requests that decode at each point of `AHEAD` but the last.

        Args:
            left: tokens that each running request may still generate.
            queued: requests that wait for a place.
            places: requests that can run at once.
        """
        share, coming = self.share, self._coming
        expected = sorted(share * tokens for tokens in left)
        return tuple(
            min(
                len(expected)
                - bisect_right(expected, tokens)
                + (queued if tokens > 0 else 0)
                + coming * tokens,
                places,
            )
            for tokens in AHEAD[:-1]
        )
