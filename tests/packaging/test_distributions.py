# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The wheel and the source distribution hold what they need, and versions are the same everywhere.

`make install-test` goes on from here: both in fresh environments, and a server.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from echo_vllm import VLLM_DISTRIBUTIONS, VLLM_VERSION, __version__
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, as `make wheel` makes them."""
    folder = tmp_path_factory.mktemp("dist")
    result = subprocess.run(
        [sys.executable, "scripts/make_wheel.py", "--out", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "ECHO_CUDA": "0"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\.whl: [\d.]+ MiB", result.stdout), "the size is not stated"
    return folder


@pytest.mark.full
def test_a_wheel_holds_the_library_and_names_its_platform(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    assert re.fullmatch(rf"echo_vllm-{__version__}-cp311-abi3-manylinux_2_\d+_\w+\.whl", wheel.name)
    assert wheel.stat().st_size < 4 << 20, "the wheel has grown"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "echo_vllm/_C.abi3.so" in names
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/"))]


@pytest.mark.full
def test_an_unpacked_wheel_needs_no_checkout(distributions: Path, tmp_path: Path) -> None:
    """The patch series, the prompts and the examples are those inside."""
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd="/",
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    code = (
        "from echo_vllm.conversations import PROMPTS, read_conversations; "
        "from echo_vllm.patching.series import find_patches; "
        "print(find_patches(), PROMPTS, len(read_conversations(PROMPTS)))"
    )
    patches, prompts, count = run("-c", code).split()
    assert patches == str(tmp_path / "echo_vllm" / "_patches")
    assert prompts.startswith(str(tmp_path))
    assert int(count) > 50
    assert "are in order" in run("-m", "echo_vllm.cli", "patch", "verify")
    for path in (ROOT / "examples").glob("*.json"):
        printed = run("-m", "echo_vllm.cli", "example", path.stem, "--head", "some/head")
        assert json.loads(printed) == {**json.loads(path.read_text()), "model": "some/head"}


@pytest.mark.full
def test_a_source_distribution_holds_what_its_build_reads(distributions: Path) -> None:
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
    tracked = subprocess.check_output(
        ["git", "ls-files", "csrc", "patches", "examples", "echo_vllm", "setup.py", "LICENSE"],
        cwd=ROOT,
        text=True,
    ).splitlines()
    links = {"patches/": "echo_vllm/_patches/", "examples/": "echo_vllm/_examples/"}
    wanted = set()
    for name in tracked:
        if (ROOT / name).is_symlink() or name == "patches/README.md":
            continue
        for folder, link in links.items():
            name = link + name.removeprefix(folder) if name.startswith(folder) else name
        wanted.add(name)
    assert not wanted - names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_version_of_vllm_is_the_same_everywhere() -> None:
    """`echo_vllm/version.py` is the place; what cannot read it must agree with it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = {
        requirement
        for name in ("cpu", "cuda")
        for requirement in extras[name]
        if "vllm" in requirement
    }
    assert pinned == {f"{name}=={VLLM_VERSION}" for name in VLLM_DISTRIBUTIONS}
    assert "version" in project["dynamic"], "the package's own version has two places"
    image = (ROOT / "docker" / "Dockerfile.cuda").read_text()
    assert set(re.findall(r"vllm-openai:v([\d.]+\d)", image)) == {VLLM_VERSION}
