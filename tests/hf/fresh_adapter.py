"""Run in a fresh process: loads an adapter in the three ways that PEFT and Transformers offer and
writes what each model answers.

Usage: fresh_adapter.py INPUTS OUT QUANTIZED ADAPTER
"""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

import qvlm_hf  # noqa: F401 - registers "qvlm"

torch.set_num_threads(2)
inputs, quantized, adapter = torch.load(sys.argv[1]), *sys.argv[3:]
loaded = AutoModelForImageTextToText.from_pretrained(quantized)
loaded.load_adapter(adapter)
models = {
    "PeftModel": PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(quantized), adapter
    ),
    "load_adapter": loaded,
    "from_pretrained": AutoModelForImageTextToText.from_pretrained(adapter),
}
with torch.no_grad():
    torch.save({name: model(**inputs).logits for name, model in models.items()}, sys.argv[2])
