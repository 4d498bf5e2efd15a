"""`${...}` is a reference, never code (RECIPES.md 2.3)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kontext_batch.recipes.references import Filter, Reference, TemplateError, nearest, parse_template, slug


def only(text: str) -> Reference:
    (part,) = parse_template(text).parts
    assert isinstance(part, Reference)
    return part


def test_literals_and_references_in_turn() -> None:
    template = parse_template("Put ${item.name} on ${scene.place}.")
    assert [part if isinstance(part, str) else part.names for part in template.parts] == [
        "Put ",
        ("item.name",),
        " on ",
        ("scene.place",),
        ".",
    ]
    assert template.names == ("item.name", "scene.place")


def test_names_are_listed_once_in_order() -> None:
    assert parse_template("${b | a} ${a} ${c}").names == ("b", "a", "c")


def test_a_whole_reference_is_known() -> None:
    assert parse_template("${clean}").whole is not None
    assert parse_template("${clean} ").whole is None
    assert parse_template("clean").whole is None


def test_alternatives_and_filters() -> None:
    reference = only("${ headline | staged|upper | default('n/a | }') | pad(3) }")
    assert reference.names == ("headline", "staged")
    assert reference.filters == (Filter("upper"), Filter("default", "n/a | }"), Filter("pad", "3"))
    assert reference.default == "n/a | }"


def test_filters_apply_in_order() -> None:
    assert only("${a | slug | upper}").apply("Größe 42") == "GROSSE-42"
    assert only("${a | pad(4)}").apply("7") == "0007"
    assert only("${a | lower}").apply("ABC") == "abc"


def test_a_doubled_dollar_is_a_dollar() -> None:
    assert parse_template("costs $${amount} or $5").parts == ("costs ${amount} or $5",)


@pytest.mark.parametrize(
    ("text", "said", "offset"),
    [
        ("${a + b}", "'a + b' is not a name", 2),
        ("x ${__import__('os')}", "unknown filter '__import__'", 4),
        ("${a.b()}", "'a.b()' is not a name", 2),
        ("${a[0]}", "'a[0]' is not a name", 2),
        ("${a | uper()}", "unknown filter 'uper'; did you mean 'upper'?", 6),
        ("${}", "a name is missing", 2),
        ("${a | }", "a name is missing", 6),
        ("${slug}", "begins with a name", 0),
        ("${a | slug | b}", "'b' stands after a filter", 13),
        ("abc ${a", "without its '}'", 4),
        ("${a ${b}}", "without its '}'", 0),
        ("${a | pad(x)}", "number of digits", 6),
        ("${a | pad(99)}", "1 to 32", 6),
        ("${a | default()}", "default(...) needs a value", 6),
        ("${a | slug(3)}", "slug takes no value", 6),
    ],
)
def test_what_is_no_reference_is_told_with_its_place(text: str, said: str, offset: int) -> None:
    with pytest.raises(TemplateError) as error:
        parse_template(text)
    assert said in str(error.value)
    assert error.value.offset == offset


@pytest.mark.parametrize(
    ("text", "slugged"),
    [
        ("Größe 42/EU", "grosse-42-eu"),
        ("  --Ñandú_x--  ", "nandu-x"),
        ("ランナー", "ランナー"),
        ("ガ", "ガ"),
        ("RX-100", "rx-100"),
        ("../../etc", "etc"),
        ("!!", ""),
    ],
)
def test_slugs(text: str, slugged: str) -> None:
    assert slug(text) == slugged


@given(st.text())
def test_a_slug_is_a_safe_part_of_a_name_and_stays_itself(text: str) -> None:
    once = slug(text)
    assert slug(once) == once
    assert not set(once) & set("/\\. :*?")


@given(st.text())
def test_every_text_is_a_template_or_a_told_error(text: str) -> None:
    offset = 0
    try:
        parse_template(text)
    except TemplateError as error:
        offset = error.offset
    assert 0 <= offset <= len(text)


@given(st.text(st.characters(exclude_characters="$")))
def test_a_text_without_dollars_is_itself(text: str) -> None:
    assert "".join(str(part) for part in parse_template(text).parts) == text


def test_nearest_is_silent_when_nothing_is_near() -> None:
    assert nearest("scen", ["scene", "locale"]) == "; did you mean 'scene'?"
    assert nearest("xyzzy", ["scene", "locale"]) == ""
    assert nearest("SKU", ["sku"]) == "; did you mean 'sku'?"
