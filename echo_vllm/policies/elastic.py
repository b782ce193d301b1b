# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the sections of policies with ragged trees share: fields, their checks, and the gates.

`echo`, `auto`, `evict` and `graft` draft more candidates than they verify. Each field that two of
them have is described once here, as a type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, PlainSerializer

from echo_vllm.config import (
    MAX_DEPTH,
    MAX_NODES,
    MAX_TOP_K,
    SECTION,
    EchoConfig,
    EchoConfigError,
    sentence,
    show,
)
from echo_vllm.forecast.drafter_profile import DrafterProfile

DEFAULT_GATES = {1: 0.2, 3: 0.2, 6: 0.3}
"""Gates without a profile: about those of the authors' published code (arXiv 2604.09603), which
tests the root, the third and the sixth level."""

_DEPTH_NAMES = frozenset(str(depth) for depth in range(1, MAX_DEPTH + 1))


def _object_to_pairs(gates: Any) -> Any:
    if not isinstance(gates, Mapping):
        if gates is None or isinstance(gates, tuple):
            return gates
        raise ValueError("an object")
    pairs = []
    for depth, tau in gates.items():
        if depth not in _DEPTH_NAMES:
            raise ValueError("an object")
        if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 <= tau < 1:
            raise ValueError("an object")
        pairs.append((int(depth), float(tau)))
    return tuple(sorted(pairs))


def _pairs_to_object(gates: tuple[tuple[int, float], ...] | None) -> dict[str, float] | None:
    return None if gates is None else {str(depth): tau for depth, tau in gates}


Gates = Annotated[
    tuple[tuple[int, float], ...] | None,
    BeforeValidator(_object_to_pairs, json_schema_input_type=dict[str, float] | None),
    PlainSerializer(_pairs_to_object, when_used="json"),
    Field(
        description=(
            'The gates as an object of depth and threshold, such as {"1": 0.2, "3": 0.2}: a '
            "request goes on below that depth if its best path there is more probable. {} for no "
            "gates. Default null: the gates of the profile."
        )
    ),
]

Floor = Annotated[
    int | None,
    Field(
        ge=0,
        le=MAX_NODES,
        description=(
            "Nodes that every request with a tree gets before anything is shared out. Range 0 to "
            "256. Default null: 1 for `echo`, 0 for `auto`."
        ),
    ),
]

Profile = Annotated[
    str | None,
    Field(
        description=(
            "The calibration written by `echo-vllm calibrate`. Default null: echo_profile.json in "
            "the head's folder, and without it built-in values, with a warning."
        ),
        json_schema_extra={"format": "path"},
    ),
]


class ElasticConfig(EchoConfig):
    """The section of a policy that drafts more candidates than it verifies."""

    width: int | None = Field(
        default=None,
        ge=1,
        le=MAX_TOP_K,
        description=(
            "Children considered after every node, of which at most `top_k` a level are expanded; "
            "the others can only widen a tree. Range top_k to 16. Default null: 8, or top_k where "
            "that is more."
        ),
    )
    k_max: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description=(
            "The most draft nodes of the whole batch in one step, less the prompt tokens in it; a "
            "hard limit. Range 0 to 1000000. Default null: `echo` takes it from the hinge fitted "
            "to the measured cost of forwards; the others have no limit but "
            "num_speculative_tokens for each request."
        ),
    )

    def filled(self, num_nodes: int) -> Self:
        width = self.width if self.width is not None else max(8, self.top_k)
        if width < self.top_k:
            raise EchoConfigError(
                f"{SECTION}.width must be at least {SECTION}.top_k ({self.top_k}), got {width}; "
                "raise it, or lower top_k."
            )
        depth = self.depth_for(num_nodes, width, "width + (max_depth - 1) * top_k * width")
        return self.with_fields(max_depth=depth, width=width)

    def checked_floor(self, floor: int | None, default: int, num_nodes: int) -> int:
        """The nodes of `floor`, or of `default` without one.

        Raises:
            EchoConfigError: more than one request, or the batch, may have.
        """
        if (default if floor is None else floor) > num_nodes:
            raise EchoConfigError(
                f"{SECTION}.floor must be at most speculative_config.num_speculative_tokens "
                f"({num_nodes}), got {floor}; lower it."
            )
        if floor is not None and self.k_max is not None and floor > self.k_max:
            raise EchoConfigError(
                f"{SECTION}.floor must be at most {SECTION}.k_max ({self.k_max}), which is all "
                f"that the batch may have, got {floor}; lower it, or raise k_max."
            )
        return default if floor is None else floor


class GatedConfig(ElasticConfig):
    """The section of a policy that stops unsure requests at gates."""

    gates: Gates = None
    profile: Profile = None

    @classmethod
    def refusal(cls, place: Sequence[int | str], value: object, kind: str, message: str) -> str:
        if place[0] != "gates":
            return super().refusal(place, value, kind, message)
        return sentence(
            place,
            f"an object of depths (1 to {MAX_DEPTH}) and thresholds (at least 0, below 1)",
            value,
            'write it as {"1": 0.2, "3": 0.2}, or remove it for the gates of the profile',
        )

    def filled(self, num_nodes: int) -> Self:
        if self.gates is not None and self.profile is not None:
            raise EchoConfigError(
                f"{SECTION}.profile has nothing to say to policy {self.policy} where "
                f"{SECTION}.gates names the gates, got {show(self.profile)}; remove one of the two."
            )
        config = super().filled(num_nodes)
        for gate, _ in self.gates or ():
            if gate > config.max_depth:
                raise EchoConfigError(
                    f"{SECTION}.gates must be at depths up to max_depth ({config.max_depth}), got "
                    f"a gate at {gate}; remove it, or raise max_depth."
                )
        return config

    def gates_with(self, profile: DrafterProfile | None) -> dict[int, float]:
        """Depth -> threshold: the section's, the profile's, or the built-in ones."""
        if self.gates is not None:
            return dict(self.gates)
        gates = DEFAULT_GATES if profile is None else profile.gates()
        return {depth: tau for depth, tau in gates.items() if depth <= self.max_depth}
