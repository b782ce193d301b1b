# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A small number, its slot, for every request that runs, and what a step asks of it by that number.

What a request's parameters say once and for all is read when the request begins, so that a step
reads arrays instead of asking every request.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
from vllm.sampling_params import SamplingParams

from echo_vllm.step.grammar import takes_trees
from echo_vllm.step.verification import Drawing
from echo_vllm.trees.store import Ints


class RequestSlots:
    """The slots of an engine's running requests.

    Attributes:
        may_draft: [num_slots] bool, whether drafts of the request can be verified.
        has_grammar: [num_slots] bool, whether its output is constrained.
        last_token: [num_slots] int64, tokens of prompt and answer that the request may have.
        by_level, is_random: [num_slots] bool, see `Drawing`.
    """

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))
        self._slots: dict[str, int] = {}
        self._batch: list[str] = []
        self._batch_slots: Ints = np.zeros(0, np.int64)
        self.may_draft = np.zeros(num_slots, np.bool_)
        self.has_grammar = np.zeros(num_slots, np.bool_)
        self.last_token = np.zeros(num_slots, np.int64)
        self.by_level = np.zeros(num_slots, np.bool_)
        self.is_random = np.zeros(num_slots, np.bool_)

    def __len__(self) -> int:
        """Requests that have a slot."""
        return len(self._slots)

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._slots

    def begin(
        self,
        req_id: str,
        params: SamplingParams,
        *,
        num_prompt: int,
        max_len: int,
        batch: Container[str],
    ) -> int:
        """The slot of a request that starts, or that goes on with other parameters.

        A session that waits for its next input runs no more and still has a slot: it loses it
        where there is no other.

        Args:
            num_prompt, max_len: tokens of its prompt, and that any request may have.
            batch: the requests of the batch, whose slots are not to be taken.
        """
        if req_id not in self._slots:
            if not self._free:
                self.end(next(r for r in self._slots if r not in batch))
            self._slots[req_id] = self._free.pop()
            self._batch = []
        slot = self._slots[req_id]
        self.has_grammar[slot] = params.structured_outputs is not None
        self.may_draft[slot] = takes_trees(params)
        self.last_token[slot] = min(max_len, num_prompt + (params.max_tokens or max_len))
        drawing = Drawing.of(params)
        self.by_level[slot], self.is_random[slot] = drawing.by_level, drawing.is_random
        return slot

    def end(self, req_id: str) -> None:
        """The request ended or was preempted."""
        slot = self._slots.pop(req_id, None)
        if slot is not None:
            self._free.append(slot)
            self._batch = []

    def of(self, req_ids: Sequence[str]) -> Ints:
        """[R] the slots of the batch `req_ids`; looked up only when the batch has changed."""
        if req_ids != self._batch:
            self._batch = list(req_ids)
            self._batch_slots = np.array([self._slots[r] for r in req_ids], np.int64)
        return self._batch_slots
