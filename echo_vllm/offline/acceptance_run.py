# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Counts in the real engine how many of a head's drafts are accepted, for several ways to draft."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from echo_vllm.offline.engine import LocalEngine


@dataclass(frozen=True)
class Counted:
    """What one engine counted on one set of prompts.

    Attributes:
        drafts: chains or trees that were verified.
        accepted_tokens: of them.
        accepted: drafts that were accepted at least to each position (of a tree: depth).
        answers: token ids generated, by prompt.
    """

    drafts: int
    accepted_tokens: int
    accepted: list[int]
    answers: list[list[int]]

    @property
    def tokens(self) -> int:
        """Generated."""
        return sum(map(len, self.answers))

    def share_of(self, vocabulary: Container[int]) -> float:
        """Of the generated tokens, how many are in a vocabulary."""
        hits = sum(token in vocabulary for answer in self.answers for token in answer)
        return hits / max(self.tokens, 1)

    @property
    def length(self) -> float:
        """Mean tokens of a step, the bonus token included."""
        return 1 + self.accepted_tokens / max(self.drafts, 1)

    @property
    def per_position(self) -> list[float]:
        """Share of the drafts accepted at least to each position, without zeros at the end."""
        shares = [count / max(self.drafts, 1) for count in self.accepted]
        while shares and shares[-1] == 0:
            shares.pop()
        return shares


def chain_of(head: str, length: int, method: str) -> dict[str, Any]:
    """vLLM's speculative_config of a chain.

    Args:
        head: a folder.
        length: tokens drafted.
        method: "eagle3", vLLM's own, or "echo".
    """
    config: dict[str, Any] = {"method": method, "model": head, "num_speculative_tokens": length}
    return config | ({"echo": {"policy": "chain"}} if method == "echo" else {})


def tree_of(head: str, nodes: int, max_depth: int = 6, top_k: int = 4) -> dict[str, Any]:
    """vLLM's speculative_config of a tree of the most probable candidates."""
    section = {"policy": "topn", "max_depth": max_depth, "top_k": top_k, "candidates": "best"}
    return {"method": "echo", "model": head, "num_speculative_tokens": nodes, "echo": section}


def measure(
    model: str,
    speculation: Mapping[str, Any],
    prompt_sets: Mapping[str, Sequence[list[int]]],
    temperatures: Sequence[float],
    *,
    max_tokens: int,
    dtype: str,
    max_model_len: int | None,
    concurrency: int,
    engine_args: Mapping[str, Any] | None = None,
    on_set: Callable[[], None] = lambda: None,
) -> dict[tuple[str, float], Counted]:
    """Run an engine of this process on all prompts, set by set, and end it.

    Args:
        model: the target.
        speculation: vLLM's speculative_config.
        prompt_sets: token ids of prompts, by the set's name.
        temperatures: each set runs at each of them.
        max_tokens: of an answer.
        dtype: as in vLLM.
        max_model_len: tokens of a request; None for the model's own.
        concurrency: requests at once.
        engine_args: more of vLLM's EngineArgs, or others in the place of these.
        on_set: called after each set at each temperature.

    Raises:
        ValueError, OSError, RuntimeError: vLLM's own, if target or head do not load.
    """
    options = {
        "speculative_config": dict(speculation),
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": concurrency,
        **(engine_args or {}),
        "disable_log_stats": False,  # They are what is counted.
    }
    counted = {}
    with LocalEngine(model, **options) as engine:
        for name, prompts in prompt_sets.items():
            for temperature in temperatures:
                before = engine.counters()
                answers = engine.answer_each(prompts, max_tokens, temperature)
                after = engine.counters()
                drafts, accepted, at = (
                    np.subtract(after[counter], before[counter]).tolist()
                    for counter in (
                        "spec_decode_num_drafts",
                        "spec_decode_num_accepted_tokens",
                        "spec_decode_num_accepted_tokens_per_pos",
                    )
                )
                counted[name, temperature] = Counted(
                    int(drafts), int(accepted), [int(count) for count in at], answers
                )
                on_set()
    return counted
