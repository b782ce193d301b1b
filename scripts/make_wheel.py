# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Builds dist/*.whl with a manylinux tag that its libraries allow, and the source distribution.

    python scripts/make_wheel.py [--out dist]

The tag comes from the newest glibc symbol that the extension asks for. torch is not packed: the
extension finds libtorch in the process that loads it. Called by `make wheel`.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GLIBC = re.compile(rb"GLIBC_(\d+)\.(\d+)")
# What the oldest manylinux that is still in use allows.
OLDEST = (2, 17)


def needed_glibc(library: bytes) -> tuple[int, int]:
    """The newest glibc version among the symbol versions of an ELF file."""
    found = [(int(major), int(minor)) for major, minor in GLIBC.findall(library)]
    return max([OLDEST, *found])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, check=True)
    library = (ROOT / "echo_vllm" / "_C.abi3.so").read_bytes()
    major, minor = needed_glibc(library)
    tag = f"manylinux_{major}_{minor}_{platform.machine()}"
    with tempfile.TemporaryDirectory() as folder:
        # abi3: one wheel for every Python that the project supports.
        subprocess.run(
            # A folder of its own, because an old one would bring back modules that are gone.
            [sys.executable, "setup.py", "-q", "build", "--build-lib", f"{folder}/lib",
             "bdist_wheel", "--plat-name", tag,
             "--py-limited-api", "cp311", "--dist-dir", folder],
            cwd=ROOT,
            check=True,
        )  # fmt: skip
        (built,) = Path(folder).glob("*.whl")
        wheel = options.out / built.name
        wheel.write_bytes(built.read_bytes())
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(options.out.resolve())],
        cwd=ROOT,
        check=True,
    )
    with zipfile.ZipFile(wheel) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        print(
            f"{wheel}: {wheel.stat().st_size / 2**20:.2f} MiB, {len(archive.infolist())} files, "
            f"the largest {largest.filename} ({largest.file_size / 2**20:.2f} MiB unpacked)"
        )


if __name__ == "__main__":
    main()
