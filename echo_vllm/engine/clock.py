# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Where the time of an engine step goes, in three parts."""

from __future__ import annotations

from time import perf_counter


class StepClock:
    """Stamped by the model runner in every step.

    Attributes:
        verify_s: seconds of the last step in the target's forward, sampling, commit and the
            runner's own work.
        draft_s: seconds of the last step in the drafter and the policy.
        idle_s: seconds between the end of the step before and the begin of the last one: the
            scheduler, the output, and any time without requests.
    """

    def __init__(self) -> None:
        self.verify_s = self.draft_s = self.idle_s = 0.0
        self._begin = self._end = perf_counter()
        self._drafting = 0.0

    def begin(self) -> None:
        """The step starts."""
        self._begin = perf_counter()
        self.idle_s = self._begin - self._end
        self.draft_s = self._drafting = 0.0

    def verified(self) -> None:
        """Drafting starts."""
        self._drafting = perf_counter()

    def drafted(self) -> None:
        """Drafting ends."""
        self.draft_s = perf_counter() - self._drafting

    def end(self) -> None:
        """The step ends."""
        self._end = perf_counter()
        self.verify_s = self._end - self._begin - self.draft_s
