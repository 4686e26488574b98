"""The model card of a saved directory: README.md and its picture.

The card is made from config.json, qvlm_report.json and the headers of the weights, and from nothing
else: what was not measured is said in a sentence, with the command that measures it. Front matter
that was there before (a licence, a language, a thumbnail) is kept; the body, card.md.jinja, is
written anew.
"""

import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from qvlm_hf.errors import first_line
from qvlm_hf.format.scheme import parse_scheme
from qvlm_hf.hub.file_list import relist_files
from qvlm_hf.hub.pictures import entropy_picture
from qvlm_hf.hub.repeat import config_arguments
from qvlm_hf.hub.saved import SavedModel, as_damaged_report

__all__ = ["CARD_NAME", "PICTURE_NAME", "write_card"]

CARD_NAME, PICTURE_NAME = "README.md", "qvlm_entropy.png"
_LICENSE = ("license", "license_name", "license_link")
_GENERATED = (
    "base_model", "base_model_relation", "library_name", "pipeline_tag", "quantized_by", "repo_id",
    "tags", "model-index",
)  # fmt: skip
# "/name/name" or "C:\name" where no word, link or relative path goes before, so not "/v1" or "a/b"
_PATH = re.compile(
    r"(?<![\w/.:~)\]\-])/(?:[\w.\-]+/)+[\w.\-]+|\b[A-Za-z]:\\[\w.\-]+|(?<!\w)~/[\w.\-]+|file://"
)


def write_card(
    folder: Path,
    *,
    name: str | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    author: str | None = None,
    base_card: ModelCardData | None = None,
) -> tuple[str, ...]:
    """Writes README.md and its picture into a saved directory, and returns their names.

    Args:
        folder: as `save_quantized` wrote it.
        name: of the directory, if it will not be the one that it has now.
        repo_id: where it will be on the Hub; None takes that of an earlier card.
        base_model: Hub id of the full-precision model; None takes that of an earlier card, or what
            quantizing recorded.
        license: identifier of a licence; None copies that of `base_card`, or of an earlier card.
        author: who quantized it; None is the owner in `repo_id`.
        base_card: front matter of the full-precision model's card.

    Raises:
        ValueError: the directory holds no quantized model, an earlier card cannot be read, or a
            path of this machine would stand in the card.
    """
    saved, earlier = SavedModel(folder), _earlier(folder)
    repo_id = repo_id or earlier.get("repo_id")
    owner, _, name = (repo_id or name or folder.resolve().name).rpartition("/")
    base = base_model or earlier.get("base_model") or saved.report.provenance.get("base_model")
    front = ModelCardData(
        **{key: value for key, value in earlier.items() if key not in (*_GENERATED, *_LICENSE)},
        **_license(earlier, base_card, license, base),
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["qvlm", saved.quantization["scheme"].lower(), saved.config.model_type],
        quantized_by=author or earlier.get("quantized_by") or owner or None,
        repo_id=repo_id,  # for a later measurement, whose card should name it too
        **_results(saved, name),
    )
    if base_card is not None and base_card.language:
        front.language = base_card.language
    with as_damaged_report():
        picture = entropy_picture(saved.report.segments)
        body = _body(saved, name=name, source=repo_id or name, base=base, picture=picture)
        text = f"---\n{front.to_yaml()}\n---\n\n{body}"
    if path := _PATH.search(re.sub(r"https?://\S+", "", text)):
        raise ValueError(
            f"model card: holds the absolute path {path[0]!r}: name the file or repository alone."
        )
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
    if picture is None:
        (folder / PICTURE_NAME).unlink(missing_ok=True)  # of an earlier card
    else:
        (folder / PICTURE_NAME).write_bytes(picture)
    relist_files(folder, (CARD_NAME, PICTURE_NAME))
    return (CARD_NAME,) if picture is None else (CARD_NAME, PICTURE_NAME)


def _earlier(folder: Path) -> dict[str, Any]:
    """Front matter of the card that is there."""
    if not (file := folder / CARD_NAME).is_file():
        return {}
    try:
        card = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (YAMLError, ValueError, TypeError) as error:
        raise ValueError(
            f"{CARD_NAME}: its front matter cannot be read ({first_line(error)}): mend or delete "
            f"the file."
        ) from error
    data = card.data.to_dict()
    for name in ("base_model", "repo_id"):
        if not isinstance(data.get(name, ""), str):
            raise ValueError(f"{CARD_NAME}: its {name} {data[name]!r} must be 'owner/name'.")
    return data


def _license(
    earlier: dict[str, Any], base_card: ModelCardData | None, asked: str | None, base: str | None
) -> dict[str, Any]:
    """The licence that is asked for, or that of the base model, or the earlier one."""
    theirs = {} if base_card is None else base_card.to_dict()
    source = theirs if "license" in theirs else earlier
    found = {key: source[key] for key in _LICENSE if key in source}
    if asked is not None and asked != found.get("license"):
        found = {"license": asked}  # a name and a link belong to the licence that they came with
    if found.get("license") == "other" and base is not None:
        # old cards have no name and link, and the Hub now asks for both
        link = f"https://huggingface.co/{base}"
        found = {"license_name": f"license of {base}", "license_link": link} | found
    return found


def _results(saved: SavedModel, name: str) -> dict[str, Any]:
    """The measured accuracy, as the Hub lists it."""
    if (found := saved.report.evaluation) is None:
        return {}
    with as_damaged_report():
        result = EvalResult(
            task_type="image-text-to-text",
            dataset_type=found["dataset"],
            dataset_name=found["dataset"],
            metric_type="exact_match",
            metric_name="exact match under greedy decoding, %",
            metric_value=round(100 * found["accuracy"]["value"], 2),
        )
    return {"eval_results": [result], "model_name": name}


def _body(
    saved: SavedModel, *, name: str, source: str, base: str | None, picture: bytes | None
) -> str:
    """Fills card.md.jinja."""
    report, scheme, sizes = saved.report, saved.quantization["scheme"], saved.sizes(torch.bfloat16)
    calibrated = "dataset" in report.provenance
    weight_bits, activation_bits = parse_scheme(scheme)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "cell": _cell,
        "code": lambda text: "`" + _cell(text).replace("`", "'") + "`",
        "counted": lambda count, noun: f"{count:,} {noun}{'' if count == 1 else 's'}",
        "percent": lambda share, digits=1: f"{100 * share:.{digits}f} %",
        "quote": shlex.quote,
        "size": lambda size: (
            f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
        ),
    }
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        name=name,
        source=source,
        base=base,
        base_name=base or report.provenance.get("base_directory"),
        picture=None if picture is None else PICTURE_NAME,
        family=saved.config.model_type,
        dtype=str(saved.dtype).removeprefix("torch."),
        scheme=scheme,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        report=report,
        calibrated=calibrated,
        without_report=calibrated and not report.sites,
        sizes=sizes,
        # of a module without scheme nothing
        kinds=Counter(
            (
                module.component,
                (s := module.scheme) and (s.weight_bits, s.activation_bits, s.granularity),
            )
            for module in saved.linear_modules
        ),
        full_precision=Counter(
            re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module.name)
            for module in saved.linear_modules
            if module.scheme is None
        ),
        arguments=config_arguments(report, scheme),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _cell(text: object) -> str:
    """Text for a table: nothing in it can end the cell."""
    return " ".join(str(text).split()).replace("|", "\\|")
