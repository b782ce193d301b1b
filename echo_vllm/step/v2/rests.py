# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the drafter has yet to see: the rows of steps that rested.

A step that rests is one of plain decoding: each request has one row, and in place of the drafter's
first forward the target's features of these rows are copied to memory that is there from the start.
One forward over all of them (`TreeSpeculator.catch_up`) makes the drafter's cache whole, before
anything else is drafted or a request gives its blocks back, and every `RESTS` steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

RESTS = 16
"""Steps after which the drafter catches up in any case: its weights are read once for all of them,
and who drafts again has no more than this to catch up with."""


class RestedRows:
    """Rows in the order of their steps.

    Attributes:
        features: [rows, width], of the target, as the drafter combines them.
        token_ids: [rows] int32, the token behind each row.
        positions: [rows] int64.
    """

    def __init__(self, max_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.features = torch.empty(max_rows, width, dtype=dtype, device=device)
        self.token_ids = torch.empty(max_rows, dtype=torch.int32, device=device)
        self.positions = torch.empty(max_rows, dtype=torch.int64, device=device)
        self._of_slot: dict[int, list[int]] = {}
        self._num_steps = self._num_rows = 0

    def __contains__(self, slot: int | None) -> bool:
        """Whether there is a row of the request in a slot."""
        return slot in self._of_slot

    def has_room(self, num_reqs: int) -> bool:
        """Whether one more step of so many requests may rest."""
        return self._num_steps < RESTS and self._num_rows + num_reqs <= len(self.token_ids)

    def put(
        self,
        slots: NDArray[np.int32],
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        features: Sequence[torch.Tensor],
    ) -> None:
        """Keep a row of each of the requests in `slots` [R]: [R], [R], and a layer [R, hidden]."""
        first, self._num_rows = self._num_rows, self._num_rows + len(slots)
        self._num_steps += 1
        rows = slice(first, self._num_rows)
        torch.cat(list(features), dim=-1, out=self.features[rows])
        self.token_ids[rows] = token_ids
        self.positions[rows] = positions
        for row, slot in enumerate(slots.tolist(), first):
            self._of_slot.setdefault(slot, []).append(row)

    def take(self) -> dict[int, list[int]]:
        """Slot -> its rows in their order, and forget them; they stay until the next `put`."""
        found, self._of_slot = self._of_slot, {}
        self._num_steps = self._num_rows = 0
        return found
