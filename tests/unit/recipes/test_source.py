"""YAML as an author means it (RECIPES.md 2.6, ORCHESTRATION.md 4)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kontext_batch.recipes.source import MAX_BYTES, MAX_NODES, Mark, WrittenFloat, WrittenInt, dotted, read_yaml


def data(text: str | bytes) -> Any:
    source, problems = read_yaml(text, file="r.yaml")
    assert problems == []
    return source.data


def problems(text: str | bytes) -> list[str]:
    return [str(problem) for problem in read_yaml(text, file="r.yaml")[1]]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("16:9", "16:9"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("08", "08"),
        ("010", "010"),
        ("0x1f", "0x1f"),
        ("0o17", "0o17"),
        ("1_000", "1_000"),
        ("2026-01-31", "2026-01-31"),
        ("1e999", "1e999"),
        (".inf", ".inf"),
        ("'#ff0000'", "#ff0000"),
        ("1e-3", 0.001),
        ("1.10", 1.1),
        (".5", 0.5),
        ("-3", -3),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
    ],
)
def test_scalars_mean_what_is_written(written: str, meant: Any) -> None:
    value = data(f"key: {written}")["key"]
    assert value == meant
    assert isinstance(value, bool) == isinstance(meant, bool)
    assert isinstance(value, str) == isinstance(meant, str)


def test_numbers_remember_how_they_were_written() -> None:
    read = data("a: 1.10\nb: 12")
    assert isinstance(read["a"], WrittenFloat)
    assert read["a"].text == "1.10"
    assert isinstance(read["b"], WrittenInt)
    assert read["b"].text == "12"


def test_keys_are_words_whatever_they_look_like() -> None:
    assert data("on: a\nno: b\n08: c\ntrue: d") == {"on": "a", "no": "b", "08": "c", "true": "d"}


def test_a_repeated_key_is_told_where_it_stands_and_where_it_was() -> None:
    source, found = read_yaml("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\na: 4\n", file="r.yaml")
    assert [str(problem) for problem in found] == [
        "r.yaml:5:3 b.c: this key is already there, in line 3",
        "r.yaml:6:1 a: this key is already there, in line 1",
    ]
    assert source.data == {"a": 1, "b": {"c": 1, "d": 2}}


def test_a_value_lost_to_a_comment_is_known() -> None:
    source, _ = read_yaml("a:\n  red: #ff0000\n  none:\n  said: # a remark\n", file="r.yaml")
    assert source.lost == {("a", "red")}


def test_a_colour_that_swallows_a_brace_hints_at_quotes() -> None:
    (problem,) = problems("colors: {red: #E4002B}\nlogos: {}\n")
    assert problem.startswith("r.yaml:1:15: not YAML:")
    assert "quote the value ('#ff0000')" in problem


def test_a_reference_in_braces_hints_at_quotes() -> None:
    assert 'quote "${...}"' in problems("overlay: [{logo: ${brand.logos.mono}}]")[0]


def test_a_colon_in_a_text_hints_at_quotes() -> None:
    assert problems("prompt: Add this: a hat")[0].endswith("quote a text that holds ': '")


def test_marks_are_lines_and_columns_from_one() -> None:
    source, _ = read_yaml("steps:\n  clean:\n    prompt: hello\n    list: [a, b]\n", file="r.yaml")
    assert source.mark(("steps", "clean", "prompt")) == Mark(3, 13)
    assert source.mark(("steps", "clean", "prompt"), key=True) == Mark(3, 5)
    assert source.mark(("steps", "clean", "list", 1)) == Mark(4, 15)
    assert source.mark(("steps", "clean", "missing", "deeper")) == Mark(2, 3)
    assert source.mark(("nothing",)) == Mark(1, 1)


def test_a_path_is_dotted_with_positions() -> None:
    assert dotted(("steps", "a", "references", 0)) == "steps.a.references[0]"


def test_anchors_are_plain_repetition() -> None:
    assert data("a: &x [1, 2]\nb: *x\nc: {d: &y hi, e: *y}") == {"a": [1, 2], "b": [1, 2], "c": {"d": "hi", "e": "hi"}}


def test_merge_keys_are_told() -> None:
    assert problems("a: &x {b: 1}\nc:\n  <<: *x\n") == [
        "r.yaml:3:3 c.<<: merge keys are not part of recipes; use defaults"
    ]


def test_tags_are_told() -> None:
    assert (
        "tags (tag:yaml.org,2002:python/object/apply:os.system)"
        in problems("a: !!python/object/apply:os.system [ls]")[0]
    )
    assert "tags" in problems("a: !!int '3'")[0]


def alias_bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


def test_an_alias_bomb_is_counted_not_expanded() -> None:
    (problem,) = problems(alias_bomb(9))
    assert f"more than {MAX_NODES} values" in problem
    assert problem.startswith("r.yaml:5:")


def test_a_merge_bomb_does_nothing() -> None:
    text = "a0: &a0 {k: 1}\n" + "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 9))
    assert all("merge keys" in problem or "more than" in problem for problem in problems(text))


@pytest.mark.parametrize("text", ["[" * 2000, "a: " + "[" * 2000 + "]" * 2000, "a: " + "{b: " * 40 + "1" + "}" * 40])
def test_depth_is_limited(text: str) -> None:
    assert "levels deep" in problems(text)[0]


def test_aliases_count_into_depth() -> None:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 40)]
    assert "levels deep" in problems("\n".join(lines))[0]


def test_size_and_number_of_values_are_limited() -> None:
    assert "larger than 256 KiB" in problems("a: " + "x" * MAX_BYTES)[0]
    assert f"more than {MAX_NODES} values" in problems("a: [" + "1," * MAX_NODES + "]")[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        ("- a", "not a mapping"),
        ("just words", "not a mapping"),
        (b"a: \xff\xfe", "not UTF-8 text (byte 0xff)"),
        ("a: \x00", "control characters"),
        ("a: 1\n---\nb: 2\n", "one YAML document"),
        ("? [a, b]\n: 1", "a key must be a word"),
        ("a: *nowhere", "unknown anchor 'nowhere'"),
        ("a:\n\t- b", "tabs"),
        ("a: &x [*x]", "unknown anchor 'x'"),
    ],
)
def test_what_is_no_recipe_is_told_in_one_sentence(text: str | bytes, said: str) -> None:
    (problem,) = problems(text)
    assert said in problem


def test_a_bom_is_no_part_of_the_first_key() -> None:
    assert data("a: 1".encode("utf-8-sig")) == {"a": 1}
    assert data("\ufeffa: 1") == {"a": 1}


# What JSON may hold unescaped and YAML may not is left out.
TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Cn", "Zl", "Zp"], exclude_characters="\ufeff"),
    max_size=12,
)
TREE = st.recursive(
    TEXT | st.integers(-(10**6), 10**6) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(TEXT, TREE, min_size=1, max_size=5))
def test_json_is_read_as_what_it_says(tree: dict[str, Any]) -> None:
    assert data(json.dumps(tree, ensure_ascii=False)) == tree


@given(st.binary(max_size=300) | st.text(max_size=300))
def test_no_text_is_an_accident(text: bytes | str) -> None:
    source, _ = read_yaml(text, file="r.yaml")
    assert isinstance(source.data, dict)
