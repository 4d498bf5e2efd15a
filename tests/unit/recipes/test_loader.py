"""Every fault of a recipe is told with file, line, column, path and the nearest right name, all at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kontext_batch.errors import RecipeError
from kontext_batch.recipes.loader import load_recipe
from tests.unit.recipes.recipes import BRAND, RECIPE, changed, load, problems

EXAMPLES = Path(__file__).parents[3] / "recipes" / "examples"


def test_the_sound_recipe_loads() -> None:
    recipe = load()
    assert (recipe.name, recipe.owner, recipe.file) == ("small", "", "small.yaml")
    assert recipe.brand.channels["square"].max_bytes == 2_000_000
    assert recipe.document.matrix.axes["locale"] == ("en", "de")


def test_the_example_of_the_language_loads() -> None:
    text = (EXAMPLES / "spring-hero.yaml").read_bytes()
    recipe = load_recipe(text, file="spring-hero.yaml", read_import=lambda name: (EXAMPLES / name).read_bytes())
    assert {name: step.axes for name, step in recipe.scope.steps.items()} == {
        "clean": ("item",),
        "staged": ("item", "scene", "channel"),
        "headline": ("item", "scene", "locale", "channel"),
        "finish": ("item", "scene", "locale", "channel"),
    }


# Each: what is changed in the sound recipe, and all that is told.
FAULTS = {
    "unknown key": (
        [("prompt: Put it", "promt: Put it")],
        [
            "small.yaml:30:5 steps.staged.promt: unknown key 'promt'; did you mean 'prompt'?",
        ],
    ),
    "two slips and a key that is missing": (
        [
            ("outputs:", "output:"),
            ("op: edit\n    image: ${clean}", "op: edit\n    imag: ${clean}\n    zzz: red"),
            ("    prompt: Put it on ${scene.place}.\n", ""),
        ],
        [
            "small.yaml:26:3 steps.staged: 'prompt' is missing",
            "small.yaml:28:5 steps.staged.imag: unknown key 'imag'; did you mean 'image'?",
            "small.yaml:29:5 steps.staged.zzz: unknown key 'zzz' (known: model, steps, guidance, negative_prompt,"
            " true_cfg_scale, adapters, reference_layout, fit, background, handoff, if, on, prompt, frame, seed,"
            " candidates, pick, op, image, references)",
            "small.yaml:35:1 output: unknown key 'output'; did you mean 'outputs'?",
        ],
    ),
    "unknown key with nothing near": (
        [("key: sku", "key: sku\n    zzz: 1")],
        ["small.yaml:8:5 inputs.item.zzz: unknown key 'zzz' (known: table, key, files, where, columns, on_missing)"],
    ),
    "wrong type": (
        [("{model: kontext-dev}", "{model: kontext-dev, steps: many, guidance: '2,5'}")],
        [
            "small.yaml:20:37 defaults.edit.steps: a whole number is wanted here, not 'many'",
            "small.yaml:20:53 defaults.edit.guidance: a number is wanted here, not '2,5';"
            " write it without quotes, leading zeros, commas or underscores",
        ],
    ),
    "true is no number": (
        [("{model: kontext-dev}", "{model: kontext-dev, steps: true}")],
        ["small.yaml:20:37 defaults.edit.steps: a whole number is wanted here, not true"],
    ),
    "a number is no prompt": (
        [("prompt: Put it on ${scene.place}.", "prompt: 12")],
        ["small.yaml:30:13 steps.staged.prompt: text is wanted here, not 12; quote it"],
    ),
    "out of range": (
        [("frame: ${channel.size}", "frame: ${channel.size}\n    candidates: 0")],
        ["small.yaml:30:17 steps.staged.candidates: 0 is out of range: at least 1"],
    ),
    "no list where one is wanted": (
        [("import: [brand.yaml]", "import: brand.yaml")],
        ["small.yaml:3:9 import: a list is wanted here, not 'brand.yaml'"],
    ),
    "a ratio that is no size": (
        [("channel: ${channel}\n", "size: 16:9\n")],
        [
            "small.yaml:34:11 steps.finish.size: '16:9' is no size;"
            " write width x height in pixels, as in 1920x1080; a ratio belongs into `frame`"
        ],
    ),
    "no frame": (
        [("frame: ${channel.size}", "frame: wide")],
        [
            "small.yaml:29:12 steps.staged.frame: 'wide' is no frame;"
            " write a ratio (16:9), a size whose ratio is meant (1920x1080), or keep"
        ],
    ),
    "repeated key": (
        [("  keep: Keep its shape.", "  keep: Keep its shape.\n  keep: Or not.")],
        ["small.yaml:13:3 vars.keep: this key is already there, in line 12"],
    ),
    "no as a value": ([("[en, de]", "[en, no, de]")], []),
    "true as a value": (
        [("[en, de]", "[en, true]")],
        ["small.yaml:17:16 matrix.locale[1]: true without quotes is a truth value; write 'true' if the word is meant"],
    ),
    "a lost colour": (
        [("frame: ${channel.size}", "background: #ff0000")],
        [
            "small.yaml:29:16 steps.staged.background: a value is missing:"
            " an unquoted '#' begins a comment; quote it ('#ff0000')"
        ],
    ),
    "no colour": (
        [("frame: ${channel.size}", "background: red")],
        ["small.yaml:29:17 steps.staged.background: 'red' is no colour; write six hex digits, as in '#E4002B'"],
    ),
    "unknown axis": (
        [("${scene.place}.", "${scen.place}.")],
        ["small.yaml:30:13 steps.staged.prompt: unknown axis 'scen'; did you mean 'scene'?"],
    ),
    "unknown field": (
        [("${scene.place}.", "${scene.plaice}.")],
        ["small.yaml:30:13 steps.staged.prompt: unknown field of 'scene' 'plaice'; did you mean 'place'?"],
    ),
    "unknown step": (
        [("image: ${clean}", "image: ${claen}")],
        ["small.yaml:28:12 steps.staged.image: unknown step 'claen'; did you mean 'clean'?"],
    ),
    "unknown variable": (
        [("${vars.keep}", "${vars.kep}")],
        ["small.yaml:25:13 steps.clean.prompt: unknown variable 'kep'; did you mean 'keep'?"],
    ),
    "unknown text": (
        [("${scene.place}.", "${text.nam}.")],
        ["small.yaml:30:13 steps.staged.prompt: unknown text 'nam'; did you mean 'name'?"],
    ),
    "unknown colour of the brand": (
        [("${brand.colors.red}", "${brand.colors.rde}")],
        ["small.yaml:16:21 matrix.scene.studio.place: unknown color of the brand 'rde'; did you mean 'red'?"],
    ),
    "unknown channel": (
        [("channel: [square, hero]", "channel: [square, heor]")],
        ["small.yaml:18:21 matrix.channel[1]: unknown channel 'heor'; did you mean 'hero'?"],
    ),
    "an own channel that is none": (
        [
            (
                "channel: [square, hero]",
                "channel: {square: {size: 9x9}, mail: {size: big, quality: x}, post: {fit: pad}}",
            )
        ],
        [
            "small.yaml:18:22 matrix.channel.square.size: 'square' is a channel of the brand, whose file says its size",
            "small.yaml:18:47 matrix.channel.mail.size: 'big' is no size;"
            " write width x height in pixels, as in 1920x1080",
            "small.yaml:18:61 matrix.channel.mail.quality: a whole number is wanted here, not 'x'",
            "small.yaml:18:71 matrix.channel.post: 'size' is missing",
        ],
    ),
    "a channel without fields is one of the brand": (
        [("channel: [square, hero]", "channel: {square: {}, heor: }")],
        ["small.yaml:18:31 matrix.channel.heor: unknown channel 'heor'; did you mean 'hero'?"],
    ),
    "unknown operation": (
        [("op: finish", "op: finsh")],
        [
            "small.yaml:32:9 steps.finish.op: unknown operation 'finsh'; did you mean 'finish'?"
            " (edit, generate, finish, contact_sheet)"
        ],
    ),
    "a lost operation": (
        [("op: finish", "op: #finish")],
        ["small.yaml:32:8 steps.finish.op: a value is missing: an unquoted '#' begins a comment; quote it ('#ff0000')"],
    ),
    "no operation": (
        [("    op: finish\n", "")],
        ["small.yaml:31:3 steps.finish: 'op' is missing; write one of edit, generate, finish, contact_sheet"],
    ),
    "code": (
        [("${scene.place}.", "${scene.place + 1}.")],
        [
            "small.yaml:30:13 steps.staged.prompt: 'scene.place + 1' is not a name; a reference is dotted names, '|'"
            " and the filters slug, upper, lower, default, pad; no expressions (at 'scene.place + 1}.')"
        ],
    ),
    "a cycle": (
        [("image: ${item.photo}", "image: ${staged}")],
        ["small.yaml:22:3 steps.clean: steps that read each other: clean <- staged <- clean"],
    ),
    "a step that reads itself": (
        [("image: ${clean}", "image: ${staged}")],
        ["small.yaml:26:3 steps.staged: steps that read each other: staged <- staged"],
    ),
    "a variable made of itself": (
        [("keep: Keep its shape.", "keep: ${vars.also}\n  also: ${vars.keep}")],
        [
            "small.yaml:12:9 vars.keep: 'vars.also' is made of itself",
            "small.yaml:13:9 vars.also: 'vars.keep' is made of itself",
        ],
    ),
    "a picture in a prompt": (
        [("${scene.place}.", "${clean}.")],
        ["small.yaml:30:13 steps.staged.prompt: 'clean' is a picture; here a text is wanted"],
    ),
    "a text for a picture": (
        [("image: ${clean}", "image: ${scene.place}")],
        ["small.yaml:28:12 steps.staged.image: 'scene.place' is a text; here a picture is wanted"],
    ),
    "a value for a picture": (
        [("image: ${clean}", "image: ${item}")],
        ["small.yaml:28:12 steps.staged.image: 'item' is a value; name one of its files"],
    ),
    "words around a picture": (
        [("image: ${clean}", "image: the ${clean}")],
        ["small.yaml:28:12 steps.staged.image: a picture is one reference, as in ${clean} or ${item.packshot}"],
    ),
    "ext in a prompt": (
        [("${scene.place}.", "${ext}.")],
        ["small.yaml:30:13 steps.staged.prompt: 'ext' exists in the paths of outputs only"],
    ),
    "candidate in a prompt": (
        [("${scene.place}.", "${candidate}.")],
        [
            "small.yaml:30:13 steps.staged.prompt: 'candidate' exists in the paths of outputs and"
            " the labels of contact sheets only"
        ],
    ),
    "a word of the language as a name": (
        [("locale: [en, de]", "text: [en, de]"), ("${locale}", "${item.sku}")],
        ["small.yaml:17:3 matrix.text: 'text' is a word of the language; choose another name"],
    ),
    "one name for two things": (
        [("  locale: [en, de]", "  clean: [en, de]"), ("${locale}", "${item.sku}"), ("${clean}", "${item.photo}")],
        ["small.yaml:22:3 steps.clean: 'clean' is a name in matrix already"],
    ),
    "a bad name": (
        [("  staged:", "  the staged:"), ("${staged}", "${clean}")],
        [
            "small.yaml:26:3 steps.the staged: 'the staged' is no name: letters, digits, '_' and '-',"
            " beginning with a letter, at most 64"
        ],
    ),
    "on that is not so": (
        [("frame: ${channel.size}", "on: [item, scene]\n    frame: ${channel.size}")],
        ["small.yaml:29:9 steps.staged.on: the step follows item, scene, channel, not item, scene"],
    ),
    "on an unknown axis": (
        [("frame: ${channel.size}", "on: [item, scene, chanel]\n    frame: ${channel.size}")],
        [
            "small.yaml:29:9 steps.staged.on: the step follows item, scene, channel, not item, scene, chanel",
            "small.yaml:29:23 steps.staged.on[2]: unknown axis 'chanel'; did you mean 'channel'?",
        ],
    ),
    "a condition on a value that is not there": (
        [("frame: ${channel.size}", "if: {locale: {not: fr}}")],
        ["small.yaml:29:18 steps.staged.if.locale: 'locale' has no value 'fr'"],
    ),
    "an exclusion that names nothing": (
        [("  channel: [square", "  exclude: [{scene: terace}, {scen: x}]\n  channel: [square")],
        [
            "small.yaml:18:21 matrix.exclude[0].scene: 'scene' has no value 'terace'; did you mean 'terrace'?",
            "small.yaml:18:31 matrix.exclude[1].scen: unknown axis 'scen'; did you mean 'scene'?",
        ],
    ),
    "an inclusion that is no whole point": (
        [("  channel: [square", "  include: [{item.sku: A, scene: podium}]\n  channel: [square")],
        ["small.yaml:18:13 matrix.include[0]: a point has a value on every axis; this one lacks channel, locale"],
    ),
    "an inclusion that overwrites": (
        [
            (
                "  channel: [square",
                "  include: [{item: A, scene: studio, scene.place: x, locale: en, channel: hero}]\n  channel: [square",
            )
        ],
        ["small.yaml:18:51 matrix.include[0].scene.place: 'studio' has its fields already; include overwrites nothing"],
    ),
    "candidates without a place for each": (
        [("frame: ${channel.size}", "candidates: 2\n    pick: all")],
        ["small.yaml:38:9 outputs[0].to: every candidate of 'finish' is delivered: the path needs ${candidate}"],
    ),
    "an output that is no step": (
        [("from: ${finish}", "from: ${item.photo}")],
        ["small.yaml:36:11 outputs[0].from: 'item.photo' is no step; only what a step made is delivered"],
    ),
    "files that follow another axis": (
        [('"photos/${item.sku}.*"', '"photos/${item.sku}_${locale}.*"')],
        ["small.yaml:8:20 inputs.item.files.photo: files may name columns of 'item', not locale"],
    ),
    "texts of no table": (
        [("{table: item,", "{table: itme,")],
        ["small.yaml:10:17 texts.name.table: 'itme' is no input; did you mean 'item'?"],
    ),
    "a cron line of four fields": (
        [("outputs:", 'schedule: {cron: "0 22 * *"}\noutputs:')],
        [
            "small.yaml:35:18 schedule.cron: '0 22 * *' has 4 fields;"
            " a cron line has five: minute, hour, day of month, month, day of week"
        ],
    ),
    "an unknown zone": (
        [("outputs:", 'schedule: {cron: "0 22 * * *", tz: Europe/Berln}\noutputs:')],
        ["small.yaml:35:36 schedule.tz: unknown time zone 'Europe/Berln'; did you mean 'Europe/Berlin'?"],
    ),
    "a missing import": (
        [("[brand.yaml]", "[brand.yaml, other.yaml]")],
        ["small.yaml:3:22 import[1]: 'other.yaml' is not there"],
    ),
    "another version": ([("version: 1", "version: 2")], ["small.yaml:1:10 version: 2 is not possible here (one of 1)"]),
    "a part that is missing": (
        [("version: 1\nname: small\n", "")],
        ["small.yaml:1:1: 'version' is missing", "small.yaml:1:1: 'name' is missing"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_where_it_is(fault: str) -> None:
    changes, told = FAULTS[fault]
    assert problems(changed(*changes)) == told


def test_faults_of_all_parts_are_told_at_once() -> None:
    text = changed(
        ("key: sku", "kee: sku"),
        ("${scene.place}.", "${scen.place}."),
        ("image: ${staged}", "image: ${stagd}"),
        ("${vars.keep}", "${locale +}"),
    )
    assert [problem.split(": ", 1)[0] for problem in problems(text)] == [
        "small.yaml:7:5 inputs.item.kee",
        "small.yaml:25:13 steps.clean.prompt",
        "small.yaml:30:13 steps.staged.prompt",
        "small.yaml:33:12 steps.finish.image",
    ]


def test_a_faulty_brand_file_is_told_under_its_own_name() -> None:
    brand = BRAND.replace("fit: crop", "fit: stretch").replace("2000x2000", "big")
    assert problems(RECIPE, files={"brand.yaml": brand}) == [
        "brand.yaml:5:18 channels.square.size: 'big' is no size; write width x height in pixels, as in 1920x1080",
        "brand.yaml:6:32 channels.hero.fit: 'stretch' is not possible here (one of pad, crop)",
    ]


def test_what_a_faulty_brand_file_would_have_held_is_not_told_as_missing() -> None:
    assert problems(RECIPE, files={"brand.yaml": BRAND.replace("kind: brand", "kind: [")})[0].startswith("brand.yaml:")
    assert all(each.startswith("brand.yaml") for each in problems(RECIPE, files={"brand.yaml": "kind: ["}))


def test_two_brand_files_may_not_define_one_name() -> None:
    text = changed(("[brand.yaml]", "[brand.yaml, more.yaml]"))
    assert problems(text, files={"more.yaml": 'kind: brand\ncolors: {red: "#000000", blue: "#0000FF"}\n'}) == [
        "more.yaml:2:10 colors.red: 'red' is defined in brand.yaml:2 already"
    ]


@pytest.mark.parametrize("text", [RECIPE, (EXAMPLES / "spring-hero.yaml").read_text(encoding="utf-8")])
def test_a_document_written_out_and_read_again_is_the_same(text: str) -> None:
    document = load(text, files={"brand-acme.yaml": (EXAMPLES / "brand-acme.yaml").read_text()}).document
    again = json.dumps(document.model_dump(by_alias=True, exclude_defaults=True, exclude_none=True) | {"version": 1})
    assert load(again, files={"brand-acme.yaml": (EXAMPLES / "brand-acme.yaml").read_text()}).document == document


def test_keys_of_the_authors_own_are_free() -> None:
    assert (
        problems(changed(("vars:", "x-note: {a: [1, 2]}\nvars:"), ("op: finish", "op: finish\n    x-why: because")))
        == []
    )


def test_a_value_may_begin_like_an_own_key() -> None:
    recipe = load(changed(("    terrace:", "    x-large:"), ("locale: [en, de]", "locale: [en, x-en]")))
    assert list(recipe.scope.values["scene"]) == ["x-large", "studio"]
    assert list(recipe.scope.values["locale"]) == ["en", "x-en"]


def test_numbers_are_values_as_they_are_written() -> None:
    recipe = load(changed(("[en, de]", "[1.10, 007, 1e3]")))
    assert recipe.document.matrix.axes["locale"] == ("1.10", "007", "1e3")


def test_the_revision_covers_recipe_and_imports() -> None:
    other = load(files={"brand.yaml": BRAND.replace("E4002B", "000000")})
    assert load().sha256 == load().sha256
    assert len({load().sha256, other.sha256, load(RECIPE + "\n").sha256}) == 3


def test_texts_made_of_texts_end_somewhere() -> None:
    names = "".join(f'  v{i}: "${{vars.v{i - 1}}}${{vars.v{i - 1}}}"\n' for i in range(1, 40))
    told = problems(changed(("  keep: Keep its shape.\n", f"  keep: a\n  v0: b\n{names}")))
    assert told[0] == "small.yaml:34:8 vars.v21: 'vars.v19' is nested more than 20 deep"


def test_a_recipe_of_slips_is_told_quickly_and_up_to_a_limit() -> None:
    names = "".join(f"  v{i}: x\n" for i in range(2000))
    slips = "".join(f"  w{i}: '{'${vars.nothing}' * 50}'\n" for i in range(100))
    told = problems(changed(("  keep: Keep its shape.\n", f"  keep: a\n{names}{slips}")))
    assert 0 < len(told) <= 500


def test_a_hostile_recipe_is_one_problem() -> None:
    bomb = "a0: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))
    assert len(problems(bomb)) == 1
    with pytest.raises(RecipeError):
        load_recipe(b"\x00\x01", file="x", read_import=lambda name: b"")


@pytest.mark.parametrize("word", ["", "[]", "{}", "12", "true", "'x'", "${item}", "${clean}", "*x", "a: b"])
def test_no_slip_is_an_accident(word: str) -> None:
    """Each value of the recipe replaced by something else, each line left out: sound, or told."""
    lines = RECIPE.splitlines()
    for number, line in enumerate(lines):
        key, colon, _ = line.partition(":")
        changed_line = f"{key}{colon} {word}" if word else ""
        told = problems("\n".join([*lines[:number], changed_line, *lines[number + 1 :]]))
        assert all(each.startswith(("small.yaml", "brand.yaml")) for each in told)
