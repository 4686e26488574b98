"""The recipe of the demo model: its first steps are those that made it."""

import pytest
import torch
from torch import distributed

from demo_model import train
from demo_model.losses import PatchHeads
from demo_model.network import build_model
from demo_model.pool import draw_pool
from demo_model.processor import build_processor
from demo_model.recipe import TrainOptions

OPTIONS = TrainOptions(
    pictures=1024,
    vision_steps=3,
    vision_batch=4,
    steps=4,
    easy_steps=2,
    batch=2,
    questions=4,
    workers=1,
)
# Of the recipe as it was when it made the shipped model: another order of random draws, another
# loss or another schedule moves them.
RECORDED = [2.22081, 1.79353, 1.85339, 6.95203, 4.53783, 5.99063, 3.78501]


@pytest.fixture
def alone(tmp_path):
    """A group of one worker."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting_point", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def test_a_folder_that_holds_something_is_refused_before_the_work(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="exists and is not empty: choose another directory"):
        train.main(["--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_first_steps_are_those_that_made_the_model(alone, monkeypatch, tmp_path):
    pytest.importorskip("sklearn", reason="the handwritten digits come with scikit-learn")
    step, losses = train.take_step, []

    def noted(loss, *rest):
        losses.append(float(loss.detach()))
        step(loss, *rest)

    monkeypatch.setattr(train, "take_step", noted)
    pool, processor = draw_pool(OPTIONS), build_processor()
    model = build_model(processor.tokenizer, OPTIONS.seed)
    heads = PatchHeads(model.config.get_text_config().hidden_size)
    model.train()
    train._train_vision(model, heads, pool, processor, OPTIONS)
    train._train_answers(model, heads, pool, processor, OPTIONS, tmp_path)
    torch.testing.assert_close(losses, RECORDED, rtol=2e-3, atol=0)
