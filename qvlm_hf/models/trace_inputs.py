"""Inputs that a model of an unknown family runs on, guessed from configuration and signatures.

A guess is a set of keyword arguments; the caller tries one after the other until the model takes
it. Values do not matter, shapes do. Pictures are tried small first: a tower of a fixed size refuses
them before it has computed anything.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["accepted", "count_rows", "picture_guesses", "text_inputs"]

_IMAGE_TOKENS = (
    "image_token_id", "image_token_index", "media_placeholder_token_id", "image_patch_id",
    "im_patch_id", "image_patch_token_id",
)  # fmt: skip
_TEXT = 4  # text tokens before and behind the picture
_DECODER_TOKENS = 3
_TILES = (1, 2, 3, 5)


def accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function names."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in names}


def text_inputs(
    model: nn.Module, function: Callable[..., Any], picture_tokens: int
) -> dict[str, Any]:
    """Keyword arguments of `function` that hold text with so many tokens for a picture."""
    config: Any = model.config
    special = _special_tokens(config)
    plain = [token for token in range(3, 3 + _TEXT + len(special)) if token not in special]
    row = plain[:_TEXT]
    if picture_tokens:
        image = next((t for name in _IMAGE_TOKENS if (t := getattr(config, name, None))), 0)
        start, end = _around(config)
        row = [*row, *start, *[image] * picture_tokens, *end, *row]
    device = next(model.parameters()).device
    ids = torch.tensor([row], device=device)
    is_image = torch.zeros_like(ids)
    if picture_tokens:
        place = _TEXT + len(start)
        is_image[:, place : place + picture_tokens] = 1
    decoder = torch.tensor([plain[:_DECODER_TOKENS]], device=device)
    # its values are looked at
    mask = {} if ids.is_meta else {"attention_mask": torch.ones_like(ids)}
    return accepted(
        function,
        mask
        | {
            "input_ids": ids,
            "mm_token_type_ids": is_image,
            "moe_mm_token_type_ids": is_image,
            "token_type_ids": is_image,
            "image_embeds_position_mask": is_image,
            "image_attention_mask": torch.ones(1, ids.shape[1], 1, dtype=torch.long, device=device),
            "qformer_input_ids": decoder,
            "decoder_input_ids": decoder,
            "bbox": torch.zeros(1, ids.shape[1], 4, dtype=torch.long, device=device),
            "use_cache": False,
        },
    )


def picture_guesses(model: nn.Module, function: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Keyword arguments of `function` that hold one picture, the likelier ones first."""
    names = inspect.signature(function).parameters
    picture = _Picture(model)
    packed = {"image_grid_thw", "grid_thw", "image_grid_hw", "spatial_shapes", "target_sizes"}
    guesses: list[dict[str, Any]] = []
    if packed & set(names) or "image_position_ids" in names or "flattened_patches" in names:
        guesses += picture.packed()
    guesses += picture.pixels()
    guesses += picture.packed() if not guesses else []
    needed = {name for name, each in names.items() if each.default is inspect.Parameter.empty}
    for guess in guesses:
        full = accepted(function, guess | picture.fixed(guess))
        least = {name: value for name, value in full.items() if name in needed | {"pixel_values"}}
        yield least
        if least.keys() != full.keys():
            yield full


class _Picture:
    """One picture in the shapes that families take it in.

    Attributes:
        patch: side of a patch, in pixels.
        merge: patches of a side that become one token.
        sizes: sides of pictures to try, in pixels.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        parts = [
            part
            for name in ("vision_config", "vision_tower_config", "image_config", "encoder")
            if (part := getattr(config, name, None)) is not None
        ]
        self._configs = [*parts, config]
        self.parameter = next(p for p in model.parameters() if p.is_floating_point())
        self.channels = self._field("num_channels", "in_channels", "in_chans", default=3)
        self.patch = self._field("patch_size", "encoder_patch_size", default=14)
        self.frames = self._field("temporal_patch_size", "patch_temporal", default=1)
        self.merge = self._field(
            "spatial_merge_size", "merge_size", "merge_kernel_size", "downsample_factor",
            "scale_factor", "pooling_kernel_size", default=2,
        )  # fmt: skip
        configured = self._field("image_size", default=0)
        fine = getattr(config, "high_res_vision_config", None)
        self.fine = getattr(fine, "image_size", configured)
        small = 4 * self.patch * max(self.merge, 1)
        self.sizes = [small, *[configured] * (configured not in (0, small))]

    def _field(self, *names: str, default: int) -> int:
        for config in self._configs:
            for name in names:
                value = getattr(config, name, None)
                if isinstance(value, Mapping):
                    value = next(iter(value.values()), None)
                if isinstance(value, list | tuple):
                    value = value[0] if value else None
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
                if isinstance(value, float) and value >= 1:
                    return int(value)
        return default

    def _random(self, *shape: int) -> Tensor:
        return torch.rand(shape, dtype=self.parameter.dtype, device=self.parameter.device)

    def _long(self, *rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.parameter.device)

    def packed(self) -> list[dict[str, Any]]:
        """Pictures as rows of patches, with the shape of the grid beside them."""
        side = 4 * max(self.merge, 1)
        count = side * side
        area = self._field("patch_embed_hidden_size", default=self.channels * self.patch**2)
        grid = self._long([side, side])
        rows = [
            self._random(count, area * self.frames),
            self._random(count, area),
            self._random(count, self.channels, self.patch, self.patch),
            self._random(count, self.frames, self.channels, self.patch, self.patch),
            self._random(count, self.merge * self.patch, self.merge * self.patch, self.channels),
            self._random(1, count, area),
            self._random(1, count, area * self.frames),
            self._random(1, count, self.channels, self.patch, self.patch),
            self._random(1, self.channels, self.patch, self.patch * count),
            self._random(1, count, area * self.merge * self.merge),
        ]
        places = torch.stack(
            torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), dim=-1
        ).reshape(1, count, 2)
        return [
            {
                "pixel_values": row,
                "flattened_patches": torch.cat([torch.ones_like(row[..., :2]), row], dim=-1)
                if row.dim() == 3
                else row,
                "image_grid_thw": self._long([1, side, side]),
                "grid_thw": self._long([1, side, side]),
                "image_grid_hw": grid,
                "spatial_shapes": grid,
                "target_sizes": grid,
                "image_sizes": grid * self.patch,
                "image_position_ids": places.to(self.parameter.device),
                "pixel_attention_mask": self._long([1] * count).bool(),
                "image_merge_sizes": self._long([self.merge])[0],
            }
            for row in rows
        ]

    def pixels(self) -> list[dict[str, Any]]:
        """Pictures as pixels: alone, as tiles, as frames."""
        guesses = []
        for size in self.sizes:
            tiles = ((1, count) for count in _TILES)
            for shape in ((1,), *tiles, (1, 1, 1), (1, 1, 4)):
                pixels = self._random(*shape, self.channels, size, size)
                sizes = self._long([size, size])
                mask = torch.ones(pixels.shape[:-3], dtype=torch.bool, device=pixels.device)
                guesses.append(
                    {
                        "pixel_values": pixels,
                        "image_sizes": sizes,
                        "pixel_attention_mask": mask,
                        "target_sizes": sizes // self.patch,
                    }
                )
        side = 4 * self.merge
        cut = self._random(side * side, self.frames, self.patch, self.patch, self.channels)
        return [*guesses, {"pixel_values": cut}]

    def fixed(self, guess: Mapping[str, Any]) -> dict[str, Any]:
        """What some families want beside the pixels."""
        pixels = guess["pixel_values"]
        tiles = pixels.shape[2] if pixels.dim() == 6 else 1
        size = pixels.shape[-1]
        return {
            "high_res_pixel_values": self._random(1, self.channels, self.fine, self.fine),
            "aspect_ratio_ids": self._long([1]),
            "aspect_ratio_mask": torch.ones(1, 1, tiles, dtype=torch.long, device=pixels.device),
            "qformer_input_ids": self._long([3, 4, 5]),
            "pixel_values_images": pixels,
            "height": self._long([size // self.patch])[0],
            "width": self._long([size // self.patch])[0],
        }  # fmt: skip


def count_rows(features: Any) -> int:
    """How many rows (tokens) the tensors of a vision model's answer hold together."""
    if hasattr(features, "keys"):
        pooled = getattr(features, "pooler_output", None)
        features = getattr(features, "last_hidden_state", None) if pooled is None else pooled
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1]
    if isinstance(features, list | tuple):
        return sum(count_rows(part) for part in features)
    return 0


def _special_tokens(config: Any) -> set[int]:
    parts = (config, getattr(config, "text_config", None))
    named = [pair for part in parts if part is not None for pair in vars(part).items()]
    values = (value for name, value in named if "token" in name)
    lists = (value if isinstance(value, list) else [value] for value in values)
    return {token for tokens in lists for token in tokens if isinstance(token, int)}


def _around(config: Any) -> tuple[list[int], list[int]]:
    """The tokens that begin and end a picture, where the configuration names them."""
    pairs = (("vision_start_token_id", "vision_end_token_id"),
             ("image_start_token_id", "image_end_token_id"),
             ("boi_token_id", "eoi_token_id"), ("boi_token_index", "eoi_token_index"))  # fmt: skip
    for first, last in pairs:
        if isinstance(getattr(config, first, None), int):
            end = getattr(config, last, None)
            return [getattr(config, first)], [end] if isinstance(end, int) else []
    return [], []
