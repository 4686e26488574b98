#!/usr/bin/env bash
# Every check and measurement that needs a GPU, in under 20 minutes; parts run by themselves: tests/gpu/run.sh check kernels
# Needs the package installed (`pip install --no-deps .` is enough beside PyTorch, Triton and Transformers) and pytest.
#   OUT=DIR   where results go, each when its part ends (default: tests/bench/results)
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/tests:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# Seconds, and the order; the last needs its name: what calibrating a whole model takes is not known yet.
order=(check kernels models_7b graphs_7b models_13b graphs_13b calibration)
declare -A seconds=(
    [check]=170 [kernels]=240 [models_7b]=120 [graphs_7b]=210 [models_13b]=120 [graphs_13b]=210 [calibration]=120
    [calibration_full]=600 [tiles]=480
)

(($#)) || set -- "${order[@]}"
for name; do
    [[ -n ${seconds[$name]:-} ]] || { echo "tests/gpu/run.sh: no part is called '$name': ${!seconds[*]}" >&2; exit 2; }
done
python3 - <<'PREFLIGHT' || exit 1
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    print(", ".join(f"{name} {version(name)}" for name in ("qvlm_hf", "torch", "transformers", "triton", "pytest")))
    import torch

    import qvlm_hf
except (ImportError, PackageNotFoundError) as error:
    sys.exit(f"tests/gpu/run.sh: {error}: install the package and pytest first.")
if not torch.cuda.is_available():
    sys.exit("tests/gpu/run.sh: PyTorch finds no CUDA device here.")
PREFLIGHT
out=${OUT:-tests/bench/results}
mkdir -p "$out" && out=$(realpath "$out")
device=$(python3 -c 'import torch; print(torch.cuda.get_device_name(0).lower().replace("nvidia ", "").replace(" ", "-"))')
check() { # kernels are compiled by the dozen: in several processes where pytest-xdist is there
    local workers=()
    python3 -c 'import xdist' 2>/dev/null && workers=(-n 8)
    python3 -m pytest -q -m gpu "${workers[@]}" tests/gpu
}
layer() { # out_features, in_features, minutes
    python3 tests/gpu/bench_kernels.py --out-features "$1" --in-features "$2" --minutes "$3" --output "$out/kernels_${device}_$1.json"
}
kernels() { layer 4096 4096 2.3 && layer 13824 5120 1.2; } # the second finds most kernels compiled
bench() { # shape, name of the result, options; PEERS=1 times other packages too
    local program=(-m qvlm_hf bench)
    [ -z "${PEERS:-}" ] || program=(tests/bench/peers.py)
    python3 "${program[@]}" --device cuda --shape "$1" --lm-head-bits 8 --prompt-tokens 608 --rounds 3 --json "$out/bench_${device}_$1$2.json" "${@:3}"
}
models_7b() { PEERS=1 bench llava-1.5-7b "" --scheme W4A8 W8A8 W4A4 --new-tokens 32; }
models_13b() { bench llava-1.5-13b "" --scheme W4A8 W8A8 --new-tokens 32; }
# Two ways: compiling a model takes a minute.
graphs_7b() { bench llava-1.5-7b _graphs --scheme W4A8 --new-tokens 128 --compile; }
graphs_13b() { bench llava-1.5-13b _graphs --scheme W4A8 --new-tokens 128 --compile; }
calibration() { # layers are calibrated one after the other: a quarter of them tells the time of all
    python3 tests/gpu/calibrate_shape.py --shape llava-1.5-7b --scheme W4A4 --layers 8 --json "$out/calibration_${device}_7b_8layers.json"
}
calibration_full() { python3 tests/gpu/calibrate_shape.py --shape llava-1.5-7b --scheme W4A4 --json "$out/calibration_${device}_7b.json"; }
tiles() { python3 tests/gpu/tune_tiles.py --minutes 7; }
export -f layer bench "${!seconds[@]}"
export out device

failed=()
for name; do
    echo "== $name, at most ${seconds[$name]} seconds"
    start=$SECONDS
    timeout --kill-after=10 "${seconds[$name]}" bash -c "$name" || failed+=("$name (exit $?)")
    echo "== $name took $((SECONDS - start)) seconds"
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}" >&2; exit 1; }
