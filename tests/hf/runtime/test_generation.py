"""Text that a saved model generates, against the same model with nothing plugged in and no cache.

Every way to generate must give the tokens that Transformers alone gives when it computes the whole
text anew for each token. Weights are quantized in both; float32, so that equal means equal.
"""

import copy
import inspect
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_models import save_tiny
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, StaticCache

import qvlm_hf
from qvlm_hf import QVLMConfig, save_quantized
from qvlm_hf.demo import model_dir
from qvlm_hf.hf.runtime.fusion import leave_to_transformers

NEW_TOKENS = 32
MODELS = ("demo", "tiny", "grouped queries")
COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name -> a quantized model's directory."""
    sources = {"demo": model_dir()}
    for name, heads in (("tiny", None), ("grouped queries", 2)):
        folder = tmp_path_factory.mktemp("source")
        sources[name] = save_tiny(folder, key_value_heads=heads)
    directories = {}
    for name, source in sources.items():
        config = QVLMConfig(scheme="W4A8", activation_granularity="dynamic_token", lm_head_bits=8)
        model = AutoModelForImageTextToText.from_pretrained(source, quantization_config=config)
        processor = AutoProcessor.from_pretrained(source)
        folder = tmp_path_factory.mktemp("saved") / "model"
        report = model.hf_quantizer.report
        directories[name] = save_quantized(model, processor, folder, report=report)
    return directories


def load(directory, **options):
    return AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32, **options)


@pytest.fixture(scope="module", params=MODELS)
def pair(request, saved):
    """The model as a user has it, what Transformers alone makes of it, and its processor."""
    directory = saved[request.param]
    model, plain = load(directory), load(directory)
    with pytest.warns(UserWarning, match="for comparison"):
        leave_to_transformers(plain, "for comparison")
    assert model.stepped_aside == ()
    return model, plain, AutoProcessor.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(pair):
    return pair[0]


def picture(seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def prompts(processor, pictures, words=("what colour", "how many there", "what")):
    """Prompts with that many pictures each, padded on the left."""
    texts, images = [], []
    for row, count in enumerate(pictures):
        words_of_row = words[row % len(words)]
        content = [{"type": "image"}] * count + [{"type": "text", "text": words_of_row}]
        chat = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
        images.append([picture(10 * row + place) for place in range(count)])
    pictured = {"images": images} if any(images) else {}
    found = processor(
        text=texts, **pictured, padding=True, padding_side="left", return_tensors="pt"
    )
    return dict(found)


def answer(model, inputs, **options):
    """Greedily generated tokens [batch, new]: no end of text, and no picture's placeholder."""
    defaults = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "suppress_tokens": [model.config.image_token_id],
        "do_sample": False,
        "disable_compile": True,
    }
    found = model.generate(**inputs, **(defaults | options))
    return found[:, inputs["input_ids"].shape[1] :]


def cache_argument(model):
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


CASES = {
    "one picture": ([1], {}),
    "no picture": ([0, 0], {}),
    "several pictures": ([2], {}),
    "a batch padded on the left": ([1, 1, 1], {}),
    "a batch of one and three pictures": ([1, 3], {}),
    "beams": ([1, 1], {"num_beams": 3}),
    "beams, all returned": ([1], {"num_beams": 3, "num_return_sequences": 3}),
    "a static cache": ([1, 1], {"cache_implementation": "static"}),
    "prompt lookup": ([1], {"prompt_lookup_num_tokens": 4}),
    "chunks of the prompt": ([0, 0], {"prefill_chunk_size": 3}),
    "penalties": ([1], {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}),
}
ONLY_WITH_A_CACHE = {"cache_implementation", "prompt_lookup_num_tokens", "prefill_chunk_size"}


@pytest.mark.parametrize("case", CASES)
def test_the_text_is_that_of_transformers_without_a_cache(pair, case):
    model, plain, processor = pair
    pictures, options = CASES[case]
    inputs = prompts(processor, pictures)
    shared = {name: value for name, value in options.items() if name not in ONLY_WITH_A_CACHE}
    expected = answer(plain, inputs, use_cache=False, **shared)
    assert expected.shape[1] == NEW_TOKENS
    assert torch.equal(answer(model, inputs, **options), expected)


@pytest.mark.parametrize("make", [DynamicCache, StaticCache], ids=lambda kind: kind.__name__)
def test_a_cache_that_is_passed_in_can_be_continued(pair, make):
    """A conversation: the second call gets the first one's cache and the whole text so far."""
    model, plain, processor = pair
    inputs = prompts(processor, [1])
    text = model.config.get_text_config(decoder=True)
    options = {"max_cache_len": 128} if make is StaticCache else {}
    given = {cache_argument(model): make(config=text, **options)}
    first = answer(model, inputs, **given, max_new_tokens=9, min_new_tokens=9)
    assert torch.equal(first, answer(plain, inputs, use_cache=False)[:, :9])
    more = prompts(processor, [0])["input_ids"]
    ids = torch.cat((inputs["input_ids"], first, more), 1)
    longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pictured = longer | {"pixel_values": inputs["pixel_values"]}
    expected = answer(plain, pictured, use_cache=False, max_new_tokens=9, min_new_tokens=9)
    found = answer(model, longer, **given, max_new_tokens=9, min_new_tokens=9)
    assert torch.equal(found, expected)


MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "gradients": nullcontext}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_steps_with_a_cache_are_the_pass_without_one(pair, mode, backend):
    """As somebody decodes by hand; with gradients too, where generate does not go."""
    model, plain, processor = pair
    inputs = prompts(processor, [1])
    expected = answer(plain, inputs, use_cache=False)
    name, tokens = cache_argument(model), []
    qvlm_hf.set_backend(model, backend)
    try:
        with MODES[mode]():
            out = model(**inputs, use_cache=True, logits_to_keep=1)
            for _ in range(NEW_TOKENS):
                logits = out.logits[:, -1].detach().clone()
                never = [model.generation_config.eos_token_id, model.config.image_token_id]
                logits[:, never] = float("-inf")
                tokens.append(logits.argmax(-1, keepdim=True))
                out = model(input_ids=tokens[-1], **{name: out[name]}, use_cache=True)
            assert out.logits.requires_grad == (mode == "gradients" and _trains(model))
            assert out[name].get_seq_length() == inputs["input_ids"].shape[1] + NEW_TOKENS
    finally:
        qvlm_hf.set_backend(model, "auto")
    assert torch.equal(torch.cat(tokens, 1), expected)


def _trains(model):
    return any(parameter.requires_grad for parameter in model.parameters())


def test_the_reference_backend_generates_the_same(pair):
    model, plain, processor = pair
    inputs = prompts(processor, [1, 1])
    qvlm_hf.set_backend(model, "reference")
    try:
        found = answer(model, inputs)
    finally:
        qvlm_hf.set_backend(model, "auto")
    assert torch.equal(found, answer(plain, inputs, use_cache=False))


def test_lora_trains_a_step_and_generates(pair):
    model, _, processor = pair
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    inputs = prompts(processor, [1, 1])
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    before = answer(adapted, inputs)
    assert not torch.equal(before, answer(model, inputs))  # the adapters count
    losses = []
    for _ in range(2):
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    assert torch.equal(answer(adapted, inputs), answer(adapted, inputs, use_cache=False))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "bits"), [("quanto", 4), ("hqq", 8)])
def test_a_quantized_cache(pair, backend, bits):
    """Keys and values lose bits, in the same way with and without what plugs in."""
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
    model, plain, processor = pair
    inputs = prompts(processor, [1, 1])
    options = {
        "cache_implementation": "quantized",
        "cache_config": {
            "backend": backend,
            "nbits": bits,
            "q_group_size": 16,
            "residual_length": 8,
        },
    }
    assert torch.equal(answer(model, inputs, **options), answer(plain, inputs, **options))


def test_threads_and_forks_share_a_model(saved):
    model = load(saved["demo"])
    inputs = [{"input_ids": torch.arange(start, start + 24).view(2, 12)} for start in range(5, 9)]
    alone = [answer(model, one) for one in inputs]
    with ThreadPoolExecutor(len(inputs)) as pool:
        for _ in range(3):
            assert all(map(torch.equal, pool.map(partial(answer, model), inputs), alone))
    child = os.fork()
    if not child:
        differs = True
        try:
            torch.set_num_threads(1)  # PyTorch's threads are not forked, and it would wait for them
            differs = not torch.equal(answer(model, inputs[0]), alone[0])
        finally:
            os._exit(differs)
    assert os.waitpid(child, 0)[1] == 0
