# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The strict reader and applier of unified diffs."""

from __future__ import annotations

import difflib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_vllm.patching.diff import FileDiff, PatchError, parse_diff

BEFORE = "".join(f"line {number}\n" for number in range(1, 21))


def make_diff(before: str, after: str, path: str = "vllm/x.py", context: int = 3) -> str:
    lines = difflib.unified_diff(
        before.splitlines(keepends=True),
        after.splitlines(keepends=True),
        f"a/{path}",
        f"b/{path}",
        n=context,
    )
    return "".join(lines)


def parse_one(text: str) -> FileDiff:
    [diff] = parse_diff(text)
    return diff


def test_hunks_apply_in_order() -> None:
    after = BEFORE.replace("line 3\n", "line 3\nnew\n").replace("line 17\n", "")
    diff = parse_one("Description: two hunks\n---\n" + make_diff(BEFORE, after))
    assert len(diff.hunks) == 2
    assert diff.apply(BEFORE) == after


def test_a_hunk_may_stand_at_another_line_if_it_fits_in_one_place_only() -> None:
    after = BEFORE.replace("line 9\n", "nine\n")
    diff = parse_one(make_diff(BEFORE, after))
    assert diff.apply("a header\n" + BEFORE) == "a header\n" + after


def test_a_hunk_that_fits_in_two_places_is_refused() -> None:
    diff = parse_one(make_diff(BEFORE, BEFORE.replace("line 9\n", "nine\n")))
    with pytest.raises(PatchError, match="exactly one place"):
        diff.apply(BEFORE + BEFORE)


@pytest.mark.parametrize("line", ["line 6\n", "line 9\n", "line 12\n"])
def test_every_line_of_a_hunk_must_match(line: str) -> None:
    diff = parse_one(make_diff(BEFORE, BEFORE.replace("line 9\n", "nine\n")))
    with pytest.raises(PatchError, match=r"vllm/x\.py \(line 6\)"):
        diff.apply(BEFORE.replace(line, line.upper()))


def test_a_patch_does_not_apply_twice() -> None:
    after = BEFORE.replace("line 9\n", "nine\n")
    diff = parse_one(make_diff(BEFORE, after))
    with pytest.raises(PatchError, match="exactly one place"):
        diff.apply(after)


def test_form_feeds_and_line_separators_do_not_end_a_line() -> None:
    before = "a\x0cb\nc\u2028d\nlast\n"
    diff = parse_one("--- a/x\n+++ b/x\n@@ -1,3 +1,3 @@\n a\x0cb\n c\u2028d\n-last\n+end\n")
    assert diff.apply(before) == "a\x0cb\nc\u2028d\nend\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("no diff at all\n", "holds no diff"),
        ("--- /dev/null\n+++ b/vllm/new.py\n@@ -0,0 +1 @@\n+x\n", "holds no diff"),
        ("--- a/vllm/x.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n", "change that file in place"),
        ("--- a/vllm/x.py\n+++ b/vllm/y.py\n@@ -1 +1 @@\n-x\n+y\n", "change that file in place"),
        ("--- a/vllm/x.py\n+++ b/vllm/x.py\n", "no hunk"),
        ("--- a/x\n+++ b/x\n@@ -0,0 +1 @@\n+x\n", "no line to stand at"),
        ("--- a/x\n+++ b/x\n@@ -1,2 +1,2 @@\n-x\n+y\n", "cannot stand in a hunk"),
        ("--- a/x\n+++ b/x\n@@ -1,2 +1,1 @@\n a\n+b\n-c\n", "wrong length"),
        ("--- a/x\n+++ b/x\n@@ -1 +1 @@\n-x\n+y\nstray\n", "not part of a diff"),
        ("--- a/x\n+++ b/x\n@@ -1 +1 @@\n-x\n\\ No newline\n+y\n", "cannot stand in a hunk"),
    ],
)
def test_what_is_not_a_change_of_a_text_file_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(PatchError, match=complaint):
        parse_diff(text)


LINES = st.lists(st.text("ab \t-+@", max_size=4), min_size=1, max_size=30)


@given(before=LINES, after=LINES)
def test_the_diff_of_any_two_texts_leads_from_one_to_the_other(
    before: list[str], after: list[str]
) -> None:
    old, new = ("".join(f"{line}\n" for line in lines) for lines in (before, after))
    # The whole file as context, so that the one hunk fits in one place.
    text = make_diff(old, new, context=100)
    if old == new:
        assert text == ""
    else:
        assert parse_one(text).apply(old) == new
