"""Searched blocks as they are kept to go on later, and back (record/resume.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qvlm_hf.calibration.record.coded import codable
from qvlm_hf.calibration.record.report import BlockReport
from qvlm_hf.calibration.search.sites import (
    QuantizedSite,
    SiteCandidate,
    join_parts,
)
from qvlm_hf.format.grids import QuantizedWeight
from qvlm_hf.format.packing import pack, unpack
from qvlm_hf.models.graph import Layer, Site

__all__ = ["SavedBlock", "restore_sites", "save_block"]


@codable
@dataclass(frozen=True)
class _SavedPart:
    """What one input tensor's modules run with: the choice of the search.

    The integers of `weights` are packed.
    """

    candidate: SiteCandidate
    weights: tuple[QuantizedWeight, ...]
    tokens: int | None
    few_tokens: bool


@codable
@dataclass(frozen=True)
class SavedBlock:
    """A block after its search: the parts of its sites, layer after layer, and the report."""

    parts: tuple[_SavedPart, ...]
    report: BlockReport | None


def save_block(sites: Sequence[QuantizedSite], report: BlockReport | None) -> SavedBlock:
    """What has to be kept of a searched block."""
    return SavedBlock(tuple(_save(part) for site in sites for part in site.parts), report)


def restore_sites(layers: Sequence[Layer], block: SavedBlock) -> tuple[QuantizedSite, ...]:
    """The sites of a kept block, its choice in force.

    Its layers are in the compute dtype, as the search left the sites' weights.
    """
    saved = iter(block.parts)
    return tuple(
        join_parts(site, [_restore(part, next(saved)) for part in site.parts])
        for layer in layers
        for site in layer.sites
    )


def _save(part: QuantizedSite) -> _SavedPart:
    weights = tuple(
        replace(weight, values=pack(weight.values, part.scheme.weight_bits))
        for weight in part.quantized_weights()
    )
    candidate = replace(part.chosen, final_grid=None, clips=None)
    return _SavedPart(candidate, weights, part.tokens, part.few_tokens)


def _restore(part: Site, saved: _SavedPart) -> QuantizedSite:
    site = QuantizedSite(part, part.linears, [saved.candidate])
    site.active, site.tokens, site.few_tokens = 0, saved.tokens, saved.few_tokens
    bits, length = site.scheme.weight_bits, part.linears[0].in_features
    site.set_weights(
        [replace(weight, values=unpack(weight.values, bits, length)) for weight in saved.weights]
    )
    return site
