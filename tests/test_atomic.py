# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Files that are written whole: what a failure, a kill, or a reader at the same time finds."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from echo_vllm import atomic
from tests.conftest import ROOT


def test_a_file_gets_its_content_and_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    atomic.write_json(path, {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}\n'
    usual = tmp_path / "usual"
    usual.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)
    path.chmod(0o640)
    atomic.write_text(path, "ü")
    assert path.read_bytes() == "ü".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["file.json", "usual"]


def test_a_failure_leaves_all_files_as_they_were(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")
    second.write_text("old")

    def fails() -> None:
        with atomic.replacing(first, second) as [one, two]:
            one.write_text("new")
            two.write_text("new")
            assert first.read_text() == second.read_text() == "old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "first": "old",
        "second": "old",
    }
    with pytest.raises(FileNotFoundError):
        atomic.write_text(tmp_path / "nowhere" / "file", "")
    with pytest.raises(TypeError):
        atomic.write_json(first, {"a": object()})
    assert first.read_text() == "old"


def test_a_link_is_replaced_and_not_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("shared")
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    os.link(tmp_path / "cache", tmp_path / "hard")
    for name in ("link", "hard"):
        atomic.write_text(tmp_path / name, "own")
    assert (tmp_path / "cache").read_text() == "shared"


# Ends itself with a kill at the n-th call that changes names.
KILLED = """
import os, signal, sys
from pathlib import Path
from echo_vllm import atomic
from tests.conftest import ROOT
left = int(sys.argv[2])
def count(frame, event, function):
    global left
    if event == "c_call" and function.__name__ in ("rename", "replace", "unlink", "remove"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[1])
with atomic.replacing(folder / "weights", folder / "config") as [weights, config]:
    weights.write_text("new")
    config.write_text("new")
    sys.setprofile(count)
"""


def test_a_kill_never_leaves_a_mixture_of_two_sets(tmp_path: Path) -> None:
    seen = []
    for moment in range(1, 5):
        for name in ("weights", "config"):
            (tmp_path / name).write_text("old")
        run = subprocess.run([sys.executable, "-c", KILLED, tmp_path, str(moment)], check=False)
        config = tmp_path / "config"
        weights = (tmp_path / "weights").read_text()
        seen.append((weights, config.read_text() if config.exists() else None))
        assert run.returncode == (-signal.SIGKILL if moment < 4 else run.returncode)
    assert seen == [("old", "old"), ("old", None), ("new", None), ("new", "new")]


WRITES = r"\b(\w+)\.(write_text|write_bytes|savefig)\((\w*)"


def test_the_package_writes_no_file_in_place() -> None:
    # The demo model's files are made in a scratch folder, which is renamed.
    sources = (ROOT / "echo_vllm").rglob("*.py")
    calls = [
        (str(source.relative_to(ROOT)), call[0])
        for source in sources
        if source.name != "atomic.py" and source.parent.name != "demo"
        for call in re.finditer(WRITES, source.read_text())
        if call[1] not in ("atomic", "fresh", "text") and call[3] not in ("fresh", "buffer")
    ]
    assert not calls
