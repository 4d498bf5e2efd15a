"""What a plan refuses or leaves out, and how it says so."""

from __future__ import annotations

import pytest

from kontext_batch.errors import RecipeError
from kontext_batch.planning.inputs import read_rows, wanted_files, wanted_tables
from tests.unit.planning.world import BASE, BRAND, plan, recipe_of, refused, tree

RECIPE = """
inputs:
  item:
    table: items.csv
    key: sku
    files: {photo: "photos/${item.sku}.*"}
    on_missing: fail
texts: {name: {table: item, column: "name_${locale}"}}
matrix: {locale: [en, de]}
defaults: {edit: {model: kontext}}
steps:
  clean: {op: edit, image: "${item.photo}", prompt: "Clean ${item.kind}."}
  titled: {op: edit, image: "${clean}", prompt: "Write ${text.name}."}
outputs: [{from: "${titled}", to: "out/${item}_${locale}.png"}]
"""
TABLE = "sku,kind,name_en,name_de\nA,shoe,Runner,Läufer\nB,bag,Tote,Tasche\n"
FILES = {"photos/A.jpg": (3000, 2000), "photos/B.jpg": (2000, 2000)}


def told(body: str = RECIPE, *, table: str = TABLE, files: object = FILES, **options: object) -> list[str]:
    return refused(body, table=table, files=files, **options)


def test_the_recipe_itself_is_sound() -> None:
    assert told() == []


# ----------------------------------------------------------------------------------------------------------- tables


def test_a_missing_column_is_told_where_it_is_named() -> None:
    assert told(table="sku,knd,name_en,name_de\nA,shoe,x,y\n") == [
        "r.yaml:16:53 steps.clean.prompt: the table has no column 'kind'; did you mean 'knd'?"
        " (it has sku, knd, name_en, name_de)"
    ]


def test_a_missing_key_column_a_where_and_a_type_are_told() -> None:
    body = RECIPE.replace("key: sku", "key: sku_\n    where: {stat: live}\n    columns: {price: decimal}")
    assert [each.split(": the table")[0] for each in told(body)] == [
        "r.yaml:9:10 inputs.item.key",
        "r.yaml:10:19 inputs.item.where.stat",
        "r.yaml:11:22 inputs.item.columns.price",
    ]


def test_a_missing_column_of_a_text_is_told_once() -> None:
    assert told(RECIPE.replace("[en, de]", "[en, fr]")) == [
        "r.yaml:12:37 texts.name.column: the table has no column 'name_fr'; did you mean 'name_en'?"
        " (it has sku, kind, name_en, name_de)"
    ]


def test_a_missing_translation_names_row_and_locale() -> None:
    assert told(table=TABLE.replace("Tasche", "")) == [
        "items.csv:3 texts.name: no text 'name' for item 'B', locale 'de'"
    ]
    assert told(RECIPE.replace("${text.name}", "${text.name | item.name_en}"), table=TABLE.replace("Tasche", "")) == []


def test_rows_need_keys_of_their_own() -> None:
    assert told(table="sku,kind,name_en,name_de\nA,,x,y\n,,x,y\nA,,x,y\n") == [
        "items.csv:3: column 'sku' is empty",
        "items.csv:4: sku 'A' is in line 2 already",
    ]


def test_rows_that_where_leaves_out_are_not_looked_at() -> None:
    body = RECIPE.replace("key: sku", "key: sku\n    where: {kind: [shoe, hat]}\n    columns: {name_de: hex}")
    assert [each[:35] for each in told(body)] == ["items.csv:2: row 'A', column 'name_"]
    body = RECIPE.replace("key: sku", "key: sku\n    where: {kind: bag}")
    assert [each.axes[0][1] for each in plan(body, table=TABLE, files=FILES).instances] == ["B", "B", "B"]


def test_where_sees_typed_cells_too() -> None:
    body = RECIPE.replace("key: sku", "key: sku\n    where: {kind: 1.50}\n    columns: {kind: decimal}")
    made = plan(body, table="sku;kind;name_en;name_de\nA;1,50;x;y\nB;2,00;x;y\n", files=FILES)
    assert {each.axes[0][1] for each in made.instances} == {"A"}


# ------------------------------------------------------------------------------------------------------------ files


def test_a_missing_file_is_told_with_row_and_pattern() -> None:
    assert told(files={"photos/A.jpg": (10, 10)}) == [
        "r.yaml:10:20 inputs.item.files.photo: row 'B' (items.csv:3): photo is missing"
        " (s3://shop/recipes/photos/B.*); mend it, or write on_missing: skip"
    ]


def test_an_unusable_file_is_told_with_its_reason() -> None:
    assert told(files=FILES | {"photos/B.jpg": "0 bytes"}) == [
        "r.yaml:10:20 inputs.item.files.photo: row 'B' (items.csv:3): photo is unusable"
        " (s3://shop/recipes/photos/B.jpg: 0 bytes); mend it, or write on_missing: skip"
    ]


def test_skipped_rows_are_never_silent() -> None:
    made = plan(
        RECIPE.replace("on_missing: fail", "on_missing: skip"),
        table=TABLE + "C,hat,x,y\n",
        files={"photos/A.jpg": (10, 10), "photos/B.jpg": "not an image"},
    )
    assert {each.axes[0][1] for each in made.instances} == {"A"}
    assert [(each.axis, each.row, each.reason, each.file, each.line) for each in made.skipped] == [
        ("item", "B", "photo is unusable (s3://shop/recipes/photos/B.jpg: not an image)", "items.csv", 3),
        ("item", "C", "photo is missing (s3://shop/recipes/photos/C.*)", "items.csv", 4),
    ]


def test_an_inclusion_of_a_skipped_row_is_noted() -> None:
    body = RECIPE.replace("on_missing: fail", "on_missing: skip").replace(
        "[en, de]}", "[en], include: [{item.sku: B, locale: de}]}"
    )
    made = plan(body, table=TABLE, files={"photos/A.jpg": (10, 10)})
    assert "matrix.include[0]: its row of 'item' is skipped (item.sku: B)" in made.notes


def test_a_logo_that_is_missing_is_told_in_the_brand_file() -> None:
    body = RECIPE + ""
    body = body.replace('image: "${clean}"', 'image: "${clean}", references: ["${brand.logos.mono}"]')
    assert told(body, files=FILES | {"logos/mono.png": "not an image"}) == [
        "brand.yaml:4:15 logos.mono: s3://shop/recipes/logos/mono.png: not an image"
    ]
    assert told(body, brand=BRAND.replace("logos/mono.png", "logos/missing.png")) == [
        "brand.yaml:4:15 logos.mono: s3://shop/recipes/logos/missing.png is not there"
    ]


GLOB = """
inputs: {photo: {glob: "photos/*"}}
defaults: {edit: {model: kontext}}
steps: {clean: {op: edit, image: "${photo.file}", prompt: Clean.}}
outputs: [{from: "${clean}", to: "out/${photo}.png"}]
"""


def test_a_glob_finds_something_and_each_name_once() -> None:
    assert told(GLOB, files={}) == ["r.yaml:6:24 inputs.photo.glob: no file matches s3://shop/recipes/photos/*"]
    assert told(GLOB, files={"photos/A.jpg": (9, 9), "photos/A.png": (9, 9)}) == [
        "r.yaml:6:24 inputs.photo.glob: two files are called 'A':"
        " s3://shop/recipes/photos/A.jpg and s3://shop/recipes/photos/A.png"
    ]
    made = plan(
        GLOB.replace('*"}', '*", on_missing: skip}'), files={"photos/A.jpg": (9, 9), "photos/B.jpg": "truncated"}
    )
    assert [each.reason for each in made.skipped] == ["truncated"]


# ----------------------------------------------------------------------------------------------------------- places


def test_places_outside_of_the_allowed_prefixes() -> None:
    recipe = recipe_of(RECIPE.replace("items.csv", "s3://other/items.csv").replace("photos/${", "../x/photos/${"))
    with pytest.raises(RecipeError) as error:
        wanted_tables(recipe, BASE, allowed=[BASE])
    assert str(error.value) == (
        "r.yaml:8:12 inputs.item.table: s3://other/items.csv lies outside of what this recipe may read"
        " (s3://shop/recipes/); the setting read_prefixes (KONTEXT_BATCH_READ_PREFIXES), or `read` of an inbox,"
        " allows more"
    )
    rows = read_rows(recipe, {"item": TABLE.encode()})
    with pytest.raises(RecipeError) as error:
        wanted_files(recipe, rows, BASE, allowed=[BASE])
    assert error.value.problems[0].message == (
        "row 'A' (s3://other/items.csv:2): s3://shop/x/photos/A.* lies outside of what this recipe may read"
        " (s3://shop/recipes/); the setting read_prefixes (KONTEXT_BATCH_READ_PREFIXES), or `read` of an inbox,"
        " allows more"
    )


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("/etc/${item}_${locale}.png", "a recipe in a bucket has no file system"),
        ("s3://other/${item}_${locale}.png", "lies outside of what this recipe may write (s3://shop/recipes/)"),
        (
            "../${item}_${locale}.png",
            "; the setting write_prefixes (KONTEXT_BATCH_WRITE_PREFIXES), or `write` of an inbox, allows more",
        ),
        ("../../../${item}_${locale}.png", "leads out of the root"),
        ("https://x.example/${item}_${locale}.png", "places are paths, s3: and file: URIs, not https:"),
        ("out/${item}_${locale}*.png", "wildcards find files; this is one place"),
        ("out/${item}_${locale}/", "is a folder; a file's name is wanted"),
        ("s3:/${item}_${locale}.png", "write s3://bucket/key"),
    ],
)
def test_paths_of_outputs(to: str, said: str) -> None:
    body = RECIPE.replace('to: "out/${item}_${locale}.png"', f'to: "{to}"')
    problems = told(body, allowed_outputs=[BASE])
    assert problems
    assert all(said in problem for problem in problems)


@pytest.mark.parametrize("kind", ["..", "../x", "a/b", "a\\b", ""])
def test_data_makes_no_folders_and_leaves_none(kind: str) -> None:
    body = RECIPE.replace("out/${item}", "out/${item}_${item.kind}" if kind != ".." else "out/${item.kind}/${item}")
    problems = told(body, table=f"sku,kind,name_en,name_de\nA,{kind},x,y\n")
    assert len(problems) == 2
    assert all("outputs[0].to" in problem for problem in problems)


def test_an_output_over_an_input_is_refused() -> None:
    body = RECIPE.replace("out/${item}_${locale}.png", "photos/${item}.jpg").replace("[en, de]", "[en]")
    assert "is an input of this recipe: it would be overwritten" in told(body)[0]


# ------------------------------------------------------------------------------------------------- limits and slices


def test_an_expansion_beyond_the_limit_is_refused_before_it_is_made() -> None:
    axes = ", ".join(f"a{i}: [{', '.join('xyzuvwabcd')}]" for i in range(12))
    assert told(RECIPE.replace("locale: [en, de]", f"locale: [en, de], {axes}")) == [
        "the matrix has 4,000,000,000,000 points (2 item x 2 locale x "
        + " x ".join(f"10 a{i}" for i in range(12))
        + "); at most 1,000,000 are planned"
    ]
    assert told(max_instances=5) == ["the recipe makes 6 step instances; at most 5 are planned"]


def test_a_long_chain_with_a_condition_is_planned_without_recursion() -> None:
    chain = "".join(f'  s{i}: {{op: edit, image: "${{s{i - 1}}}", prompt: x}}\n' for i in range(1, 99))
    body = RECIPE.replace(
        "  titled:", '  s0: {op: edit, image: "${clean}", prompt: x, if: {locale: en}}\n' + chain + "  titled:"
    )
    body = body.replace('image: "${clean}", prompt: "Write', 'image: "${s98}", prompt: "Write')

    def deep(frames: int) -> int:
        return deep(frames - 1) if frames else len(plan(body, table=TABLE, files=FILES).steps)

    with pytest.raises(RecipeError, match="at most 100"):
        deep(0)
    body = body.replace('  s98: {op: edit, image: "${s97}", prompt: x}\n', "").replace("${s98}", "${s97}")
    assert deep(300) == 2 * 100


def test_an_expanded_text_has_a_limit() -> None:
    variable = "${item.kind}" * 400
    body = RECIPE.replace("matrix:", f"vars: {{a: '{variable}'}}\nmatrix:").replace("Clean ${item.kind}", "${vars.a}")
    assert "a text of more than 20000 characters" in told(body, table=TABLE.replace("shoe", "x" * 100))[0]


def test_only_and_limit_plan_a_slice_with_the_same_keys() -> None:
    whole = {each.key for each in plan(RECIPE, table=TABLE, files=FILES).steps}
    made = plan(RECIPE, table=TABLE, files=FILES, only={"item": ["B"], "locale": ["de"]})
    assert tree(made).splitlines() == [
        "clean B <- photos/B.jpg",
        "titled B de <- clean B",
        "out/B_de.png <= titled B de",
    ]
    assert {each.key for each in made.steps} < whole
    made = plan(RECIPE, table=TABLE, files=FILES, only={"item.kind": ["shoe", "bag"]}, limit=1)
    assert [each.path[-8:] for each in made.deliveries] == ["A_en.png"]


def test_a_slice_of_nothing_is_told() -> None:
    assert told(only={"itm": ["A"], "locale": ["dee"], "item.knd": ["x"], "item": ["A"]}) == [
        "--only item.knd: the table has no column 'knd'; did you mean 'kind'? (it has sku, kind, name_en, name_de)",
        "--only itm: unknown axis 'itm'; did you mean 'item'?",
        "--only locale: 'locale' has no value 'dee'; did you mean 'de'?",
    ]


def test_many_problems_are_cut_short() -> None:
    rows = "".join(f"A{i},k,x,\n" for i in range(700))
    files = {f"photos/A{i}.jpg": (9, 9) for i in range(700)}
    problems = told(table="sku,kind,name_en,name_de\n" + rows, files=files)
    assert len(problems) == 501
    assert problems[-1] == "~: and 200 more problems"


# ------------------------------------------------------------------------------------------------------------- notes


def test_long_prompts_are_noted_once() -> None:
    counted: list[tuple[str, str]] = []

    def count_tokens(model: str, prompt: str) -> int:
        counted.append((model, prompt))
        return 600 if "Runner" in prompt else 10

    made = plan(RECIPE, table=TABLE, files=FILES, count_tokens=count_tokens)
    assert "steps.titled: a prompt of 600 tokens, kontext reads 512: 'Write Runner.'" in made.notes
    assert len(counted) == len(set(counted)) == 6


def test_settings_without_an_effect_are_noted() -> None:
    made = plan(RECIPE.replace("{model: kontext}", "{model: kontext, negative_prompt: blur}"), table=TABLE, files=FILES)
    assert "defaults.edit.negative_prompt has no effect: true_cfg_scale is 1 (6 times)" in made.notes


def test_estimates_come_from_past_timings() -> None:
    lane = "edit/kontext/aaaaaaaaaaaa/-/float32"
    made = plan(RECIPE, table=TABLE, files=FILES, lane_seconds={lane: 2.5})
    assert sum(each.gpu_seconds for each in made.steps) == 15.0
    made = plan(RECIPE, table=TABLE, files=FILES)
    assert any("6 images are not in the estimate" in note for note in made.notes)


def test_an_input_without_rows_is_noted() -> None:
    made = plan(RECIPE, table="sku,kind,name_en,name_de\n", files=FILES)
    assert made.steps == ()
    assert made.notes == ("input 'item' has no row that takes part",)
