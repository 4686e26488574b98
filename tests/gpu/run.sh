#!/usr/bin/env bash
# Every check and measurement that needs a GPU, in under 20 minutes. Parts run by themselves: tests/gpu/run.sh check kernels
#   OUT=DIR   where results go (default: tests/bench/results)
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/tests:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
out=${OUT:-tests/bench/results}
device=$(python3 -c 'import torch; print(torch.cuda.get_device_name(0).lower().replace("nvidia ", "").replace(" ", "-"))' 2>/dev/null) || {
    echo "tests/gpu/run.sh: PyTorch finds no CUDA device here." >&2
    exit 1
}
bench() { python3 -m qvlm_hf bench --device cuda "$@"; }
declare -A minutes=([check]=4 [kernels]=4 [models]=7 [calibration]=4)

check() { python3 -m pytest --no-cov -q -m gpu tests/gpu; }
kernels() {
    python3 tests/gpu/bench_kernels.py --out-features 4096 --in-features 4096 --minutes 2 --output "$out/kernels_${device}_4096.json" &&
        python3 tests/gpu/bench_kernels.py --out-features 13824 --in-features 5120 --minutes 2 --output "$out/kernels_${device}_13824.json"
}
models() {
    for shape in llava-1.5-7b llava-1.5-13b; do
        for mode in "" --compile; do
            bench --shape "$shape" --scheme W4A8 W8A8 W4A4 --lm-head-bits 8 --prompt-tokens 608 --new-tokens 128 --rounds 3 $mode \
                --json "$out/bench_${device}_${shape}${mode:+_graphs}.json" || return
        done
    done
}
calibration() {
    python3 tests/gpu/calibrate_shape.py --shape llava-1.5-7b --scheme W4A4 --json "$out/calibration_${device}_7b.json"
}
export -f bench check kernels models calibration
export out device

failed=()
for part in "${@:-check kernels models calibration}"; do
    for name in $part; do
        [[ -n ${minutes[$name]:-} ]] || { echo "tests/gpu/run.sh: no part is called '$name': ${!minutes[*]}" >&2; exit 2; }
        echo "== $name, at most ${minutes[$name]} minutes"
        timeout "$((minutes[$name] * 60))" bash -c "$name" || failed+=("$name (exit $?)")
    done
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}" >&2; exit 1; }
