"""Other words for a query: templates, synonyms, and names that are not in the picture."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from arrcoc.data.splits import hash_fraction
from sam_core._checks import check_count

TEMPLATES = (
    "a photo of a {}",
    "a photo that shows a {}",
    "a picture with a {} in it",
    "there is a {} in this picture",
    "a close view of a {}",
    "a {} seen from far away",
    "look at the {}",
)

_ARTICLE_AND_PLACE = re.compile(r"\b(an?|the) \{\}", re.IGNORECASE)
# A query that begins like this brings its own article, or takes none.
_DETERMINED = re.compile(
    r"(?:an?|the|this|that|these|those|some|any|all|every|each|no|my|your|his|her|its|our|their|one|two|three|four|five|"
    r"anything|something|everything|anyone|someone|everyone|people)\b",
    re.IGNORECASE,
)


def plural(name: str) -> str:
    """The regular plural of a name's last word: -s, -es after a hiss, -ies for a consonant and y."""
    if re.search(r"(?:s|x|z|ch|sh)$", name, re.IGNORECASE):
        return name + "es"
    return name[:-1] + "ies" if re.search(r"[^aeiou]y$", name, re.IGNORECASE) else name + "s"


@dataclass(frozen=True, kw_only=True)
class QueryVariants:
    """Texts that ask for the same as a query: with other words for what it names, and inside templates.

    Args:
        templates: texts with one ``{}``, the place of the query. ``a``, ``an`` or ``the`` right before it fits itself
            to the query: it is left out before a query that has an article of its own or takes none ("the red star",
            "anything blue"), and a and an follow the next letter.
        synonyms: word or name -> other words for it. Whole words are replaced, whatever their case, singular by
            singular and regular plural by plural; one name at a time.

    Raises:
        ValueError: if a template has no place or several, or an entry of synonyms is empty.

    Example:
        >>> variants = QueryVariants(templates=("a photo of a {}",), synonyms={"couch": ["sofa"]})
        >>> variants.variants("red couch")
        ('red couch', 'red sofa', 'a photo of a red couch', 'a photo of a red sofa')
    """

    templates: Sequence[str] = TEMPLATES
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.templates, str):
            raise ValueError(f"templates must be a sequence of str, got the single str {self.templates!r}.")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"a template must have one {{}}, the place of the query, got {template!r}.")
        for name, others in self.synonyms.items():
            texts = [] if isinstance(others, str) else [name, *others]
            if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(f"synonyms must map a word to a list of one or more others, got {name!r}: {others!r}.")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str], *, templates: Sequence[str] = TEMPLATES) -> QueryVariants:
        """Synonyms from a JSON file ``{"couch": ["sofa", "settee"]}``.

        Raises:
            FileNotFoundError: if there is no file.
            ValueError: if it is not such a JSON object.
        """
        return cls(templates=templates, synonyms=read_synonyms(path))

    def variants(self, query: str) -> tuple[str, ...]:
        """All different variants of a query, in a fixed order; the first is the query itself."""
        names = [query]
        for match in self._names.finditer(query) if self._others else ():
            for other in self._others[match.group().lower()]:
                names.append(query[: match.start()] + other + query[match.end() :])
        filled = (_fill(template, name) for template in self.templates for name in names)
        return tuple(dict.fromkeys([*names, *filled]))

    def draw(self, query: str, generator: torch.Generator) -> str:
        """One of the variants of a query, each as likely as the others."""
        variants = self.variants(query)
        return variants[int(torch.randint(len(variants), (), generator=generator))]

    @cached_property
    def _others(self) -> dict[str, list[str]]:
        """Lower-case word, singular or plural -> what replaces it."""
        singular = {name.lower(): list(others) for name, others in self.synonyms.items()}
        plurals = {plural(name): [plural(other) for other in others] for name, others in singular.items()}
        return plurals | singular

    @cached_property
    def _names(self) -> re.Pattern[str]:
        """Any of the words; of "dog" and "hot dog" the longer one is looked for first."""
        words = sorted(self._others, key=len, reverse=True)
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)


def _fill(template: str, query: str) -> str:
    """The template with the query in its place, its article fitted."""

    def article(match: re.Match[str]) -> str:
        if _DETERMINED.match(query):
            return "{}"
        word = match.group(1)
        if word.lower() != "the":
            word = word[0] + ("n" if query[:1].lower() in tuple("aeiou") else "")
        return f"{word} {{}}"

    return _ARTICLE_AND_PLACE.sub(article, template).replace("{}", query)


def read_synonyms(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Name -> other names of the same, from a JSON file ``{"couch": ["sofa", "settee"]}``.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is not such a JSON object.
    """
    try:
        synonyms = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(synonyms, dict) or not all(isinstance(others, list) for others in synonyms.values()):
        raise ValueError(f'{path} must hold an object like {{"couch": ["sofa"]}}, got {str(synonyms)[:80]}.')
    return synonyms


def absent_names(
    vocabulary: Collection[str],
    present: Collection[str],
    count: int,
    *,
    key: str,
    synonyms: Mapping[str, Sequence[str]] | None = None,
) -> tuple[str, ...]:
    """Names that are not in a picture, to be asked for as absent queries.

    Which ones depends on the key and on each name alone, the same on every machine: those whose hash with the key is
    smallest. A vocabulary that grows replaces few of them.

    Args:
        vocabulary: names to choose from; all that could be in the picture must have been looked for.
        present: names that are in the picture, in letters of any case, singular or regular plural.
        count: how many; fewer are given if there are fewer.
        key: names the picture, e.g. its id.
        synonyms: name -> other names of the same; a synonym of what is present is not absent.

    Raises:
        ValueError: if count is not a whole number >= 0.
    """
    check_count("count", count, at_least=0)
    there = _forms(present)
    found = set(there)
    for name, others in (synonyms or {}).items():
        same = _forms((name, *others))
        if not same.isdisjoint(there):
            found |= same
    absent = {name for name in vocabulary if _forms((name,)).isdisjoint(found)}
    return tuple(sorted(absent, key=lambda name: (hash_fraction(f"{key}/{name}"), name))[:count])


def _forms(names: Collection[str]) -> set[str]:
    """Names as they are and in the plural, in one case: what names the same has one of them in common."""
    folded = [name.casefold() for name in names]
    return {*folded, *map(plural, folded)}
