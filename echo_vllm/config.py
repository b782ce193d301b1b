# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What all policies' `echo` sections have in common: the base of their models, and their errors.

Each policy has a model of its own, beside it in `echo_vllm.policies`, and
`policies.parse_section` picks it by the section's `policy`. The result is frozen, every value in
it is set and every combination possible; the engine and the policies read it and never check it
again. Nothing here knows vLLM or a policy. An error is one sentence: the field, the value, what to
do.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from types import NoneType
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

SECTION = "speculative_config.echo"
"""How the section is called in errors."""

MAX_NODES = 256
"""Upper limit of num_speculative_tokens: nodes of one request's tree (the mask is 64-bit words)."""

MAX_DEPTH = 32
MAX_TOP_K = 16
_PLAIN_NAME = re.compile(r"[\w-]{1,64}")

LinearLayers = Literal["auto", "stock"]
Candidates = Literal["best", "drawn", "auto"]


class EchoConfigError(ValueError):
    """What is wrong with a configuration, as one sentence for the user.

    The patched vLLM knows the class by `is_echo_config_error`, so that it needs no import of this
    package to show the sentence alone.
    """

    is_echo_config_error = True


def show(value: object) -> str:
    """`value` as the user would write it in JSON, cut to a length that fits a sentence."""
    try:
        text = json.dumps(value)
    except TypeError:
        text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def show_name(name: str) -> str:
    """A field's name as the user wrote it: in JSON's quotes where it is not a plain word."""
    return name if _PLAIN_NAME.fullmatch(name) else show(name)


def show_place(loc: Sequence[int | str]) -> str:
    """Where in a JSON object something is, as pydantic's `loc` has it: ".tree[1]"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{show_name(part)}" for part in loc)


def closest(name: str, allowed: Sequence[str]) -> str:
    """A hint at the name that was probably meant, or nothing."""
    matches = difflib.get_close_matches(name, allowed, n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def either(names: Sequence[str]) -> str:
    """ "a", "a or b", "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def check_num_nodes(num_nodes: object) -> int:
    """The value of num_speculative_tokens.

    Raises:
        EchoConfigError: it is no number of nodes that a tree can have.
    """
    if (
        isinstance(num_nodes, bool)
        or not isinstance(num_nodes, int)
        or not (1 <= num_nodes <= MAX_NODES)
    ):
        raise EchoConfigError(
            "speculative_config.num_speculative_tokens is required with method echo and must be "
            f"an integer between 1 and {MAX_NODES}, got {show(num_nodes)}; set it to the nodes "
            "that one request's tree may have."
        )
    return num_nodes


def num_candidates(depth: int, top_k: int, width: int) -> int:
    """Nodes that a drafter can propose for one tree: the best `width` tokens after the root, and in
    each further level after each of the `top_k` nodes that are expanded."""
    return width + (depth - 1) * top_k * width


def sentence(place: Sequence[int | str], allowed: str, value: object, remedy: str) -> str:
    """The usual form of a refusal."""
    where = f"{SECTION}{show_place(place)}"
    return f"{where} must be {allowed}, got {show(value)}; {remedy}."


class EchoConfig(BaseModel):
    """One policy's `echo` section; a policy's own model adds its fields.

    `policies.parse_section` makes one out of what a user wrote. A model of its own names its policy
    (`policy: Literal["name"] = "name"`), gives every field a description, and extends `filled`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    policy: str = Field(description="Which nodes are drafted and verified.")
    max_depth: int = Field(
        default=6,
        ge=1,
        le=MAX_DEPTH,
        description=(
            "Levels of the tree, each one forward of the draft head. Range 1 to 32; default 6, or "
            "num_speculative_tokens where that is smaller; num_speculative_tokens for `chain`; "
            "the longest path of `tree` for `static`."
        ),
    )
    top_k: int = Field(
        default=4,
        ge=1,
        le=MAX_TOP_K,
        description=(
            "Children considered of a node, and nodes of a level that are expanded. Range 1 to "
            "16; default 4; 1 for `chain`; what `tree` needs for `static`."
        ),
    )
    candidates: Candidates = Field(
        default="auto",
        description=(
            "For requests with a temperature, children of a node are the drafter's best tokens "
            "(`best`) or tokens drawn from its distribution (`drawn`; not with `evict` and "
            "`graft`). `auto` draws, where the policy can, for requests with a temperature of 0.5 "
            'or more and no seed. Default "auto".'
        ),
    )
    linear: LinearLayers = Field(
        default="auto",
        description=(
            "Linear layers and norms of target and drafter on a CPU, and the attention of steps "
            "without drafts: `auto`, this project's for few rows where they are the faster ones "
            "(linear layers in float32 with AVX2, in bfloat16 with AVX-512 for it), or `stock`, "
            "vLLM's. "
            'Default "auto".'
        ),
    )
    trace: str | None = Field(
        default=None,
        description=(
            "A file (.jsonl or .jsonl.gz) to record every drafting and its verification to, for "
            "`echo-vllm trace` and `echo-vllm calibrate`; not for `graft`. Default null: no trace."
        ),
        json_schema_extra={"format": "path"},
    )

    def filled(self, num_nodes: int) -> Self:
        """The same with every default filled in, checked against num_speculative_tokens.

        Args:
            num_nodes: nodes that one request's tree may have, 1 to MAX_NODES.

        Raises:
            EchoConfigError: with one sentence on the first thing that is wrong.
        """
        return self.with_fields(
            max_depth=self.depth_for(num_nodes, self.top_k, "top_k + (max_depth - 1) * top_k^2")
        )

    def compile_factors(self) -> tuple[str, ...]:
        """What of the section changes the compiled graph of the target; vLLM hashes it into the
        key of its compilation cache."""
        return ("echo", self.linear)

    @classmethod
    def refusal(cls, place: Sequence[int | str], value: object, kind: str, message: str) -> str:
        """The sentence for a value that the type of its field does not take.

        Args:
            place: the field's name, and where in its value.
            value: what stands there.
            kind, message: pydantic's `type` and `msg` of the error.
        """
        field = cls.model_fields[str(place[0])]
        annotation: Any = field.annotation
        if get_origin(annotation) is not Literal:  # Of "int | None" the number.
            kinds = [each for each in get_args(annotation) if each is not NoneType]
            annotation = kinds[0] if len(kinds) == 1 else annotation
        if get_origin(annotation) is Literal:
            allowed = either([json.dumps(name) for name in get_args(annotation)])
            return sentence(place, allowed, value, "set it to one of them")
        if annotation is bool:
            return sentence(place, "true or false", value, "set it to one of them")
        if annotation is str:
            return sentence(place, "the path of a file", value, "write it as a string")
        limits = {
            end: getattr(each, end)
            for each in field.metadata
            for end in ("ge", "le")
            if hasattr(each, end)
        }
        if annotation in (int, float) and len(limits) == 2:
            number = "an integer " if annotation is int else "a number "
            if kind in ("greater_than_equal", "less_than_equal"):
                number = ""
            default = "" if field.default is None else f" of {field.default}"
            return sentence(
                place,
                f"{number}between {limits['ge']} and {limits['le']}",
                value,
                f"set it in that range, or remove it for the default{default}",
            )
        what = message[:1].lower() + message[1:]
        return f"{SECTION}{show_place(place)} is not valid ({what}), got {show(value)}; correct it."

    def depth_for(self, num_nodes: int, width: int, terms: str) -> int:
        """The depth of a tree of `num_nodes` nodes, of which `width` candidates hang under each
        expanded one; `terms` says in words how many there can be.

        Raises:
            EchoConfigError: no such tree has as many nodes.
        """
        depth = self.max_depth
        if depth > num_nodes:
            if "max_depth" in self.model_fields_set:
                raise EchoConfigError(
                    f"{SECTION}.max_depth must be at most "
                    f"speculative_config.num_speculative_tokens ({num_nodes}), because a path of "
                    f"{depth} levels has {depth} nodes, got {depth}; lower it, or raise "
                    "num_speculative_tokens."
                )
            depth = num_nodes
        reachable = num_candidates(depth, self.top_k, width)
        if num_nodes > reachable:
            raise EchoConfigError(
                f"speculative_config.num_speculative_tokens must be at most {reachable} with "
                f"{SECTION}.top_k {self.top_k} and {SECTION}.max_depth {depth} ({terms} = {width} "
                f"+ {depth - 1} * {self.top_k * width} = {reachable} nodes can be drafted), got "
                f"{num_nodes}; lower it, or raise top_k or max_depth."
            )
        return depth

    def with_fields(self, **values: Any) -> Self:
        """A copy with other values, checked like what a user wrote."""
        return type(self).model_validate({**self.model_dump(), **values})
