"""What one run of a model tells about it, against the rows of the table and a made-up model."""

from itertools import chain

import pytest
import torch
from shrunken_families import tiny_model
from tiny_models import tiny_llava
from torch import nn
from torch.nn import functional

from qvlm_hf.models.by_structure import StructureError, read_structure
from qvlm_hf.models.coverage import measure_coverage
from qvlm_hf.models.graph import Selection, get_linear, resolve


class Config:
    model_type = "made_up"
    image_token_id = 2


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.late = (nn.Linear(8, 8) for _ in range(3))
        self.out, self.direct = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.norm(x)
        mixed = self.q(h) + self.k(h.flatten(0, 1)).view_as(h)
        h += 1  # what reads h from here on reads another input
        return x + self.out(mixed) + self.late(h) + functional.linear(h, self.direct.weight)


class MadeUp(nn.Module):
    """A language model alone: two layers, the second of which nothing reads if `dead`."""

    config = Config()

    def __init__(self, dead=False):
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.spare, self.tied = nn.Linear(8, 4), nn.Linear(8, 32, bias=False)
        self.tied.weight = self.embed.weight
        self.table = nn.Parameter(torch.ones(2, 3, 4))
        self.dead = dead

    def forward(self, input_ids):
        x = first = self.layers[0](self.embed(input_ids))
        x = self.layers[1](x)
        return self.tied(first if self.dead else x)


def sites(structure):
    return [site.modules for segment in structure.segments for site in segment.sites]


@pytest.mark.parametrize("feature_layer", [-2, -1, [-3, -2], 1])
def test_llava_reads_as_its_row_says(feature_layer):
    model = tiny_llava(vision_feature_layer=feature_layer)
    structure = read_structure(model)
    assert structure.segments == resolve(model)
    assert structure.run == "model"


def test_llava_without_values():
    model = tiny_llava()
    structure = read_structure(tiny_llava().to("meta"))
    assert sites(structure) == [
        site.modules for s in resolve(model) for layer in s.layers for site in layer.sites
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"quantize_vision": False},
        {"quantize_projector": False},
        {"modules_to_not_convert": ["mlp.fc1", "model.language_model.layers.0"]},
    ],
)
def test_options_mean_what_they_mean_to_resolve(options):
    model = tiny_llava()
    selection = Selection(**options)
    expected = [s.modules for g in resolve(model, selection) for la in g.layers for s in la.sites]
    assert sites(read_structure(model, selection)) == expected


def test_the_model_is_left_as_it_was():
    model = tiny_llava()
    model.lm_head.weight.requires_grad_(False)
    hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]  # noqa: E731
    read_structure(model)
    before = hooks()  # Transformers adds some at the first call
    read_structure(model)
    assert hooks() == before
    assert not model.lm_head.weight.requires_grad
    assert model.model.multi_modal_projector.linear_1.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_views_are_the_same_input_and_what_was_written_to_is_not():
    structure = read_structure(MadeUp())
    assert sites(structure) == [
        (f"layers.{i}.{group[0]}", *(f"layers.{i}.{name}" for name in group[1:]))
        for i in range(2)
        for group in (("q", "k"), ("out",), ("late",))
    ]


def test_what_stays_is_listed_with_the_reason_and_counted():
    model = MadeUp()
    structure = read_structure(model)
    modules = [*chain(*sites(structure))]
    coverage = measure_coverage(model, modules, structure.left_out)
    reasons = {part.name: part.reason for part in coverage.kept}
    assert reasons["spare"] == "the run did not call it"
    assert reasons["embed"] == "embedding"
    assert reasons["table"] == "a bare parameter of 3 dimensions"
    assert reasons["layers.0.norm"] == "norm"
    assert reasons["layers.0.q"] == "bias"
    held = sum(get_linear(model, name).weight.numel() for name in modules)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert coverage.parameters == total
    assert coverage.percent == pytest.approx(100 * held / total)
    assert held + sum(part.parameters for part in coverage.kept) == total


@pytest.mark.parametrize("dead", [False, True])
def test_a_layer_whose_output_reaches_nothing(dead):
    layers = [layer for s in read_structure(MadeUp(dead)).segments for layer in s.layers]
    assert [layer.dead for layer in layers] == [False, dead]


def test_a_weight_that_is_read_directly_or_shared_stays():
    class Direct(MadeUp):
        def forward(self, input_ids):
            h = super().forward(input_ids) @ torch.ones(32, 8)
            return h.to(self.layers[0].out.weight.dtype)

    model = Direct()
    names = [*chain(*sites(read_structure(model)))]
    assert "layers.0.out" not in names
    assert "layers.1.out" in names
    assert "tied" not in names


def test_the_weight_that_the_model_takes_its_dtype_from_stays():
    class First(MadeUp):
        def __init__(self):
            super().__init__()
            del self.table
            self._modules = {"first": nn.Linear(8, 8), **self._modules}

        def forward(self, input_ids):
            return super().forward(input_ids) + self.first(torch.ones(1, 8)).sum()

    left_out = read_structure(First()).left_out
    assert left_out["first"] == "the model takes its dtype from this weight"


def test_a_model_that_does_not_run():
    class Broken(MadeUp):
        def forward(self, input_ids):
            raise RuntimeError("needs a\nsound")

    with pytest.raises(StructureError, match="did not reach its language part") as error:
        read_structure(Broken())
    assert "RuntimeError: needs a sound" in str(error.value)
    assert "language 0 of 12; missing is 'layers.0.q' first." in str(error.value)
    assert str(error.value).endswith(" To quantize it, add a row (docs/contributing.md).")
    assert "\n" not in str(error.value)


def test_a_tower_that_does_not_run_may_be_left_out():
    """What the message advises works: Molmo2's tower wants inputs that nobody can guess."""
    model = tiny_model("molmo2")
    with pytest.raises(StructureError, match="did not reach its vision part") as error:
        read_structure(model)
    assert "ran: language 14 of 14, projector 0 of 7, vision 0 of 13" in str(error.value)
    assert "missing is 'model.vision_tower." in str(error.value)
    assert "leave that part out (quantize_vision=False), or add a row" in str(error.value)
    structure = read_structure(model, Selection(quantize_vision=False))
    assert {segment.component for segment in structure.segments} == {"language"}


def test_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match="'nowhere' matches no module"):
        read_structure(tiny_llava(), Selection(modules_to_not_convert=["nowhere"]))


def test_nothing_left():
    with pytest.raises(ValueError, match="leaves no module"):
        read_structure(tiny_llava(), Selection(modules_to_not_convert=["model"]))


@pytest.mark.parametrize(
    ("family", "run", "components"),
    [
        ("glm4v", "model", ["vision", "projector", "language"]),  # packed patches, merger inside
        ("idefics3", "model", ["vision", "projector", "language"]),
        ("mllama", "model", ["vision", "vision", "projector", "language"]),  # cross-attention
        ("aya_vision", "model", ["vision", "projector", "language"]),
        ("fuyu", "parts", ["language"]),
    ],
)
def test_families_without_a_row(family, run, components):
    structure = read_structure(tiny_model(family))
    assert structure.run == run
    assert [segment.component for segment in structure.segments] == components


def test_a_parallel_block_has_one_site_of_five_readers():
    structure = read_structure(tiny_model("aya_vision"))
    language = structure.segments[-1].layers[0]
    assert len(language.sites[0].modules) == 5
