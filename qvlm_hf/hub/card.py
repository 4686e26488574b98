"""The model card of a saved directory: README.md and its picture.

The card is made from config.json, qvlm_report.json and the headers of the weights, and from nothing
else: what was not measured is said in a sentence, with the command that measures it. Front matter
that was there before (a licence, a language, a thumbnail) is kept; the body, card.md.jinja, is
written anew.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from qvlm_hf.format.scheme import QuantScheme, parse_scheme
from qvlm_hf.hub.contents import Contents, read_contents
from qvlm_hf.hub.file_list import relist_files
from qvlm_hf.hub.pictures import entropy_picture
from qvlm_hf.hub.repeat import config_arguments

__all__ = ["CARD_NAME", "PICTURE_NAME", "write_card"]

CARD_NAME, PICTURE_NAME = "README.md", "qvlm_entropy.png"
_COPIED = ("license", "license_name", "license_link", "language")  # from the base model's card
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
    contents, earlier = read_contents(folder), _earlier(folder)
    found = contents.report.provenance
    repo_id = repo_id or earlier.get("repo_id")
    name = (repo_id or name or folder.resolve().name).rpartition("/")[2]
    base = base_model or earlier.get("base_model") or found.get("base_model")
    picture = entropy_picture(contents.report.segments)
    owner = repo_id.rpartition("/")[0] if repo_id else None
    author = author or earlier.get("quantized_by") or owner or None
    kept = {key: value for key, value in earlier.items() if key not in _GENERATED}
    front = ModelCardData(
        **_with_license(kept, base_card, license, base),
        **_generated(contents, name=name, base=base, author=author, repo_id=repo_id),
    )
    body = _body(
        contents,
        name=name,
        source=repo_id or name,
        base=base,
        base_name=base or found.get("base_directory"),
        picture=None if picture is None else PICTURE_NAME,
    )
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
            f"{CARD_NAME}: its front matter cannot be read ({' '.join(str(error).split())}): mend "
            f"or delete the file."
        ) from error
    data = card.data.to_dict()
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
    """Adds licence and language of the base model, or another licence if one is asked for."""
    theirs = {} if base_card is None else {key: base_card.get(key) for key in _COPIED}
    copied = {key: value for key, value in theirs.items() if value is not None}
    if license is not None and license != copied.get("license", data.get("license")):
        copied = {key: value for key, value in copied.items() if key == "language"}
        copied["license"] = license
    if "license" in copied:  # a name and a link belong to the licence that they came with
        data = {key: value for key, value in data.items() if not key.startswith("license")}
    data = data | copied
    if data.get("license") == "other" and base is not None:
        # old cards have no name and link, and the Hub now asks for both
        link = f"https://huggingface.co/{base}"
        data = {"license_name": f"license of {base}", "license_link": link} | data
    return data


def _generated(
    contents: Contents, *, name: str, base: str | None, author: str | None, repo_id: str | None
) -> dict[str, Any]:
    """Front matter that follows from the model and from where it goes."""
    data: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["qvlm", contents.scheme.lower(), contents.family],
        "quantized_by": author,
        "repo_id": repo_id,  # for a later measurement, whose card should name it too
    }
    if (found := contents.report.evaluation) is not None:
        result = EvalResult(
            task_type="image-text-to-text",
            dataset_type=found["dataset"],
            dataset_name=found["dataset"],
            metric_type="exact_match",
            metric_name="exact match under greedy decoding, %",
            metric_value=round(100 * found["accuracy"]["value"], 2),
        )
        data |= {"eval_results": [result], "model_name": name}
    return data


def _body(contents: Contents, *, name: str, base_name: str | None, **named: str | None) -> str:
    """Fills card.md.jinja; names as there."""
    report, calibrated = contents.report, "dataset" in contents.report.provenance
    weight_bits, activation_bits = parse_scheme(contents.scheme)
    text = (
        _environment()
        .get_template("card.md.jinja")
        .render(
            **named,
            name=name,
            base_name=base_name,
            contents=contents,
            report=report,
            settings=report.settings,
            data=report.provenance,
            calibrated=calibrated,
            without_report=calibrated and not report.sites,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            precision=list(_precision_rows(contents)),
            quantized=[module for module in contents.modules if module.scheme is not None],
            listed=_listed(contents),
            full_precision=Counter(
                ".".join("*" if part.isdigit() else part for part in module.name.split("."))
                for module in contents.modules
                if module.scheme is None
            ),
            arguments=config_arguments(report, contents.scheme),
        )
    )
    return _lay_out(text)


def _listed(contents: Contents) -> list[tuple[str, QuantScheme]]:
    """Name and scheme of every quantized module; experts of one scheme are one line."""
    modules = ((module.name, module.scheme) for module in contents.modules)
    named = ((name, scheme) for name, scheme in modules if scheme is not None)
    return list(dict.fromkeys((re.sub(r"_proj\.\d+$", "_proj.*", n), s) for n, s in named))


def _precision_rows(contents: Contents) -> Iterator[dict[str, Any]]:
    """What every part has of each precision, and what is left of it."""
    total = contents.sizes.total.parameters
    for row in contents.sizes.rows:
        own = [module for module in contents.modules if module.component == row.component]
        modules: Counter[tuple[int, int, str]] = Counter()
        weights: Counter[tuple[int, int, str]] = Counter()
        for scheme, count in ((module.scheme, module.weights) for module in own):
            if scheme is not None:
                key = (scheme.weight_bits, scheme.activation_bits, scheme.granularity)
                modules[key] += 1
                weights[key] += count
        for key, count in sorted(modules.items()):
            what, share = _counted(count, "linear module"), weights[key] / total
            yield {"part": row.component, "what": what, "scheme": key, "share": share}
        if rest := row.parameters - weights.total():
            left = len(own) - modules.total()
            what = "everything else" if modules else "everything"
            what = _counted(left, "linear module") if left else what
            yield {"part": row.component, "what": what, "scheme": None, "share": rest / total}


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "cell": _cell,
        "code": lambda text: "`" + _cell(text).replace("`", "'") + "`",
        "counted": _counted,
        "percent": lambda share, digits=1: f"{100 * share:.{digits}f} %",
        "quote": shlex.quote,
        "size": lambda size: (
            f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
        ),
    }
    return environment


def _lay_out(text: str) -> str:
    """Joins the lines of paragraphs and list items and pads the columns of tables."""
    blocks = []
    for part in re.split(r"^(```.*?^```)$", text, flags=re.S | re.M):
        if part.startswith("```"):
            blocks.append(part)
            continue
        for block in filter(None, (block.strip() for block in re.split(r"\n\s*\n", part))):
            match block[0]:
                case "|":
                    blocks.append(_pad_table(block))
                case "-":
                    blocks.append(re.sub(r"\n +", " ", block))
                case "<":  # HTML
                    blocks.append(block)
                case _:
                    blocks.append(" ".join(block.split()))
    return "\n\n".join(blocks) + "\n"


def _pad_table(text: str) -> str:
    """Pads the columns of a Markdown table; its second line says which go to the right."""
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()
    ]
    columns = []
    for cells in zip(*rows, strict=True):
        width, right = max(3, *map(len, cells)), cells[1].endswith(":")
        rule = "-" * (width - right) + ":" * right
        cells = (cells[0], rule, *cells[2:])
        columns.append([cell.rjust(width) if right else cell.ljust(width) for cell in cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))


def _cell(text: object) -> str:
    """Text for a table: nothing in it can end the cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
