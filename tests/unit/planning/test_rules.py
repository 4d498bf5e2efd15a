"""One golden plan, written by hand, for each rule of RECIPES.md section 2."""

from __future__ import annotations

from pathlib import Path

from kontext_batch.planning import uris
from kontext_batch.planning.inputs import join, read_rows, wanted_files, wanted_tables
from kontext_batch.planning.planner import plan_recipe
from kontext_batch.recipes.loader import load_recipe
from tests.unit.planning.world import MODELS, image, params_of, plan, refused, step_of, text, tree

TABLE = "sku,kind,name_en,name_de\nA,shoe,Runner,Läufer\nB,bag,Tote,Tasche\n"
FILES = {"photos/A.jpg": (3000, 2000), "photos/B.jpg": (2000, 2000)}

ITEM = """
inputs:
  item: {table: items.csv, key: sku, files: {photo: "photos/${item.sku}.*"}}
defaults: {edit: {model: kontext}, generate: {model: kontext}}
"""


# ---------------------------------------------------------------------------- 1: three kinds of fan-out, three words


def test_rule_1_inputs_matrix_and_candidates() -> None:
    made = plan(
        ITEM
        + """
matrix: {scene: [sea, city]}
steps:
  staged: {op: edit, image: "${item.photo}", prompt: "On the ${scene}.", candidates: 2}
outputs: [{from: "${staged}", to: "out/${item}_${scene}.${ext}"}]
""",
        table=TABLE,
        files=FILES,
    )
    assert tree(made) == text("""
        staged A sea #1 <- photos/A.jpg
        staged A sea #2 <- photos/A.jpg
        staged A city #1 <- photos/A.jpg
        staged A city #2 <- photos/A.jpg
        staged B sea #1 <- photos/B.jpg
        staged B sea #2 <- photos/B.jpg
        staged B city #1 <- photos/B.jpg
        staged B city #2 <- photos/B.jpg
        out/A_sea.png <= staged A sea #1
        out/A_city.png <= staged A city #1
        out/B_sea.png <= staged B sea #1
        out/B_city.png <= staged B city #1
    """)


def test_rule_1_a_glob_is_an_input_too() -> None:
    made = plan(
        """
inputs: {photo: {glob: "photos/*.jpg"}}
defaults: {edit: {model: kontext}}
steps: {clean: {op: edit, image: "${photo.file}", prompt: "Clean ${photo.name}."}}
outputs: [{from: "${clean}", to: "out/${photo}.png"}]
""",
        files=FILES | {"photos/deeper/C.jpg": (10, 10), "photos/D.png": (10, 10)},
    )
    assert tree(made) == text("""
        clean A <- photos/A.jpg
        clean B <- photos/B.jpg
        out/A.png <= clean A
        out/B.png <= clean B
    """)
    assert params_of(made, "clean A")["prompt"] == "Clean A.jpg."


def test_rule_1_pick_all_fans_readers_out() -> None:
    made = plan(
        ITEM
        + """
steps:
  staged: {op: edit, image: "${item.photo}", prompt: One., candidates: 2, pick: all}
  titled: {op: edit, image: "${staged}", prompt: Two., candidates: 2}
  finish: {op: finish, image: "${titled}", overlay: [{logo: "${staged}"}]}
outputs:
  - {from: "${finish}", to: "out/${item}_${candidate}.${ext}"}
  - {from: "${staged}", to: "raw/${item}_${candidate | pad(2)}.${ext}"}
""",
        table=TABLE.replace("B,bag,Tote,Tasche\n", ""),
        files=FILES,
    )
    assert tree(made) == text("""
        staged A #1 <- photos/A.jpg
        staged A #2 <- photos/A.jpg
        titled A #1 <- staged A #1
        titled A #2 <- staged A #1
        titled A #3 <- staged A #2
        titled A #4 <- staged A #2
        finish A #1 <- titled A #1, staged A #1
        finish A #2 <- titled A #3, staged A #2
        out/A_1.png <= finish A #1
        out/A_2.png <= finish A #2
        raw/A_01.png <= staged A #1
        raw/A_02.png <= staged A #2
    """)


# -------------------------------------------------------------------------------------------- 2: axes are inferred


CHAIN = (
    ITEM
    + """
texts: {name: {table: item, column: "name_${locale}"}}
vars: {where: "at ${scene.place}"}
matrix:
  scene: {sea: {place: the sea}, city: {place: a city}}
  locale: [en, de]
  unused: [x, y]
steps:
  clean: {op: edit, image: "${item.photo}", prompt: Clean it.}
  staged: {op: edit, image: "${clean}", prompt: "Put it ${vars.where}.", on: [scene, item]}
  titled: {op: edit, image: "${staged}", prompt: "Write ${text.name}."}
  never: {op: edit, image: "${clean}", prompt: Nobody asks for this.}
outputs: [{from: "${titled}", to: "out/${item}_${scene}_${locale}.png"}]
"""
)


def test_rule_2_a_shared_first_step_runs_once_and_unwanted_steps_not_at_all() -> None:
    made = plan(CHAIN, table=TABLE.replace("B,bag,Tote,Tasche\n", ""), files=FILES)
    assert tree(made) == text("""
        clean A <- photos/A.jpg
        staged A sea <- clean A
        staged A city <- clean A
        titled A sea en <- staged A sea
        titled A sea de <- staged A sea
        titled A city en <- staged A city
        titled A city de <- staged A city
        out/A_sea_en.png <= titled A sea en
        out/A_sea_de.png <= titled A sea de
        out/A_city_en.png <= titled A city en
        out/A_city_de.png <= titled A city de
    """)
    assert "step 'never': no output needs it, it is not run" in made.notes
    assert params_of(made, "titled A city de")["prompt"] == "Write Läufer."
    assert params_of(made, "staged A sea")["prompt"] == "Put it at the sea."


def test_rule_2_an_instance_needs_a_surviving_point() -> None:
    made = plan(
        CHAIN.replace("  unused: [x, y]", "  exclude: [{item: A, scene: city}, {item: A, locale: de}, {item: B}]"),
        table=TABLE,
        files=FILES,
    )
    assert tree(made) == text("""
        clean A <- photos/A.jpg
        staged A sea <- clean A
        titled A sea en <- staged A sea
        out/A_sea_en.png <= titled A sea en
    """)


# -------------------------------------------------------------------------------- 3: ${...} is a reference, never code


def test_rule_3_the_first_that_exists_by_if_alone() -> None:
    made = plan(
        ITEM
        + """
matrix: {locale: [en, de, fr]}
steps:
  base: {op: edit, image: "${item.photo}", prompt: Base.}
  titled: {op: edit, image: "${base}", prompt: "In ${locale}.", if: {locale: {not: en}}}
  french: {op: edit, image: "${titled}", prompt: Encore., if: {locale: fr, item.kind: [shoe, hat]}}
  finish: {op: finish, image: "${french | titled | base}"}
outputs: [{from: "${finish}", to: "out/${item}_${locale}.${ext}"}]
""",
        table=TABLE,
        files=FILES,
    )
    assert tree(made) == text("""
        base A <- photos/A.jpg
        base B <- photos/B.jpg
        titled A de <- base A
        titled A fr <- base A
        titled B de <- base B
        titled B fr <- base B
        french A fr <- titled A fr
        finish A en <- base A
        finish A de <- titled A de
        finish A fr <- french A fr
        finish B en <- base B
        finish B de <- titled B de
        finish B fr <- titled B fr
        out/A_en.png <= finish A en
        out/A_de.png <= finish A de
        out/A_fr.png <= finish A fr
        out/B_en.png <= finish B en
        out/B_de.png <= finish B de
        out/B_fr.png <= finish B fr
    """)


def test_rule_3_what_reads_a_step_that_does_not_exist_does_not_exist_and_is_noted() -> None:
    made = plan(
        ITEM
        + """
matrix: {locale: [en, de]}
steps:
  titled: {op: edit, image: "${item.photo}", prompt: "In ${locale}.", if: {locale: {not: en}}}
  finish: {op: finish, image: "${titled}"}
outputs: [{from: "${finish}", to: "out/${item}_${locale}.${ext}"}]
""",
        table=TABLE,
        files=FILES,
    )
    assert [each.path[-8:] for each in made.deliveries] == ["A_de.png", "B_de.png"]
    assert "outputs[0]: ${finish} does not exist at 2 points" in made.notes


def test_rule_3_filters_and_defaults() -> None:
    made = plan(
        ITEM
        + """
steps:
  clean:
    op: edit
    image: ${item.photo}
    prompt: ${item.note | item.name_en | upper}, $${x}, ${item.note | default('none')}.
outputs: [{from: "${clean}", to: "out/${item.name_de | slug}_${item.number | pad(4)}.png"}]
""",
        table="sku,name_en,name_de,note,number\nA,Runner,Läufer 42/EU,,7\n",
        files=FILES,
    )
    assert params_of(made, "clean A")["prompt"] == "RUNNER, ${x}, none."
    assert made.deliveries[0].path.endswith("/out/laufer-42-eu_0007.png")


# ------------------------------------------------------------------- 4: what a table or a file holds is data


def test_rule_4_data_is_never_expanded_again() -> None:
    made = plan(
        ITEM
        + """
vars: {secret: hidden}
steps: {clean: {op: edit, image: "${item.photo}", prompt: "Write ${item.name_en}."}}
outputs: [{from: "${clean}", to: "out/${item.name_en}.png"}]
""",
        table='sku,name_en\nA,"${vars.secret} ${item.sku} $${x}"\n',
        files=FILES,
    )
    assert params_of(made, "clean A")["prompt"] == "Write ${vars.secret} ${item.sku} $${x}."
    assert made.deliveries[0].path.endswith("/out/${vars.secret} ${item.sku} $${x}.png")


def test_rule_4_data_is_no_pattern() -> None:
    made = plan(
        ITEM
        + """
steps: {clean: {op: edit, image: "${item.photo}", prompt: Clean.}}
outputs: [{from: "${clean}", to: "out/${item}.png"}]
""",
        table="sku\nA*\n[B]\n",
        files={"photos/A*.jpg": (10, 10), "photos/AB.jpg": (10, 10), "photos/[B].jpg": (9, 9), "photos/B.jpg": (9, 9)},
    )
    assert tree(made) == text("""
        clean A* <- photos/A*.jpg
        clean [B] <- photos/[B].jpg
        out/A*.png <= clean A*
        out/[B].png <= clean [B]
    """)


# ------------------------------------------- 5 and 6, errors and YAML's traps: tests/unit/recipes/test_loader.py


def test_rule_6_ratios_and_small_numbers_mean_what_is_written() -> None:
    made = plan(
        ITEM
        + """
matrix: {locale: [no, 08]}
steps: {clean: {op: edit, image: "${item.photo}", frame: 16:9, guidance: 1e-3, prompt: "In ${locale}."}}
outputs: [{from: "${clean}", to: "out/${item}_${locale}.png"}]
""",
        table="sku\nA\n",
        files=FILES,
    )
    params = params_of(made, "clean A no")
    assert params["target"] == {"width": 1392, "height": 752}
    assert params["guidance"] == 0.001
    assert [each.path[-8:] for each in made.deliveries] == ["A_no.png", "A_08.png"]


# ------------------------------------------------------------------------------------- 7: exclude and include


MATRIX = (
    ITEM
    + """
matrix:
  scene: {sea: {place: the sea}, city: {place: a city}}
  channel: [square, hero]
  exclude:
    - {item.kind: bag, scene: sea}
    - {scene: city, channel: [hero]}
  include:
    - {item.sku: B, scene: ice, scene.place: "ice in ${brand.colors.red}", channel: hero}
steps:
  staged: {op: edit, image: "${item.photo}", frame: "${channel.size}", prompt: "On ${scene.place}."}
outputs: [{from: "${staged}", to: "out/${item}_${scene}_${channel}.png"}]
"""
)


def test_rule_7_exclude_takes_points_away_and_include_adds_one() -> None:
    made = plan(MATRIX, table=TABLE, files=FILES)
    assert tree(made) == text("""
        staged A sea square <- photos/A.jpg
        staged A sea hero <- photos/A.jpg
        staged A city square <- photos/A.jpg
        staged B city square <- photos/B.jpg
        staged B ice hero <- photos/B.jpg
        out/A_sea_square.png <= staged A sea square
        out/A_sea_hero.png <= staged A sea hero
        out/A_city_square.png <= staged A city square
        out/B_city_square.png <= staged B city square
        out/B_ice_hero.png <= staged B ice hero
    """)
    assert params_of(made, "staged B ice hero")["prompt"] == "On ice in #E4002B."


def test_rule_7_clashes_are_errors() -> None:
    def told(point: str) -> list[str]:
        body = MATRIX.replace("item.sku: B, scene: ice", point).replace(
            ', scene.place: "ice in ${brand.colors.red}"', ""
        )
        return refused(body, table=TABLE, files=FILES)

    assert told("item.sku: A, scene: sea") == [
        "r.yaml:17:7 matrix.include[0]: the point is there already (item A, scene sea, channel hero)"
    ]
    assert told("item.sku: B, scene: sea") == [
        "r.yaml:17:7 matrix.include[0]: the point is taken away by exclude in line 14 (item B, scene sea, channel hero)"
    ]
    assert told("item.kind: shoe, scene: sea") == told("item.sku: A, scene: sea")
    assert told("item.sku: C, scene: sea") == [
        "r.yaml:17:7 matrix.include[0]: no row of 'item' that takes part has item.sku: C"
    ]
    assert told("item.kind: shoe, item.sku: B, scene: sea") == [
        "r.yaml:17:7 matrix.include[0]: no row of 'item' that takes part has item.kind: shoe, item.sku: B"
    ]


def test_rule_7_an_inclusion_of_several_rows_is_an_error() -> None:
    body = MATRIX.replace("item.sku: B, scene: ice", "item.kind: shoe, scene: ice")
    assert refused(body, table=TABLE + "C,shoe,x,y\n", files=FILES | {"photos/C.jpg": (9, 9)}) == [
        "r.yaml:17:7 matrix.include[0]: 2 rows of 'item' have item.kind: shoe; a point is one row"
    ]


# -------------------------------------------------------- 8: pictures of any earlier step; two outputs, one name


def test_rule_8_image_and_prompt_come_from_any_earlier_step() -> None:
    made = plan(
        ITEM
        + """
steps:
  last: {op: edit, image: "${second}", references: ["${first}"], prompt: "Again: ${first.prompt}"}
  second: {op: edit, image: "${first}", prompt: Two.}
  first: {op: edit, image: "${item.photo}", prompt: "One, ${item.kind}."}
outputs: [{from: "${last}", to: "out/${item}.png"}]
""",
        table="sku,kind\nA,shoe\n",
        files=FILES,
    )
    assert tree(made) == text("""
        first A <- photos/A.jpg
        second A <- first A
        last A <- second A, first A
        out/A.png <= last A
    """)
    assert params_of(made, "last A")["prompt"] == "Again: One, shoe."


def test_rule_8_two_outputs_with_one_name() -> None:
    body = MATRIX.replace("out/${item}_${scene}_${channel}.png", "out/${item}_${channel}.png")
    assert refused(body, table=TABLE, files=FILES) == [
        "r.yaml:20:35 outputs[0].to: two outputs have one name, s3://shop/recipes/out/A_square.png"
        " (A sea square and A city square); the path lacks ${scene}"
    ]


def test_rule_8_more_outputs_with_one_name_are_counted_after_those_that_are_told() -> None:
    body = MATRIX.replace("out/${item}_${scene}_${channel}.png", "out/x.png")
    *told, last = refused(body, table=TABLE, files=FILES)
    place = "r.yaml:20:35 outputs[0].to:"
    assert [each.partition(", s3:")[0] for each in told] == [f"{place} two outputs have one name"] * 3
    assert last == f"{place} and 1 more output whose name is taken"


def test_rule_8_two_values_with_one_slug() -> None:
    body = MATRIX.replace("out/${item}_", "out/${item.kind | slug}_")
    (problem, *_) = refused(body, table=TABLE.replace("bag", "SHOE"), files=FILES)
    assert "two outputs have one name" in problem


CASES = """
matrix: {name: [Mug, mug, Müg, MÜG]}
steps: {made: {op: generate, model: kontext, prompt: "${name}"}}
outputs: [{from: "${made}", to: "out/${name}.png"}]
"""


def test_rule_8_two_files_whose_names_differ_in_case_only() -> None:
    alike = "r.yaml:8:33 outputs[0].to: two outputs have names that differ only in case"
    assert refused(CASES, base="file:///shop/") == [
        f"{alike}, file:///shop/out/Mug.png and file:///shop/out/mug.png (Mug and mug),"
        " which macOS and Windows keep as one file; rename one",
        f"{alike}, file:///shop/out/M%C3%BCg.png and file:///shop/out/M%C3%9CG.png (Müg and MÜG),"
        " which macOS and Windows keep as one file; rename one",
    ]
    body = CASES.replace('to: "out/${name}.png', 'to: "${name.folder}/a.png').replace(
        "[Mug, mug, Müg, MÜG]", "{one: {folder: Out}, two: {folder: out}}"
    )
    (problem,) = refused(body, base="file:///shop/")
    assert "file:///shop/Out/a.png and file:///shop/out/a.png (one and two)" in problem


def test_rule_8_keys_of_a_bucket_may_differ_in_case_only() -> None:
    assert len(plan(CASES).deliveries) == 4
    assert len(plan(CASES.replace("[Mug, mug, Müg, MÜG]", "[Straße, Strasse]"), base="file:///shop/").deliveries) == 2


# ------------------------------------------------------------- 9: image is the canvas, references only condition


def test_rule_9_references_keep_their_order_and_their_layout() -> None:
    made = plan(
        """
inputs:
  item:
    table: items.csv
    key: sku
    files: {photo: "photos/${item.sku}.jpg", looks: ["looks/${item.sku}_*.jpg", "looks/all.jpg"]}
defaults: {edit: {model: kontext, reference_layout: index}}
steps:
  one: {op: edit, image: "${item.photo}", references: ["${item.looks}", "${brand.logos.mono}"], prompt: Like these.}
  two: {op: edit, image: "${one}", prompt: No references.}
outputs: [{from: "${two}", to: "out/${item}.png"}]
""",
        table="sku\nA\n",
        files=FILES | {"looks/A_2.jpg": (100, 200), "looks/A_1.jpg": (200, 100), "looks/all.jpg": (100, 100)},
    )
    assert tree(made) == text("""
        one A <- photos/A.jpg, looks/A_1.jpg, looks/A_2.jpg, looks/all.jpg, logos/mono.png
        two A <- one A
        out/A.png <= two A
    """)
    step = step_of(made, "one A")
    assert [(each.role, each.position) for each in step.inputs] == [
        ("image", 0), ("reference", 0), ("reference", 1), ("reference", 2), ("reference", 3),
    ]  # fmt: skip
    assert step.params["reference_layout"] == "index"
    assert [(each["width"], each["height"]) for each in step.params["references"]] == [
        (1456, 720), (720, 1456), (1024, 1024), (1568, 672),
    ]  # fmt: skip
    assert params_of(made, "two A")["reference_layout"] == "offset"


# ---------------------------------------------------------------------- 10: frames, exact pixels, upscales


def test_rule_10_a_frame_is_a_wish_finish_makes_pixels_and_upscales_are_limited() -> None:
    body = (
        ITEM
        + """
matrix: {channel: [square, hero]}
steps:
  staged: {op: edit, image: "${item.photo}", frame: "${channel.size}", prompt: Go.}
  finish: {op: finish, image: "${staged}", channel: "${channel}"}
outputs: [{from: "${finish}", to: "out/${item}_${channel}.${ext}"}]
"""
    )
    made = plan(body, table="sku\nA\n", files=FILES, default_seconds=3.0)
    assert params_of(made, "staged A hero")["target"] == {"width": 1392, "height": 752}
    assert params_of(made, "finish A hero")["size"] == {"width": 1600, "height": 900}
    assert params_of(made, "finish A square") == {
        "box": None,
        "size": {"width": 1000, "height": 1000},
        "fit": "pad",
        "background": "#EEEEEE",
        "format": "jpeg",
        "quality": 80,
        "max_bytes": 2_000_000,
        "icc": "srgb",
        "overlay": [],
    }
    assert made.notes == (
        "steps.staged: frame 1000x1000 is made at 1024x1024",
        "steps.staged: frame 1600x900 is made at 1392x752",
        "steps.finish: 1392x752 to 1600x900 enlarges 1.20 times",
    )
    assert refused(body.replace("op: finish,", "op: finish, max_upscale: 1.1,"), table="sku\nA\n", files=FILES) == [
        "r.yaml:13:11 steps.finish: 1392x752 to 1600x900 enlarges 1.20 times, more than max_upscale 1.1"
        " (at item A, channel hero)"
    ]


# ----------------------------------------------------------------------- 11: generate and the Pillow operations


def test_rule_11_generate_and_contact_sheet() -> None:
    made = plan(
        ITEM
        + """
matrix: {scene: [sea, city], locale: [en, de]}
steps:
  backdrop: {op: generate, prompt: "A backdrop: ${scene}.", frame: "2:1"}
  staged: {op: edit, image: "${item.photo}", references: ["${backdrop}"], prompt: "In ${locale}."}
  sheet:
    op: contact_sheet
    images: ["${staged}"]
    on: [item]
    columns: 2
    cell: 200x100
    label: "${scene} ${locale | upper}"
outputs: [{from: "${sheet}", to: "out/${item}.${ext}"}]
""",
        table="sku\nA\n",
        files=FILES,
    )
    assert tree(made) == text("""
        backdrop sea
        backdrop city
        staged A sea en <- photos/A.jpg, backdrop sea
        staged A sea de <- photos/A.jpg, backdrop sea
        staged A city en <- photos/A.jpg, backdrop city
        staged A city de <- photos/A.jpg, backdrop city
        sheet A <- staged A sea en, staged A sea de, staged A city en, staged A city de
        out/A.jpg <= sheet A
    """)
    assert params_of(made, "sheet A") == {
        "columns": 2,
        "cell": {"width": 200, "height": 100},
        "labels": ["sea EN", "sea DE", "city EN", "city DE"],
        "background": "#FFFFFF",
        "format": "jpeg",
        "quality": 90,
        "icc": "srgb",
    }
    assert step_of(made, "sheet A").lane == "operations"
    assert params_of(made, "backdrop sea")["target"] == {"width": 1456, "height": 720}
    assert "canvas" not in params_of(made, "backdrop sea")
    assert {step_of(made, name).lane for name in ("backdrop sea", "staged A sea en")} == {
        "edit/kontext/aaaaaaaaaaaa/-/float32"
    }


SHEET = (
    ITEM
    + """
steps:
  staged: {op: edit, image: "${item.photo}", prompt: Go., candidates: 2, pick: all}
  sheet: {op: contact_sheet, images: ["${item.photo}", "${staged}"], label: "${item.kind} ${candidate}"}
outputs: [{from: "${sheet}", to: "out/sheet.${ext}"}]
"""
)


def test_rule_11_labels_of_a_sheet_tell_the_candidates_apart() -> None:
    made = plan(SHEET, table="sku,kind\nA,Schuh\nB,Tasche\n", files=FILES, default_seconds=1)
    assert step_of(made, "sheet").params["labels"] == [
        "Schuh 1", "Schuh 1", "Schuh 2", "Tasche 1", "Tasche 1", "Tasche 2",
    ]  # fmt: skip
    assert made.notes == ()


def test_rule_11_a_sheet_shows_each_picture_once() -> None:
    """The photo and the step that names only the item, beside three scenes of it."""
    recipe = (
        ITEM
        + """
matrix: {scene: [sea, city, park]}
steps:
  clean: {op: edit, image: "${item.photo}", prompt: Clean.}
  staged: {op: edit, image: "${clean}", prompt: "Go to ${scene}."}
  sheet: {op: contact_sheet, images: ["${item.photo}", "${clean}", "${staged}"], label: "${item} ${scene}"}
outputs: [{from: "${sheet}", to: "out/sheet.${ext}"}]
"""
    )
    made = plan(recipe, table="sku,kind\nA,shoe\nB,bag\n", files=FILES, default_seconds=1)
    assert step_of(made, "sheet").params["labels"] == [
        "A sea", "A sea", "A sea", "A city", "A park", "B sea", "B sea", "B sea", "B city", "B park",
    ]  # fmt: skip


def test_rule_11_labels_that_lose_their_letters_are_noted_once() -> None:
    made = plan(SHEET, table="sku,kind\nA,靴\nB,Größe\n", files=FILES, default_seconds=1)
    assert made.notes == (
        "steps.sheet: labels are drawn in Latin letters, without accents; others show as ?: '靴 1' as '? 1' (3 times)",
    )


# ------------------------------------------------------------------------------------- 12: models and adapters


def test_rule_12_models_and_adapters_are_names_of_the_registry() -> None:
    body = (
        ITEM
        + """
steps:
  clean: {op: edit, image: "${item.photo}", prompt: Go., adapters: [{name: look, scale: 0.8}, {name: style}]}
outputs: [{from: "${clean}", to: "out/${item}.png"}]
"""
    )
    made = plan(body, table="sku\nA\n", files=FILES)
    step = step_of(made, "clean A")
    assert step.params["adapters"] == [
        {"name": "look", "scale": 0.8, "sha256": "c" * 64},
        {"name": "style", "scale": 1.0, "sha256": "d" * 64},
    ]
    assert step.lane == "edit/kontext/aaaaaaaaaaaa/look:cccccccc@0.8+style:dddddddd@1/float32"
    told = refused(
        body.replace("name: look", "name: lok").replace("edit: {model: kontext}", "edit: {model: kontxt}"),
        table="sku\nA\n",
        files=FILES,
    )
    assert told == [
        "r.yaml:8:26 defaults.edit.model: unknown model 'kontxt'; did you mean 'kontext'?",
        "r.yaml:11:76 steps.clean.adapters[0].name: unknown adapter 'lok'; did you mean 'look'?",
    ]
    assert refused(body.replace("edit: {model: kontext}", "edit: {model: tiny}"), table="sku\nA\n", files=FILES) == [
        "r.yaml:11:68 steps.clean.adapters: model 'tiny' takes no adapters"
    ]


# ------------------------------------------------------------------------ 13: channels, lists of files, fits


def test_rule_13_a_pattern_takes_one_file_a_list_takes_all() -> None:
    body = (
        ITEM
        + """
steps: {clean: {op: edit, image: "${brand.logos.mono}", references: ["${item.photo}"], prompt: Go.}}
outputs: [{from: "${clean}", to: "out/${item}.png"}]
"""
    )
    files = {"photos/A.jpg": (10, 10), "photos/A.png": (10, 10)}
    assert refused(body, table="sku\nA\n", files=files) == [
        "r.yaml:7:53 inputs.item.files.photo: row 'A' (items.csv:2): several files match:"
        " s3://shop/recipes/photos/A.jpg, s3://shop/recipes/photos/A.png; write a list to take all"
    ]
    made = plan(body.replace('"photos/${item.sku}.*"', '["photos/${item.sku}.*"]'), table="sku\nA\n", files=files)
    assert tree(made) == text("""
        clean A <- logos/mono.png, photos/A.jpg, photos/A.png
        out/A.png <= clean A
    """)


def test_rule_13_a_recipe_may_bring_channels_of_its_own() -> None:
    made = plan(
        """
inputs: {photo: {glob: "photos/*.jpg"}}
matrix:
  channel:
    square: {mood: calm}
    mail: {size: 600x300, quality: 70, format: jpeg, max_upscale: 1.5, mood: loud}
defaults: {edit: {model: kontext}}
steps:
  staged: {op: edit, image: "${photo}", frame: "${channel.size}", prompt: "Make it ${channel.mood}."}
  finish: {op: finish, image: "${staged}", channel: "${channel}"}
outputs: [{from: "${finish}", to: "out/${photo}_${channel}.${ext}"}]
""",
        files={"photos/A.jpg": (2000, 2000)},
    )
    assert tree(made) == text("""
        staged A square <- photos/A.jpg
        staged A mail <- photos/A.jpg
        finish A square <- staged A square
        finish A mail <- staged A mail
        out/A_square.jpg <= finish A square
        out/A_mail.jpg <= finish A mail
    """)
    assert params_of(made, "staged A mail")["prompt"] == "Make it loud."
    assert params_of(made, "staged A mail")["target"] == {"width": 1456, "height": 720}
    assert params_of(made, "finish A mail")["quality"] == 70
    assert params_of(made, "finish A square")["background"] == "#EEEEEE"


# --------------------------------------------------------------------------------------------- 14: tables


def test_rule_14_cell_errors_name_row_column_and_value() -> None:
    body = (
        ITEM.replace("key: sku,", "key: sku, columns: {color: hex, price: decimal, pieces: int},")
        + """
steps: {clean: {op: edit, image: "${item.photo}", prompt: "${item.color} ${item.price} ${item.pieces}"}}
outputs: [{from: "${clean}", to: "out/${item}.png"}]
"""
    )
    made = plan(body, table="\ufeffsku;color;price;pieces\nA;e4002b;1.299,95;007\n", files=FILES)
    assert params_of(made, "clean A")["prompt"] == "#E4002B 1299.95 7"
    assert refused(body, table="sku;color;price;pieces\nA;rot;viel;7\nB;#000000;1;1,5\n", files=FILES) == [
        "items.csv:2: row 'A', column 'color': 'rot' is no colour; write six hex digits, as in '#E4002B'",
        "items.csv:2: row 'A', column 'price': 'viel' is no number; write 129.95 or 129,95",
        "items.csv:3: row 'B', column 'pieces': '1,5' is no whole number",
    ]


# ------------------------------------------------------------------------------------- the whole recipe of section 1


EXAMPLES = Path(__file__).parents[3] / "recipes" / "examples"


def test_the_recipe_of_the_language_is_planned() -> None:
    text_ = (EXAMPLES / "spring-hero.yaml").read_bytes()
    recipe = load_recipe(text_, file="spring-hero.yaml", read_import=lambda name: (EXAMPLES / name).read_bytes())
    base = "file:///studio/recipes/"
    assert wanted_tables(recipe, base) == {"item": "s3://acme-pim/spring.csv"}
    rows = read_rows(recipe, {"item": (EXAMPLES / "spring.csv").read_bytes()})
    wanted = wanted_files(recipe, rows, base)
    assert uris.folders(each.uri for each in wanted) == ("s3://acme-brand/", "s3://acme-raw/spring/")
    there = [
        "s3://acme-raw/spring/RX-100_front.jpg",
        "s3://acme-raw/spring/BG-7_front.png",
        "s3://acme-brand/logo-mono.png",
    ]
    found = uris.assign([each.uri for each in wanted], there)
    listed = join(recipe, rows, wanted, {pattern: [image(uri) for uri in names] for pattern, names in found.items()})
    models = {"kontext-dev": MODELS["kontext"]}
    made = plan_recipe(recipe, listed, models, base=base)

    per_node = {name: sum(each.node == name for each in made.instances) for name in recipe.scope.steps}
    # RX-100: 2 scenes, BG-7: the studio only (bags have no terrace), and RX-100 on the podium for web-hero and en.
    assert per_node == {
        "clean": 2,
        "staged": 2 * (2 * 2 + 1 * 2 + 1),
        "headline": 2 * 2 * 2 + 1 * 2 * 2,
        "finish": 2 * 3 * 2 + 1 * 3 * 2 + 1,
    }
    assert len(made.deliveries) == 19
    assert made.deliveries[0].path == "s3://acme-dam/spring/RX-100/RX-100_terrace_en_shop-square.jpg"
    assert made.deliveries[-1].path == "s3://acme-dam/spring/RX-100/RX-100_podium_en_web-hero.avif"
    prompts = {each.params["prompt"] for each in made.steps if each.operation == "edit"}
    keep = "Keep the product's shape, logo, stitching and label text exactly the same."
    assert f"Change the background to a seamless pastel studio sweep in #E4002B. {keep}" in prompts
    assert "Replace the text 'Weekender' with 'Reisetasche'. Keep the font, size and colour." in prompts
    assert made.budget == {"gpu_minutes": 240.0, "outputs": 2000.0}
