"""Run in a fresh process with an empty HF_HOME: loads repositories by id and writes their logits.

Usage: fresh_load.py INPUTS OUT ID...
"""

import sys

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import qvlm_hf  # noqa: F401 - registers the quantizer

torch.set_num_threads(2)
inputs, found = torch.load(sys.argv[1]), {}
for name in sys.argv[3:]:
    model = AutoModelForImageTextToText.from_pretrained(name)
    assert AutoProcessor.from_pretrained(name).chat_template
    with torch.no_grad():
        found[name] = model(**inputs[name]).logits
torch.save(found, sys.argv[2])
