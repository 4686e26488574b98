"""A calibration or evaluation sample: one chat, whatever the source.

    load_samples(source) -> [Sample]         read, check, choose
    batches(samples, processor, 8) -> Batch  render, tokenize, pad on the right, label the answer

Sources are recognised by their keys (formats.py): Transformers chats, LLaVA JSON,
image/question/answer rows and ScienceQA. Every error is one line that names the file, the line and
the key, and says how to mend it.

Left out on purpose: truncation (it cuts image tokens), URLs (a calibration set must be the same
tomorrow) and any import of Transformers: the processor is passed in.

    sample     the chat; its pictures (pictures.py)
    loading    load_samples: a source -> rows (sources.py, json_files.py)
               -> samples (formats.py: the table of layouts; keys.py)
    batch      batches: chat -> text and answer (rendering.py) -> tensors
    identity   hashes of samples
"""

from qvlm_hf.calibration.samples.batch import (
    IGNORE_INDEX,
    Batch,
    batches,
    collate,
    longest_sample,
    moved,
    without_too_long,
)
from qvlm_hf.calibration.samples.identity import by_picture, fingerprint
from qvlm_hf.calibration.samples.loading import dataset_name, hold_out, load_samples
from qvlm_hf.calibration.samples.rendering import Processor, takes_suffix
from qvlm_hf.calibration.samples.sample import Sample

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Processor",
    "Sample",
    "batches",
    "by_picture",
    "collate",
    "dataset_name",
    "fingerprint",
    "hold_out",
    "load_samples",
    "longest_sample",
    "moved",
    "takes_suffix",
    "without_too_long",
]
