# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A policy is one file: nobody outside of `echo_vllm.policies` asks which one it is."""

from __future__ import annotations

import ast
from pathlib import Path

import echo_vllm
from echo_vllm.policies.registry import BUILT_IN

PACKAGE = Path(echo_vllm.__file__).parent
SHARED = {"echo_vllm.policies", "echo_vllm.policies.base", "echo_vllm.policies.registry"}


def outside() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if PACKAGE / "policies" not in path.parents]


def test_nobody_imports_a_policy() -> None:
    for path in outside():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "echo_vllm.policies"
            ):
                assert node.module in SHARED, f"{path} line {node.lineno}"
                names = {alias.name for alias in node.names}
                assert not names & {policy.__name__ for policy in BUILT_IN.values()}, path


def test_nobody_compares_a_policys_name() -> None:
    for path in outside():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Compare):
                continue
            constants = {
                leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)
            } & BUILT_IN.keys()
            asked = ast.unparse(node)
            assert not (constants and "policy" in asked), f"{path} line {node.lineno}: {asked}"


def test_every_policy_has_a_file_of_its_name() -> None:
    for name, policy in BUILT_IN.items():
        assert policy.__module__ == policy.Config.__module__ == f"echo_vllm.policies.{name}"
