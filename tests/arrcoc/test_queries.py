"""Query variants and absent queries."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from arrcoc.data.queries import TEMPLATES, QueryVariants, absent_names, plural


def test_plurals() -> None:
    for name, expected in {"cup": "cups", "bus": "buses", "box": "boxes", "bench": "benches", "dish": "dishes"}.items():
        assert plural(name) == expected
    for name, expected in {"city": "cities", "boy": "boys", "hot dog": "hot dogs"}.items():
        assert plural(name) == expected


def test_the_query_comes_first_and_variants_differ() -> None:
    variants = QueryVariants(synonyms={"couch": ["sofa", "settee"]}).variants("a couch")
    assert variants[0] == "a couch"
    assert len(set(variants)) == len(variants) == 3 * (1 + len(TEMPLATES))


def test_whole_words_of_any_case_are_replaced_and_plurals_by_plurals() -> None:
    synonyms = {"couch": ["sofa"], "dog": ["puppy"], "hot dog": ["frankfurter"], "Bus": ["coach"]}
    variants = QueryVariants(templates=(), synonyms=synonyms)
    assert variants.variants("two Couches") == ("two Couches", "two sofas")
    assert variants.variants("a dog and dogs") == ("a dog and dogs", "a puppy and dogs", "a dog and puppies")
    assert variants.variants("a hot dog") == ("a hot dog", "a frankfurter")
    assert variants.variants("buses") == ("buses", "coaches")
    assert variants.variants("dogma, couchette") == ("dogma, couchette",)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("cup", "a photo of a cup"),
        ("apple", "a photo of an apple"),
        ("the red star", "a photo of the red star"),
        ("A man riding a horse", "a photo of A man riding a horse"),
        ("anything blue", "a photo of anything blue"),
        ("two dogs", "a photo of two dogs"),
        ("theatre", "a photo of a theatre"),
    ],
)
def test_the_article_of_a_template_fits_the_query(query: str, expected: str) -> None:
    for article in ("a", "an"):
        assert QueryVariants(templates=(f"a photo of {article} {{}}",)).variants(query) == (query, expected)


def test_other_templates_are_filled_as_they_are() -> None:
    assert QueryVariants(templates=("{} in the rain", "look at the {}")).variants("cup")[1:] == (
        "cup in the rain",
        "look at the cup",
    )
    assert QueryVariants(templates=("look at the {}",)).variants("the cup")[1] == "look at the cup"


def test_every_variant_is_drawn_equally_often_by_the_generator_alone() -> None:
    variants = QueryVariants(templates=("a {}", "one {}", "this {}"))
    state = torch.get_rng_state()
    drawn = [variants.draw("cup", torch.Generator().manual_seed(seed)) for seed in (5, 5)]
    assert drawn[0] == drawn[1]
    generator = torch.Generator().manual_seed(0)
    counts = Counter(variants.draw("cup", generator) for _ in range(2000))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(counts) == set(variants.variants("cup"))
    assert all(abs(count - 500) < 100 for count in counts.values())  # 5 standard deviations


def test_synonyms_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.json"
    path.write_text(json.dumps({"couch": ["sofa"]}))
    assert QueryVariants.from_json(path, templates=()).variants("couch") == ("couch", "sofa")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"synonyms.json is not JSON"):
        QueryVariants.from_json(path)
    path.write_text('{"couch": "sofa"}')
    with pytest.raises(ValueError, match=r'must hold an object like \{"couch": \["sofa"\]\}, got'):
        QueryVariants.from_json(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"templates": ("a photo",)}, r"a template must have one \{\}, the place of the query, got 'a photo'"),
        ({"templates": ("{} and {}",)}, r"a template must have one \{\}"),
        ({"templates": "a {}"}, "templates must be a sequence of str, got the single str"),
        ({"synonyms": {"couch": []}}, r"synonyms must map a word to a list of one or more others, got 'couch': \[\]"),
        ({"synonyms": {"couch": "sofa"}}, "synonyms must map a word to a list"),
        ({"synonyms": {"couch": [""]}}, "synonyms must map a word to a list"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QueryVariants(**options)  # type: ignore[arg-type]


def test_absent_names_are_absent_and_depend_on_key_and_name_alone() -> None:
    vocabulary = [f"thing {number}" for number in range(40)]
    chosen = absent_names(vocabulary, ["thing 3"], 5, key="7")
    assert len(set(chosen)) == 5 and "thing 3" not in chosen
    assert chosen == absent_names(vocabulary[::-1], ["thing 3"], 5, key="7")
    assert chosen[:4] == absent_names(vocabulary, ["thing 3", chosen[4]], 4, key="7")
    assert chosen != absent_names(vocabulary, ["thing 3"], 5, key="8")
    assert set(chosen) & set(absent_names([*vocabulary, "new"], ["thing 3"], 5, key="7")) >= set(chosen[:4])
    counts = Counter(name for key in range(400) for name in absent_names(vocabulary, [], 4, key=str(key)))
    assert len(counts) == 40 and max(counts.values()) < 80  # 40 expected, standard deviation 6


def test_absent_names_are_no_synonyms_of_what_is_there_and_may_be_few() -> None:
    synonyms = {"couch": ["sofa", "settee"]}
    assert absent_names(["sofa", "cup", "Couch"], ["Settee"], 3, key="1", synonyms=synonyms) == ("cup",)
    assert absent_names(["Cup", "pan"], ["cup"], 3, key="1") == ("pan",)
    assert absent_names(["cups", "berry", "pans"], ["Cup", "berries"], 3, key="1") == ("pans",)
    assert absent_names(["sofas", "cup"], ["couches"], 3, key="1", synonyms=synonyms) == ("cup",)
    assert absent_names(["cup"], [], 0, key="1") == ()
    with pytest.raises(ValueError, match="count must be an integer >= 0, got -1"):
        absent_names(["cup"], [], -1, key="1")
