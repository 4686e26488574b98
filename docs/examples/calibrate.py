"""Calibrates a model on questions of its task, and saves it."""

from transformers import AutoModelForImageTextToText, AutoProcessor

import qvlm_hf
from qvlm_hf.demo import dataset_path, model_dir

MODEL = model_dir()  # or "llava-hf/llava-1.5-7b-hf"
QUESTIONS = dataset_path("calibration")  # or your own: "questions.jsonl"
OUTPUT = "qvlm-w4a4"

processor = AutoProcessor.from_pretrained(MODEL)
config = qvlm_hf.QVLMConfig(scheme="W4A4", dataset=QUESTIONS, processor=processor)
model = AutoModelForImageTextToText.from_pretrained(MODEL, quantization_config=config)

report = model.hf_quantizer.report
print(*report.warnings, sep="\n")
print(f"agrees with full precision on {report.self_check.agreement:.1%} of the answers' tokens")
qvlm_hf.save_quantized(model, processor, OUTPUT, report=report)
