"""evaluate() against greedy generation, question by question, and against its own reference."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from tiny_models import tiny_llava, tiny_messages, tiny_processor

from qvlm_hf.calibration.samples import collate, load_samples, longest_sample, without_too_long
from qvlm_hf.evaluation import evaluate, format_comparison

PICTURE = Image.new("RGB", (32, 32), "green")
TEXT_ONLY = [
    {"image": None, "question": "which letter ?", "answer": "A"},
    {"image": PICTURE, "question": "what ?", "answer": "the green thing"},
]


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def samples():
    return [*load_samples(tiny_messages(8, seed=1)), *load_samples(TEXT_ONLY)]


@pytest.fixture(scope="module")
def trained(samples, processor):
    """A model that knows the even-numbered answers by heart, and few others."""
    torch.manual_seed(0)
    model = tiny_llava()
    batch = collate(samples[::2] + samples[-1:], processor)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**batch.inputs, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    return model.eval()


def greedy_is_right(model, sample, processor):
    """Generates from the prompt alone and compares with answer and end of sequence."""
    labels = collate([sample], processor).labels[0]
    answer = labels[labels != -100]
    inputs = collate([dataclasses.replace(sample, messages=sample.messages[:-1])], processor).inputs
    made = model.generate(**inputs, do_sample=False, max_new_tokens=len(answer))[0]
    return made[inputs["input_ids"].shape[1] :].tolist() == answer.tolist()


def test_agrees_with_greedy_generation(trained, samples, processor):
    expected = tuple(greedy_is_right(trained, sample, processor) for sample in samples)
    assert 5 <= sum(expected) < len(samples)  # the test needs both
    for batch_size in (1, 3, 16):
        evaluation = evaluate(trained, samples, processor, batch_size=batch_size)
        assert evaluation.correct == expected
    assert evaluation.accuracy.successes == sum(expected)
    assert evaluation.origins == tuple(sample.origin for sample in samples)
    assert evaluation.comparison is None
    assert evaluation.answer_logits is None


def test_end_of_sequence_counts(trained, samples, processor):
    """ "red" is not answered by a model that would go on after it."""
    right = samples[0]
    assert evaluate(trained, [right], processor).correct == (True,)
    eos = processor.tokenizer.eos_token_id

    def never_stop(_module, _inputs, logits):
        return logits.index_fill(-1, torch.tensor([eos]), -100.0)

    handle = trained.lm_head.register_forward_hook(never_stop)
    try:
        assert evaluate(trained, [right], processor).correct == (False,)
    finally:
        handle.remove()


def test_kinds(trained, samples, processor):
    evaluation = evaluate(trained, samples, processor)
    kinds = evaluation.by_kind
    assert list(kinds) == ["colour", "shape"]
    assert (kinds["colour"].total, kinds["shape"].total) == (4, 4)
    assert kinds["colour"].successes == sum(evaluation.correct[:8:2])
    assert kinds["shape"].successes == sum(evaluation.correct[1:8:2])


def test_published_columns_come_first_and_in_their_order(trained, samples, processor):
    columns = [("NAT", "TXT", "IMG", "G1-6"), ("SOC", "NO", "G7-12")] * 4
    placed = [dataclasses.replace(s, columns=c) for s, c in zip(samples[:8], columns, strict=True)]
    evaluation = evaluate(trained, placed, processor)
    assert list(evaluation.by_kind) == ["NAT", "SOC", "TXT", "IMG", "NO", "G1-6", "G7-12"]
    assert evaluation.by_kind["IMG"].total == 4
    assert evaluation.by_kind["SOC"].successes == sum(evaluation.correct[1:8:2])


def test_reference_model_and_kept_evaluation_agree(trained, samples, processor):
    reference = tiny_llava(seed=3)
    direct = evaluate(trained, samples, processor, batch_size=4, reference=reference)
    kept = evaluate(reference, samples, processor, batch_size=3, keep_logits=True)
    indirect = evaluate(trained, samples, processor, batch_size=16, reference=kept)
    found = direct.comparison
    assert found.kl == pytest.approx(indirect.comparison.kl, rel=1e-4)
    assert found.kl > 0.5
    assert found.counts == indirect.comparison.counts
    assert found.reference_accuracy == kept.accuracy
    assert found.counts.both_right + found.counts.only_second == direct.accuracy.successes
    assert found.answer_tokens == sum(len(logits) for logits in kept.answer_logits) == 9 * 2 + 4
    assert found.difference == pytest.approx(direct.accuracy.value - kept.accuracy.value)


def test_kl_is_the_mean_over_tokens(trained, samples, processor):
    reference = tiny_llava(seed=3)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            batch = collate([sample], processor)
            positions = (batch.labels[0] != -100).nonzero().flatten() - 1
            first, second = (
                model(**batch.inputs).logits[0, positions].log_softmax(-1)
                for model in (reference, trained)
            )
            total += (first.exp() * (first - second)).sum().item()
            tokens += len(positions)
    found = evaluate(trained, samples, processor, reference=reference).comparison
    assert found.kl == pytest.approx(total / tokens, rel=1e-4)


def test_model_against_itself(trained, samples, processor):
    found = evaluate(trained, samples, processor, reference=trained).comparison
    assert found.kl == 0.0
    assert (found.counts.only_first, found.counts.only_second) == (0, 0)
    assert (found.p_value, found.difference) == (1.0, 0.0)


def test_half_precision_and_models_without_logits_to_keep(trained, samples, processor):
    class Wrapped(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **inputs):
            return self.model(**inputs)

    whole = evaluate(Wrapped(trained), samples, processor, reference=trained)
    assert whole.correct == evaluate(trained, samples, processor).correct
    assert whole.comparison.kl == pytest.approx(0.0, abs=1e-8)
    half = evaluate(tiny_llava(dtype=torch.bfloat16), samples, processor, keep_logits=True)
    assert {logits.dtype for logits in half.answer_logits} == {torch.bfloat16}


def test_training_mode_is_restored_module_by_module(samples, processor):
    model = tiny_llava().train()
    model.model.vision_tower.eval()
    before = [module.training for module in model.modules()]
    seen = []
    handle = model.lm_head.register_forward_hook(
        lambda module, *_: seen.append((module.training, torch.is_inference_mode_enabled()))
    )
    evaluate(model, samples[:2], processor)
    handle.remove()
    assert [module.training for module in model.modules()] == before
    assert seen == [(False, True)]


def test_progress(trained, samples, processor):
    steps = []
    evaluate(trained, samples, processor, batch_size=4, progress=lambda *step: steps.append(step))
    assert steps == [(4, 10), (8, 10), (10, 10)]


def test_refuses(trained, samples, processor):
    (silent,) = load_samples([{"image": PICTURE, "question": "what ?"}])
    without = evaluate(trained, samples, processor)
    silence = r"^dataset\[0\]: has no answer to compare with; add one or leave the sample out$"
    with pytest.raises(ValueError, match=silence):
        evaluate(trained, [*samples, silent], processor)
    with pytest.raises(ValueError, match="evaluate got no samples"):
        evaluate(trained, [], processor)
    with pytest.raises(ValueError, match="batch_size=0 must be"):
        evaluate(trained, samples, processor, batch_size=0)
    with pytest.raises(ValueError, match="kept no logits; evaluate it with keep_logits=True"):
        evaluate(trained, samples, processor, reference=without)
    with pytest.raises(ValueError, match="evaluated on other samples"):
        evaluate(trained, samples[::-1], processor, reference=without)


def test_questions_without_positions_are_refused_and_can_be_left_out(samples, processor):
    model = tiny_llava()
    masks = [collate([sample], processor).inputs["attention_mask"] for sample in samples]
    limit = max(int(mask.sum()) for mask in masks) - 1
    model.config.text_config.max_position_embeddings = limit
    assert longest_sample(model) == limit
    told = rf"{limit + 1} tokens are more than the model's {limit} positions; leave it out"
    with pytest.raises(ValueError, match=rf"^dataset\[\d\]: {told}"):
        evaluate(model, samples, processor)
    fitting = without_too_long(samples, processor, limit)
    expected = [s.origin for s, mask in zip(samples, masks, strict=True) if mask.sum() <= limit]
    assert [sample.origin for sample in fitting] == expected
    assert len(evaluate(model, fitting, processor).correct) == len(fitting)


def test_broken_model_is_named(samples, processor):
    model = tiny_llava()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(ValueError, match=r"^dataset\[\d\]: the model's logits are not numbers"):
        evaluate(model, samples, processor)


def test_to_dict_is_json_without_logits(trained, samples, processor):
    options = {"reference": tiny_llava(seed=3), "keep_logits": True}
    evaluation = evaluate(trained, samples, processor, **options)
    data = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert set(data) == {"accuracy", "by_kind", "comparison", "data_fingerprint", "questions"}
    assert data["accuracy"]["correct"] == evaluation.accuracy.successes
    assert data["comparison"]["only_model"] == evaluation.comparison.counts.only_second
    second = {"origin": "dataset[1]", "kind": "shape", "correct": evaluation.correct[1]}
    assert data["questions"][1] == second
    assert evaluate(trained, samples[:1], processor).to_dict()["comparison"] is None


def test_format_comparison(trained, samples, processor):
    evaluation = evaluate(trained, samples[:1], processor)
    right = dataclasses.replace(
        evaluation,
        correct=(True,) * 942 + (False,) * 58,
        kinds=("easy",) * 900 + (None,) * 100,
        columns=((),) * 1000,
    )
    assert format_comparison(right) == [
        "quantized: accuracy 94.2 % [92.6, 95.5] (942/1000)",
        "  easy: 100.0 % [99.6, 100.0] (900/900)",
    ]
    compared = evaluate(trained, samples, processor, reference=trained)
    right_count = compared.accuracy.successes
    lines = format_comparison(compared, name="W4A4")
    assert lines[0] == lines[1].replace("W4A4", "full precision")
    assert lines[-3].startswith("difference +0.0 points [")
    assert lines[-3].endswith("McNemar p = 1")
    assert lines[-2:] == [
        f"both right {right_count}, only full precision 0, only W4A4 0, "
        f"both wrong {10 - right_count}",
        "KL(full precision || W4A4) 0 nats per answer token (22 tokens)",
    ]
    lines = format_comparison(compared, name="model", reference="W4A4")
    assert lines[0] == lines[1].replace("model", "W4A4")
    assert lines[-2].split(", ")[1] == "only W4A4 0"
    assert lines[-1] == "KL(W4A4 || model) 0 nats per answer token (22 tokens)"
