"""The model card of a saved directory: README.md and its picture, made from config.json, qvlm_report.json and the headers of the weights.

Nothing in it is typed by hand: what was not measured is said in a sentence, with the command that
measures it. Front matter that was there before (a licence, a language, a thumbnail) is kept; the
body is written anew. model_card.md is its frame, card_text.py has its sentences, card_tables.py its
tables.
"""

from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from qvlm_hf.hub import card_tables, card_text
from qvlm_hf.hub.card_rules import check_card
from qvlm_hf.hub.card_text import Card
from qvlm_hf.hub.contents import read_contents
from qvlm_hf.hub.file_list import relist_files
from qvlm_hf.hub.pictures import entropy_picture
from qvlm_hf.hub.reproduce import quantize_command

__all__ = ["CARD_NAME", "PICTURE_NAME", "check_card", "write_card"]

CARD_NAME = "README.md"
PICTURE_NAME = "qvlm_entropy.png"
_COPIED = ("license", "license_name", "license_link", "language")  # from the base model's card
_GENERATED = (
    "base_model",
    "base_model_relation",
    "library_name",
    "pipeline_tag",
    "quantized_by",
    "repo_id",
    "tags",
    "model-index",
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
    """Writes README.md and its picture into a saved directory.

    Args:
        folder: as `save_quantized` wrote it.
        name: of the directory, if it will not be the one that it has now.
        repo_id: where it will be on the Hub; None takes that of an earlier card, and without one
            the texts name the directory.
        base_model: Hub id of the full-precision model; None takes that of an earlier card, or what
            quantizing recorded.
        license: identifier of a licence; None copies that of `base_card`, or keeps that of an
            earlier card.
        author: who quantized it; None is the owner in `repo_id`.
        base_card: front matter of the full-precision model's card.

    Returns:
        Names of the files that were written.

    Raises:
        ValueError: the directory holds no quantized model, or the card would break a rule of
            `check_card`.
    """
    contents, earlier = read_contents(folder), _earlier(folder)
    repo_id = repo_id or earlier.get("repo_id")
    found = contents.report.provenance
    name = (repo_id or name or folder.resolve().name).rpartition("/")[2]
    base = base_model or earlier.get("base_model") or found.get("base_model")
    base_name = base or found.get("base_directory")
    picture = entropy_picture(contents.report.segments)
    language, command = quantize_command(
        contents.report, scheme=contents.scheme, base=base_name or "BASE", revision=found.get("base_model_revision"), dtype=contents.dtype,
        output=name,
    )  # fmt: skip
    card = Card(
        contents=contents, name=name, source=repo_id or name, base=base, base_name=base_name,
        picture=None if picture is None else PICTURE_NAME, command_language=language, command=command,
    )  # fmt: skip
    owner = repo_id.partition("/")[0] if repo_id and "/" in repo_id else None
    author = author or earlier.get("quantized_by") or owner
    kept = {key: value for key, value in earlier.items() if key not in _GENERATED}
    data = _with_license(kept, base_card, license, base) | _generated(
        card, author=author, repo_id=repo_id
    )
    text = f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{_body(card)}"
    check_card(text)
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
    if picture is None:
        (folder / PICTURE_NAME).unlink(missing_ok=True)  # of an earlier card
    else:
        (folder / PICTURE_NAME).write_bytes(picture)
    relist_files(folder, (CARD_NAME, PICTURE_NAME))
    return (CARD_NAME,) if picture is None else (CARD_NAME, PICTURE_NAME)


def _earlier(folder: Path) -> dict[str, Any]:
    """Front matter of the card that is there."""
    file = folder / CARD_NAME
    if not file.is_file():
        return {}
    try:
        data = ModelCard(
            file.read_text(encoding="utf-8"), ignore_metadata_errors=True
        ).data.to_dict()
    except (YAMLError, ValueError, TypeError) as error:
        raise ValueError(
            f"{CARD_NAME}: its front matter cannot be read ({' '.join(str(error).split())}): mend "
            f"or delete the file."
        ) from error
    for name in ("base_model", "repo_id"):
        if not isinstance(data.get(name, ""), str):
            raise ValueError(
                f"{CARD_NAME}: its {name} {data[name]!r} must be 'owner/name': mend or delete the "
                f"line."
            )
    return data


def _with_license(
    data: dict[str, Any], base_card: ModelCardData | None, license: str | None, base: str | None
) -> dict[str, Any]:
    """`data` with licence and language of the base model, or with another licence if one is asked for."""
    copied = (
        {}
        if base_card is None
        else {key: value for key in _COPIED if (value := base_card.get(key)) is not None}
    )
    if license is not None and license != copied.get("license", data.get("license")):
        copied = {key: value for key, value in copied.items() if key == "language"} | {
            "license": license
        }
    if "license" in copied:  # a name and a link belong to the licence that they came with
        data = {key: value for key, value in data.items() if not key.startswith("license")}
    data = data | copied
    if data.get("license") == "other" and base is not None:
        # old cards have no name and link, and the Hub now asks for both
        data = {
            "license_name": f"license of {base}",
            "license_link": f"https://huggingface.co/{base}",
        } | data
    return data


def _generated(card: Card, *, author: str | None, repo_id: str | None) -> dict[str, Any]:
    """Front matter that follows from the model and from where it goes."""
    contents, found = card.contents, card.report.evaluation
    data: dict[str, Any] = (
        {"base_model": card.base, "base_model_relation": "quantized"} if card.base else {}
    )
    data |= {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["qvlm", contents.scheme.lower(), contents.family],
    }
    if author is not None:
        data["quantized_by"] = author
    if repo_id is not None:
        data["repo_id"] = repo_id  # for a later measurement, whose card should name it too
    if found is not None:
        result = EvalResult(
            task_type="image-text-to-text", dataset_type=found["dataset"], dataset_name=found["dataset"], metric_type="exact_match",
            metric_name="exact match under greedy decoding, %", metric_value=round(100 * found["accuracy"]["value"], 2),
        )  # fmt: skip
        data |= {"eval_results": [result], "model_name": card.name}
    return data


def _body(card: Card) -> str:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.from_string(
        Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    )
    return template.render(card=card, report=card.report, say=card_text, tables=card_tables)
