# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The profile of a drafter: what calibration found, as one JSON file.

`echo-vllm calibrate` writes it, the engine reads it at start-up, policies take its gates and its
survival model. It knows neither vLLM nor torch (until `survival()` is called), and it holds names,
never the paths of a machine.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from echo_vllm import atomic
from echo_vllm.config import EchoConfigError, show, show_place

if TYPE_CHECKING:
    from echo_vllm.forecast.survival import SurvivalModel

FIELD = "speculative_config.echo.profile"
"""How the profile is called in errors."""

FILE_NAME = "echo_profile.json"
"""Beside the head's weights, where the engine looks for it by default."""

SCHEMA_VERSION = 1
MAX_KNOTS = 24


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _check_curve(logprobs: tuple[float, ...], probs: tuple[float, ...]) -> None:
    if len(logprobs) != len(probs):
        raise ValueError("survival_logprobs and survival_probs must be equally long")
    if any(a >= b for a, b in pairwise(logprobs)):
        raise ValueError("survival_logprobs must ascend")
    if any(a > b for a, b in pairwise(probs)):
        raise ValueError("survival_probs must not fall")
    if probs[0] < 0 or probs[-1] > 1:
        raise ValueError("survival_probs must be between 0 and 1")


def _check_depths(depths: Sequence[DepthProfile | DrawnDepth]) -> None:
    if [each.depth for each in depths] != list(range(1, len(depths) + 1)):
        raise ValueError("depths must be 1, 2, 3, ... in order")


class DepthProfile(_Frozen):
    """What is known about one depth of the trees.

    The survival curve is linear between its knots and constant outside them; a node's input is its
    path log-probability in nats.
    """

    depth: int = Field(ge=1, description="1 for the children of the root.")
    samples: int = Field(ge=1, description="Trees in which the drafter reached this depth.")
    auc: float | None = Field(
        ge=0,
        le=1,
        description=(
            "How well c, the probability of the best path of this depth, separates the trees in "
            "which a node of this depth was accepted; None where one of the two never happened."
        ),
    )
    acceptance: float = Field(
        ge=0, le=1, description="Share of those trees in which a node of this depth was accepted."
    )
    is_gate: bool = Field(description="Whether a tree is truncated here unless c > tau.")
    tau: float | None = Field(ge=0, le=1, description="The gate's threshold on c.")
    survival_logprobs: tuple[float, ...] = Field(min_length=1, max_length=MAX_KNOTS)
    survival_probs: tuple[float, ...] = Field(min_length=1, max_length=MAX_KNOTS)
    ece_before: float = Field(
        ge=0, le=1, description="Calibration error of exp(path log-probability), held out."
    )
    ece_after: float = Field(
        ge=0, le=1, description="Calibration error of the survival curve, held out."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.is_gate != (self.tau is not None):
            raise ValueError("a depth has a tau if and only if it is a gate")
        _check_curve(self.survival_logprobs, self.survival_probs)
        return self


class DrawnDepth(_Frozen):
    """What is known about one depth of trees of drawn candidates.

    The survival curve is as that of `DepthProfile`; a slot's input is the logarithm of the accepted
    tokens that are expected of it before it is drawn, from what its parent promises and from its
    place in the order of drawing (`forecast.gains`).
    """

    depth: int = Field(ge=1, description="1 for the children of the root.")
    samples: int = Field(ge=1, description="Slots of this depth that were verified.")
    acceptance: float = Field(
        ge=0, le=1, description="Share of the trees in which a node of this depth was accepted."
    )
    survival_logprobs: tuple[float, ...] = Field(min_length=1, max_length=MAX_KNOTS)
    survival_probs: tuple[float, ...] = Field(min_length=1, max_length=MAX_KNOTS)
    ece_before: float = Field(ge=0, le=1, description="Of the expectation itself, held out.")
    ece_after: float = Field(ge=0, le=1, description="Of the survival curve, held out.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_curve(self.survival_logprobs, self.survival_probs)
        return self


class DrawnProfile(_Frozen):
    """What is known about trees of drawn candidates."""

    temperature: float | None = Field(
        gt=0, description="At which they were drawn and verified; null if that is not known."
    )
    depths: tuple[DrawnDepth, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_depths(self.depths)
        return self

    def survival(self) -> SurvivalModel:
        """The calibrated probability that a slot's child is accepted."""
        from echo_vllm.forecast.survival import SurvivalModel

        return SurvivalModel([(d.survival_logprobs, d.survival_probs) for d in self.depths])


class DrafterProfile(_Frozen):
    """One drafter's gates and survival curves for one target, and how they were found."""

    schema_version: Literal[1] = 1
    target: str = Field(description="Name of the target model.")
    drafter: str = Field(description="Name of the draft head.")
    dtype: str
    created: str = Field(description="ISO date.")
    prompts: str = Field(description="What was run, in words.")
    num_steps: int = Field(ge=1, description="Verified trees that the numbers come from.")
    delta: float = Field(ge=0, le=1, description="AUC above which a depth may become a gate.")
    objective: str = Field(description="What the thresholds tau maximise.")
    depths: tuple[DepthProfile, ...] = Field(min_length=1)
    drawn: DrawnProfile | None = Field(
        default=None, description="Of drawn candidates; null where they were not measured."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_depths(self.depths)
        return self

    def gates(self) -> dict[int, float]:
        """Threshold on c = exp(best path log-probability) by gate depth, shallowest first."""
        return {d.depth: d.tau for d in self.depths if d.tau is not None}

    def survival(self) -> SurvivalModel:
        """The calibrated probability that a node is accepted."""
        from echo_vllm.forecast.survival import SurvivalModel

        return SurvivalModel([(d.survival_logprobs, d.survival_probs) for d in self.depths])

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a profile.

        Raises:
            EchoConfigError: the file cannot be read or is not a profile; one sentence.
        """
        where = (
            f"{FIELD} must name a profile that `echo-vllm calibrate` wrote, got {show(str(path))}"
        )
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise EchoConfigError(
                f"{where}, which cannot be read ({reason}); give the path of a readable file."
            ) from None
        try:
            content = json.loads(text)
        except ValueError:
            content = None
        if not isinstance(content, dict) or "schema_version" not in content:
            raise EchoConfigError(
                f"{where}, which is not a JSON object with a schema_version; run "
                "`echo-vllm calibrate` to make one."
            )
        version = content["schema_version"]
        if version != SCHEMA_VERSION:
            raise EchoConfigError(
                f"{where} with schema_version {show(version)}, but this release reads "
                f"{SCHEMA_VERSION}; run `echo-vllm calibrate` again."
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            report = error.errors(include_url=False)[0]
            place = show_place(report["loc"]).lstrip(".")
            what = report["msg"].removeprefix("Value error, ")
            raise EchoConfigError(
                f"{where}, whose {place or 'content'} is wrong ({what}); run `echo-vllm "
                "calibrate` again."
            ) from None

    def save(self, path: str | Path) -> None:
        """Write the profile; a reader never sees half of it.

        Raises:
            OSError: the file cannot be written.
        """
        atomic.write_text(path, _dump(self.model_dump(mode="json")))


def _dump(content: dict[str, object]) -> str:
    """JSON with one line a field, so that profiles can be compared by eye and by diff."""
    text = json.dumps(_round(content), indent=2)
    # A curve's knots stand on one line.
    return re.sub(r"\[\n([^\[\]{}]+?)\n\s+\]", _on_one_line, text) + "\n"


def _on_one_line(match: re.Match[str]) -> str:
    return f"[{', '.join(part.strip() for part in match[1].split(','))}]"


def _round(value: object) -> object:
    """Nothing here is measured to more than nine digits."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else value
    if isinstance(value, list):
        return [_round(item) for item in value]
    if isinstance(value, dict):
        return {name: _round(item) for name, item in value.items()}
    return value
