"""The cleaning of captions against pairs that LlamaGen's own code made, and rules that no pair shows."""

import json

import pytest

from lightning_modules.backbone.caption import clean_caption
from tests.helpers.llamagen import LLAMAGEN

PAIRS = json.loads((LLAMAGEN / "captions.json").read_text())


@pytest.mark.parametrize("pair", PAIRS, ids=range(len(PAIRS)))
def test_pairs_of_the_original(pair: dict[str, str]) -> None:
    assert clean_caption(pair["raw"]) == pair["clean"]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a <b>red</b> cube<br/>on <i>a table", "a red cubeon a table"),
        ("a cat<script>cat()</script><!-- no --> asleep", "a cat asleep"),
        ("&lt;b&gt;bold&lt;/b&gt; &eacute;t&eacute; &unknown; &#233;", "bold< b> été unknown é"),
        ("a cat &quot", "a cat"),
        ("<![CDATA[a dog]]> at rest", "a dog at rest"),
        ("the dog&#39;s bone, Ã©tÃ©", "the dog's bone, ã tã"),
        ("meet https://www.example.org/x and shop.example.com", "meet and"),
        ("click on it: 1.5x2.5 tables, 10:30  ", "1 5 tables, 10:30"),
        ("worldwide free shipping of a lamp", "of a lamp"),
    ],
)  # fmt: skip
def test_rules_that_no_pair_shows(raw: str, clean: str) -> None:
    """What is expected was made with the original, too."""
    assert clean_caption(raw) == clean
