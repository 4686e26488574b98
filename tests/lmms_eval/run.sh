#!/usr/bin/env bash
# lmms-eval, unchanged, evaluates a quantized demo model: with `qvlm autoload install` it counts what `qvlm evaluate` counts, without it fails.
# Takes minutes and installs lmms-eval into a virtual environment of its own, beside the packages of the python that runs this.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
questions=${1:-600}

python -m venv "$work/venv"
packages=$(echo "$work"/venv/lib/python3*/site-packages)
python -c 'import pathlib, site, qvlm_hf; print(pathlib.Path(qvlm_hf.__file__).parents[1], *site.getsitepackages(), sep="\n")' > "$packages/zz_packages.pth"
demo=$(python -c 'from qvlm_hf.demo import dataset_path; print(dataset_path("test").parent)')
model=$(python -c 'from qvlm_hf.demo import model_dir; print(model_dir())')
python -m pip list --format=freeze | grep -E '^(torch|transformers|accelerate|huggingface.hub|tokenizers|datasets|numpy)==' > "$work/kept.txt"
source "$work/venv/bin/activate"
# lmms-eval 0.7.3 reads a module that filelock 4 no longer has
pip install --quiet lmms-eval==0.7.3 decord==0.6.0 "filelock<4" --constraint "$work/kept.txt"
# registries have it for PyTorch with CUDA only; lmms-eval asks for it and needs it for other models
python -c 'import torchvision' 2> /dev/null || pip uninstall --quiet --yes torchvision

cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/cache"
head -n "$questions" "$demo/test.jsonl" > questions.jsonl
ln -s "$demo/images" images
python -m qvlm_hf quantize "$model" --scheme W4A16 --method rtn --output w4a16

lmms() {
    python -m lmms_eval --model llava_hf --model_args pretrained=w4a16,device=cpu,device_map=cpu --batch_size 1 \
        --tasks qvlm_demo --include_path "$here" --log_samples --output_path "$1" 2>&1 | tee "$1.log" | grep -E '^\|qvlm_demo|Error:' || true
}

lmms without
if ls without/*/*samples* 2> /dev/null; then
    echo "lmms-eval loaded the model without autoload"
    exit 1
fi
grep -q '^RuntimeError: .*ignore_mismatched_sizes' without.log

python -m qvlm_hf autoload install
lmms with
if ! ls with/*/*samples_qvlm_demo.jsonl > /dev/null 2>&1; then
    tail -n 20 with.log
    exit 1
fi
python -m qvlm_hf evaluate w4a16 --dataset questions.jsonl --json evaluation.json
python "$here/compare.py" with/*/*samples_qvlm_demo.jsonl evaluation.json
