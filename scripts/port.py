# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What another release of vLLM asks of this package: `make port VLLM=X.Y.Z`.

Downloads the wheel (some 340 MB) and keeps its Python files in .build/vllm/, imports nothing of it,
and prints which patches apply, which of our overrides and imports no longer fit, what moved under
those that do, and which fields of SpeculativeConfig nobody has decided on. With --record it writes
the release's hashes into patches/pristine.json and its methods into tests/contract/; after that
echo_vllm/version.py can list it.

Exit status: 0 if everything fits, 1 if something has to be done.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from echo_vllm.patching import PatchError, load_series
from echo_vllm.patching.series import PRISTINE, find_patches, sha256
from echo_vllm.startup.validation import FIXED, PASSED_ON
from echo_vllm.version import VLLM_RELEASES
from tests.contract.fetch import FetchError, fetch_sources
from tests.contract.seams import (
    Source,
    load_record,
    misfits,
    moved,
    read_release,
    record_file,
    speculative_fields,
    unresolved_imports,
)


def section(title: str, lines: list[str], fine: str) -> bool:
    """Print a section; whether it holds something to do."""
    print(f"\n{title}")
    for line in lines or [fine]:
        print(f"  {line}")
    return bool(lines)


def failing_patches(root: Path) -> list[str]:
    """Every patch that does not apply after those before it that do."""
    series = load_series()
    texts, failures = {}, []
    for path in series.paths:
        if (root / path).is_file():
            texts[path] = (root / path).read_text("utf-8")
        else:
            failures.append(f"{path} is gone")
    for patch in series.patches:
        for diff in patch.diffs:
            try:
                texts[diff.path] = diff.apply(texts[diff.path])
            except PatchError as error:
                failures.append(f"{patch.name}: {error}")
            except KeyError:
                failures.append(f"{patch.name}: {diff.path} is gone")
    return failures


def write_record(distribution: str, version: str, root: Path, source: Source) -> None:
    file = find_patches() / PRISTINE
    pristine = json.loads(file.read_text("utf-8"))
    pristine[f"{distribution}=={version}"] = {
        path: sha256((root / path).read_bytes()) for path in load_series().paths
    }
    file.write_text(json.dumps(dict(sorted(pristine.items())), indent=2) + "\n")
    if distribution == "vllm":
        text = json.dumps(read_release(source), indent=1)
        record_file(version).write_text(f"{text}\n")
    print(f"\nrecorded {distribution} {version} in {file.name} and {record_file(version).name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("version", help="of vLLM, as in 0.33.0")
    parser.add_argument("--distribution", default="vllm", choices=VLLM_RELEASES)
    parser.add_argument("--record", action="store_true", help="keep what was found as right")
    args = parser.parse_args()
    if not re.fullmatch(r"\d+\.\d+\.\d+(\.?(post|rc)\d+)?", args.version):
        parser.error(f"the version must be a release such as 0.33.0, got {args.version!r}")
    try:
        root = fetch_sources(args.distribution, args.version)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    source = Source(root)
    known = [v for v in VLLM_RELEASES["vllm"] if v != args.version and record_file(v).exists()]
    print(f"{args.distribution} {args.version}, compared with {known[-1]}: {root}")
    try:
        found = read_release(source)
    except LookupError as error:
        print(f"\nclasses that we derive from\n  {error}")
        return 1
    if args.record:
        write_record(args.distribution, args.version, root, source)
    undecided = speculative_fields(source).keys() - PASSED_ON - FIXED.keys()
    to_do = [
        section("patches that do not apply", failing_patches(root), "none"),
        section("overrides that do not fit", misfits(found), "none"),
        section("imports that are gone", unresolved_imports(source), "none"),
        section("fields of SpeculativeConfig to decide on", sorted(undecided), "none"),
    ]
    section(
        "read again: what moved under our overrides",
        moved(load_record(known[-1]), found),
        "nothing",
    )
    return int(any(to_do))


if __name__ == "__main__":
    sys.exit(main())
