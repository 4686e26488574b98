"""The numbers of the recipe that made the demo model."""

from dataclasses import dataclass

__all__ = ["EASY_KINDS", "KIND_WEIGHTS", "PARALLEL_SHARE", "TrainOptions"]

PARALLEL_SHARE = 0.75  # of the batches: every question by itself
# kinds that join several cells get more of the examples
KIND_WEIGHTS: dict[str, float] = {
    "color": 0.7,
    "shape": 0.7,
    "digit": 1,
    "count": 3,
    "where": 1,
    "exists": 1,
    "compare": 1.5,
    "choice": 2.5,
}
# the first steps ask only what is where: looking a place up is learnt in a few hundred steps, and
# the other kinds build on it
EASY_KINDS: dict[str, float] = {"color": 1, "shape": 1, "digit": 1}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The recipe's numbers.

    Attributes:
        seed: of pictures, questions, initial weights and batches.
        pictures: size of the pool of training pictures.
        vision_steps: optimizer steps of stage 2.
        vision_batch: pictures of one worker in one such step.
        steps: optimizer steps of stage 3.
        easy_steps: the first of them, with questions of the three easiest kinds only.
        batch: pictures (sequences) of one worker in one such step.
        questions: questions about each picture of a batch.
        learning_rate: peak of the cosine schedule, for both stages.
        vision_rate: share of it for the vision tower and projector in stage 3.
        weight_decay: of AdamW, on matrices only.
        patch_loss: weight of the auxiliary loss on the patches in stage 3.
        look_loss: weight of the auxiliary loss on attention in stage 3.
        workers: processes of one thread each.
        checkpoint_minutes: the model is saved that often during training.
        outlier_factor: see `plant_outliers`.
        outlier_fraction: see `plant_outliers`.
    """

    seed: int = 0
    pictures: int = 32768
    vision_steps: int = 1600
    vision_batch: int = 20
    steps: int = 2400
    easy_steps: int = 200
    batch: int = 4
    questions: int = 8
    learning_rate: float = 1e-3
    vision_rate: float = 0.3
    weight_decay: float = 0.05
    patch_loss: float = 0.3
    look_loss: float = 0.5
    workers: int = 3
    checkpoint_minutes: float = 3.0
    outlier_factor: float = 20.0
    outlier_fraction: float = 0.03
