"""What the library says in Python's words, in those of the command line: its messages name arguments, a terminal has options."""

import re

__all__ = ["in_options"]

# Arguments of the library that are options of `qvlm quantize`, `publish` or `evaluate`.
_OPTIONS = (
    "activation_granularity", "base_model", "batch_size", "create_pr", "dataset", "dtype", "group_size", "license", "max_block_depth",
    "modules_to_not_convert", "num_samples", "precision_budget", "private", "revision", "rotation", "scheme", "seed", "strict", "symmetric",
)  # fmt: skip
_NAME = rf"(?<![\w/.\"'-])({'|'.join(_OPTIONS)})"
_VALUE = r"('[^']*'|\"[^\"]*\"|\[[^\]]*\]|[^\s,;:()/]*[^\s,;:()./](?![\w/]))"  # no path

# Pattern -> replacement, in this order: whole remedies first, then arguments by their form.
_RULES: tuple[tuple[str, str], ...] = (
    (r"pass QVLMConfig\(dataset='samples\.jsonl', processor=\.\.\.\)", "give --dataset F"),
    (r"pass dataset= and processor= to QVLMConfig", "give --dataset F"),
    (r"pass a dataset\b", "give --dataset F"),
    (r"\(quantize_vision=False, quantize_projector=False, or both in modules_to_not_convert\)",
     "(--modules-to-not-convert vision_tower multi_modal_projector)"),
    (r"\(guard=False, precision_budget=None, lm_head_bits=None\)", "(--method rtn)"),
    (r"use more bits or activation_granularity=None, or calibrate", "use more bits, leave out --activation-granularity, or calibrate"),
    (r"; use AutoProcessor\.from_pretrained\(model\)", "; name a model that was saved with its processor"),
    (r"set processor\.chat_template, or load the processor of a chat model",
     "put a chat_template.jinja beside the model, or take a chat model"),
    (r"set processor\.tokenizer\.pad_token = processor\.tokenizer\.eos_token", 'set "pad_token" in the model\'s tokenizer_config.json'),
    (r"save it there with processor\.save_pretrained", "quantize the model again, which saves it there, or copy its files"),
    (r"leave it out \(qvlm_hf\.calibration\.samples\.without_too_long does\), or shorten it", "leave it out, or shorten it"),
    (r", set HF_TOKEN or pass token=", " or set HF_TOKEN"),
    (r": take 'other' with license_name and license_link", ": take one that the Hub lists, as in apache-2.0"),
    (r"\bsave_quantized or qvlm quantize\b|\bqvlm quantize or save_quantized\b", "qvlm quantize"),
    (r"use batch size 1\b", "use --batch-size 1"),
    # one sample that the command itself made of its arguments
    (r'^dataset\[0\]: key "image":? ', "--image: "),
    (r'^dataset\[0\]: key "question" (.*); (.*) or remove the sample', r"the question \1; \2"),
    (r"^dataset\[0\]: ", ""),
    (r"(^--image: .*); paths are relative to the dataset file, of samples in memory to the working directory",
     r"\1; paths are relative to the working directory"),
    (r"(^--image: .*); replace it or remove the sample", r"\1; give another"),
    # arguments
    (r"\btorch\.(float\d+|bfloat16|u?int\d+)\b", r"\1"),
    (r"\brotation=None\b", "--rotation none"),
    (rf"{_NAME}=True\b", r"--\1"),
    (rf"{_NAME}=(?:False|None)\b", r"no --\1"),
    (rf"{_NAME}={_VALUE}", r"--\1 \2"),
    (r"\brepo_id='", "REPO '"),
    (r"^(dataset|num_samples|strict|modules_to_not_convert|batch_size)(?=:? )", r"--\1"),
    # our remedies alone: a column of somebody's data may have such a name
    (rf"\b(lower|raise|shorten|change) ({'|'.join(n for n in _OPTIONS if '_' in n)})\b", r"\1 --\2"),
    (r"\bor None to take all", "or leave it out to take all"),
    (r", or None(?= to |[ .;,]|$)", ", or left out"),
)  # fmt: skip


def in_options(message: str) -> str:
    """The same message for the command line: options instead of Python's arguments, in one line."""
    text = " ".join(message.split())
    for pattern, replacement in _RULES:
        text = re.sub(pattern, replacement, text)
    return re.sub(rf"--({'|'.join(_OPTIONS)})\b", lambda option: option[0].replace("_", "-"), text)
