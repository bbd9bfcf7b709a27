#!/usr/bin/env bash
# Does an image built from deploy/Dockerfile work? Builds its runtime stage from the programs in target/ on a Debian base made
# here, with no registry and no Docker engine, and runs it beside a real etcd: a worker registers, answers /readyz, computes for
# a router, and leaves the store on SIGTERM. The router runs as the chart's pods do: read-only root, no capability, user 65532.
#
# Where CUDA's libraries are here too (deploy/setup.sh cuda), the image with CUDA is built and its libraries are opened.
#
# What it does not show: the stages that compile and download, and anything of a real container runtime's network and cgroups.
# Needs root, buildah, mmdebstrap, etcd, a built checkout; exits 0 with the reason where one is missing.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Another checkout's programs and libtorch may be used.
programs=${PROGRAMS:-target/debug}
libtorch=${LIBTORCH_SITE:-.deps/site}
cuda=${CUDA_SITE:-$libtorch}
model=$PWD/tests/golden/v3

say() { printf '== %s\n' "$*"; }
skip() {
  say "image check skipped: $*"
  exit 0
}

[ "$(id -u)" = 0 ] || skip "not root (mounts and chroot)"
for tool in buildah mmdebstrap etcd setpriv unshare; do
  command -v "$tool" >/dev/null || skip "no $tool here"
done
# shellcheck source=/dev/null
. /etc/os-release
# The programs were linked with this machine's C library, so the base must be its Debian too.
[ "$ID" = debian ] || skip "programs built on $ID need a base of $ID; only Debian's is made here"
for file in "$programs"/conclave{,-router,-expert-worker} "$libtorch/torch/lib/libtorch_cpu.so"; do
  [ -e "$file" ] || skip "no $file (cargo build --workspace, or PROGRAMS= and LIBTORCH_SITE=)"
done

scratch=$(mktemp -d "${TMPDIR:-/var/tmp}/conclave-image.XXXXXX")
# Images of its own: nothing of the machine's is read or shadowed.
echo '{"default": [{"type": "insecureAcceptAnything"}]}' >"$scratch/policy.json"
build() { buildah --root "$scratch/storage" --runroot "$scratch/run" --storage-driver overlay "$@"; }

pids=()
clean_up() {
  trap '' INT TERM HUP
  # The cluster goes before its store, which was started first.
  local index
  for ((index = ${#pids[@]} - 1; index >= 0; index--)); do
    kill -TERM "${pids[index]}" 2>/dev/null || true
  done
  wait
  build umount --all >/dev/null 2>&1 || true
  build rm --all >/dev/null 2>&1 || true
  rm -rf "$scratch" 2>/dev/null || { umount -R "$scratch/storage/overlay" && rm -rf "$scratch"; }
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# until_true SECONDS WHAT COMMAND...: waits for COMMAND to succeed.
until_true() {
  local what=$2 deadline=$((SECONDS + $1))
  shift 2
  until "$@" >/dev/null 2>&1; do
    if [ $SECONDS -ge $deadline ]; then
      say "FAILED: $what"
      tail -n 20 "$scratch"/*.log
      exit 1
    fi
    sleep 0.2
  done
}

get() { python3 -c 'import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=2).read().decode(), end="")' "$1"; }

read -r client peer exchange worker_admin inference router_admin < <(python3 -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(6)]
print(*(s.getsockname()[1] for s in sockets))')
store=etcd=http://127.0.0.1:$client

say "a base of Debian $VERSION_CODENAME"
base=.deps/deploy/base-$VERSION_CODENAME.tar
if [ ! -e "$base" ]; then
  mkdir -p .deps/deploy
  mmdebstrap --quiet --variant=minbase "$VERSION_CODENAME" "$base.part" && mv "$base.part" "$base"
fi
name=docker.io/library/debian:$VERSION_CODENAME-slim
container=$(build from --signature-policy "$scratch/policy.json" scratch)
build add --quiet "$container" "$base" >/dev/null
build commit --quiet --signature-policy "$scratch/policy.json" "$container" "$name" >/dev/null
build rm "$container" >/dev/null

# image TARGET TAG: the image that `docker build --target TARGET` makes, less what it would compile and download.
image() {
  build build --quiet --isolation chroot --pull-never --signature-policy "$scratch/policy.json" \
    --file deploy/Dockerfile --target "$1" --build-arg BASE="$name" --build-context programs="$programs" \
    --build-context libtorch="$libtorch" --build-context cuda-libraries="$cuda" --tag "$2" . >"$scratch/build.log"
}

say "the image, from $programs"
image cpu conclave:check
build inspect --type image --format '{{.OCIv1.Config.User}} {{.OCIv1.Config.Cmd}} {{.OCIv1.Config.Env}}' conclave:check
container=$(build from --pull-never --signature-policy "$scratch/policy.json" conclave:check)
in_image() { build run --isolation chroot --network host --volume "$model:/models/v3:ro" "$@"; }
in_image "$container" conclave --version

say "etcd"
etcd --data-dir "$scratch/etcd" --unsafe-no-fsync --name check \
  --listen-client-urls "http://127.0.0.1:$client" --advertise-client-urls "http://127.0.0.1:$client" \
  --listen-peer-urls "http://127.0.0.1:$peer" --initial-advertise-peer-urls "http://127.0.0.1:$peer" \
  --initial-cluster "check=http://127.0.0.1:$peer" >"$scratch/etcd.log" 2>&1 &
pids+=($!)
until_true 30 "etcd starts" get "http://127.0.0.1:$client/health"

say "a worker from the image"
in_image --env CONCLAVE_STORE="$store" --env CONCLAVE_MODEL=/models/v3 --env CONCLAVE_ID=worker-0 --env CONCLAVE_DTYPE=f32 \
  --env CONCLAVE_LISTEN="127.0.0.1:$exchange" --env CONCLAVE_ADMIN_LISTEN="127.0.0.1:$worker_admin" \
  --env CONCLAVE_HOST=node-a --env CONCLAVE_ZONE=zone-a \
  "$container" conclave-expert-worker >"$scratch/worker.log" 2>&1 &
run=$!
until_true 60 "the worker answers /readyz" get "http://127.0.0.1:$worker_admin/readyz"
printf '/readyz: %s\n' "$(get "http://127.0.0.1:$worker_admin/readyz")"
# The process itself: buildah does not pass signals on.
worker=$(python3 - "$worker_admin" <<'PY'
import os, pathlib, sys
port = int(sys.argv[1])
inodes = {f"socket:[{line.split()[9]}]" for line in open("/proc/net/tcp")
          if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"}
for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        if any(os.readlink(file) in inodes for file in (process / "fd").iterdir()):
            print(process.name)
            break
    except OSError:
        pass
PY
)
pids+=("$worker")
awk '/^(Uid|Gid|Name)/' "/proc/$worker/status"
in_image --env CONCLAVE_STORE="$store" "$container" conclave placement show

say "a router as in a pod: read-only root, no capability, nothing to gain by exec"
root=$(build mount "$container")
mkdir -p "$root/models/v3"
# shellcheck disable=SC2016  # the inner shell's own arguments
unshare --mount --propagation private sh -euc '
  root=$1 model=$2; shift 2
  mount --bind "$root" "$root" && mount -o remount,bind,ro "$root"
  mount -t proc proc "$root/proc"
  mount --bind "$model" "$root/models/v3" && mount -o remount,bind,ro "$root/models/v3"
  exec chroot "$root" setpriv --reuid 65532 --regid 65532 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \
    env -i OMP_WAIT_POLICY=PASSIVE "$@"' sh "$root" "$model" \
  CONCLAVE_STORE="$store" CONCLAVE_MODEL=/models/v3 CONCLAVE_ID=router-0 CONCLAVE_DTYPE=f32 \
  CONCLAVE_LISTEN="127.0.0.1:$inference" CONCLAVE_ADMIN_LISTEN="127.0.0.1:$router_admin" \
  /opt/conclave/target/release/conclave-router >"$scratch/router.log" 2>&1 &
router=$!
pids+=("$router")
until_true 60 "the router answers /readyz" get "http://127.0.0.1:$router_admin/readyz"
printf '/readyz: %s\n' "$(get "http://127.0.0.1:$router_admin/readyz")"
awk '/^(Name|Uid|CapEff|CapBnd|NoNewPrivs)/' "/proc/$router/status"
in_image "$container" conclave generate --endpoint "http://127.0.0.1:$inference" --tokens 1,2,3 --max-tokens 4 \
  --temperature 0 --ignore-eos --json
in_image --env CONCLAVE_STORE="$store" "$container" conclave placement show --rows

say "SIGTERM"
kill -TERM "$router" && wait "$router"
kill -TERM "$worker" && wait "$run"
tail -n 3 "$scratch/worker.log"
in_image --env CONCLAVE_STORE="$store" "$container" conclave placement show | tee "$scratch/after"
if grep -q worker-0 "$scratch/after"; then
  say "FAILED: the worker is still in the store"
  exit 1
fi
# Whether everything that libtorch_cuda.so names is in the image shows without a GPU: then the GPU is what is missing.
if [ -e "$cuda/nvidia/cu13/lib/libcublas.so.13" ]; then
  say "the image with CUDA"
  image cuda conclave:check-cuda
  container=$(build from --pull-never --signature-policy "$scratch/policy.json" conclave:check-cuda)
  in_image "$container" conclave-expert-worker --model /models/v3 --device cuda:0 --store "$store" \
    --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0 >"$scratch/cuda.log" 2>&1 || true
  grep 'libtorch sees 0 GPU' "$scratch/cuda.log" || {
    say "FAILED: CUDA's half of libtorch was not opened (or this machine has a GPU)"
    cat "$scratch/cuda.log"
    exit 1
  }
else
  say "the image with CUDA is not checked: no CUDA libraries in $cuda (deploy/setup.sh cuda)"
fi
say "image check passed"
