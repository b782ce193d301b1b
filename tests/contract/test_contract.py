# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What we override of vLLM still answers the calls of every release that the patches fit."""

from __future__ import annotations

import ast

import pytest

from echo_vllm.patching import PatchState, find_installation, load_series
from echo_vllm.version import VLLM_RELEASES, VLLM_VERSION
from tests.contract.fetch import FetchError, fetch_sources
from tests.contract.seams import (
    Source,
    find_seams,
    load_record,
    misfits,
    moved,
    parsed,
    read_release,
    record_file,
    unresolved_imports,
    why_not,
)

RECORDED = sorted(f.stem.removeprefix("vllm-") for f in record_file("x").parent.glob("vllm-*.json"))


@pytest.fixture(scope="module")
def installed() -> Source:
    """The installed vLLM as published."""
    installation = find_installation()
    published = PatchState(installation, load_series()).published_files()
    return Source(installation.root, published)


def test_the_seams_are_found() -> None:
    names = {seam.ours.name for seam in find_seams()}
    assert {"EchoRunnerMixin", "EchoScheduler", "EchoProposer", "TreeAttentionImpl"} <= names


@pytest.mark.parametrize("version", RECORDED)
def test_every_override_answers_vllms_calls(version: str) -> None:
    assert misfits(load_record(version)) == []


def test_the_installed_vllm_is_the_recorded_release(installed: Source) -> None:
    version = VLLM_VERSION
    record, found = load_record(version), read_release(installed)
    assert record.keys() <= found.keys()
    assert moved(record, found) == [], f"the installed vLLM is not the recorded {version}"


@pytest.mark.full
@pytest.mark.parametrize("version", VLLM_RELEASES["vllm"])
def test_the_published_wheel_is_the_recorded_release(version: str) -> None:
    try:
        wheel = Source(fetch_sources("vllm", version))
    except FetchError as error:
        pytest.skip(f"the CUDA wheel cannot be downloaded here: {error}")
    assert moved(load_record(version), read_release(wheel)) == []
    assert unresolved_imports(wheel) == []


@pytest.mark.parametrize("version", VLLM_RELEASES["vllm"])
def test_every_supported_release_is_recorded(version: str) -> None:
    assert record_file(version).is_file()


def test_every_import_of_ours_is_there(installed: Source) -> None:
    assert unresolved_imports(installed) == []


def test_another_release_is_named_in_words() -> None:
    """What a reader sees when vLLM renames an argument of something that we override."""
    record = load_record(VLLM_VERSION)
    cls = "vllm.v1.core.sched.scheduler:Scheduler"
    methods = record[cls]
    old = methods["update_draft_token_ids"]
    new = old.replace("draft_token_ids", "draft_tokens")
    changed = {**record, cls: {**methods, "update_draft_token_ids": new}}
    sentence, *_ = misfits(changed)
    assert sentence.startswith(f"{cls}.update_draft_token_ids(self, draft_tokens")
    assert sentence.endswith("but argument 1 is draft_token_ids, vLLM's is draft_tokens")
    [line] = moved(record, changed)
    assert " was (self, draft_token_ids" in line
    del methods["update_draft_token_ids"]
    assert f"{cls}.update_draft_token_ids is gone" in moved(load_record(VLLM_VERSION), record)


@pytest.mark.parametrize(
    ("ours", "reason"),
    [
        ("(self, a, b=1, *, c=0)", None),
        ("(self, *args, **kwargs)", None),
        ("(self, a, *args, **kwargs)", None),
        ("(self, a, b=1, *, c=0, own=None)", None),
        ("(self, a, *, c=0)", "it does not take b"),
        ("(self, a, b=1)", "it does not take c"),
        ("(self, b, a, *, c)", "argument 1 is b, vLLM's is a"),
        ("(self, a, b, mine, *, c)", "it wants mine, which vLLM does not give"),
    ],
)
def test_a_signature_fits_or_the_reason_is_said(ours: str, reason: str | None) -> None:
    function = ast.parse(f"def f{ours}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    assert why_not(function, parsed("(self, a, b=2, *, c) 00000000")) == reason
