# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Lets torchvision's CUDA build, the only one on the package index, be imported beside torch's CPU
build.

Python imports this module at the start of every process that has this folder on PYTHONPATH, those
in which vLLM looks at a model's class among them. torchvision goes on where its compiled operators
cannot be loaded, but registers the fake kernels of two of them all the same: their schemas are
defined here. Whoever called one would be told that it has no kernel; text asks for none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
kept: list[Any] = []
"""torch forgets the definitions of a library that nobody holds."""


class DefineBefore(MetaPathFinder):
    """Defines the schemas right before torchvision wants them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if name == "torchvision._meta_registrations" and not kept:
            import torch

            library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
            for schema in SCHEMAS:
                library.define(schema)
            kept.append(library)


sys.meta_path.insert(0, DefineBefore())
