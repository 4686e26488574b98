"""Run in a fresh process where qvlm_hf cannot be imported: loads exported models.

Usage: fresh_exported.py INPUTS OUT DIRECTORY...
"""

import sys

import torch


class Missing:
    """Makes a package impossible to import."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "qvlm_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

torch.set_num_threads(2)
inputs, results = torch.load(sys.argv[1]), {}
for directory in sys.argv[3:]:
    model, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    fed = {
        name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    with torch.no_grad():
        logits = model(**fed).logits
    results[directory] = {
        "logits": logits,
        "weight": model.get_submodule("model.language_model.layers.1.mlp.down_proj")
        .weight.detach()
        .clone(),
        "problems": {name: sorted(map(str, found)) for name, found in info.items() if found},
        "processor": type(AutoProcessor.from_pretrained(directory)).__name__,
    }
torch.save(results, sys.argv[2])
