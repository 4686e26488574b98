#!/usr/bin/env bash
# What needs a GPU, as two calls that fit into 15 minutes of a lent one.
#   tests/gpu/run.sh carry             where there is a network: wheels for a bare machine, into tests/gpu/wheels
#   OUT=DIR tests/gpu/run.sh first     480 s: checks, kernels, decoding, tiles
#   OUT=DIR tests/gpu/run.sh second    230 s: generation from end to end, calibration
#   tests/gpu/run.sh check kernels     parts by name
#   DRY=1 ...                          the same on a CPU, small, with five times the seconds: nothing is measured
# Results are written row by row, at most 8 files. Needs PyTorch, Triton and pip; the rest can be carried.
set -uo pipefail
cd "$(dirname "$0")/../.."
wheels=tests/gpu/wheels

carry() { # PYTHON=3.12: of the machine with the GPU; what it has by itself may be left out by NOT="numpy ..."
    rm -rf "$wheels" && mkdir "$wheels"
    pip wheel --quiet --no-deps --wheel-dir "$wheels" . || return
    local platforms=(manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64)
    # The versions of this environment, but for what is built for a device.
    python3 - "${NOT:-}" <<'NAMES' | xargs pip download --quiet --no-deps --only-binary=:all: --implementation cp \
        --python-version "${PYTHON:-3.12}" "${platforms[@]/#/--platform=}" --dest "$wheels" || return
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution

left, found = ["qvlm_hf", "pytest", "pytest-xdist"], {}
while left:
    name = left.pop()
    key = name.lower().replace("_", "-")
    if key in found or re.match(r"(torch|triton|nvidia|cuda|setuptools)", key) or key in sys.argv[1].split():
        continue
    try:
        one = distribution(name)
    except PackageNotFoundError:
        continue
    found[key] = f"{name}=={one.version}"
    left += [re.split(r"[^\w.-]", need)[0] for need in one.requires or () if "extra ==" not in need]
found.pop("qvlm-hf")
print(*found.values())
NAMES
    du -sh "$wheels"
}

if [ "${1:-}" = carry ]; then carry; exit; fi
export PYTHONPATH="$PWD:$PWD/tests:$PWD/tests/ops:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
first=(install precompile check kernels decode tiles) second=(install generate calibration)
# Seconds of each part: 480 and 230 in all.
declare -A seconds=([install]=30 [precompile]=45 [check]=95 [kernels]=125 [decode]=115 [tiles]=70 [generate]=120 [calibration]=80)
case "${1:-first}" in first) set -- "${first[@]}" ;; second) set -- "${second[@]}" ;; esac
for name; do
    [[ -n ${seconds[$name]:-} ]] || { echo "tests/gpu/run.sh: no part is called '$name': ${!seconds[*]}" >&2; exit 2; }
done
out=${OUT:-tests/bench/results}
mkdir -p "$out" && out=$(realpath "$out")
dry=() && [ -z "${DRY:-}" ] || dry=(--dry)

install() { # and the shortest sign of life
    if compgen -G "$wheels/*.whl" >/dev/null; then
        python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl || return
    fi
    python3 - <<'ALIVE'
import os
from importlib.metadata import version

import tiny_models
import torch

import qvlm_hf
from qvlm_hf.bench.random_models import random_model
from qvlm_hf.cli.shapes import plan
from qvlm_hf.hub.saved import empty_model

print(", ".join(f"{name} {version(name)}" for name in ("qvlm_hf", "torch", "transformers", "pytest")))
device = torch.device("cpu" if os.environ["DRY"] else "cuda")
config = tiny_models.tiny_llava().config
modules = plan(empty_model(config), "W4A8").report.modules
model = random_model(config, dtype=torch.bfloat16, device=device, modules=modules)
ids = torch.tensor([[1, 5, 6]], device=device)
print(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False).tolist())
print({row.kernel for row in qvlm_hf.precision_table(model)})
ALIVE
}
precompile() {
    local capability processes=14 every=1
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
    [ -z "${DRY:-}" ] || processes=1 every=200
    python3 tests/gpu/precompile.py --capability "${capability:-90}" --processes "$processes" --every "$every"
}
check() { python3 -m pytest -q -m gpu -n "${DRY:-8}" tests/gpu; } # kernels are compiled by the dozen
layer() { # out_features, in_features, minutes, tokens
    python3 tests/gpu/bench_kernels.py --out-features "$1" --in-features "$2" --minutes "$3" --tokens "${@:4}" --rounds 20 \
        --output "$out/kernels_$1.json" "${dry[@]}"
}
kernels() {
    if [ -n "${DRY:-}" ]; then layer 256 256 .5 1 16; return; fi
    layer 4096 4096 1.1 1 16 608 && layer 11008 4096 .8 1 16 608
}
decode() {
    local shape=llava-1.5-7b && [ -z "${DRY:-}" ] || shape=demo-1b
    python3 tests/gpu/decode_graph.py --shape "$shape" --output "$out/decode.jsonl" "${dry[@]}"
}
tiles() {
    local minutes=.9 && [ -z "${DRY:-}" ] || minutes=.1
    python3 tests/gpu/tune_tiles.py --minutes "$minutes" --output "$out/tiles.jsonl" "${dry[@]}"
}
generate() {
    local sizes=(--device cuda --shape llava-1.5-7b --lm-head-bits 8 --prompt-tokens 608 --new-tokens 32)
    [ -z "${DRY:-}" ] || sizes=(--device cpu --shape demo-1b --images 0 --prompt-tokens 8 --new-tokens 2)
    local scheme wrong=0
    for scheme in W4A8 W4A4; do # a command writes at its end
        python3 -m qvlm_hf bench "${sizes[@]}" --rounds 2 --scheme "$scheme" --json "$out/generate_$scheme.json" || wrong=1
    done
    return "$wrong"
}
calibration() { # layers are calibrated one after the other: four of them tell the time of all
    local sizes=(--device cuda --shape llava-1.5-7b --layers 4 --samples 16)
    [ -z "${DRY:-}" ] || sizes=(--device cpu --shape demo-1b --layers 1 --samples 2)
    python3 tests/gpu/calibrate_shape.py "${sizes[@]}" --scheme W4A4 --json "$out/calibration.json"
}
site=$(mktemp -d)
export PYTHONPATH="$PYTHONPATH:$site" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$site/triton}" site out wheels
trap 'rm -rf "$site"' EXIT
export -f layer "${!seconds[@]}"
export DRY="${DRY:-}"

exec > >(tee -a "$out/log.txt") 2>&1
failed=()
for name; do
    limit=${seconds[$name]} && [ -z "$DRY" ] || limit=$((5 * limit))
    echo "== $name, at most $limit seconds"
    start=$SECONDS
    timeout --kill-after=5 "$limit" bash -c "dry=(${dry[*]}); $name" || failed+=("$name (exit $?)")
    echo "== $name took $((SECONDS - start)) seconds"
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
