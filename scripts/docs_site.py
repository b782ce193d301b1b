# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Builds the documentation as a site in .build/site; a broken link is an error. For `make docs`.

The site is the repository's own pages at their own paths, so links work in both places. Added are
`docs/reference.md`, every field of every policy from the pydantic models, and the tables that pages
ask for with `<!-- speed: FILE -->`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / ".build" / "docs"
BAD = 0.95
"""Share of plain decoding's speed below which a configuration does harm."""


def main() -> None:
    shutil.rmtree(SOURCE, ignore_errors=True)
    tracked = subprocess.check_output(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True
    ).splitlines()
    pages = [name for name in tracked if name.endswith(".md") and not name.startswith("tests/")]
    for name in pages:
        put(name, staged(ROOT / name))
    put("docs/reference.md", reference())
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "mkdocs.yml"]
    built = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    if built.returncode:
        sys.exit("error: the documentation does not build (see above)")
    print(f"wrote {ROOT / '.build' / 'site' / 'index.html'}")


def staged(page: Path) -> str:
    """A page's text, after what it links to and is no page was copied beside it."""

    def link(match: re.Match[str]) -> str:
        target = (page.parent / match[1]).resolve()
        if not target.is_relative_to(ROOT):
            return match[0]
        if target.is_dir():
            if not (target / "README.md").is_file():
                put(f"{target.relative_to(ROOT)}/README.md", folder_page(target))
            return f"]({match[1]}/README.md"
        if target.is_file() and target.suffix != ".md":
            copy(target)
        return match[0]

    text = re.sub(r"\]\(([^)#:\s]+)", link, page.read_text("utf-8"))
    return re.sub(r"<!-- speed: (\S+) -->", lambda match: speed_tables(ROOT / match[1]), text)


def put(name: str, text: str) -> None:
    path = SOURCE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def copy(file: Path) -> None:
    path = SOURCE / file.relative_to(ROOT)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, path)


def folder_page(folder: Path) -> str:
    """What a folder holds, for a link to it."""
    parts = [f"# {folder.relative_to(ROOT)}"]
    for file in sorted(folder.iterdir()):
        if file.suffix == ".json":
            parts.append(f"## {file.name}\n\n```json\n{file.read_text('utf-8').strip()}\n```")
    return "\n\n".join(parts) + "\n"


def reference() -> str:
    """Every field of every policy's section."""
    from echo_vllm.policies.registry import section_models

    models = section_models()
    lines = [
        "# Reference",
        "Fields of the section `echo` of a `speculative_config`, by policy, from the models that "
        "check them. `num_speculative_tokens`, beside the section, is the most nodes that one "
        "request's tree may have (1 to 256).",
    ]
    for policy, model in models.items():
        schema = model.model_json_schema()
        lines.append(f"## {policy}")
        first = (model.__doc__ or "").strip().split("\n\n")[0]
        lines.append(" ".join(first.split()))
        rows = ["| field | values | default | meaning |", "|---|---|---|---|"]
        for name, field in schema["properties"].items():
            if name == "policy":
                continue
            meaning = " ".join(field.get("description", "").split()).replace("|", "\\|")
            default = json.dumps(field.get("default"))
            rows.append(f"| `{name}` | {values(field)} | `{default}` | {meaning} |")
        lines.append("\n".join(rows))
    return "\n\n".join(lines) + "\n"


def values(field: dict[str, Any]) -> str:
    """What a field of a JSON schema may be."""
    if "anyOf" in field:
        return " or ".join(values(option) for option in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    kind = str(field.get("type", "value"))
    low, high = field.get("minimum"), field.get("maximum", field.get("exclusiveMaximum"))
    return kind if low is None and high is None else f"{kind}, {low} to {high}"


def speed_tables(results: Path) -> str:
    """Ratios to plain decoding of a result of `echo-vllm bench`, the bad ones marked."""
    summary = json.loads(results.read_text("utf-8"))["summary"]
    parts = []
    for temperature in sorted({row["temperature"] for row in summary}):
        cells = {
            (row["configuration"], row["concurrency"]): row["speed over plain"]["median"]
            for row in summary
            if row["temperature"] == temperature
        }
        loads = sorted({load for _, load in cells})
        rows = [
            f"| temperature {temperature:g}: requests at once | {' | '.join(map(str, loads))} |",
            "|---" * (1 + len(loads)) + "|",
        ]
        for name in dict.fromkeys(name for name, _ in cells if name != "plain"):
            shown = (cells.get((name, load)) for load in loads)
            marked = ("-" if x is None else f"{x:.2f}" + " **✗**" * (x < BAD) for x in shown)
            rows.append(f"| `{name}` | {' | '.join(marked)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
