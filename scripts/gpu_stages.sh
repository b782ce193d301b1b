# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#
# What scripts/gpu_all.sh and scripts/gpu_v2.sh share; read by both from the repository's folder. They
# set STAGES, and PYTHON, OUT, LIMIT and LOGS where the environment does not.

# wanted STAGE...: whether one of them is.
wanted() {
  local name
  for name in "$@"; do
    [[ " $STAGES " == *" $name "* ]] && return
  done
  return 1
}

say() { printf '[gpu %3d s] %s\n' "$SECONDS" "$*"; }

# stage NAME SECONDS COMMAND...: its output goes to $LOGS/NAME.log and the result to summary.txt.
stage() {
  local name=$1 most=$2 left=$((LIMIT - SECONDS)) begin=$SECONDS code=0
  shift 2
  ((left < most)) && most=$left
  if ((most < 5)); then
    echo "$name: not run, no time left" | tee -a "$OUT/summary.txt"
    return 1
  fi
  say "$name (at most $most s)"
  timeout --kill-after=5 "$most" "$@" >"$LOGS/$name.log" 2>&1 || code=$?
  echo "$name: exit $code after $((SECONDS - begin)) s; $(tail -n 1 "$LOGS/$name.log" | cut -c 1-200)" |
    tee -a "$OUT/summary.txt"
  return "$code"
}

# begin: the folders for results and logs, which are kept whatever ends the run.
begin() {
  mkdir -p "$OUT" "$LOGS"
  : >"$OUT/summary.txt"
  trap 'tar -C "$LOGS" -czf "$OUT/logs.tar.gz" .' EXIT
}

# build: the extension for the GPU that is there, and the entry points by which vLLM finds the plug-in.
build() {
  "$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA GPU"' || exit 1
  {
    nvidia-smi
    "$PYTHON" -c 'import torch; print(torch.__version__, torch.version.cuda)'
  } >"$LOGS/machine.txt" 2>&1
  if [[ -z ${ECHO_CUDA_ARCHS:-} ]]; then
    ECHO_CUDA_ARCHS=$("$PYTHON" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + ("a" if major == 9 else ""))')
    export ECHO_CUDA_ARCHS
  fi
  "$PYTHON" setup.py -q egg_info >"$LOGS/egg-info.log" 2>&1 || exit 1
  stage build 300 "$PYTHON" setup.py build_ext --inplace || exit 1
}

# patch_vllm: apply the patches; fails where vLLM cannot be imported.
patch_vllm() {
  local missing
  if missing=$("$PYTHON" -c 'import vllm.v1.worker.gpu_model_runner' 2>&1); then
    stage patches 30 "$PYTHON" -c 'from echo_vllm.patching import *
print(PatchState(find_installation(), load_series()).apply()[0])'
  else
    echo "engine: not run, vLLM cannot be imported: ${missing##*$'\n'}" | tee -a "$OUT/summary.txt"
    return 1
  fi
}

# conclude: exits 1 if a stage failed.
conclude() {
  if grep -E "exit [1-9]|not run" "$OUT/summary.txt"; then
    say "not all is good"
    exit 1
  fi
  say "all good"
}
