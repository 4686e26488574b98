"""Nothing that the package calls is deprecated in the Transformers at hand."""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
# Everything from a full-precision model to text; what a warning of Transformers says goes to
# stderr.
CODE = """
import sys
sys.path.insert(0, sys.argv[1])
from tiny_models import save_tiny, tiny_messages, tiny_processor
from transformers import AutoModelForImageTextToText, pipeline
from qvlm_hf import QVLMConfig, save_quantized
from qvlm_hf.cli import main

source, output = save_tiny(sys.argv[2] + "/source"), sys.argv[2] + "/output"
config = QVLMConfig(
    scheme="W4A4", dataset=tiny_messages(6), processor=tiny_processor(), num_samples=4,
    batch_size=2, optimize_vision=True, lm_head_bits=8,
)
model = AutoModelForImageTextToText.from_pretrained(source, quantization_config=config)
save_quantized(model, tiny_processor(), output, report=model.hf_quantizer.report)
(chat,) = tiny_messages(1)
ask = pipeline("image-text-to-text", model=output)
ask(text=chat["messages"][:1], max_new_tokens=3, do_sample=False)
assert main(["check", output]) == 0
assert main(["bench", output, "--prompt-tokens", "20", "--new-tokens", "3", "--rounds", "2"]) == 0
model.dequantize()
print("all of it ran")
"""


def test_nothing_that_is_called_is_deprecated(tmp_path):
    command = [sys.executable, "-W", "always", "-c", CODE, str(TESTS), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TRANSFORMERS_VERBOSITY": "info"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all of it ran\n")
    # torch's own, of its own calls
    lines = [line for line in done.stderr.splitlines() if "site-packages/torch/" not in line]
    said = [line for line in lines if re.search("deprecat|will be removed|FutureWarning", line)]
    assert not said
