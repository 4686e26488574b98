"""Run in a fresh process: loads saved directories and writes what the models answer.

Usage: fresh_reload.py INPUTS OUT DIRECTORY...
"""

import sys

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import qvlm_hf

torch.set_num_threads(2)
inputs, results = torch.load(sys.argv[1]), {}
for directory in sys.argv[3:]:
    model, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    fed = {
        name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    with torch.no_grad():
        logits, tokens = (
            model(**fed).logits,
            model.generate(**fed, max_new_tokens=6, do_sample=False),
        )
    results[directory] = {
        "logits": logits,
        "tokens": tokens,
        "problems": {name: sorted(map(str, found)) for name, found in info.items() if found},
        "report": model.hf_quantizer.report,
        "trainable": [
            name
            for name, p in model.named_parameters()
            if p.requires_grad and ".layers." in name and "norm" not in name
        ],
        "rows": {row.kernel.split()[0] for row in qvlm_hf.precision_table(model)},
    }
processor = AutoProcessor.from_pretrained(sys.argv[3])
prompt = processor.apply_chat_template(
    [{"role": "user", "content": [{"type": "text", "text": "what colour ?"}]}],
    add_generation_prompt=True,
)
answer = pipeline("image-text-to-text", model=sys.argv[3])(
    text=prompt, max_new_tokens=4, generate_kwargs={"do_sample": False}
)
results["pipeline"] = answer[0]["generated_text"]
torch.save(results, sys.argv[2])
