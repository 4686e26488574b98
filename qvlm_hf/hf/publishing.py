"""`publish`: a quantized model, or a saved directory, becomes a repository on the Hub that loads.

    may we? -> save -> load it again, logits equal -> card -> search for secrets -> one upload ->
    read back what the Hub holds

Whatever fails after saving, the saved directory stays and the error says how to go on. Left out:
datasets, Spaces, anything but models.
"""

import shlex
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, cached_assets_path
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.hub import cached_file

from qvlm_hf.calibration.record.report import CalibrationReport
from qvlm_hf.calibration.samples import moved
from qvlm_hf.errors import first_line
from qvlm_hf.hf.config import QVLMConfig
from qvlm_hf.hf.runtime.decoding import probe_inputs
from qvlm_hf.hf.saving import save_quantized
from qvlm_hf.hub.card import write_card
from qvlm_hf.hub.payload import choose_files
from qvlm_hf.hub.saved import REPORT_NAME, SavedModel, read_report
from qvlm_hf.hub.upload import Published, Target, check_target, fetch_card, upload
from qvlm_hf.nn.replace import quantized_modules

__all__ = ["check_push", "publish", "publish_command", "publish_folder", "push_result"]


def publish(
    model: Any,
    processor: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    api: HfApi | None = None,
) -> Published:
    """Publishes a quantized model with its processor, report and card, in one upload.

    Args:
        model: quantized.
        processor: of the model.
        repo_id: "owner/name"; a bare name belongs to the token's user. Made where it is missing.
        private: of the repository; None is the owner's default, or leaves it as it is.
        revision: branch, made where it is missing, or "refs/pr/N"; None is main.
        create_pr: open a pull request against main.
        token: None takes the one of `hf auth login` or HF_TOKEN.
        commit_message: None names the scheme.
        base_model: Hub id of the full-precision model; None takes what quantizing recorded.
        license: identifier of a licence; None copies that of the base model.
        api: instead of `token`, for another Hub.

    Returns:
        Repository, commit and files.

    Raises:
        ValueError: an argument breaks a rule, the model is not quantized, or a file holds a token.
        PermissionError: there is no token, or it may not write there.
        FileNotFoundError: there is no such repository or revision.
        ConnectionError: the Hub cannot be reached.
        OSError: saving failed, or the Hub refuses.
        RuntimeError: what was saved answers differently from `model`; nothing was sent.

        Notes of the error (PEP 678) name the saved directory and the command that publishes it.
    """
    if not getattr(model, "is_quantized", False) or processor is None:
        raise ValueError(
            "publish needs a quantized model and its processor: quantize it first, and load "
            "AutoProcessor.from_pretrained(model_id)."
        )
    probe_inputs(processor)  # one that makes none should not wait for the saving
    target = Target(
        repo_id=repo_id, private=private, revision=revision, create_pr=create_pr,
        commit_message=commit_message, base_model=base_model, license=license,
    )  # fmt: skip
    api = _api(api, token)
    return _publish(api, model, processor, check_target(api, target))


def publish_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    api: HfApi | None = None,
    **options: Any,
) -> Published:
    """Publishes a directory that `save_quantized` or `qvlm quantize` wrote, with a new card.

    Args:
        folder: with config.json, weights and processor; other files stay behind.
        repo_id: as in `publish`.
        token: as there.
        api: as there.
        **options: the others of `publish`.

    Returns:
        Repository, commit and files.

    Raises:
        ValueError: the directory holds no complete quantized model, or as `publish`.
        OSError: as `publish`.
    """
    target, saved, api = Target(repo_id=repo_id, **options), SavedModel(folder), _api(api, token)
    _ = saved.quantization
    target = check_target(api, target)
    choose_files(saved.folder, ())
    _ = saved.report
    _check_loads(saved.folder)
    return _send(api, saved.folder, target)


def check_push(config: QVLMConfig) -> Target:
    """Checks what `push_to_hub=True` needs, before hours of work.

    Raises:
        ValueError: the processor is missing or makes no inputs, or as `check_target`.
        OSError: the scratch directory cannot be written, or as `check_target`.
    """
    if config.processor is None:
        raise ValueError(
            "push_to_hub=True publishes the processor too: pass QVLMConfig(..., "
            "processor=AutoProcessor.from_pretrained(model_id))."
        )
    probe_inputs(config.processor)
    _scratch().rmdir()
    return check_target(
        HfApi(), Target(repo_id=str(config.hub_model_id), private=config.hub_private)
    )


def push_result(model: Any, processor: Any, target: Target) -> Published | None:
    """Publishes what `push_to_hub=True` made; a failure is a warning, as the model took hours."""
    try:
        return _publish(HfApi(), model, processor, target)
    except Exception as error:
        in_memory = ["The model is in memory: save it with qvlm_hf.save_quantized."]
        notes = getattr(error, "__notes__", in_memory)
        warnings.warn(f"push_to_hub: {error} {' '.join(notes)}", stacklevel=2)
        return None


def _publish(api: HfApi, model: Any, processor: Any, target: Target) -> Published:
    """Saves, checks and sends; the directory is deleted when all went well."""
    scratch = _scratch()
    folder = scratch / target.repo_id.split("/")[1]
    try:
        save_quantized(model, processor, folder, report=_report(model))
        if difference := _difference(folder, model, processor):
            shutil.rmtree(folder)
            raise RuntimeError(
                f"{target.repo_id}: {difference}; nothing was sent: undo what was changed since it "
                f"was quantized."
            )
        published = _send(api, folder, target)
    except BaseException as error:  # an interruption too
        if folder.is_dir():
            error.add_note(publish_command(folder, target))
        else:
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(scratch, ignore_errors=True)
    return replace(published, folder=None)


def _send(api: HfApi, folder: Path, target: Target) -> Published:
    """Card, choice of files, upload."""
    base = target.base_model or SavedModel(folder).report.provenance.get("base_model")
    card = write_card(
        folder,
        repo_id=target.repo_id,
        base_model=base,
        license=target.license,
        author=target.user,
        base_card=fetch_card(api, base),
    )
    return upload(api, folder, target, choose_files(folder, card))


def publish_command(folder: str | Path, target: Target) -> str:
    """What publishes a saved directory as it was asked for."""
    words = ["qvlm", "publish", str(folder), target.repo_id]
    options = ("private", "create_pr", "revision", "commit_message", "base_model", "license")
    for name in options:
        value = getattr(target, name)
        option = f"--{name.removeprefix('commit_').replace('_', '-')}"
        words += [] if value in (None, False) else [option] if value is True else [option, value]
    return f"The model is saved; this publishes it: {shlex.join(words)}"


def _scratch() -> Path:
    """A new directory beside the Hub's own cache, which has room for models."""
    return Path(tempfile.mkdtemp(prefix="publish-", dir=cached_assets_path("qvlm_hf", "publish")))


def _api(api: HfApi | None, token: str | None) -> HfApi:
    """To ask with. A token from a file often ends in a line break, which HTTP would refuse."""
    if api is not None and token is not None:
        raise ValueError("publish takes token= or api=, not both: an HfApi has its own token.")
    if token is not None and not token.strip():  # a variable that was not set
        raise ValueError("token= is empty: leave it out to use the one of `hf auth login`.")
    return api or HfApi(token=token and token.strip())


def _report(model: Any) -> CalibrationReport | None:
    """Of this process, or beside the checkpoint that the model was loaded from."""
    if model.hf_quantizer.report is not None:
        return model.hf_quantizer.report
    file = cached_file(
        model.name_or_path,
        REPORT_NAME,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return None
    report, config = read_report(Path(file)), model.hf_quantizer.quantization_config
    same = (report.modules, report.provenance) == (config.modules, config.provenance)
    return report if same else None  # a branch's model finds the report of main


def _difference(folder: Path, model: Any, processor: Any) -> str | None:
    """Loads a saved model and compares its logits, bit by bit, with those of the one in memory."""
    inputs = probe_inputs(processor)
    again = probe_inputs(AutoProcessor.from_pretrained(folder, local_files_only=True))
    same = inputs.keys() == again.keys()
    if not same or not all(torch.equal(inputs[name], again[name]) for name in inputs):
        return (
            "the saved processor does not turn a picture and a question into the same inputs as "
            "the one in memory"
        )
    parts = model.config.sub_configs
    reloaded = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=model.dtype,
        device_map=getattr(model, "hf_device_map", None) or model.device,
        attn_implementation={p: getattr(model.config, p)._attn_implementation for p in parts},
        local_files_only=True,
    )
    pairs = zip(quantized_modules(model), quantized_modules(reloaded), strict=True)
    for (_, mine), (_, other) in pairs:
        other.reference = mine.reference  # the same kernels: `set_backend` is not saved
    expected, found = _logits(model, inputs), _logits(reloaded, inputs)
    if torch.equal(expected, found):
        return None
    most = float((expected - found).abs().max())
    return f"the saved model's logits differ from those of the model in memory by up to {most:.3g}"


def _check_loads(folder: Path) -> None:
    """Loads a saved model with every check of a checkpoint and asks it once.

    Raises:
        ValueError: its processor does not load, its answer holds NaN or infinity, or as loading.
    """
    try:
        inputs = probe_inputs(AutoProcessor.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder}: holds no processor that loads ({first_line(error)}): save the model's "
            f"processor there too."
        ) from error
    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    if not bool(_logits(model, inputs).isfinite().all()):
        raise ValueError(
            f"{folder}: the model answers with NaN or infinity: quantize it again, in bfloat16."
        )


def _logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[1, tokens, vocabulary]."""
    with torch.inference_mode():
        return model(**moved(inputs, model.device, model.dtype)).logits
