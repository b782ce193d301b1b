# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Which implementation runs an operator on a device: one table, and why the better ones do not.

Some implementations of tree attention lack a feature (float32, an 8-bit cache, a window, a
softcap): calls that need it pass them over. `attention_table.py` may put another one first for a
shape.

`echo_vllm.ops` asks `implementation` on every call, so its answers are cached; `echo-vllm doctor`
prints `report`. `ECHO_VLLM_OPS` in the environment names an implementation to use for every
operator that has it; it is read once, at the first call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from echo_vllm.ops import reference
from echo_vllm.ops.library import load_library

VARIABLE = "ECHO_VLLM_OPS"
NAMES = ("extension", "triton", "flash", "xformers", "reference")
DEVICES = ("cpu", "cuda")

_GPU_ORDER = ("extension", "triton", "reference")
# On a CPU Triton is its interpreter, and behind the reference: used when it is asked for.
_CPU_ORDER = ("extension", "reference", "triton")

ORDER: dict[str, dict[str, tuple[str, ...]]] = {
    "tree_attention": {
        "cpu": (*_CPU_ORDER, "xformers"),
        "cuda": ("extension", "triton", "flash", "xformers", "reference"),
    },
    "suffix_attention": {"cpu": _CPU_ORDER, "cuda": _GPU_ORDER},
    "merge_attention": {"cpu": ("extension", "reference"), "cuda": ("extension", "reference")},
    "commit_kv": {"cpu": _CPU_ORDER, "cuda": _GPU_ORDER},
    "build_super_tree": {"cpu": _CPU_ORDER, "cuda": _GPU_ORDER},
    "accept_path": {"cpu": _CPU_ORDER, "cuda": _GPU_ORDER},
    "sample_path": {"cpu": _CPU_ORDER, "cuda": _GPU_ORDER},
    "select_budget": {"cpu": ("extension", "reference"), "cuda": ("extension", "reference")},
}
"""Operator -> device type -> its implementations, best first."""

FEATURES = ("float32", "fp8 cache", "window", "softcap")
"""What a call of tree attention may need beyond the ordinary."""

LACKS: dict[str, dict[str, str]] = {
    "triton": {"fp8 cache": "its kernels read caches of the query's dtype only"},
    "flash": {
        "float32": "FlashAttention computes in 16 bits only",
        "fp8 cache": "FlashAttention reads 8-bit caches with 8-bit queries only",
        "window": "FlashAttention counts windows by rows, not by their positions in a tree",
    },
    "xformers": {
        "float32": "xformers' partial attention computes in 16 bits only",
        "softcap": "xformers has no softcap",
    },
}
"""Implementation -> feature that it lacks -> why."""

WAITING = frozenset({"xformers", "reference"})
"""Implementations whose attention reads lengths on the host, which no CUDA graph can hold."""

logger = logging.getLogger(__name__)


def _extension_is_missing(op: str, device: str) -> str:
    try:
        load_library()
    except RuntimeError as error:
        return str(error)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"echo_vllm::{op}", device.upper()):
        return f"the C++ extension was built without a {device} kernel for {op}"
    return ""


def _triton_is_missing(op: str, device: str) -> str:
    if not _is_installed("triton"):
        return "triton is not installed"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton runs on CPU tensors only in its interpreter (TRITON_INTERPRET=1)"
    return _import_fails("echo_vllm.ops.triton_kernels")


def _xformers_is_missing(op: str, device: str) -> str:
    if device == "cpu":
        return "xformers has no CPU kernels"
    from echo_vllm.ops import xformers_attention

    try:
        xformers_attention.load_partial_attention()
    except RuntimeError as error:
        return str(error)
    return ""


def _flash_is_missing(op: str, device: str) -> str:
    if device == "cpu":
        return "FlashAttention has no CPU kernels"
    from echo_vllm.ops import prefix_attention

    try:
        prefix_attention.load_flash_attention()
    except RuntimeError as error:
        return str(error)
    # Nothing else merges without a look at the host.
    return _extension_is_missing("merge_attention", device)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a stand-in module without a spec
        return False


def _import_fails(module: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation can raise anything
        return f"{module} cannot be imported: {error}"
    return ""


@functools.cache
def has_extension(op: str) -> bool:
    """Whether the extension may run an operator that only it has, for tensors on the CPU."""
    return os.environ.get(VARIABLE, "") in ("", "extension") and not _extension_is_missing(
        op, "cpu"
    )


@dataclass(frozen=True)
class _Source:
    """Why an operator is missing on a device ('' if it is not), and the operator itself."""

    reason: Callable[[str, str], str]
    load: Callable[[str], Callable[..., Any]]


def _from_module(module: str) -> Callable[[str], Callable[..., Any]]:
    def load(op: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(module), op)
        return function

    return load


def _load_extension(op: str) -> Callable[..., Any]:
    kernel: Callable[..., Any] = getattr(torch.ops.echo_vllm, op).default
    return kernel


_SOURCES = {
    "extension": _Source(_extension_is_missing, _load_extension),
    "triton": _Source(_triton_is_missing, _from_module("echo_vllm.ops.triton_kernels")),
    "flash": _Source(_flash_is_missing, _from_module("echo_vllm.ops.prefix_attention")),
    "xformers": _Source(_xformers_is_missing, _from_module("echo_vllm.ops.xformers_attention")),
    "reference": _Source(lambda op, device: "", lambda op: getattr(reference, op)),
}


@dataclass(frozen=True)
class Choice:
    """What runs an operator on a device.

    Attributes:
        name: the implementation.
        passed_over: why not the ones that come before it, name -> reason.
        forced: whether `ECHO_VLLM_OPS` named it.
    """

    name: str
    passed_over: dict[str, str]
    forced: bool = False


def forced_implementation() -> str:
    """The value of `ECHO_VLLM_OPS`, '' if unset.

    Raises ValueError if it is no implementation.
    """
    name = os.environ.get(VARIABLE, "")
    if name and name not in NAMES:
        raise ValueError(f"{VARIABLE} must be unset or one of {', '.join(NAMES)}, got {name!r}")
    return name


def _reason_against(name: str, op: str, device: str, features: tuple[str, ...]) -> str:
    """Why an implementation cannot run a call that needs these features, '' if it can."""
    for feature in features:
        if reason := LACKS.get(name, {}).get(feature):
            return f"{feature}: {reason}"
    return _SOURCES[name].reason(op, device)


def choose(op: str, device: str, features: tuple[str, ...] = (), first: str = "") -> Choice:
    """The first implementation of the table that can run, or the forced one.

    Args:
        op, device: as in `ORDER`.
        features: what the call needs, of `FEATURES`.
        first: an implementation to try before the others, '' for none.

    Raises:
        ValueError: `ECHO_VLLM_OPS` names no implementation.
        RuntimeError: the forced implementation cannot run here.
    """
    forced = forced_implementation()
    order = ORDER[op][device]
    if forced in order:
        reason = _reason_against(forced, op, device, features)
        if reason:
            raise RuntimeError(f"{VARIABLE}={forced}: {op} cannot run so on {device}: {reason}")
        return Choice(forced, {}, forced=True)
    passed_over: dict[str, str] = {}
    if first in order:
        order = (first, *(name for name in order if name != first))
    for name in order:
        reason = _reason_against(name, op, device, features)
        if not reason:
            return Choice(name, passed_over)
        passed_over[name] = reason
    raise AssertionError("the reference always runs")


@functools.cache
def implementation(
    op: str, is_cuda: bool, features: tuple[str, ...] = (), first: str = ""
) -> Callable[..., Any]:
    """The function that runs `op` on tensors with this `is_cuda`; see `choose`.

    An operator runs in every layer of every step, and `is_cuda` is the cheapest question to a
    tensor about its device. Devices of other kinds get what a CPU gets.
    """
    device = "cuda" if is_cuda else "cpu"
    choice = choose(op, device, features, first)
    if choice.name == "reference" and not choice.forced:
        reasons = "; ".join(choice.passed_over.values())
        logger.warning(
            "%s on %s runs on the plain-torch reference, which is slow: %s", op, device, reasons
        )
    return _SOURCES[choice.name].load(op)


def report() -> dict[str, list[dict[str, Any]]]:
    """Device type -> what each operator uses and why not better, as plain data.

    Each entry has `op`, and either `name` and `passed_over` of its `Choice`, or `error`.
    """
    return {device: [_report_one(op, device) for op in ORDER] for device in DEVICES}


def _report_one(op: str, device: str) -> dict[str, Any]:
    try:
        choice = choose(op, device)
    except (RuntimeError, ValueError) as error:
        return {"op": op, "error": str(error)}
    return {"op": op, "name": choice.name, "passed_over": choice.passed_over}
