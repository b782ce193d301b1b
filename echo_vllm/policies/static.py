# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""`static`: one tree shape for every request and step, given by child ranks (as in Medusa).

The path [0, 2] is the third-best child of the best child of the root. A shape is what EAGLE-1 and
Medusa verify; it knows nothing of how sure the drafter is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator

from echo_vllm.config import (
    MAX_DEPTH,
    MAX_TOP_K,
    SECTION,
    EchoConfig,
    EchoConfigError,
    sentence,
    show,
)
from echo_vllm.forecast.drafter_profile import DrafterProfile
from echo_vllm.policies.base import DraftBatch, DraftPolicy
from echo_vllm.trees.drawn import DrawnLevel, OpenLevel
from echo_vllm.trees.forest import ROOT, DraftForest
from echo_vllm.trees.pool import CandidatePool, Expansion

FIELD = f"{SECTION}.tree"


class StaticConfig(EchoConfig):
    """The section of `static`."""

    policy: Literal["static"] = Field(
        default="static", description="The fixed shape given by `tree`."
    )
    tree: tuple[tuple[int, ...], ...] | None = Field(
        default=None,
        description=(
            "Required: the nodes as paths of child ranks from the root, 0 being the draft's best "
            "token. [[0], [1], [0, 0]] is two children of the root and one child of the first. "
            "Every prefix of a path must be a path too; ranks 0 to 15; at most "
            "num_speculative_tokens paths of at most 32 ranks. Kept level by level, in the order "
            "of the ranks."
        ),
    )

    @field_validator("tree", mode="before")
    @classmethod
    def _lists_to_tuples(cls, tree: Any) -> Any:
        if isinstance(tree, list):
            return tuple(tuple(path) if isinstance(path, list) else path for path in tree)
        return tree

    @classmethod
    def refusal(cls, place: Sequence[int | str], value: object, kind: str, message: str) -> str:
        if place[0] != "tree":
            return super().refusal(place, value, kind, message)
        return sentence(
            place,
            "a rank, an integer" if len(place) == 3 else "a list",
            value,
            "give the nodes as paths of child ranks, such as [[0], [1], [0, 0]]",
        )

    def filled(self, num_nodes: int) -> Self:
        tree = _checked_tree(self.tree, num_nodes)
        follows = {
            "max_depth": max(len(path) for path in tree),
            "top_k": 1 + max(max(path) for path in tree),
        }
        for name, needed in follows.items():
            if name in self.model_fields_set and getattr(self, name) != needed:
                raise EchoConfigError(
                    f"{SECTION}.{name} follows from {FIELD} for policy static and would "
                    f"have to be {needed}, got {getattr(self, name)}; remove it."
                )
        return self.with_fields(tree=tree, **follows)


def _checked_tree(
    tree: tuple[tuple[int, ...], ...] | None, num_nodes: int
) -> tuple[tuple[int, ...], ...]:
    if not tree:
        raise EchoConfigError(
            f"{FIELD} is required for policy static and must list at least one path, got "
            f"{show(tree)}; give the nodes as paths of child ranks, such as [[0], [1], [0, 0]]."
        )
    paths: set[tuple[int, ...]] = set()
    for index, path in enumerate(tree):
        where = f"{FIELD}[{index}]"
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
                f"{FIELD}[{index}] is {show(path)} but its parent {show(path[:-1])} is not in the "
                "list; add the parent, or remove the path."
            )
    if len(tree) > num_nodes:
        raise EchoConfigError(
            f"{FIELD} must have at most speculative_config.num_speculative_tokens ({num_nodes}) "
            f"paths, got {len(tree)}; shorten it, or raise num_speculative_tokens."
        )
    return tuple(sorted(tree, key=lambda path: (len(path), path)))


class FixedShapePolicy(DraftPolicy):
    """A fixed, prefix-closed set of child-rank paths; every node that has children is expanded.

    Of drawn candidates a rank is the place in the order of drawing; a rank that the shape leaves
    out is not drawn.
    """

    draws = True
    acceptance = None

    has_fixed_size = True

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        """Args: paths: prefix-closed, without duplicates; any order."""
        shape = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        column = {path: i for i, path in enumerate(shape)}
        self.max_nodes = len(shape)
        self.max_depth = len(shape[-1])
        self.num_ranks = 1 + max(path[-1] for path in shape)
        self.column_ranks = [path[-1] for path in shape]
        inner = {path[:-1] for path in shape}
        self._frontier: list[list[int]] = []
        self._children: list[torch.Tensor] = []
        for depth in range(1, self.max_depth + 1):
            level = [path for path in shape if len(path) == depth]
            parents = [path for path in shape if len(path) == depth - 1 and path in inner]
            row = {path: i for i, path in enumerate(parents or [()])}
            self._frontier.append([column[path] for path in parents])
            self._children.append(
                torch.tensor([row[path[:-1]] * self.num_ranks + path[-1] for path in level])
            )
        self.max_frontier = max(1, *(len(columns) for columns in self._frontier))
        self._drawn = _drawn_levels(shape, self.num_ranks)

    def level_widths(self) -> list[int]:
        return sorted({len(columns) for columns in self._frontier[1:]})

    def expand(self, depth: int, pool: CandidatePool, batch: DraftBatch) -> Expansion:
        children = self._children[depth - 1]
        if depth == 1:
            return Expansion(frontier=None, children=children)
        columns = pool.on_device(torch.tensor(self._frontier[depth - 1]))
        return Expansion(columns.expand(len(pool.active), len(columns)), children)

    def columns(self, pool: CandidatePool) -> torch.Tensor:
        return pool.all_columns()

    def select(self, pool: CandidatePool, batch: DraftBatch) -> DraftForest:
        return pool.take(self.columns(pool))

    def drawn_parents(self, level: DrawnLevel, batch: DraftBatch) -> torch.Tensor:
        parents, _ = self._drawn[level.depth]
        return torch.tensor(parents).expand(len(level.requests), -1)

    def drawn_widths(self, level: OpenLevel) -> torch.Tensor:
        _, widths = self._drawn[level.depth - 1]
        return torch.tensor(widths).expand(level.parents.shape)


def _drawn_levels(
    shape: Sequence[tuple[int, ...]], num_ranks: int
) -> list[tuple[list[int], list[int]]]:
    """Per level the columns of a `DrawnPool` that have children, and how many each has; a parent
    takes `num_ranks` columns of its level."""
    children: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for path in shape:
        children.setdefault(path[:-1], []).append(path)
    column: dict[tuple[int, ...], int] = {(): ROOT}
    levels, start = [], 0
    for depth in range(max(map(len, shape))):
        parents = [path for path in column if len(path) == depth and path in children]
        levels.append(([column[path] for path in parents], [len(children[p]) for p in parents]))
        for row, parent in enumerate(parents):
            for rank, path in enumerate(children[parent]):
                column[path] = start + row * num_ranks + rank
        start += len(parents) * num_ranks
    return levels


class StaticPolicy(FixedShapePolicy):
    """The shape that the user gives."""

    Config = StaticConfig

    def __init__(
        self, config: StaticConfig, max_nodes: int, profile: DrafterProfile | None = None
    ) -> None:
        assert config.tree is not None  # `filled` refuses a section without one.
        super().__init__(config.tree)
