"""Edits of a scene, each with the true result and an instruction in one of many wordings."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from engine.training.products import (
    BACKGROUNDS,
    BADGES,
    COLOURS,
    PATTERNS,
    PRODUCTS,
    Scene,
    another,
    on_white,
    random_scene,
)

KEEP = (
    "Keep the {product} exactly the same.",
    "Keep the product's shape and colour exactly the same.",
    "Keep everything else unchanged.",
    "Do not change the {product}.",
    "Keep the product's shape, logo and label text exactly the same.",
)

COLOUR_WORDS = (
    "make the {product} {colour}",
    "change the {product} to {colour}",
    "change the colour of the {product} to {colour}",
    "change the product's colour to {colour}",
    "turn the {product} {colour}",
    "recolour the {product} in {colour}",
    "paint the {product} {colour}",
    "make it {colour}",
    "turn it {colour}",
    "the {product} should be {colour}",
    "I want a {colour} {product}",
    "give the {product} the colour {colour}",
)
WHITE_WORDS = (
    "remove the background",
    "remove the background and place the {product} on plain white",
    "remove the background and place the product on plain white",
    "cut out the {product}",
    "cut out the product and put it on plain white",
    "put the {product} on plain white without a shadow",
    "isolate the product on white",
    "isolate the {product}",
)
BACKGROUND_WORDS = {
    "plain": (
        "put it on a {colour} background",
        "put the {product} on a plain {colour} background",
        "change the background to {colour}",
        "change the background to plain {colour}",
        "make the background {colour}",
        "turn the background {colour}",
        "place the product on a {colour} background",
        "replace the background with {colour}",
        "give the {product} a {colour} background",
        "the background should be {colour}",
    ),
    "studio": (
        "change the background to a {colour} studio sweep",
        "put the {product} in a {colour} studio",
        "place the product on a seamless {colour} studio sweep",
        "give it a {colour} studio background",
        "put it in front of a {colour} studio sweep",
        "show the {product} in a {colour} studio",
        "replace the background with a {colour} studio sweep",
    ),
    "table": (
        "put the {product} on a {colour} table",
        "place the product on a {colour} table top",
        "put it on a {colour} table",
        "change the background to a {colour} wall and table",
        "show the {product} standing on a {colour} table",
        "change the background to a {colour} table",
        "place the {product} on a {colour} table",
    ),
}
PATTERN_WORDS = {
    "plain": (
        "remove the pattern",
        "make the {product} plain",
        "make it plain",
        "take the pattern off the {product}",
        "remove the pattern from the {product}",
    ),
    "striped": (
        "add stripes to the {product}",
        "make the {product} striped",
        "make it striped",
        "give the {product} stripes",
        "give it stripes",
        "put white stripes on the {product}",
        "add white stripes",
        "change the pattern to stripes",
    ),
    "dotted": (
        "add dots to the {product}",
        "make the {product} dotted",
        "make it dotted",
        "give the {product} polka dots",
        "cover the {product} with white dots",
        "add white dots",
        "change the pattern to dots",
    ),
    "checked": (
        "add checks to the {product}",
        "make the {product} checked",
        "make it checked",
        "give the {product} a checked pattern",
        "put a check pattern on the {product}",
        "add white checks",
        "change the pattern to checks",
    ),
}
BADGE_WORDS = {
    "add": (
        "add a {badge} badge",
        "add a {badge} badge to the picture",
        "put a {badge} badge in the corner",
        "add a badge that says {badge}",
        "stick a {badge} badge on it",
    ),
    "change": (
        "change the badge to {badge}",
        "make the badge say {badge}",
        "the badge should say {badge}",
        "replace the badge with {badge}",
    ),
    "remove": ("remove the badge", "take the badge off", "remove the badge from the picture"),
}
SAME_WORDS = ("keep it the same", "change nothing", "keep everything as it is", "leave the picture unchanged")
ASKING = ("please ", "now ", "can you ")
"""Put before some instructions."""
NOT_ASKED = ("I", "the", "a", "an", "one", "product")
"""First words of what is no imperative."""
UNSEEN: dict[str, tuple[str, ...]] = {
    "colour": (
        "the product should be {colour}",
        "paint it {colour}",
        "I want the {product} in {colour}",
        "change the {product}'s colour to {colour}",
    ),
    "background": (
        "I want a plain {colour} background",
        "put the product on {colour}",
        "show the product on a plain {colour} background",
    ),
    "cut-out": ("isolate the {product} on plain white", "remove everything but the {product}", "cut it out"),
    "striped": ("I want a striped {product}", "the {product} should be striped", "put stripes on it"),
    "dotted": ("I want a dotted {product}", "the {product} should be dotted", "put dots on it"),
    "checked": ("I want a checked {product}", "the {product} should be checked", "put checks on it"),
    "add": ("I want a {badge} badge", "put a {badge} badge on the picture"),
}
"""Wordings that training never shows: the benchmark reports them apart. By kind, pattern, or what becomes of a badge;
a background is a plain one."""


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
    return on_white(scene), _say(rng, WHITE_WORDS, scene.product)


def _pattern(rng: np.random.Generator, scene: Scene) -> tuple[Scene, str]:
    pattern = str(rng.choice([name for name in PATTERNS if name != scene.pattern]))
    wordings = PATTERN_WORDS[pattern]
    if scene.colour == "white":  # its ink is dark
        wordings = tuple(words for words in wordings if "white" not in words)
    return replace(scene, pattern=pattern), _say(rng, wordings, scene.product)


def _badge(rng: np.random.Generator, scene: Scene) -> tuple[Scene, str]:
    badge = str(rng.choice([word for word in BADGES if word != scene.badge]))
    deed = str(rng.choice(("change", "remove"))) if scene.badge else "add"
    after = replace(scene, badge="" if deed == "remove" else badge)
    return after, _say(rng, BADGE_WORDS[deed], scene.product, badge=badge)


CHANGES: dict[str, Change] = {
    "colour": _colour,
    "background": _background,
    "cut-out": _cut_out,
    "pattern": _pattern,
    "badge": _badge,
}
COMBINED = ("colour", "background", "pattern", "badge")
"""What a compound instruction is made of."""
SHARES = {
    "colour": 0.23,
    "background": 0.2,
    "cut-out": 0.1,
    "pattern": 0.15,
    "badge": 0.09,
    "compound": 0.13,
    "same": 0.04,
    "text-to-image": 0.06,
}
"""How often each kind of edit is drawn, where a training says nothing else."""
KINDS = tuple(SHARES)


def random_example(rng: np.random.Generator, shares: Mapping[str, float] = SHARES) -> Example:
    """One pair of a random kind; `shares` are weights by kind."""
    weights = np.array([shares.get(kind, 0.0) for kind in KINDS])
    kind = str(rng.choice(KINDS, p=weights / weights.sum()))
    scene = random_scene(rng)
    if kind == "text-to-image":
        scene = replace(scene, x=0.5, y=0.52, size=0.62, shadow=scene.background != "plain")
        return Example(None, scene, _finish(rng, describe(rng, scene), scene, keep=False), kind)
    if kind == "same":
        return Example(scene, scene, _finish(rng, str(rng.choice(SAME_WORDS)), scene, keep=False), kind)
    if kind == "compound":
        first, second = (str(name) for name in rng.choice(COMBINED, 2, replace=False))
        middle, words = CHANGES[first](rng, scene)
        after, more = CHANGES[second](rng, middle)
        joined = str(rng.choice([" and ", ", and ", ", then "]))
        return Example(scene, after, _finish(rng, words + joined + more, scene, keep=False), kind)
    if kind == "badge" and not scene.badge and rng.random() < 0.4:
        scene = replace(scene, badge=str(rng.choice(BADGES)))
    after, words = CHANGES[kind](rng, scene)
    return Example(scene, after, _finish(rng, words, scene, keep=kind in ("background", "cut-out")), kind)


def unseen_example(rng: np.random.Generator) -> Example:
    """One pair whose words training never shows; its kind is that of the change."""
    name = str(rng.choice(list(UNSEEN)))
    scene = random_scene(rng)
    colour, badge = another(rng, scene.colour, scene.background_colour), ""
    if name == "colour":
        kind, after = "colour", replace(scene, colour=colour)
    elif name == "background":
        kind, after = "background", replace(scene, background="plain", background_colour=colour, shadow=True)
    elif name == "cut-out":
        kind, after = "cut-out", on_white(scene)
    elif name == "add":
        badge = str(rng.choice(BADGES))
        scene = replace(scene, badge="")
        kind, after = "badge", replace(scene, badge=badge)
    else:
        scene = replace(scene, pattern="plain")
        kind, after = "pattern", replace(scene, pattern=name)
    return Example(scene, after, _say(rng, UNSEEN[name], scene.product, colour, badge), kind)


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
    badge = f" with a {scene.badge} badge" if scene.badge else ""
    return _articles(f"{start}{pattern}{scene.colour} {scene.product} {place}{badge}")


def _say(rng: np.random.Generator, wordings: tuple[str, ...], product: str, colour: str = "", badge: str = "") -> str:
    return _articles(str(rng.choice(wordings)).format(product=product, colour=colour, badge=badge))


def _articles(words: str) -> str:
    """ "an orange", not "a orange"."""
    return re.sub(r"\b([Aa]) (?=orange|ECO)", r"\1n ", words)


def _finish(rng: np.random.Generator, words: str, scene: Scene, *, keep: bool) -> str:
    """Asked for politely now and then, sentence case and a full stop half of the time, sometimes what is to be kept."""
    if rng.random() < 0.15 and words.partition(" ")[0] not in NOT_ASKED:
        words = str(rng.choice(ASKING)) + words
    if rng.random() < 0.5:
        words = words[0].upper() + words[1:]
    sentence = words + "." if rng.random() < 0.5 else words
    if keep and rng.random() < 0.4:
        sentence = sentence.rstrip(".") + ". " + str(rng.choice(KEEP)).format(product=scene.product)
    return sentence


def corpus() -> list[str]:
    """Every wording with every product and colour, and each character alone: what the tokenizers are made from."""
    wordings = [*COLOUR_WORDS, *WHITE_WORDS, *SAME_WORDS, *KEEP]
    for group in (*BACKGROUND_WORDS.values(), *PATTERN_WORDS.values(), *UNSEEN.values()):
        wordings.extend(group)
    lines = [
        text.format(product=product, colour=colour, badge="SALE")
        for text in wordings
        for product in PRODUCTS
        for colour in COLOURS
    ]
    lines += [text.format(badge=badge) for group in BADGE_WORDS.values() for text in group for badge in BADGES] * 20
    lines += [f"{asking}make it {colour}" for asking in ASKING for colour in COLOURS]
    for colour in COLOURS:
        for product in PRODUCTS:
            lines += [f"a picture of a {pattern} {colour} {product} on a {colour} background" for pattern in PATTERNS]
            lines.append(f"product photo of one {colour} {product} in a studio, then on a table, and")
    lines = [_articles(line) for line in lines]
    lines += [line[0].upper() + line[1:].rstrip(".") + "." for line in lines]
    return lines + [chr(code) for code in range(33, 127)] * 3
