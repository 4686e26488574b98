"""Calibrations of the tiny LLaVA: batches, a started `Calibration`, a whole run, one site."""

import torch
from tiny_models import tiny_llava, tiny_messages, tiny_processor
from torch import nn

from qvlm_hf.calibration.layers import capture_inputs
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.samples import batches, load_samples
from qvlm_hf.calibration.search.sites import QuantizedSite, SiteCandidate
from qvlm_hf.calibration.settings import CalibrationSettings, RangeCandidate
from qvlm_hf.format.grids import QParams, choose_qparams
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.models.graph import Site, resolve
from qvlm_hf.quantize import quantize_with_data

__all__ = [
    "TEXT",
    "calibrate",
    "tiny_batches",
    "tiny_calibration",
    "tiny_logits",
    "tiny_samples",
    "tiny_site",
]

TEXT = [
    {"messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "red"}]}
] * 4


def tiny_samples(count=8, seed=0):
    return load_samples(tiny_messages(count, seed=seed))


def tiny_batches(count=8, batch_size=4, seed=0, rows=None):
    samples = load_samples(rows) if rows else tiny_samples(count, seed)
    return list(batches(samples, tiny_processor(), batch_size))


def tiny_logits(model):
    with torch.no_grad():
        return model(**tiny_batches(3, 3)[0].inputs).logits


def tiny_calibration(model=None, data=None, components=None, **options):
    """A calibration of an unchanged model with its inputs recorded; `options` are settings."""
    model = tiny_llava().eval() if model is None else model
    data = tiny_batches() if data is None else data
    segments = tuple(s for s in resolve(model) if not components or s.component in components)
    return Calibration(
        model=model,
        settings=CalibrationSettings(**{"group_size": 32, **options}),
        segments=segments,
        data=data,
        inputs=capture_inputs(model, data, segments),
    )


def calibrate(model=None, data=None, held_out=(), callbacks=(), resume_dir=None, **options):
    """The whole recipe; returns the model and the report."""
    model = tiny_llava().eval() if model is None else model
    fields = {"recipe": "fixed", "group_size": 32, "batch_size": 4, "max_block_depth": 2, **options}
    report = quantize_with_data(
        model,
        CalibrationSettings(**fields),
        data or tiny_samples(),
        tiny_processor(),
        held_out=held_out,
        callbacks=callbacks,
        resume_dir=resume_dir,
    )
    return model, report


def tiny_site(granularity, bits=4, dtype=torch.float32):
    """A site of two modules with one candidate, in force, and an uneven input [3, 7, 40]."""
    torch.manual_seed(1)
    linears = [nn.Linear(40, 24).to(dtype), nn.Linear(40, 16, bias=False).to(dtype)]
    x = torch.randn(3, 7, 40, dtype=dtype) * torch.linspace(0.2, 5, 40).to(dtype)
    scheme = QuantScheme(
        weight_bits=4,
        activation_bits=16 if granularity == "none" else bits,
        group_size=16,
        granularity=granularity,
    )
    grid = None
    if granularity in ("channel", "token"):
        axes = (0, 1) if granularity == "channel" else (0, 2)
        grid = choose_qparams(x.float().amin(axes), x.float().amax(axes), bits)
    if granularity == "token":
        grid = QParams(grid.scale[:, None], grid.zero_point[:, None], bits)
    candidate = SiteCandidate(RangeCandidate(granularity=granularity), scheme, grid, grid)
    site = QuantizedSite(Site(("a", "b")), linears, [candidate])
    site.active = 0
    return site, x
