"""What a model card must satisfy before it is uploaded, checked without a network.

The Hub checks the front matter at every commit that holds a README.md and refuses the commit; these
rules find the same mistakes, and some that it accepts (a base model that is no id, an unfilled
template, a token or a path of this machine in the text), before the upload starts. Left out:
whether the base model and the licence's link exist.
"""

import re
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

__all__ = ["BASE_MODEL_RELATIONS", "LICENSES", "check_card", "check_choices"]

BASE_MODEL_RELATIONS = ("adapter", "finetune", "merge", "quantized")

# The identifiers that the Hub accepts (huggingface/hub-docs, repositories-licenses.md); anything
# else is "other" with a name and a link.
LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0
    cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m
    deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl
    gpl-2.0 gpl-3.0 grok2-community h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2
    llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other
    pddl postgresql unknown unlicense wtfpl zlib
    """.split()  # noqa: SIM905 - ninety lines as a list
)

_LISTS = ("datasets", "language", "metrics", "tags")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
# "/name/name" or "C:\name" where no word, link or relative path goes before; "/v1" and "a/b" are
# none
_PATH = re.compile(
    r"(?<![\w/.:~)\]\-])/(?:[\w.\-]+/)+[\w.\-]+|\b[A-Za-z]:\\[\w.\-]+|(?<!\w)~/[\w.\-]+|file://"
)


def check_card(text: str) -> None:
    """Checks a whole README.md.

    Args:
        text: front matter and body.

    Raises:
        ValueError: one line, with the first rule that it breaks.
    """
    data = _front_matter(text)
    _check_license(data)
    _check_base_model(data)
    for name in _LISTS:
        value = data.get(name)
        if value is not None and not (
            isinstance(value, str | list)
            and all(isinstance(item, str) and item for item in _listed(value))
        ):
            raise ValueError(
                f"model card: {name}={value!r} must be a list of strings: write [a, b]."
            )
    if "[More Information Needed]" in text:
        raise ValueError(
            "model card: holds '[More Information Needed]': fill it in or leave the section out."
        )
    if _TOKEN.search(text):  # never quoted: messages end in logs
        raise ValueError(
            "model card: holds something like a Hub token (hf_...): remove it, and revoke it if it "
            "is one."
        )
    if found := _PATH.search(_without_links(text)):
        raise ValueError(
            f"model card: holds the absolute path {found[0]!r}: name the file or repository alone."
        )


def check_choices(*, license: str | None, base_model: str | None) -> None:
    """Checks what a caller chose for a card that is not written yet.

    Raises:
        ValueError: one is no identifier. Whether "other" has a name and a link shows only in the
            card.
    """
    if license is not None and license not in LICENSES:
        raise ValueError(
            f"license={license!r} is no identifier of the Hub: take one that it lists, as in "
            f"'apache-2.0'."
        )
    if base_model is not None:
        _check_base_model({"base_model": base_model})


def _front_matter(text: str) -> dict[str, Any]:
    """What stands between the two "---".

    Raises:
        ValueError: it is missing, no YAML, or does not survive being written and read again.
    """
    if not text.startswith("---\n") or "\n---\n" not in text:
        raise ValueError("model card: has no front matter: begin with '---', YAML and '---'.")
    try:
        written = yaml.safe_load(text[4 : text.index("\n---\n")])
        card = ModelCard(text)
        data = card.data.to_dict()
        again = ModelCard(str(card)).data.to_dict()
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"model card: the front matter is no valid metadata ({' '.join(str(error).split())}): "
            f"mend its YAML."
        ) from error
    if again != data or set(written) != set(data):
        raise ValueError(
            "model card: the front matter changes when it is written and read again: use plain "
            "strings, numbers and lists."
        )
    return written  # the card's own data has made lists of what was none


def _check_license(data: dict[str, Any]) -> None:
    for name in _listed(data.get("license") or []):
        if name not in LICENSES:
            raise ValueError(
                f"model card: license={name!r} is no identifier of the Hub: take one that it "
                f"lists, as in 'apache-2.0'."
            )
        if name == "other" and not (data.get("license_name") and data.get("license_link")):
            raise ValueError(
                "model card: license='other' needs license_name and license_link: name the licence "
                "and where it is."
            )


def _check_base_model(data: dict[str, Any]) -> None:
    bases, relation = data.get("base_model"), data.get("base_model_relation")
    for base in _listed(bases or []):
        try:
            validate_repo_id(base)
        except HFValidationError as error:
            raise ValueError(
                f"model card: base_model={base!r} is no Hub id: write 'owner/name', or leave it "
                f"out."
            ) from error
    if relation is not None and relation not in BASE_MODEL_RELATIONS:
        raise ValueError(
            f"model card: base_model_relation={relation!r} must be one of "
            f"{', '.join(BASE_MODEL_RELATIONS)}."
        )
    if relation is not None and not bases:
        raise ValueError(
            f"model card: base_model_relation={relation!r} needs a base_model: name it, or leave "
            f"both out."
        )


def _without_links(text: str) -> str:
    """The text without the addresses that it links to, which hold slashes too."""
    return re.sub(r"https?://\S+", "", text)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
