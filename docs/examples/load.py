"""Loads what calibrate.py saved, asks about a picture, and shows what computes each module."""

from transformers import AutoModelForImageTextToText, AutoProcessor

import qvlm_hf  # teaches Transformers the format
from qvlm_hf.demo import dataset_path

DIRECTORY = "qvlm-w4a4"  # or a repository on the Hub
PICTURE = dataset_path("test").parent / "images" / "test" / "0001.png"
QUESTION = "Which shape is at the top left?"

processor = AutoProcessor.from_pretrained(DIRECTORY)
model = AutoModelForImageTextToText.from_pretrained(DIRECTORY)

content = [{"type": "image", "path": str(PICTURE)}, {"type": "text", "text": QUESTION}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.dtype)
output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(qvlm_hf.format_precision_table(qvlm_hf.precision_table(model)))
