# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The schema of the `echo` section of a speculative config, and its errors.

`EchoConfig.from_section` turns what a user wrote into a frozen object on which every value is set
and every combination is possible; the engine and the policies read that object and never check it
again. Nothing here knows vLLM. An error is one sentence: the field, the value, what to do.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
)

SECTION = "speculative_config.echo"
"""How the section is called in errors."""

MAX_NODES = 256
"""Upper limit of num_speculative_tokens: nodes of one request's tree (the mask is 64-bit words)."""

MAX_DEPTH = 32
MAX_TOP_K = 16
_PLAIN_NAME = re.compile(r"[\w-]{1,64}")
_DEPTH_NAMES = frozenset(str(depth) for depth in range(1, MAX_DEPTH + 1))

Policy = Literal["chain", "static", "topn", "echo", "auto", "evict", "graft"]
Share = Literal["batch", "equal"]
LinearLayers = Literal["auto", "stock"]

PROFILED = ("echo", "auto", "graft")
"""Policies that read the drafter's profile."""


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


class EchoConfig(BaseModel):
    """One engine's tree speculation, validated and with every default filled in.

    Build it with `from_section`, which also checks the fields against num_speculative_tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    policy: Policy = Field(
        default="auto",
        description=(
            "Which nodes are drafted and verified. `chain`: one path of num_speculative_tokens "
            "nodes. `static`: the fixed shape given by `tree`. `topn`: the "
            "num_speculative_tokens best nodes by path score of a tree grown level by level. "
            "`echo`: calibrated gates stop unsure requests early, and one budget (`k_max`) for the "
            "whole batch is spent on depth, then width. `auto`: as `echo`, but the budget is what "
            "maximises the predicted tokens per second, and may be nothing. `evict`: trees are "
            "drafted in full, and what pays by the drafter's own probabilities is verified. "
            "`graft`: gates as for `echo`; what a request that stops early leaves free of its "
            "num_speculative_tokens nodes is filled by retrieval, without a forward. "
            'Default "auto".'
        ),
    )
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
    tree: tuple[tuple[int, ...], ...] | None = Field(
        default=None,
        description=(
            "For `static` only, and required there: the nodes as paths of child ranks from the "
            "root, 0 being the draft's best token. [[0], [1], [0, 0]] is two children of the root "
            "and one child of the first. Every prefix of a path must be a path too; ranks 0 to "
            "15; at most num_speculative_tokens paths of at most 32 ranks. Kept level by level, "
            "in the order of the ranks."
        ),
    )

    width: int | None = Field(
        default=None,
        ge=1,
        le=MAX_TOP_K,
        description=(
            "For `echo`, `auto`, `evict` and `graft`: children considered after every node, of "
            "which at most `top_k` a level are expanded; the others can only widen a tree. Range "
            "top_k to 16. Default null: 8, or top_k where that is more."
        ),
    )
    k_max: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description=(
            "For `echo`, `auto`, `evict` and `graft`: the most draft nodes of the whole batch in "
            "one step, less the prompt tokens in it; a hard limit. Range 0 to 1000000. Default "
            "null: `echo` takes it from the hinge fitted to the measured cost of forwards; the "
            "others have no limit but num_speculative_tokens for each request."
        ),
    )
    gamma: float | None = Field(
        default=None,
        ge=0,
        le=1000,
        description=(
            "For `auto` and `evict`, with `k_max`: replace the measured cost of a forward by the "
            "hinge T * (1 + gamma * max(0, rows - k_max)), T being the time of one row. Range 0 "
            "to 1000. Default null: the measured cost."
        ),
    )
    gates: tuple[tuple[int, float], ...] | None = Field(
        default=None,
        description=(
            "For `echo` and `graft`: the gates as an object of depth and threshold, such as "
            '{"1": 0.2, "3": 0.2}: a request goes on below that depth if its best path there is '
            "more probable. {} for no gates. Default null: the gates of the profile."
        ),
    )
    floor: int | None = Field(
        default=None,
        ge=0,
        le=MAX_NODES,
        description=(
            "For `echo` and `auto`: nodes that every request with a tree gets before anything is "
            "shared out. Range 0 to 256. Default null: 1 for `echo`, 0 for `auto`."
        ),
    )
    share: Share = Field(
        default="batch",
        description=(
            "For `echo`: `batch` spends one budget over the batch, `equal` gives every request the "
            'same part of it (a baseline). Default "batch".'
        ),
    )
    online: bool = Field(
        default=True,
        description=(
            "For `auto` and `evict`: correct the cost model, and for `auto` the calibration, by "
            "what is observed while serving. Default true."
        ),
    )
    profile: str | None = Field(
        default=None,
        description=(
            "For `echo`, `auto` and `graft`: the calibration written by `echo-vllm calibrate`. "
            "Default null: echo_profile.json in the head's folder, and without it built-in "
            "values, with a warning."
        ),
    )
    linear: LinearLayers = Field(
        default="auto",
        description=(
            "Linear layers of target and drafter: `auto`, this project's product for few rows "
            "where it is the faster one (float32 on a CPU with AVX2), or `stock`, vLLM's "
            "everywhere. "
            'Default "auto".'
        ),
    )
    trace: str | None = Field(
        default=None,
        description=(
            "A file (.jsonl or .jsonl.gz) to record every drafting and its verification to, for "
            "`echo-vllm trace` and `echo-vllm calibrate`; not for `graft`. Default null: no trace."
        ),
    )

    POLICIES: ClassVar[tuple[str, ...]] = get_args(Policy)

    @field_validator("tree", mode="before")
    @classmethod
    def _lists_to_tuples(cls, tree: Any) -> Any:
        if isinstance(tree, list):
            return tuple(tuple(path) if isinstance(path, list) else path for path in tree)
        return tree

    @field_validator("gates", mode="before")
    @classmethod
    def _object_to_pairs(cls, gates: Any) -> Any:
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

    @field_serializer("gates", when_used="json")
    def _pairs_to_object(
        self, gates: tuple[tuple[int, float], ...] | None
    ) -> dict[str, float] | None:
        return None if gates is None else {str(depth): tau for depth, tau in gates}

    @classmethod
    def from_section(cls, section: object, *, num_speculative_tokens: int) -> Self:
        """Validate the `echo` section as the user wrote it.

        Args:
            section: the parsed JSON value; must be an object.
            num_speculative_tokens: nodes that one request's tree may have, 1 to MAX_NODES.

        Raises:
            EchoConfigError: with one sentence on the first thing that is wrong.
        """
        if not isinstance(section, Mapping):
            raise EchoConfigError(
                f"{SECTION} must be a JSON object, got {show(section)}; "
                "leave it out, or write {}, for the defaults."
            )
        # vLLM takes dashes for underscores in the names of its own config's fields.
        fields = {str(name).replace("-", "_"): value for name, value in section.items()}
        if len(fields) < len(section):
            raise EchoConfigError(
                f"{SECTION} must not name a field twice, got {show(list(section))}; remove one of "
                "the two spellings."
            )
        try:
            given = cls.model_validate(fields)
        except ValidationError as error:
            raise EchoConfigError(_first_sentence(error)) from None
        if given.policy != "static" and given.tree is not None:
            raise EchoConfigError(
                f"{SECTION}.tree belongs to policy static, got policy {given.policy}; "
                f"remove {SECTION}.tree, or set {SECTION}.policy to static."
            )
        given._check_elastic_fields()
        fill = {
            "chain": cls._fill_chain,
            "static": cls._fill_static,
            "topn": cls._fill_topn,
            "echo": cls._fill_elastic,
            "auto": cls._fill_elastic,
            "evict": cls._fill_elastic,
            "graft": cls._fill_elastic,
        }
        return fill[given.policy](given, num_speculative_tokens)

    def _fill_chain(self, num_nodes: int) -> Self:
        if num_nodes > MAX_DEPTH:
            raise EchoConfigError(
                f"speculative_config.num_speculative_tokens must be at most {MAX_DEPTH} for "
                f"policy chain, which drafts one node a level, got {num_nodes}; lower it, or "
                f"choose another {SECTION}.policy."
            )
        if "max_depth" in self.model_fields_set and self.max_depth != num_nodes:
            raise EchoConfigError(
                f"{SECTION}.max_depth must equal speculative_config.num_speculative_tokens "
                f"({num_nodes}) for policy chain, got {self.max_depth}; remove it, or make the "
                "two equal."
            )
        if "top_k" in self.model_fields_set and self.top_k != 1:
            raise EchoConfigError(
                f"{SECTION}.top_k must be 1 for policy chain, got {self.top_k}; remove it, or "
                f"set {SECTION}.policy to topn for a tree."
            )
        return self._with(max_depth=num_nodes, top_k=1)

    def _fill_static(self, num_nodes: int) -> Self:
        tree = _checked_tree(self.tree, num_nodes)
        for name, needed in (
            ("max_depth", max(len(path) for path in tree)),
            ("top_k", 1 + max(max(path) for path in tree)),
        ):
            if name in self.model_fields_set and getattr(self, name) != needed:
                raise EchoConfigError(
                    f"{SECTION}.{name} follows from {SECTION}.tree for policy static and would "
                    f"have to be {needed}, got {getattr(self, name)}; remove it."
                )
        return self._with(
            tree=tree,
            max_depth=max(len(path) for path in tree),
            top_k=1 + max(max(path) for path in tree),
        )

    def _check_elastic_fields(self) -> None:
        """Refuse a field that the chosen policy would ignore."""
        for name, policies in _FIELDS_OF_POLICIES.items():
            default = type(self).model_fields[name].default
            if getattr(self, name) != default and self.policy not in policies:
                raise EchoConfigError(
                    f"{SECTION}.{name} belongs to policy {_either(policies)}, got policy "
                    f"{self.policy}; remove {SECTION}.{name}, or set {SECTION}.policy to "
                    f"{policies[0]}."
                )

    def _fill_elastic(self, num_nodes: int) -> Self:
        if self.trace is not None and self.policy == "graft":
            raise EchoConfigError(
                f"{SECTION}.trace does not work with policy graft, because retrieved nodes are not "
                f"the draft head's, got {show(self.trace)}; remove it, or choose another policy."
            )
        if self.gates is not None and self.profile is not None:
            raise EchoConfigError(
                f"{SECTION}.profile has nothing to say to policy {self.policy} where "
                f"{SECTION}.gates names the gates, got {show(self.profile)}; remove one of the two."
            )
        width = self.width if self.width is not None else max(8, self.top_k)
        if width < self.top_k:
            raise EchoConfigError(
                f"{SECTION}.width must be at least {SECTION}.top_k ({self.top_k}), got {width}; "
                "raise it, or lower top_k."
            )
        if self.gamma is not None and self.k_max is None:
            raise EchoConfigError(
                f"{SECTION}.gamma needs {SECTION}.k_max, the rows at which the hinge begins, got "
                f"gamma {self.gamma} alone; set k_max too, or remove gamma."
            )
        depth = self._depth_for(num_nodes, width)
        for gate, _ in self.gates or ():
            if gate > depth:
                raise EchoConfigError(
                    f"{SECTION}.gates must be at depths up to max_depth ({depth}), got a gate at "
                    f"{gate}; remove it, or raise max_depth."
                )
        floor = self.floor
        if floor is None and self.policy in _FIELDS_OF_POLICIES["floor"]:
            floor = int(self.policy == "echo")
        if floor is not None and floor > num_nodes:
            raise EchoConfigError(
                f"{SECTION}.floor must be at most speculative_config.num_speculative_tokens "
                f"({num_nodes}), got {floor}; lower it."
            )
        if self.floor is not None and self.k_max is not None and self.floor > self.k_max:
            raise EchoConfigError(
                f"{SECTION}.floor must be at most {SECTION}.k_max ({self.k_max}), which is all "
                f"that the batch may have, got {self.floor}; lower it, or raise k_max."
            )
        return self._with(max_depth=depth, width=width, floor=floor)

    def _fill_topn(self, num_nodes: int) -> Self:
        return self._with(max_depth=self._depth_for(num_nodes, self.top_k))

    def _depth_for(self, num_nodes: int, width: int) -> int:
        """The depth of a tree of `num_nodes` nodes, of which `width` candidates hang under each
        expanded one.

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
            terms = (
                "top_k + (max_depth - 1) * top_k^2"
                if self.policy == "topn"
                else "width + (max_depth - 1) * top_k * width"
            )
            raise EchoConfigError(
                f"speculative_config.num_speculative_tokens must be at most {reachable} with "
                f"{SECTION}.top_k {self.top_k} and {SECTION}.max_depth {depth} ({terms} = {width} "
                f"+ {depth - 1} * {self.top_k * width} = {reachable} nodes can be drafted), got "
                f"{num_nodes}; lower it, or raise top_k or max_depth."
            )
        return depth

    def _with(self, **values: Any) -> Self:
        return type(self).model_validate({**self.model_dump(), **values})


_FIELDS_OF_POLICIES = {
    "width": ("echo", "auto", "evict", "graft"),
    "k_max": ("echo", "auto", "evict", "graft"),
    "gamma": ("auto", "evict"),
    "gates": ("echo", "graft"),
    "floor": ("echo", "auto"),
    "share": ("echo",),
    "online": ("auto", "evict"),
    "profile": PROFILED,
}
"""Which policies read a field that others would ignore."""


def _either(names: Sequence[str]) -> str:
    """ "a", "a or b", "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _checked_tree(
    tree: tuple[tuple[int, ...], ...] | None, num_nodes: int
) -> tuple[tuple[int, ...], ...]:
    field = f"{SECTION}.tree"
    if not tree:
        raise EchoConfigError(
            f"{field} is required for policy static and must list at least one path, got "
            f"{show(tree)}; give the nodes as paths of child ranks, such as [[0], [1], [0, 0]]."
        )
    paths: set[tuple[int, ...]] = set()
    for index, path in enumerate(tree):
        where = f"{field}[{index}]"
        if not 1 <= len(path) <= MAX_DEPTH:
            raise EchoConfigError(
                f"{where} must have 1 to {MAX_DEPTH} ranks, got {show(path)} with {len(path)}; "
                "the root is not listed."
            )
        if not all(0 <= rank < MAX_TOP_K for rank in path):
            raise EchoConfigError(
                f"{where} must hold child ranks between 0 and {MAX_TOP_K - 1}, got {show(path)}; "
                "rank 0 is the draft's best token."
            )
        if path in paths:
            raise EchoConfigError(f"{where} repeats the path {show(path)}; list every path once.")
        paths.add(path)
    for index, path in enumerate(tree):
        if len(path) > 1 and path[:-1] not in paths:
            raise EchoConfigError(
                f"{field}[{index}] is {show(path)} but its parent {show(path[:-1])} is not in the "
                "list; add the parent, or remove the path."
            )
    if len(tree) > num_nodes:
        raise EchoConfigError(
            f"{field} must have at most speculative_config.num_speculative_tokens ({num_nodes}) "
            f"paths, got {len(tree)}; shorten it, or raise num_speculative_tokens."
        )
    return tuple(sorted(tree, key=lambda path: (len(path), path)))


def _first_sentence(error: ValidationError) -> str:
    """Pydantic's first complaint about the section, in this project's words."""
    report = error.errors(include_url=False)[0]
    if not report["loc"]:  # Names that are no text: half of a surrogate pair.
        return f"{SECTION} is not a JSON object of names and values ({report['msg']}); correct it."
    name = str(report["loc"][0])
    path = SECTION + show_place(report["loc"])
    got = show(report["input"])
    fields = tuple(EchoConfig.model_fields)
    if report["type"] == "extra_forbidden":
        return (
            f"{path} is not a known field, got {got}{closest(name, fields)}; the fields are "
            f"{', '.join(fields)}."
        )
    if name == "policy":
        allowed = ", ".join(EchoConfig.POLICIES)
        hint = (
            closest(report["input"], EchoConfig.POLICIES)
            if isinstance(report["input"], str)
            else ""
        )
        return f"{path} must be one of {allowed}, got {got}{hint}; set it to one of them."
    if name == "tree":
        return (
            f"{path} must be {'a rank, an integer' if len(report['loc']) == 3 else 'a list'}, got "
            f"{got}; give the nodes as paths of child ranks, such as [[0], [1], [0, 0]]."
        )
    if name == "gates":
        return (
            f"{path} must be an object of depths (1 to {MAX_DEPTH}) and thresholds (at least 0, "
            f'below 1), got {got}; write it as {{"1": 0.2, "3": 0.2}}, or remove it for the gates '
            "of the profile."
        )
    if name == "share":
        return f'{path} must be "batch" or "equal", got {got}; set it to one of them.'
    if name == "linear":
        return f'{path} must be "auto" or "stock", got {got}; set it to one of them.'
    if name == "online":
        return f"{path} must be true or false, got {got}; set it to one of them."
    if name in ("profile", "trace"):
        return f"{path} must be the path of a file, got {got}; write it as a string."
    low, high, kind_of_number = {
        "max_depth": (1, MAX_DEPTH, "an integer "),
        "top_k": (1, MAX_TOP_K, "an integer "),
        "width": (1, MAX_TOP_K, "an integer "),
        "k_max": (0, 1_000_000, "an integer "),
        "gamma": (0, 1000, "a number "),
        "floor": (0, MAX_NODES, "an integer "),
    }[name]
    default = EchoConfig.model_fields[name].default
    if report["type"] in ("greater_than_equal", "less_than_equal"):
        kind_of_number = ""
    return (
        f"{path} must be {kind_of_number}between {low} and {high}, got {got}; set it in that "
        f"range, or remove it for the default{f' of {default}' if default is not None else ''}."
    )
