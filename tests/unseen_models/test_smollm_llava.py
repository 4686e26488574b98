"""A real language model of awkward sizes, from a few chats: kept, reloaded, and its language."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from qvlm_hf import QVLMConfig, save_quantized
from qvlm_hf.calibration.samples import batches, load_samples
from qvlm_hf.hf.runtime.decoding import check_decoding
from unseen_models.smollm_llava import smollm_llava
from unseen_models.text import compare_text, read_texts, text_logits

pytestmark = pytest.mark.slow

load = AutoModelForImageTextToText.from_pretrained


@pytest.fixture(scope="module")
def full():
    """The directory, the processor, and what full precision says of the prose."""
    path = smollm_llava()
    processor = AutoProcessor.from_pretrained(path)
    model = load(path, dtype=torch.float32)
    texts = read_texts(6, processor.tokenizer, model)
    return path, processor, texts, text_logits(model, texts)


def perplexity(model, full):
    _, _, texts, logits = full
    return compare_text(logits, text_logits(model, texts))["perplexity"]


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8"])
def test_it_is_quantized_from_a_few_chats(full, tmp_path, scheme):
    path, processor, _, _ = full
    rounded = load(
        path,
        dtype=torch.float32,
        quantization_config=QVLMConfig(scheme=scheme, activation_granularity="dynamic_token"),
    )
    bound = perplexity(rounded, full)  # plain rounding: the least to ask for
    del rounded
    config = QVLMConfig(
        scheme=scheme,
        dataset=path / "calibration.jsonl",
        processor=processor,
        num_samples=16,
        max_block_depth=1,
        guard=False,
        written_text=True,
    )
    model = load(path, dtype=torch.float32, quantization_config=config)
    report = model.hf_quantizer.report
    assert len(report.modules) == 5 * 6 + 2 + 30 * 7
    assert report.decode_check.tokens > 0
    # of a model this small the embeddings are much
    assert all("of the weights are quantized" in warning for warning in report.warnings)
    assert perplexity(model, full) <= bound

    samples = load_samples(path / "test.jsonl", num_samples=3)
    prompts = [sample.messages[:1] for sample in samples]
    inputs = next(batches(load_samples([{"messages": p} for p in prompts]), processor, 1)).inputs
    options = {"max_new_tokens": 12, "do_sample": False}
    # not by greedy text: a sum in another order puts a massive activation on another level
    assert check_decoding(model, inputs).kl < 1e-6
    with torch.no_grad():
        answers = model.generate(**inputs, **options)
        logits = model(**inputs).logits

    save_quantized(model, processor, tmp_path / "saved", report=report)
    again = load(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, logits)
        assert torch.equal(again.generate(**inputs, **options), answers)
