"""What `several_processes.run_together` runs in each of them."""

import hashlib
import io
import os
from contextlib import redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist
from tiny_calibrations import TEXT, calibrate, tiny_samples
from tiny_families import tiny_family, tiny_family_processor
from tiny_models import tiny_llava, tiny_messages

from qvlm_hf import QVLMConfig, quantize_model
from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.record.resume import SavedSteps
from qvlm_hf.cli import main
from qvlm_hf.format.packing import unpack
from qvlm_hf.nn.linear import QVLMLinear

__all__ = [
    "VALUES",
    "calibrated",
    "command",
    "differ",
    "exchange",
    "fail_in_first_later",
    "fail_in_second",
    "other_samples",
    "quantized_family",
    "stopped",
]

VALUES = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))


def exchange(number):
    own = ranks.shard(7)
    rows = torch.arange(7)[own]
    with ranks.no_sync():
        apart = (ranks.world_size(), ranks.all_reduce(torch.tensor([3.0])).tolist())
    ranks._PIECE = 1024  # several pieces
    return {
        "number": ranks.rank(),
        "sum": ranks.all_reduce(VALUES[number]).tolist(),
        "largest": ranks.all_reduce(torch.tensor([number + 1.0, 5.0 - 6 * number]), "max").tolist(),
        "smallest": ranks.all_reduce(
            torch.tensor([number + 1.0, 5.0 - 6 * number]), "min"
        ).tolist(),
        "numbers": (
            *ranks.all_reduce_numbers(3 + number),
            *ranks.all_reduce_numbers(0.5 - 0.25 * number),
        ),
        "gathered": [
            t.tolist() for t in ranks.all_gather(torch.full([(1, 3), (3, 1)][number], number))
        ],
        "rows": torch.cat(ranks.all_gather(rows)).tolist(),
        "first": ranks.broadcast(torch.tensor([float(number)])).tolist(),
        "told": ranks.broadcast_object(["first, ä", "second"][number]),
        "apart": apart,
        "seen": ranks.offsets([[0, 1, 4], [2, 3]][number], [[1, 2, 16], [4, 8]][number]),
    }


def fail_in_second(number):
    with ranks.sharing_errors():
        if number:
            raise ValueError("no second")
        ranks.all_reduce(torch.ones(3))


def fail_in_first_later(number):
    with ranks.sharing_errors():
        ranks.all_reduce_numbers(1)
        if not number:
            raise KeyError("late")


def differ(number):
    ranks.all_reduce(torch.ones(3 + number))


def other_samples(number):
    with ranks.sharing_errors():
        ranks.check_alike(f"samples {number}", "samples")


def calibrated(_, options):
    """A tiny model after the whole recipe, as plain values."""
    options = dict(options)
    data = tiny_samples(options.pop("count", 8))
    model, report = calibrate(
        tiny_llava().eval(), data=data, held_out=tiny_samples(4, seed=9), **options
    )
    return described(model, report)


def described(model, report):
    """Bytes, choices and figures of a quantized model."""
    digest = hashlib.sha256()
    state = model.state_dict()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QVLMLinear)}
    blocks = [block for segment in report.segments for block in segment.blocks]
    return {
        "bytes": digest.hexdigest(),
        "processes": report.provenance.get("processes"),
        "choices": [(site.modules, site.candidate) for site in report.sites],
        "raised": [(r.site, r.weight_bits, r.activation_bits) for r in report.lifts],
        "blocks": [(block.layers, block.evaluations) for block in blocks],
        "errors": [(block.initial, block.greedy, block.joint) for block in blocks],
        "entropies": [e for segment in report.segments for e in segment.entropies],
        "sensitivities": list(report.sensitivities.values()),
        "kl": report.self_check.kl,
        "recipes": [(t.fields, t.answer_kl, t.text_kl) for t in report.recipes],
        "vision": report.vision,
        "integers": {
            n: unpack(m.weight, m.scheme.weight_bits, m.in_features).numpy()
            for n, m in packed.items()
        },
        "scales": {n: t.float().numpy() for n, t in state.items() if n.endswith("_scale")},
    }


def command(number, words):
    """Exit status of `qvlm`, and what it writes to standard output and standard error."""
    count = str(dist.get_world_size())
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of which Accelerate would warn
    os.environ |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    said, complained = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(complained):
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code
    return status, said.getvalue(), complained.getvalue()


def quantized_family(_, name, options):
    """A tiny model of a family after `quantize_model`, as `calibrated`."""
    model, processor = tiny_family(name, name, name), tiny_family_processor(name, name)
    options = {
        "recipe": "fixed",
        "group_size": 16,
        "percentiles": (1.0,),
        "margins": (),
        "batch_size": 1,
        **options,
    }
    rows = [*tiny_messages(options["num_samples"] - len(TEXT)), *TEXT]
    config = QVLMConfig(scheme="W4A4", dataset=rows, processor=processor, **options)
    return described(model, quantize_model(model, config))


def stopped(number, options, steps):
    """As `calibrated`, but the first process fails when so many steps are kept."""
    write, left = SavedSteps.write, [steps]

    def counted(self, step, value):
        write(self, step, value)
        left[0] -= 1
        if not left[0] and not number:
            raise OSError("stopped")

    SavedSteps.write = counted
    try:
        return calibrated(number, options)
    finally:
        SavedSteps.write = write
