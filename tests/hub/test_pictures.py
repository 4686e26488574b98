"""The picture of entropies and blocks, looked at through its pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from qvlm_hf.calibration.report import BlockReport, SegmentReport
from qvlm_hf.calibration.search.blocks import partition_layers
from qvlm_hf.hub.pictures import entropy_picture


def segment(component: str, entropies: list[float], *, dead: int = 0) -> SegmentReport:
    blocks, threshold = partition_layers(entropies, max_block_depth=3)
    layers = tuple(f"{component}.{index}" for index in range(len(entropies) + 1 + dead))
    return SegmentReport(
        component=component,
        layers=layers,
        entropies=tuple(entropies),
        threshold=threshold,
        blocks=tuple(
            BlockReport(
                layers=layers[block.start : block.stop],
                initial=1.0,
                greedy=1.0,
                joint=1.0,
                evaluations=1.0,
            )
            for block in blocks
        ),
    )


def pixels(picture: bytes | None) -> np.ndarray:
    assert picture is not None
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


def bands(drawn: np.ndarray) -> set[tuple[int, int, int]]:
    """Colours that fill a large part of the picture."""
    colours, counts = np.unique(drawn.reshape(-1, 3), axis=0, return_counts=True)
    return {
        tuple(map(int, colour))
        for colour, count in zip(colours, counts, strict=True)
        if count > 0.05 * counts.sum()
    }


def test_nothing_to_draw_is_no_picture() -> None:
    assert entropy_picture([]) is None
    assert entropy_picture([segment("projector", [])]) is None


def test_the_same_report_gives_the_same_bytes_and_names_no_program() -> None:
    one = [segment("vision", [1.0, 2.0, 1.5], dead=1), segment("language", [2.0, 1.0])]
    first = entropy_picture(one)
    assert first == entropy_picture(one)
    assert first is not None
    assert Image.open(io.BytesIO(first)).info.keys() <= {"dpi"}
    assert first != entropy_picture(
        [segment("vision", [1.0, 2.0, 1.6], dead=1), segment("language", [2.0, 1.0])]
    )


@pytest.mark.parametrize("layers", [2, 24, 80])
def test_a_panel_per_segment_with_blocks_as_bands(layers: int) -> None:
    entropies = [1.5 + (index % 5) / 10 for index in range(layers - 1)]
    single = pixels(entropy_picture([segment("language", entropies)]))
    both = pixels(
        entropy_picture(
            [segment("vision", entropies), segment("projector", []), segment("language", entropies)]
        )
    )
    assert single.shape[1] == both.shape[1] == 1080
    assert both.shape[0] > 1.8 * single.shape[0]
    expected = {(0xDF, 0xE8, 0xF3), (0xF3, 0xEA, 0xD9)} if layers > 2 else {(0xDF, 0xE8, 0xF3)}
    assert expected <= bands(single)
