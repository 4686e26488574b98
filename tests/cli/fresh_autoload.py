"""In a fresh process without qvlm_hf: asks a saved model about a picture, also by a pipeline."""

import json
import sys

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

directory, picture, question = sys.argv[1:]
torch.set_num_threads(2)  # as in the tests: sums depend on how they are split
spared = "qvlm_hf" not in sys.modules
content = [{"type": "image", "path": picture}, {"type": "text", "text": question}]
messages = [{"role": "user", "content": content}]
model = AutoModelForImageTextToText.from_pretrained(directory)
inputs = AutoProcessor.from_pretrained(directory).apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    logits = model(**inputs).logits[0, -1]
(said,) = pipeline("image-text-to-text", model=directory)(
    text=messages, max_new_tokens=4, return_full_text=False
)
answer = {
    "spared": spared,
    "method": model.quantization_method,
    "logits": logits.tolist(),
    "answer": said["generated_text"].strip(),
}
sys.stdout.write(json.dumps(answer))
