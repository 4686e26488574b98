"""Samples made of nothing: repeatable, varied, and answered by the model itself."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_llava, tiny_processor

from qvlm_hf import QVLMConfig, quantize_model
from qvlm_hf.calibration.samples import collate, synthetic
from qvlm_hf.calibration.samples.synthetic import synthesize


@pytest.fixture(scope="module")
def model():
    return tiny_llava().eval()


def pixels(samples):
    return [np.asarray(sample.images()[0]) for sample in samples]


def test_a_seed_repeats_and_another_differs(model):
    first, again, other = (synthesize(model, tiny_processor(), 4, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(pixels(first), pixels(again), strict=True))
    assert [s.answer for s in first] == [s.answer for s in again]
    assert not any(np.array_equal(a, b) for a, b in zip(pixels(first), pixels(other), strict=True))


def test_pictures_have_the_models_size_and_differ_in_kind():
    generator = np.random.default_rng(0)
    pictures = [np.asarray(synthetic._draw_picture(generator, 48)) for _ in range(40)]
    assert {picture.shape for picture in pictures} == {(48, 48, 3)}
    roughness = [np.abs(np.diff(picture.astype(float), axis=0)).mean() for picture in pictures]
    assert max(roughness) > 5 * min(roughness)
    assert len({picture.tobytes() for picture in pictures}) == 40
    assert synthetic._picture_size(tiny_processor()) == 32
    assert synthetic._picture_size(object()) == 336


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_noise_has_the_spectrum_it_claims(exponent):
    class Fixed:
        """A generator whose first uniform draw is the exponent."""

        def __init__(self):
            self._own, self._first = np.random.default_rng(0), True

        def uniform(self, *args):
            if self._first:
                self._first = False
                return exponent
            return self._own.uniform(*args)

        def standard_normal(self, shape):
            return self._own.standard_normal(shape)

    size = 128
    spectrum = np.abs(np.fft.fft2(synthetic._noise(Fixed(), size)[..., 0]))
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None]) * size
    band = (frequency > 2) & (frequency < 50)
    slope = np.polyfit(np.log(frequency[band]), np.log(spectrum[band]), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.15)


def test_answers_are_the_models_own(model):
    processor = tiny_processor()
    for sample in synthesize(model, processor, 3, seed=2):
        asked = type(sample)(messages=sample.messages[:1], origin="again")
        inputs = collate([asked], processor).inputs
        with torch.no_grad():
            first = int(model(**inputs).logits[0, -1].argmax())
        if sample.answer is not None:
            assert sample.answer.startswith(
                processor.tokenizer.decode([first], skip_special_tokens=True).strip()
            )


def test_a_model_without_answers_is_refused(model, monkeypatch):
    monkeypatch.setattr(synthetic, "_answer", lambda *_: "")
    message = r"answered only 0 of 4 drawn pictures: pass real samples\.$"
    with pytest.raises(ValueError, match=message):
        synthesize(model, tiny_processor(), 4, seed=0)


def test_a_model_is_quantized_without_data():
    model = tiny_llava().eval()
    report = quantize_model(
        model,
        QVLMConfig(
            recipe="fixed",
            dataset="synthetic",
            processor=tiny_processor(),
            num_samples=4,
            max_block_depth=1,
        ),
    )
    assert report.provenance["dataset"] == "synthetic"
    assert report.provenance["samples"] == report.provenance["images"] == 4
    assert report.self_check.held_out
    assert model.hf_quantizer.quantization_config.provenance["dataset"] == "synthetic"
