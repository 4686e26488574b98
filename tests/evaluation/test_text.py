"""Perplexity and divergence on plain text, against plain PyTorch and by definition."""

import math
import os

import pytest
import torch
from tiny_models import tiny_llava, tiny_processor

from qvlm_hf.evaluation import check_text, evaluate_text, format_text, read_text

_TOO_LITTLE = r"text\.txt: holds too little text: give a few hundred words\.$"
WORDS = "what red the blue square is circle green "


@pytest.fixture(scope="module")
def model():
    return tiny_llava(seed=1).eval()


@pytest.fixture
def tokenizer():
    return tiny_processor().tokenizer


def test_it_is_cross_entropy_and_kl(model):
    torch.manual_seed(0)
    windows = [torch.randint(5, 30, (size,)) for size in (9, 2, 30)]
    reference = tiny_llava(seed=2).eval()
    found = evaluate_text(model, windows, reference=reference)
    rows = {}
    with torch.no_grad():
        for name, each in (("own", model), ("other", reference)):
            logits = [each(input_ids=ids[None]).logits[0, :-1].double() for ids in windows]
            rows[name] = torch.cat(logits)
    targets = torch.cat([ids[1:] for ids in windows])
    loss = {name: torch.nn.functional.cross_entropy(r, targets).item() for name, r in rows.items()}
    kl = torch.nn.functional.kl_div(
        rows["own"].log_softmax(-1), rows["other"].log_softmax(-1), log_target=True,
        reduction="batchmean",
    ).item()  # fmt: skip
    assert found.tokens == 8 + 1 + 29
    assert found.perplexity == pytest.approx(math.exp(loss["own"]), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(math.exp(loss["other"]), rel=1e-5)
    assert found.kl == pytest.approx(kl, rel=1e-4)
    lines = format_text(found, name="model", reference="W4A4")
    assert lines[0] == f"W4A4: perplexity {found.reference_perplexity:.2f} on text"
    assert lines[1] == f"model: perplexity {found.perplexity:.2f} on 38 tokens of text"
    assert lines[2] == f"KL(W4A4 || model) {found.kl:.4g} nats per token of text"


def test_a_model_beside_itself_and_alone(model):
    windows = [torch.arange(5, 25)]
    same = evaluate_text(model, windows, reference=model)
    assert same.kl == 0
    assert same.perplexity == same.reference_perplexity
    alone = evaluate_text(model, windows)
    assert (alone.perplexity, alone.kl) == (same.perplexity, None)
    assert len(format_text(alone)) == 1
    assert format_text(evaluate_text(model, [torch.tensor([5, 6])]))[0].endswith(
        " on 1 token of text"
    )


def test_a_file_is_read_in_windows_that_the_model_has_positions_for(model, tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 200)
    windows = read_text(path, tokenizer, model)
    positions = model.config.text_config.max_position_embeddings
    assert max(map(len, windows)) == min(512, positions)
    assert len(windows) > 1
    whole = tokenizer(WORDS * 200, add_special_tokens=False)["input_ids"]
    assert {int(window[0]) for window in windows} == {tokenizer.bos_token_id}
    assert torch.cat([window[1:] for window in windows]).tolist() == whole


def test_a_tokenizer_that_puts_nothing_in_front(model, tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 200)

    def bare(text, **_):
        return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

    windows = read_text(path, bare, model)
    assert torch.cat(windows).tolist() == bare(WORDS * 200)["input_ids"]


def test_a_file_that_is_not_there_and_what_is_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # which would wait for a writer, and could be read once
    for name, why in (
        ("none.txt", r"cannot be read \(No such file.*\)"),
        (".", "is no regular file"),
        ("pipe", "is no regular file"),
    ):
        with pytest.raises(ValueError, match=f"{why}: name a file of UTF-8 text"):
            check_text(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "is no UTF-8 text"),
        (b"", "too little text"),
        (b"red", _TOO_LITTLE),
        (b"red " * 31, _TOO_LITTLE),
    ],
)
def test_mistakes(model, tokenizer, tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(path, tokenizer, model)
