#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#
# Builds an image, or tries what the CPU image must do, with the engine that is there. Called by
# `make image` and `make image-test`.
#
#   scripts/image.sh build|test
#
# Environment: ENGINE (docker, podman or buildah: the first that works), VARIANT (cpu; cuda builds on
# vLLM's own image), IMAGE (echo-vllm, or echo-vllm:cuda), PYTHON_IMAGE (cpu: another base with Python
# 3.11 to 3.13 and pip), VLLM_IMAGE (cuda: another image that holds vLLM), IMAGE_ARGS (more options of
# the build, such as -v and --build-arg for a proxy or a package index), PORT of the test, ARGS
# (more options of its `vllm serve`).
#
# With buildah the test enters the image's files with chroot, as root, and mounts them read-only:
# what an engine adds (network, memory limits, its own health checks) is not tried then.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${VARIANT:=cpu} in
  cpu) dockerfile=docker/Dockerfile default_image=echo-vllm ;;
  cuda) dockerfile=docker/Dockerfile.cuda default_image=echo-vllm:cuda ;;
  *) printf "[image] error: VARIANT must be cpu or cuda, got '%s'\n" "$VARIANT" >&2 && exit 1 ;;
esac
readonly IMAGE=${IMAGE:-$default_image} PORT=${PORT:-8012}
readonly HEALTH_S=900 LIMIT_S=30 # to the first healthy answer; from SIGTERM to the end

say() { printf '[image] %s\n' "$*"; }
die() {
  printf '[image] error: %s\n' "$*" >&2
  exit 1
}

find_engine() {
  local name
  for name in ${ENGINE:-docker podman buildah}; do
    case $name in
      docker | podman) "$name" info >/dev/null 2>&1 && echo "$name" && return ;;
      buildah) command -v buildah >/dev/null && echo buildah && return ;;
      *) die "ENGINE must be docker, podman or buildah, got '$name'" ;;
    esac
  done
  die "no container engine works here: install docker, podman or buildah (Debian and Ubuntu: apt-get install buildah)"
}

build() {
  local command=("$engine" build)
  # Without user namespaces and a network of its own; and the format that keeps HEALTHCHECK.
  [[ $engine == buildah ]] && command=(buildah bud --layers --isolation chroot --format docker)
  [[ $engine == podman ]] && command+=(--format docker)
  # shellcheck disable=SC2086  # IMAGE_ARGS holds several options
  "${command[@]}" -f "$dockerfile" -t "$IMAGE" \
    ${PYTHON_IMAGE:+--build-arg PYTHON_IMAGE="$PYTHON_IMAGE"} \
    ${VLLM_IMAGE:+--build-arg VLLM_IMAGE="$VLLM_IMAGE"} ${IMAGE_ARGS:-} .
  say "$IMAGE: $(image_bytes | awk '{printf "%.2f GB", $1 / 1e9}')"
}

image_bytes() {
  if [[ $engine == buildah ]]; then
    buildah images --json "$IMAGE" | python3 -c '
import json, sys
size = json.load(sys.stdin)[0]["size"].replace("\xa0", " ")
number, unit = size.split()
print(float(number) * {"KB": 1e3, "MB": 1e6, "GB": 1e9}[unit])'
  else
    "$engine" image inspect --format '{{.Size}}' "$IMAGE"
  fi
}

# --- the test ------------------------------------------------------------------------------

container= pid= root=

start() { # start ARGUMENT...: the entrypoint, as the image's user, with a read-only root
  if [[ $engine == buildah ]]; then
    container=$(buildah from "$IMAGE")
    root=$(buildah mount "$container")
    mkdir -p "$root/cache"
    mount --bind "$root" "$root"
    mount -o remount,ro,bind "$root"
    mount -t proc proc "$root/proc"
    mount -t sysfs -o ro sysfs "$root/sys" # lscpu reads it, by which vLLM counts cores
    # Private, or the memory that its processes share would lie over this machine's.
    mount --bind --make-private /dev "$root/dev"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    mount -t tmpfs -o "uid=$(chroot "$root" id -u echo),gid=$(chroot "$root" id -g echo)" \
      tmpfs "$root/cache"
    mapfile -t settings < <(buildah inspect --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$container" | grep =)
    inside "$@" &
    pid=$!
  else
    container=$("$engine" run -d --init --read-only -v "echo-vllm-test-$$:/cache" --shm-size 1g \
      --cap-add SYS_NICE -e "PORT=$PORT" -e "ARGS=${ARGS:-}" -p "127.0.0.1:$PORT:$PORT" "$IMAGE" "$@")
  fi
}

inside() { # inside ARGUMENT...: buildah's container; the first argument may be --entrypoint COMMAND
  local command=/opt/echo-vllm/docker/entrypoint.sh
  if [[ ${1:-} == --entrypoint ]]; then
    command=$2
    shift 2
  fi
  exec setsid env -i "${settings[@]}" "PORT=$PORT" HOST=127.0.0.1 "ARGS=${ARGS:-}" \
    chroot --userspec=echo:echo "$root" "$command" "$@"
}

execute() { # execute COMMAND: in the running container
  if [[ $engine == buildah ]]; then
    (inside --entrypoint "$@")
  else
    "$engine" exec "$container" "$@"
  fi
}

is_running() {
  if [[ $engine == buildah ]]; then
    kill -0 "$pid" 2>/dev/null
  else
    [[ $("$engine" inspect --format '{{.State.Running}}' "$container") == true ]]
  fi
}

end() {
  if [[ $engine == buildah ]]; then
    kill -TERM "$pid"
  else
    "$engine" kill --signal TERM "$container" >/dev/null
  fi
}

clean_up() {
  set +e
  if [[ $engine == buildah && -n $container ]]; then
    [[ -n $pid ]] && kill -KILL -- "-$pid" 2>/dev/null
    umount --lazy "$root/cache" "$root/dev/shm" "$root/dev" "$root/sys" "$root/proc" "$root" 2>/dev/null
    buildah umount "$container" >/dev/null 2>&1
    buildah rm "$container" >/dev/null
  elif [[ -n $container ]]; then
    "$engine" rm -f "$container" >/dev/null
    "$engine" volume rm "echo-vllm-test-$$" >/dev/null
  fi
}

run_test() {
  ! (exec 3<>"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null ||
    die "something listens on port $PORT already: stop it, or choose another with PORT=8012"
  trap clean_up EXIT
  say "starting $IMAGE with $engine"
  start
  local started=$SECONDS
  until execute /opt/echo-vllm/docker/healthcheck.sh 2>/dev/null; do
    is_running || die "the container has ended before it was healthy"
    ((SECONDS - started < HEALTH_S)) || die "not healthy after $HEALTH_S s"
    sleep 1
  done
  say "healthy after $((SECONDS - started)) s"
  [[ $(execute /usr/bin/id -un) == echo ]] || die "the container does not run as user echo"
  if execute /bin/sh -c 'echo >/opt/echo-vllm/written' 2>/dev/null; then
    die "the root file system can be written"
  fi
  execute /bin/sh -c 'command -v vllm' || die "vllm is not on PATH"
  local answer
  answer=$(curl -sf "http://127.0.0.1:$PORT/v1/chat/completions" -H 'Content-Type: application/json' \
    -d '{"model": "smollm2-135m-instruct", "temperature": 0, "max_tokens": 40,
         "messages": [{"role": "user", "content": "What is the capital of France?"}]}') ||
    die "no answer over HTTP"
  [[ $answer == *Paris* ]] || die "a strange answer: $answer"
  say "answers as user echo, with a read-only root"
  started=$SECONDS
  end
  while is_running; do
    ((SECONDS - started < LIMIT_S)) || die "it still runs $LIMIT_S s after SIGTERM"
    sleep 0.2
  done
  say "ended $((SECONDS - started)) s after SIGTERM; all good"
}

engine=$(find_engine)
case ${1:-} in
  build) build ;;
  test) run_test ;;
  *) die "the command must be build or test, got '${1:-}'" ;;
esac
