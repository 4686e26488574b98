"""Searched blocks as they are kept to go on later, and back (record/resume.py)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from qvlm_hf.calibration.record.coded import codable
from qvlm_hf.calibration.record.report import BlockReport
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.search.sites import ExpertsSite, QuantizedSite, SiteCandidate
from qvlm_hf.calibration.settings import RangeCandidate
from qvlm_hf.format.grids import QParams, QuantizedWeight
from qvlm_hf.format.packing import pack, unpack
from qvlm_hf.models.graph import Layer, Site

__all__ = ["SavedBlock", "restore_sites", "save_block"]


@codable
@dataclass(frozen=True)
class _SavedWeight:
    """The integers of one module, packed, and the grids of its groups."""

    packed: Tensor
    length: int
    scale: Tensor
    zero_point: Tensor
    group_length: int


@codable
@dataclass(frozen=True)
class _SavedPart:
    """What one input tensor's modules run with: the choice of the search."""

    range: RangeCandidate
    grid: QParams | None
    weights: tuple[_SavedWeight, ...]
    few_tokens: bool


@codable
@dataclass(frozen=True)
class _SavedSite:
    parts: tuple[_SavedPart, ...]
    tokens: tuple[int, ...] | None  # of every expert; None without experts


@codable
@dataclass(frozen=True)
class SavedBlock:
    """A block after its search: its sites, layer after layer, and the report."""

    sites: tuple[_SavedSite, ...]
    report: BlockReport | None


def save_block(sites: Sequence[QuantizedSite], report: BlockReport | None) -> SavedBlock:
    """What has to be kept of a searched block."""
    return SavedBlock(tuple(map(_save_site, sites)), report)


def restore_sites(
    calibration: Calibration, layers: Sequence[Layer], block: SavedBlock
) -> tuple[QuantizedSite, ...]:
    """The sites of a kept block, its choice in force.

    Its layers are in the compute dtype, as the search left the sites' weights.
    """
    sites = [site for layer in layers for site in layer.sites]
    return tuple(
        _restore_site(calibration, site, saved)
        for site, saved in zip(sites, block.sites, strict=True)
    )


def _save_site(site: QuantizedSite) -> _SavedSite:
    tokens = site.tokens if isinstance(site, ExpertsSite) else None
    return _SavedSite(tuple(map(_save_part, site.parts)), tokens)


def _save_part(part: QuantizedSite) -> _SavedPart:
    weights = tuple(
        _SavedWeight(
            packed=pack(weight.values, part.scheme.weight_bits),
            length=weight.values.shape[1],
            scale=weight.scale,
            zero_point=weight.zero_point,
            group_length=weight.group_length,
        )
        for weight in part.quantized_weights()
    )
    return _SavedPart(part.chosen.range, part.chosen.grid, weights, part.few_tokens)


def _restore_site(calibration: Calibration, site: Site, saved: _SavedSite) -> QuantizedSite:
    parts = []
    for part, kept in zip(site.parts, saved.parts, strict=True):
        scheme = calibration.settings.module_scheme(
            kept.range.granularity, part.hadamard, calibration.precision(site)
        )
        candidate = SiteCandidate(kept.range, scheme, kept.grid, kept.grid)
        restored = QuantizedSite(part, part.linears, [candidate])
        restored.active, restored.few_tokens = 0, kept.few_tokens
        restored.set_weights(
            [
                QuantizedWeight(
                    unpack(weight.packed, scheme.weight_bits, weight.length),
                    weight.scale,
                    weight.zero_point,
                    weight.group_length,
                )
                for weight in kept.weights
            ]
        )
        parts.append(restored)
    return parts[0] if saved.tokens is None else ExpertsSite(site, parts, saved.tokens)
