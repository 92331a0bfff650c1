"""What a drawn scene can contain and how it is asked for: shapes, colours, patterns, sizes and their descriptions.

Some pairs of shape and colour are held out of training: with shapes and colours numbered as listed, pair (s, c) belongs
to the split that ``(c + 3 s) mod 11`` names in ``HELD_OUT``. Every shape has one colour for validation and two for
testing, every shape and every colour is seen in training, and no pair is in two splits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

Colour = tuple[float, float, float]

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "hexagon", "crescent", "arrow")

# name -> (the colour, the ink of its patterns), sRGB from 0 to 255. An ink is a lighter or darker shade of its colour.
COLOURS: dict[str, tuple[Colour, Colour]] = {
    "red": ((218, 32, 38), (148, 4, 16)),
    "orange": ((246, 130, 22), (255, 186, 110)),
    "yellow": ((252, 216, 40), (204, 164, 10)),
    "green": ((34, 156, 68), (128, 214, 138)),
    "blue": ((36, 86, 216), (128, 176, 255)),
    "purple": ((128, 48, 176), (188, 128, 226)),
    "pink": ((248, 136, 188), (255, 198, 222)),
    "brown": ((120, 70, 34), (176, 122, 76)),
    "black": ((18, 18, 20), (76, 76, 82)),
    "white": ((250, 250, 250), (196, 196, 202)),
    "grey": ((140, 140, 142), (186, 186, 190)),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")

# name -> range of the longest side, as a share of the picture's shorter side
SIZES: dict[str, tuple[float, float]] = {"small": (0.15, 0.22), "large": (0.32, 0.45)}

SPLITS = ("train", "val", "test")
HELD_OUT = {0: "val", 1: "test", 5: "test"}


def split_of(shape: str, colour: str) -> str:
    """The split that a pair of shape and colour belongs to: "train", "val" or "test"."""
    residue = (list(COLOURS).index(colour) + 3 * SHAPES.index(shape)) % len(COLOURS)
    return HELD_OUT.get(residue, "train")


PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    split: tuple((shape, colour) for shape in SHAPES for colour in COLOURS if split_of(shape, colour) == split)
    for split in SPLITS
}


@dataclass(frozen=True, kw_only=True)
class Description:
    """Attributes of a thing; None leaves one open. A thing in a scene leaves none open, a query some."""

    shape: str | None = None
    colour: str | None = None
    pattern: str | None = None
    size: str | None = None

    def matches(self, thing: Description) -> bool:
        """Whether every attribute that this description names is the thing's."""
        return all(getattr(self, field.name) in (None, getattr(thing, field.name)) for field in fields(self))

    def only(self, names: tuple[str, ...]) -> Description:
        """This description with only the named attributes, the others left open."""
        return replace(self, **{field.name: None for field in fields(self) if field.name not in names})

    def phrase(self, article: str = "the") -> str:
        """In words: "the large striped red star", "anything dotted and blue"; article: "the", "a" or ""."""
        adjectives = [word for word in (self.size, self.pattern, self.colour) if word]
        if self.shape is None:
            return " ".join(["anything", " and ".join(adjectives)]).strip()
        words = " ".join([*adjectives, self.shape])
        if article == "a" and words[0] in "aeiou":
            article = "an"
        return f"{article} {words}".strip()
