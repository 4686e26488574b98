"""Run in a fresh process that never imports qvlm_hf: prints, as JSON, how loading each saved
directory ends.
"""

import json
import sys

from transformers import AutoModelForImageTextToText

outcomes = {}
for directory in sys.argv[1:]:
    try:
        AutoModelForImageTextToText.from_pretrained(directory)
        outcomes[directory] = "loaded"
    except Exception as error:
        outcomes[directory] = f"{type(error).__name__}: {error}"
outcomes["imported"] = "qvlm_hf" in sys.modules
sys.stdout.write(json.dumps(outcomes))
