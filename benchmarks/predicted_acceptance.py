# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What an engine will count, predicted without one.

On the target's own greedy answer a chain of drafts is accepted up to its first token that differs,
and up to there the drafter has read the answer's own tokens: so one forward of the training-time
test, which is fed those, holds every draft that an engine could make. Walking over the answer as
the engine does gives the very counts of the engine's metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from echo_vllm.training.rows import Row


@dataclass(frozen=True)
class Acceptance:
    """Drafts, and how many were accepted at each position.

    Attributes:
        drafts: chains that were verified.
        accepted: [length], how many chains were accepted at least to position k + 1.
    """

    drafts: int
    accepted: list[int]

    @property
    def length(self) -> float:
        """Mean tokens of a step, the bonus token included."""
        return 1 + sum(self.accepted) / max(self.drafts, 1)

    def plus(self, other: Acceptance) -> Acceptance:
        """Both together."""
        return Acceptance(
            self.drafts + other.drafts,
            [a + b for a, b in zip(self.accepted, other.accepted, strict=True)],
        )


@torch.inference_mode()
def draft_tokens(model: Any, states: torch.Tensor, ids: torch.Tensor, length: int) -> torch.Tensor:
    """The head's greedy drafts from every position of a sequence.

    Args:
        model: speculators' Eagle3DraftModel.
        states: [num_tokens, num_aux, hidden_size], auxiliary hidden states of the target.
        ids: [num_tokens].
        length: of the chain.

    Returns:
        [num_tokens - 1, length] target token ids: entry [i, k] is drafted for position i + 2 + k,
        by a head that has read the tokens up to i + 1 + k and the states up to i.
    """
    model.eval()
    drafted = model(
        hidden_states=states[:-1].flatten(1)[None].to(model.dtype),
        input_ids=ids[None, 1:],
        document_ids=torch.zeros(1, len(ids) - 1, dtype=torch.long),
        ttt_steps=length,
    )
    tokens = torch.stack([step[0] for step in drafted], dim=1)
    return tokens if model.d2t is None else tokens + model.d2t[tokens]


def predicted_acceptance(
    model: Any, states: torch.Tensor, row: Row, length: int, max_tokens: int
) -> Acceptance:
    """What an engine with a chain of `length` counts while it gives this answer.

    Args:
        model: speculators' Eagle3DraftModel.
        states: [num_tokens, num_aux, hidden_size].
        row: prompt and greedy answer.
        length: of the chain.
        max_tokens: of the answer; an engine drafts no more than what is left of them.
    """
    ids = torch.tensor(row.input_ids)
    drafts = draft_tokens(model, states, ids, length)
    return walk(row.input_ids, drafts.tolist(), row.prompt_length, length, max_tokens)


def walk(
    ids: Sequence[int],
    drafts: Sequence[Sequence[int]],
    prompt_length: int,
    length: int,
    max_tokens: int,
) -> Acceptance:
    """Count as an engine does that begins with one token after the prompt.

    Args:
        ids: prompt and answer.
        drafts: `draft_tokens` of them.
        prompt_length: tokens of the prompt.
        length: of the chain.
        max_tokens: of the answer.
    """
    accepted = [0] * length
    steps = 0
    last = prompt_length  # The newest token, which the target has not read yet.
    end = min(len(ids), prompt_length + max_tokens)
    while last < end - 1:
        steps += 1
        run = 0
        while (
            run < length and last + 1 + run < end and drafts[last - 1][run] == ids[last + 1 + run]
        ):
            accepted[run] += 1
            run += 1
        last += run + 1
    return Acceptance(steps, accepted)
