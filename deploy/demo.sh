#!/usr/bin/env bash
# The demo: builds everything, starts one router and four expert workers on the demo model, asks one question, streams
# the answer, shows how many rows each worker computed, and stops what it started. Nothing is left running, whatever
# ends it; the second run starts within seconds.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=models/smollm2/build/smollm2-moe
question='What is the capital of France?'
# The binaries find libtorch from where they stand, two folders below the checkout.
export CARGO_TARGET_DIR=$PWD/target
bin=$CARGO_TARGET_DIR/debug

say() { printf '\n%s\n' "$*" >&2; }

scratch=$(mktemp -d "${TMPDIR:-/tmp}/conclave-demo.XXXXXX")
cluster_pid=
etcd_pid=

# stop PID SECONDS: SIGTERM, and SIGKILL for what has not ended after SECONDS.
stop() {
  kill -TERM "$1" 2>/dev/null || return 0
  local tenths=$(($2 * 10))
  while kill -0 "$1" 2>/dev/null && [ $((tenths -= 1)) -gt 0 ]; do sleep 0.1; done
  kill -KILL "$1" 2>/dev/null || true
  wait "$1" 2>/dev/null || true
}

# The cluster goes before its store, so that its keys go with it.
clean_up() {
  trap '' INT TERM HUP
  if [ -n "$cluster_pid" ]; then stop "$cluster_pid" 40; fi
  if [ -n "$etcd_pid" ]; then stop "$etcd_pid" 5; fi
  rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# In a session of its own, so that Ctrl-C reaches only this script, which stops things in order; and ended by the
# kernel should this script be killed outright.
run_in_background() { exec setsid setpriv --pdeathsig TERM -- "$@"; }

# start_etcd: a private etcd on two free ports, its data in the scratch folder; sets etcd_pid and etcd_url.
start_etcd() {
  local client peer
  read -r client peer < <(python3 -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in sockets))')
  etcd_url=http://127.0.0.1:$client
  run_in_background etcd --name demo --data-dir "$scratch/etcd" --unsafe-no-fsync \
    --listen-client-urls "$etcd_url" --advertise-client-urls "$etcd_url" \
    --listen-peer-urls "http://127.0.0.1:$peer" --initial-advertise-peer-urls "http://127.0.0.1:$peer" \
    --initial-cluster "demo=http://127.0.0.1:$peer" >"$scratch/etcd.log" 2>&1 &
  etcd_pid=$!
  for _ in $(seq 150); do
    if ! kill -0 "$etcd_pid" 2>/dev/null; then break; fi
    if python3 -c 'import sys, urllib.request as r; sys.exit(b"true" not in r.urlopen(sys.argv[1], timeout=1).read())' \
      "$etcd_url/health" 2>/dev/null; then return 0; fi
    sleep 0.1
  done
  tail -n 20 "$scratch/etcd.log" >&2
  say "etcd did not start"
  return 1
}

# start_cluster STORE: `conclave up`, until everything serves.
start_cluster() {
  run_in_background "$bin/conclave" up --model "$model" --workers 4 --listen 127.0.0.1:0 --store "$1" \
    --ready-file "$scratch/ready.json" >"$scratch/cluster.log" 2>&1 </dev/null &
  cluster_pid=$!
  for _ in $(seq 1200); do
    if [ -s "$scratch/ready.json" ]; then return 0; fi
    if ! kill -0 "$cluster_pid" 2>/dev/null; then break; fi
    sleep 0.1
  done
  tail -n 40 "$scratch/cluster.log" >&2
  say "the cluster did not come up"
  return 1
}

deploy/setup.sh build
deploy/setup.sh python
say "Building (the first time takes a while)"
cargo build --workspace --bins --locked
.deps/python/bin/python models/smollm2/convert.py

store=embedded
# An installation that failed before is not tried again.
if command -v etcd >/dev/null || { [ ! -e .deps/etcd-install.log ] && deploy/setup.sh etcd 2>/dev/null; }; then
  start_etcd
  store=etcd=$etcd_url
else
  say "No etcd here: placement lives in the embedded store"
fi

say "Starting one router and four expert workers (store: $store)"
started=$(date +%s%N)
start_cluster "$store"
printf 'Serving after %d.%d s\n' $(((($(date +%s%N) - started) / 100000000) / 10)) \
  $(((($(date +%s%N) - started) / 100000000) % 10)) >&2
endpoint=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["inference"])' "$scratch/ready.json")

say "> $question"
"$bin/conclave" generate --endpoint "$endpoint" --temperature 0 --max-tokens 64 --timings --chat "$question"

say "Rows computed by each worker"
"$bin/conclave" placement show --rows --ready-file "$scratch/ready.json"

say "Stopping"
