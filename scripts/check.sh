#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#
# Runs every static check, all of them even if one fails. Called by `make check`.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
failed=()

run() {
  printf '[check] %s\n' "$1"
  shift
  "$@" || failed+=("$1")
}

mapfile -t sources < <(find csrc tests/cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

run "ruff check" .venv/bin/ruff check .
run "ruff format" .venv/bin/ruff format --check .
run "mypy" .venv/bin/mypy
run "imports" .venv/bin/lint-imports --no-logo
run "docs" .venv/bin/python scripts/docs_site.py
run "clang-format" .venv/bin/clang-format --dry-run -Werror "${sources[@]}"

if ((${#failed[@]})); then
  printf '[check] failed: %s (make format mends the layout)\n' "${failed[*]##*/}" >&2
  exit 1
fi
echo "[check] all good"
