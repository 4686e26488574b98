"""Compares what calibrate.py saved with full precision, on the same questions."""

from transformers import AutoModelForImageTextToText, AutoProcessor

import qvlm_hf  # noqa: F401 - teaches Transformers the format
from qvlm_hf.calibration.samples import load_samples
from qvlm_hf.demo import dataset_path, model_dir
from qvlm_hf.evaluation import evaluate, format_comparison

DIRECTORY = "qvlm-w4a4"
MODEL = model_dir()  # in full precision
QUESTIONS = dataset_path("test")  # that calibration has not seen

result = evaluate(
    AutoModelForImageTextToText.from_pretrained(DIRECTORY),
    load_samples(QUESTIONS, num_samples=200, seed=0),
    AutoProcessor.from_pretrained(DIRECTORY),
    reference=AutoModelForImageTextToText.from_pretrained(MODEL),
)
print(*format_comparison(result), sep="\n")
