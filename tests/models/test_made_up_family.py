"""A family that Transformers does not have: one row, and the whole method works."""

import inspect

import pytest
import torch
from tiny_families import DECODERS, TOWERS, WORDS, tiny_family_processor
from tiny_models import randomize, tiny_messages
from torch import nn
from torch.nn import functional
from transformers import AutoModelForImageTextToText, LlavaConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
)
from transformers.models.siglip.modeling_siglip import SiglipAttention

from qvlm_hf import QVLMConfig, precision_table, quantize_model
from qvlm_hf.calibration.samples import batches, load_samples
from qvlm_hf.models import families, layer_kinds, wirings
from qvlm_hf.models.families import Family
from qvlm_hf.models.wirings import chain


def add_row(families, kinds):
    """All that the package must know of the family."""
    families["made_up"] = Family(
        projector="bridge", projector_kind=chain("enter", "leave", norm="norm")
    )
    names = {role: f"look.{role}_proj" for role in ("q", "k", "v")} | {
        "attention_norm": "first",
        "attention_out": "look.out_proj",
        "mlp_norm": "second",
        "up": "grow",
        "down": "shrink",
    }
    kinds["SketchLayer"] = wirings.ENCODER.named(names)
    names = {role: f"mixer.{role}_proj" for role in ("q", "k", "v")} | {
        "attention_norm": "before",
        "attention_out": "mixer.o_proj",
        "mlp_norm": "between",
        **{role: f"swiglu.{role}_proj" for role in ("gate", "up", "down")},
    }
    kinds["StoryLayer"] = wirings.DECODER.named(names)


class MadeUpConfig(LlavaConfig):
    model_type = "made_up"


class SketchLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.first, self.second = nn.LayerNorm(size), nn.LayerNorm(size)
        self.look = SiglipAttention(config)
        self.grow = nn.Linear(size, config.intermediate_size)
        self.shrink = nn.Linear(config.intermediate_size, size)

    def forward(self, x):
        x = x + self.look(self.first(x))[0]
        return x + self.shrink(functional.silu(self.grow(self.second(x))))


class Sketch(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        size, patch = config.hidden_size, config.patch_size
        self.patches = nn.Conv2d(3, size, patch, stride=patch)
        self.blocks = nn.ModuleList(SketchLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, pixel_values):
        x = self.patches(pixel_values).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return x


class Bridge(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.enter, self.leave = nn.Linear(inputs, outputs), nn.Linear(outputs, outputs)

    def forward(self, x):
        return self.leave(functional.gelu(self.enter(self.norm(x))))


class StoryLayer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.before, self.between = (
            LlamaRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2)
        )
        self.mixer, self.swiglu = LlamaAttention(config, index), LlamaMLP(config)

    def forward(self, x, **kwargs):
        x = x + self.mixer(hidden_states=self.before(x), **kwargs)[0]
        return x + self.swiglu(self.between(x))


class Story(LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(
            StoryLayer(config, index) for index in range(config.num_hidden_layers)
        )


class MadeUpPreTrainedModel(PreTrainedModel):
    config_class, base_model_prefix, _supports_sdpa = MadeUpConfig, "model", True


class MadeUpModel(MadeUpPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_tower, self.language_model = Sketch(vision), Story(text)
        self.bridge = Bridge(vision.hidden_size, text.hidden_size)
        self.post_init()

    def forward(self, input_ids, pixel_values=None, **kwargs):
        embedded = self.language_model.embed_tokens(input_ids)
        is_picture = (input_ids == self.config.image_token_id)[..., None]
        if is_picture.any():
            features = self.bridge(self.vision_tower(pixel_values))
            embedded = embedded.masked_scatter(is_picture, features)
        return self.language_model(inputs_embeds=embedded, **kwargs)


class MadeUpForConditionalGeneration(MadeUpPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        text = config.text_config
        self.model = MadeUpModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, pixel_values=None, **kwargs):
        output = dict(self.model(input_ids, pixel_values, **kwargs))
        return CausalLMOutputWithPast(
            logits=self.lm_head(output.pop("last_hidden_state")), **output
        )


@pytest.fixture
def made_up(monkeypatch):
    """Enters the family everywhere; the test's end takes it out again."""
    enter, tables = monkeypatch.setitem, ({}, {})
    enter(CONFIG_MAPPING._extra_content, "made_up", MadeUpConfig)
    models = AutoModelForImageTextToText._model_mapping._extra_content
    enter(models, MadeUpConfig, MadeUpForConditionalGeneration)
    add_row(*tables)
    for table, rows in zip((families.FAMILIES, layer_kinds.LAYER_KINDS), tables, strict=True):
        for name, row in rows.items():
            enter(table, name, row)
    config = MadeUpConfig(
        vision_config=TOWERS["siglip"],
        text_config=DECODERS["llama"],
        image_token_index=WORDS.index("<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    model = MadeUpForConditionalGeneration(config)
    randomize(model)
    return model.eval()


def test_a_row_has_at_most_25_lines():
    assert len(inspect.getsource(add_row).splitlines()) <= 25


@pytest.mark.parametrize("scheme", ["W4A4", "W8A8"])
def test_the_whole_method_works(scheme, made_up, tmp_path):
    model, processor = made_up, tiny_family_processor("llava", "siglip")
    batch = next(batches(load_samples(tiny_messages(2)), processor, 2))
    inputs = {name: tensor[:1] for name, tensor in batch.inputs.items()}
    with torch.no_grad():
        before = model(**batch.inputs).logits
    config = QVLMConfig(
        scheme=scheme,
        dataset=tiny_messages(4),
        processor=processor,
        group_size=16,
        num_samples=4,
        batch_size=2,
    )
    report = quantize_model(model, config)
    linears = [name for name, module in model.named_modules() if hasattr(module, "scheme")]
    assert sorted(linears) == sorted(report.modules)
    assert len(linears) == 6 * len(model.model.vision_tower.blocks) + 2 + 7 * 2
    assert [segment.component for segment in report.segments] == [
        "vision", "projector", "language",
    ]  # fmt: skip
    assert report.full_precision == ("lm_head",)
    assert report.settings["rotation"] == ("hadamard" if scheme == "W8A8" else None)
    assert report.decode_check.kl < 1e-4
    assert precision_table(model)
    with torch.no_grad():
        after = model(**batch.inputs).logits
    if scheme == "W8A8":
        assert (after - before).std() < 0.1 * before.std()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(loaded) is MadeUpForConditionalGeneration
    with torch.no_grad():
        assert torch.equal(loaded(**batch.inputs).logits, after)
    texts = [
        one.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=use)
        for one, use in ((model, True), (loaded, True), (loaded, False))
    ]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[1], texts[2])
