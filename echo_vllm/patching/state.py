# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Compares vLLM's files with the series, and changes them, all or none.

A folder beside the package `vllm` holds what is needed to go back: a copy of every file as it was
published, and a manifest with the hashes of the files and of the patches that were applied. It is
written before the first file is replaced, so a process killed half-way leaves a state that `apply`
and `revert` both recognise and repair. Files are replaced, never written in place: installers link
them to a cache that other environments share.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from echo_vllm import atomic
from echo_vllm.patching.diff import PatchError
from echo_vllm.patching.installation import Installation
from echo_vllm.patching.series import Series, sha256
from echo_vllm.version import __version__

STATE_FOLDER = ".echo_vllm_patches"


class Condition(Enum):
    """What the files of the series look like, taken together."""

    PRISTINE = "not applied: all files are as published"
    APPLIED = "applied"
    OUTDATED = "applied, but from another version of the series"
    PARTIAL = "applied in part: an earlier run was interrupted, or vLLM was reinstalled in part"
    CHANGED = "files were changed by something else"


@dataclass(frozen=True)
class FileRecord:
    """sha256 of one file: as published, as patched, and just before it was patched."""

    pristine: str
    patched: str
    previous: str


@dataclass(frozen=True)
class Manifest:
    """What was applied: patch name -> sha256, in order; path -> hashes."""

    patches: Mapping[str, str]
    files: Mapping[str, FileRecord]


@dataclass(frozen=True)
class Report:
    """The condition, and the files that are not as they should be, each with what is wrong."""

    condition: Condition
    problems: Mapping[str, str]


class PatchState:
    """The series and one installation of vLLM, seen together.

    Args:
        installation: where vLLM's files are.
        series: what to apply; its table of pristine files must know this release.
    """

    def __init__(self, installation: Installation, series: Series) -> None:
        self.installation = installation
        self.series = series
        self.folder = installation.root / STATE_FOLDER
        known = series.pristine.get(installation.requirement, {})
        if missing := [path for path in series.paths if path not in known]:
            raise PatchError(
                f"the series has no hash of {missing[0]} as published in "
                f"{installation.requirement}; reinstall echo-vllm."
            )
        self._published = known

    def inspect(self) -> Report:
        """Compare every file with what it was as published and as patched."""
        manifest = self._read_manifest()
        problems: dict[str, str] = {}
        seen: set[str] = set()
        for path in self._paths(manifest):
            pristine = self._pristine_hash(path, manifest)
            record = manifest.files.get(path) if manifest else None
            try:
                actual = sha256(self._file(path).read_bytes())
            except FileNotFoundError:
                problems[path] = "is missing"
                continue
            except OSError as error:
                problems[path] = f"cannot be read ({error.strerror})"
                continue
            if actual == pristine:
                # A file that the applied series does not touch cannot tell whether it is applied.
                seen.add("pristine" if record or manifest is None else "untouched")
            elif record and actual == record.patched:
                seen.add("patched")
            elif record and actual == record.previous:
                seen.add("previous")
            else:
                problems[path] = (
                    f"is neither as published in {self.installation.requirement} nor as patched"
                )
        if problems:
            return Report(Condition.CHANGED, problems)
        seen.discard("untouched")
        if manifest is None or seen <= {"pristine"}:
            return Report(Condition.PRISTINE, {})
        if seen != {"patched"}:
            return Report(Condition.PARTIAL, {})
        outdated = dict(manifest.patches) != self.series.fingerprint
        return Report(Condition.OUTDATED if outdated else Condition.APPLIED, {})

    def apply(self) -> tuple[Condition, tuple[str, ...]]:
        """Bring every file to the patched state, whatever known state it is in.

        Returns:
            The condition that was found, and the paths that were replaced.

        Raises:
            PatchError: if a file was changed by something else, or cannot be replaced; nothing is
                changed then.
        """
        with self._locked():
            condition = self._known_condition()
            manifest = self._read_manifest()
            if condition is Condition.APPLIED:
                return condition, ()
            pristine = self._pristine_contents(manifest)
            patched = self.series.apply(pristine)
            for path, content in patched.items():
                compile(content, path, "exec", dont_inherit=True)
            records = {
                path: FileRecord(
                    pristine=sha256(pristine[path]),
                    patched=sha256(patched[path]),
                    previous=sha256(self._file(path).read_bytes()),
                )
                for path in self.series.paths
            }
            with self._new_state(Manifest(self.series.fingerprint, records), pristine):
                # A file that only an older series touched goes back to what it was.
                return condition, self._replace({**pristine, **patched})

    def revert(self) -> tuple[Condition, tuple[str, ...]]:
        """Bring every file back to what was published, byte for byte, and forget the state.

        Returns and raises as `apply` does.
        """
        with self._locked():
            condition = self._known_condition()
            manifest = self._read_manifest()
            replaced: tuple[str, ...] = ()
            if condition is not Condition.PRISTINE:
                replaced = self._replace(self._pristine_contents(manifest))
            shutil.rmtree(self.folder, ignore_errors=True)
            return condition, replaced

    def verify(self) -> tuple[str, ...]:
        """What is wrong with the applied series; empty if nothing is.

        Compares the files with the series itself, not only with the manifest.
        """
        report = self.inspect()
        if report.condition is Condition.CHANGED:
            return tuple(f"{path} {what}" for path, what in report.problems.items())
        if report.condition is not Condition.APPLIED:
            return (f"the series is {report.condition.value}",)
        manifest = self._read_manifest()
        assert manifest is not None, "APPLIED needs a manifest"
        try:
            patched = self.series.apply(self._pristine_contents(manifest))
        except PatchError as error:
            return (str(error),)
        return tuple(
            f"{path} is not what the series makes of the published file"
            for path, content in patched.items()
            if sha256(content) != sha256(self._file(path).read_bytes())
        )

    def published_files(self) -> dict[str, bytes]:
        """Every file of the series as published, whether the series is applied or not."""
        self._known_condition()
        contents = self._pristine_contents(self._read_manifest())
        return {path: contents[path] for path in self.series.paths}

    # --- contents and hashes -------------------------------------------------------------------

    def _file(self, path: str) -> Path:
        return self.installation.root / path

    def _paths(self, manifest: Manifest | None) -> list[str]:
        return sorted({*self.series.paths, *(manifest.files if manifest else ())})

    def _pristine_hash(self, path: str, manifest: Manifest | None) -> str:
        known = self._published.get(path)
        if known is not None:
            return known
        assert manifest is not None, "a path is in the series or in the manifest"
        return manifest.files[path].pristine

    def _pristine_contents(self, manifest: Manifest | None) -> dict[str, bytes]:
        """Every file as published, from its place or from the copy that was kept."""
        contents: dict[str, bytes] = {}
        for path in self._paths(manifest):
            expected = self._pristine_hash(path, manifest)
            for file in (self._file(path), self.folder / "pristine" / path):
                with contextlib.suppress(FileNotFoundError):
                    content = file.read_bytes()
                    if sha256(content) == expected:
                        contents[path] = content
                        break
            else:
                raise PatchError(
                    f"the copy of {path} in {self.folder} is damaged; {self._reinstall()}."
                )
        return contents

    def _known_condition(self) -> Condition:
        report = self.inspect()
        if report.condition is Condition.CHANGED:
            [(path, what), *others] = report.problems.items()
            more = f" (and {len(others)} more files)" if others else ""
            raise PatchError(f"{path} {what}{more}; {self._reinstall()}.")
        return report.condition

    def _reinstall(self) -> str:
        return (
            "restore vLLM with `pip install --force-reinstall --no-deps "
            f"{self.installation.requirement}` and apply again"
        )

    # --- changes -------------------------------------------------------------------------------

    def _replace(self, contents: Mapping[str, bytes]) -> tuple[str, ...]:
        """Give every file its content, all or none; returns the paths that changed."""
        before = {path: self._file(path).read_bytes() for path in contents}
        changed = tuple(path for path in contents if contents[path] != before[path])
        staged: list[Path] = []
        done: list[str] = []
        try:
            for path in changed:
                staged.append(atomic.stage(self._file(path), contents[path]))
            for path, temporary in zip(changed, staged, strict=True):
                os.replace(temporary, self._file(path))
                done.append(path)
        except BaseException as error:
            for path in done:
                atomic.write_bytes(self._file(path), before[path])
            if isinstance(error, OSError):
                raise PatchError(
                    f"{error.filename or self.installation.root} cannot be replaced "
                    f"({error.strerror}) and nothing was changed; make the folder writable, or "
                    "install vLLM into a virtual environment of your own."
                ) from error
            raise
        finally:
            for temporary in staged:
                temporary.unlink(missing_ok=True)
            for path in done:
                _forget_bytecode(self._file(path))
        return changed

    @contextlib.contextmanager
    def _new_state(self, manifest: Manifest, pristine: Mapping[str, bytes]) -> Iterator[None]:
        """Write the state for the block, and take it back if the block fails."""
        file = self.folder / "manifest.json"
        before = file.read_bytes() if file.exists() else None
        for path in manifest.files:
            copy = self.folder / "pristine" / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_bytes(copy, pristine[path])
        text = json.dumps(
            {
                "echo_vllm": __version__,
                "distribution": self.installation.requirement,
                "patches": dict(manifest.patches),
                "files": {path: asdict(record) for path, record in manifest.files.items()},
            },
            indent=2,
        )
        atomic.write_text(file, f"{text}\n")
        try:
            yield
        except BaseException:
            if before is None:
                shutil.rmtree(self.folder, ignore_errors=True)
            else:
                atomic.write_bytes(file, before)
            raise

    def _read_manifest(self) -> Manifest | None:
        file = self.folder / "manifest.json"
        try:
            content = json.loads(file.read_text("utf-8"))
            return Manifest(
                patches=content["patches"],
                files={path: FileRecord(**record) for path, record in content["files"].items()},
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PatchError(
                f"{file} cannot be read ({error}); {self._reinstall()} after removing "
                f"{self.folder}."
            ) from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep two commands from changing the same installation at the same time."""
        try:
            lock = os.open(self.installation.root, os.O_RDONLY)
        except OSError as error:
            raise PatchError(f"{self.installation.root} cannot be opened: {error}.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.folder.mkdir(exist_ok=True)
            yield
        except PermissionError as error:
            raise PatchError(
                f"{error.filename} cannot be written and nothing was changed; make the folder "
                "writable, or install vLLM into a virtual environment of your own."
            ) from error
        finally:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # only if it is empty
            os.close(lock)


def _forget_bytecode(source: Path) -> None:
    """Remove compiled copies, some kinds of which Python would use without a look at the source."""
    for compiled in (source.parent / "__pycache__").glob(f"{source.stem}.*.pyc"):
        with contextlib.suppress(OSError):
            compiled.unlink()
