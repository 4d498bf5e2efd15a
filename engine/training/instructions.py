"""Edits of a scene, each with the true result and an instruction in one of many wordings."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from engine.training.products import BACKGROUNDS, COLOURS, PATTERNS, PRODUCTS, Scene, another, on_white, random_scene

KEEP = (
    "Keep the {product} exactly the same.",
    "Keep the product's shape and colour exactly the same.",
    "Keep everything else unchanged.",
    "Do not change the {product}.",
    "Keep the product's shape, logo, stitching and label text exactly the same.",
)

COLOUR_WORDS = (
    "make the {product} {colour}",
    "change the {product} to {colour}",
    "change the colour of the {product} to {colour}",
    "turn the {product} {colour}",
    "recolour the {product} in {colour}",
    "paint the {product} {colour}",
    "make it {colour}",
    "the {product} should be {colour}",
    "I want a {colour} {product}",
)
WHITE_WORDS = (
    "remove the background",
    "remove the background and place the {product} on plain white",
    "remove the background and place the product on plain white",
    "cut out the {product}",
    "put the {product} on plain white without a shadow",
    "isolate the product on white",
)
BACKGROUND_WORDS = {
    "plain": (
        "put it on a {colour} background",
        "put the {product} on a plain {colour} background",
        "change the background to {colour}",
        "change the background to plain {colour}",
        "make the background {colour}",
        "place the product on a {colour} background",
        "replace the background with {colour}",
    ),
    "studio": (
        "change the background to a {colour} studio sweep",
        "put the {product} in a {colour} studio",
        "place the product on a seamless {colour} studio sweep",
        "give it a {colour} studio background",
        "put it in front of a {colour} studio sweep",
    ),
    "table": (
        "put the {product} on a {colour} table",
        "place the product on a {colour} table top",
        "put it on a {colour} table",
        "change the background to a {colour} wall and table",
        "show the {product} standing on a {colour} table",
    ),
}
PATTERN_WORDS = {
    "plain": ("remove the pattern", "make the {product} plain", "make it plain", "take the pattern off the {product}"),
    "striped": (
        "add stripes to the {product}",
        "make the {product} striped",
        "make it striped",
        "give the {product} stripes",
        "put white stripes on the {product}",
        "add white stripes",
    ),
    "dotted": (
        "add dots to the {product}",
        "make the {product} dotted",
        "make it dotted",
        "give the {product} polka dots",
        "cover the {product} with white dots",
        "add white dots",
    ),
    "checked": (
        "add checks to the {product}",
        "make the {product} checked",
        "make it checked",
        "give the {product} a checked pattern",
        "put a check pattern on the {product}",
        "add white checks",
    ),
}
SAME_WORDS = ("keep it the same", "change nothing", "keep everything as it is", "leave the picture unchanged")


@dataclass(frozen=True, slots=True)
class Example:
    """One training pair: the scene before (None for text-to-image), the scene after, the words, the kind of edit."""

    before: Scene | None
    after: Scene
    instruction: str
    kind: str


Change = Callable[[np.random.Generator, Scene], tuple[Scene, str]]


def _colour(rng: np.random.Generator, scene: Scene) -> tuple[Scene, str]:
    colour = another(rng, scene.colour, scene.background_colour)
    return replace(scene, colour=colour), _say(rng, COLOUR_WORDS, scene.product, colour)


def _background(rng: np.random.Generator, scene: Scene) -> tuple[Scene, str]:
    kind = str(rng.choice(BACKGROUNDS, p=[0.5, 0.25, 0.25]))
    colour = another(rng, scene.colour, scene.background_colour)
    after = replace(scene, background=kind, background_colour=colour, shadow=True)
    return after, _say(rng, BACKGROUND_WORDS[kind], scene.product, colour)


def _cut_out(rng: np.random.Generator, scene: Scene) -> tuple[Scene, str]:
    return on_white(scene), _say(rng, WHITE_WORDS, scene.product, "white")


def _pattern(rng: np.random.Generator, scene: Scene) -> tuple[Scene, str]:
    pattern = str(rng.choice([name for name in PATTERNS if name != scene.pattern]))
    return replace(scene, pattern=pattern), _say(rng, PATTERN_WORDS[pattern], scene.product, "")


CHANGES: dict[str, Change] = {
    "colour": _colour,
    "background": _background,
    "cut-out": _cut_out,
    "pattern": _pattern,
}
KINDS = (*CHANGES, "compound", "same", "text-to-image")
SHARES = (0.26, 0.24, 0.12, 0.14, 0.12, 0.05, 0.07)


def random_example(rng: np.random.Generator) -> Example:
    """One pair of a random kind."""
    kind = str(rng.choice(KINDS, p=SHARES))
    scene = random_scene(rng)
    if kind == "text-to-image":
        scene = replace(scene, x=0.5, y=0.52, size=0.62, shadow=scene.background != "plain")
        return Example(None, scene, _finish(rng, describe(rng, scene), scene, keep=False), kind)
    if kind == "same":
        return Example(scene, scene, _finish(rng, str(rng.choice(SAME_WORDS)), scene, keep=False), kind)
    if kind == "compound":
        first, second = (str(name) for name in rng.choice(["colour", "background", "pattern"], 2, replace=False))
        middle, words = CHANGES[first](rng, scene)
        after, more = CHANGES[second](rng, middle)
        joined = str(rng.choice([" and ", ", and ", ", then "]))
        return Example(scene, after, _finish(rng, words + joined + more, scene, keep=False), kind)
    after, words = CHANGES[kind](rng, scene)
    return Example(scene, after, _finish(rng, words, scene, keep=kind in ("background", "cut-out")), kind)


def describe(rng: np.random.Generator, scene: Scene) -> str:
    """Words for a scene that is to be made from text alone: "a striped green bottle on grey"."""
    pattern = "" if scene.pattern == "plain" else f"{scene.pattern} "
    where = {
        "plain": ["on {c}", "on a {c} background", "on plain {c}"],
        "studio": ["in a {c} studio", "on a {c} studio sweep"],
        "table": ["on a {c} table"],
    }[scene.background]
    start = str(rng.choice(["a ", "a picture of a ", "product photo of a ", "one "]))
    place = str(rng.choice(where)).format(c=scene.background_colour)
    return _articles(f"{start}{pattern}{scene.colour} {scene.product} {place}")


def _say(rng: np.random.Generator, wordings: tuple[str, ...], product: str, colour: str) -> str:
    return _articles(str(rng.choice(wordings)).format(product=product, colour=colour))


def _articles(words: str) -> str:
    """ "an orange", not "a orange"."""
    return re.sub(r"\b([Aa]) (?=orange)", r"\1n ", words)


def _finish(rng: np.random.Generator, words: str, scene: Scene, *, keep: bool) -> str:
    """Sentence case and a full stop half of the time; now and then what is to be kept."""
    if rng.random() < 0.5:
        words = words[0].upper() + words[1:]
    sentence = words + "." if rng.random() < 0.5 else words
    if keep and rng.random() < 0.4:
        sentence = sentence.rstrip(".") + ". " + str(rng.choice(KEEP)).format(product=scene.product)
    return sentence


def corpus() -> list[str]:
    """Every wording with every product and colour, and each character alone: what the tokenizers are made from."""
    wordings = [*COLOUR_WORDS, *WHITE_WORDS, *SAME_WORDS, *KEEP]
    for group in (*BACKGROUND_WORDS.values(), *PATTERN_WORDS.values()):
        wordings.extend(group)
    lines = [
        text.format(product=product, colour=colour) for text in wordings for product in PRODUCTS for colour in COLOURS
    ]
    for colour in COLOURS:
        for product in PRODUCTS:
            lines += [f"a picture of a {pattern} {colour} {product} on a {colour} background" for pattern in PATTERNS]
            lines.append(f"product photo of one {colour} {product} in a studio, then on a table, and")
    lines = [_articles(line) for line in lines]
    lines += [line[0].upper() + line[1:].rstrip(".") + "." for line in lines]
    return lines + [chr(code) for code in range(33, 127)] * 3
