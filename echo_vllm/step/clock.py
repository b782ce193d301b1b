# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Where the time of an engine step goes, in three parts.

`StepClock` tells it at the end of the step, `StepMarks` when the device has come so far.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

LONGEST_GAP_S = 0.05
"""A longer time between two steps is a lack of requests, not work of the scheduler."""


class StepClock:
    """Stamped by the model runner in every step.

    Attributes:
        verify_s: seconds of the last step in the target's forward, sampling, commit and the
            runner's own work.
        draft_s: seconds of the last step in the drafter and the policy; None if the drafter still
            runs (on a GPU, when nobody waited for a draft).
        idle_s: seconds between the end of the step before and the begin of the last one: the
            scheduler, the output, and any time without requests.
    """

    def __init__(self) -> None:
        self.verify_s = self.idle_s = 0.0
        self.draft_s: float | None = 0.0
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

    def drafted(self, *, waited: bool) -> None:
        """Drafting ends; `waited` says whether the host has waited for its result."""
        self.draft_s = perf_counter() - self._drafting

    def end(self) -> None:
        """The step ends."""
        self._end = perf_counter()
        self.verify_s = self._end - self._begin - (self.draft_s or 0.0)


class DeviceClock(StepClock):
    """The same by events on the device's stream.

    The host runs ahead of the device, so its own clock would charge what the drafter left behind to
    the next step. Events are waited for only where the host has waited for what came before them:
    for the tokens of the verification, or for those of the draft. A drafting that nobody waited for
    and that has not ended with the step stays unknown.
    """

    def __init__(self, make_event: Any) -> None:
        """Args: make_event: returns an event as `torch.cuda.Event(enable_timing=True)`."""
        super().__init__()
        self._marks = StepMarks(make_event)
        self._has_verified = False

    def begin(self) -> None:
        super().begin()
        self._has_verified = False
        self._marks.begun.record()

    def verified(self) -> None:
        self._marks.verified.record()
        self._marks.verified.synchronize()
        self._has_verified = True

    def drafted(self, *, waited: bool) -> None:
        self._marks.drafted.record()
        self.draft_s = None
        if waited:
            self._marks.drafted.synchronize()
            self.draft_s = self._marks.draft_s

    def end(self) -> None:
        self._end = perf_counter()
        if not self._has_verified:  # A step without requests.
            self.verify_s = self._end - self._begin
            return
        self.verify_s = self._marks.verify_s
        if self.draft_s is None and self._marks.drafted.query():
            self.draft_s = self._marks.draft_s


def clock_of(device: torch.device) -> StepClock:
    """The clock for steps on `device`."""
    if device.type == "cpu":
        return StepClock()
    return DeviceClock(lambda: torch.cuda.Event(enable_timing=True))


class HostMark:
    """A moment of the host, asked as a `torch.cuda.Event` is."""

    def record(self) -> None:
        self.at = perf_counter()

    def elapsed_time(self, later: HostMark) -> float:
        """Milliseconds up to `later`."""
        return 1000 * (later.at - self.at)


class StepMarks:
    """Moments of one step on the device's own clock, for which nobody waits.

    Attributes:
        begun, verified, drafted: when the step began, when target and drafter were up to date with
            its tokens, and when the next drafts were there.
    """

    def __init__(self, make_mark: Callable[[], Any]) -> None:
        self.begun, self.verified, self.drafted = (make_mark() for _ in range(3))

    @property
    def verify_s(self) -> float:
        """Seconds up to `verified`, which the device has passed."""
        return float(self.begun.elapsed_time(self.verified)) / 1000

    @property
    def draft_s(self) -> float:
        """Seconds from there to `drafted`, which the device has passed."""
        return float(self.verified.elapsed_time(self.drafted)) / 1000

    def seconds(self, before: StepMarks | None) -> tuple[float, float, float]:
        """(up to `verified`, from there to `drafted`, between the step `before` and this one), once
        the device has passed all of them; the last is 0 for a first step."""
        gap = 0.0 if before is None else before.drafted.elapsed_time(self.begun) / 1000
        return self.verify_s, self.draft_s, gap


def marks_on(device: torch.device) -> Callable[[], StepMarks]:
    """Makes the marks of a step on `device`."""
    if device.type == "cpu":
        return lambda: StepMarks(HostMark)
    return lambda: StepMarks(lambda: torch.cuda.Event(enable_timing=True))
