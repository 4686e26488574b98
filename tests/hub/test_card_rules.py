"""Every rule of a card, on a card that breaks it alone."""

import pytest

from qvlm_hf.hub.card_rules import LICENSES, check_card

FRONT = """base_model: org/base
base_model_relation: quantized
library_name: transformers
license: apache-2.0
tags: [qvlm, w4a4]
"""


def card(front: str = FRONT, body: str = "# A model\n\nText.\n") -> str:
    return f"---\n{front}---\n\n{body}"


@pytest.mark.parametrize(
    "text",
    [
        card(),
        card("library_name: transformers\n"),
        card(
            FRONT.replace("apache-2.0", "other")
            + "license_name: my terms\nlicense_link: https://example.org/terms\n"
        ),
        card(FRONT.replace("apache-2.0", "[mit, apache-2.0]")),
        card(FRONT.replace("org/base", "[org/base, gpt2]")),
        card(
            body="see [the paper](https://arxiv.org/abs/2410.08119), `a/b/c`, ~5 GiB, and/or, 3/4, "
            "`model.layers.*.fc1`, /v1, I/O.\n"
        ),
        card(FRONT + "language: en\ndatasets:\n- me/data\n"),
    ],
)
def test_sound_cards_pass(text: str) -> None:
    check_card(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# A model\n", "has no front matter: begin with '---'"),
        ("---\nlibrary_name: transformers\n", "has no front matter"),
        (card("library_name: [transformers\n"), "the front matter is no valid metadata"),
        (card("- a\n- list\n"), "the front matter is no valid metadata"),
        (card("model-index:\n- results: []\n"), "the front matter is no valid metadata"),
        (
            card(FRONT.replace("apache-2.0", "apache2")),
            "license='apache2' is no identifier of the Hub: take one that it lists",
        ),
        (
            card(FRONT.replace("apache-2.0", "other") + "license_name: my terms\n"),
            "license='other' needs license_name and license_link",
        ),
        (
            card(FRONT.replace("org/base", "/models/base")),
            "base_model='/models/base' is no Hub id: write 'owner/name'",
        ),
        (card(FRONT.replace("org/base", "../base")), r"base_model='\.\./base' is no Hub id"),
        (card(FRONT.replace("org/base", "7")), "base_model=7 is no Hub id"),
        (
            card(FRONT.replace("relation: quantized", "relation: shrunk")),
            "base_model_relation='shrunk' must be one of adapter, finetune",
        ),
        (
            card(FRONT.replace("base_model: org/base\n", "")),
            "base_model_relation='quantized' needs a base_model",
        ),
        (
            card(FRONT.replace("[qvlm, w4a4]", "[qvlm, 4]")),
            r"tags=\['qvlm', 4\] must be a list of strings",
        ),
        (
            card(FRONT.replace("[qvlm, w4a4]", "{a: b}")),
            "tags={'a': 'b'} must be a list of strings",
        ),
        (
            card(body="[More Information Needed]\n"),
            r"holds '\[More Information Needed\]': fill it in",
        ),
        (
            card(body="token: hf_" + "a1B2c3D4e5F6g7H8i9J0k1\n"),
            r"something like a Hub token \(hf_\.\.\.\): remove it",
        ),
        (
            card(body="made from /home/me/models/base\n"),
            "holds the absolute path '/home/me/models/base': name the file",
        ),
        (card(body='from_pretrained("/tmp/out")\n'), "holds the absolute path '/tmp/out'"),
        (card(body=r"made in C:\Users\me" + "\n"), "holds the absolute path"),
        (card(body="made in ~/models\n"), "holds the absolute path '~/models'"),
        (card(FRONT + "thumbnail: file:///tmp/a.png\n"), "holds the absolute path 'file://'"),
    ],
)
def test_every_rule_has_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"model card: .*{message}") as caught:
        check_card(text)
    assert "\n" not in str(caught.value)
    assert "hf_a1B2" not in str(caught.value)


def test_the_licences_are_identifiers() -> None:
    assert {"apache-2.0", "mit", "llama2", "gemma", "other", "cc-by-4.0"} <= LICENSES
    assert all(name == name.strip().lower() and " " not in name for name in LICENSES)
