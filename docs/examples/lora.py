"""Trains a LoRA adapter on what calibrate.py saved; the packed weights stay as they are."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

import qvlm_hf  # noqa: F401 - teaches Transformers the format
from qvlm_hf.calibration.samples import batches, load_samples
from qvlm_hf.demo import dataset_path

DIRECTORY = "qvlm-w4a4"
QUESTIONS = dataset_path("calibration")
OUTPUT = "adapter"

processor = AutoProcessor.from_pretrained(DIRECTORY)
model = AutoModelForImageTextToText.from_pretrained(DIRECTORY)
adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)

adapted.train()
for batch in batches(load_samples(QUESTIONS, num_samples=64), processor, 8):
    loss = adapted(**batch.inputs, labels=batch.labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")
adapted.eval().save_pretrained(OUTPUT)
