"""Places and patterns: what an author writes becomes one absolute URI, and data never becomes a pattern."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kontext_batch.planning.uris import (
    allowed,
    assign,
    expand,
    file_name,
    folders,
    is_pattern,
    literal,
    literal_prefix,
    one_file,
    reaches,
)

S3, FOLDER = "s3://bucket/recipes/", "file:///srv/my%20recipes/"


def place(text: str, base: str = S3) -> str:
    return expand([(text, False)], base, pattern=True)


@pytest.mark.parametrize(
    ("text", "base", "uri"),
    [
        ("photos/*.jpg", S3, "s3://bucket/recipes/photos/*.jpg"),
        ("./a//b.jpg", S3, "s3://bucket/recipes/a/b.jpg"),
        ("../a.jpg", S3, "s3://bucket/a.jpg"),
        ("S3://other/a b.jpg", S3, "s3://other/a b.jpg"),
        ("s3://other", S3, "s3://other/"),
        ("a[1].jpg", S3, "s3://bucket/recipes/a[[]1].jpg"),
        ("photos/a b.jpg", FOLDER, "file:///srv/my%20recipes/photos/a%20b.jpg"),
        ("/abs/ä.jpg", FOLDER, "file:///abs/%C3%A4.jpg"),
        ("file:///abs/%C3%A4 b.jpg", FOLDER, "file:///abs/%C3%A4%20b.jpg"),
        ("100%.jpg", FOLDER, "file:///srv/my%20recipes/100%25.jpg"),
        ("a[1].jpg", FOLDER, "file:///srv/my%20recipes/a%5B1%5D.jpg"),
        ("out/", S3, "s3://bucket/recipes/out/"),
    ],
)
def test_an_authors_place_becomes_a_uri(text: str, base: str, uri: str) -> None:
    assert place(text, base) == uri


@pytest.mark.parametrize(
    "text", ["", "a\x00b", "a\nb", "../../x", "/abs", "ftp://x/y", "C:\\x", "s3://", "file://host/x", "s3:///x"]
)
def test_other_places_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        place(text)


def test_data_is_never_a_pattern_and_never_leaves() -> None:
    assert expand([("p/", False), ("A*?[x]", True), ("_*", False)], S3, pattern=True) == (
        "s3://bucket/recipes/p/A[*][?][[]x]_*"
    )
    assert expand([("p/", False), ("A*?[x]", True), ("_*", False)], FOLDER, pattern=True) == (
        "file:///srv/my%20recipes/p/A%2A%3F%5Bx%5D_*"
    )
    for data in ("..", "a/../b", ".", ""):
        with pytest.raises(ValueError, match="value"):
            expand([("p/", False), (data, True)], S3, pattern=True)
    with pytest.raises(ValueError, match="would make a folder"):
        expand([("a/b", True)], S3, pattern=False, slashes=False)


PRINTABLE = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp", "Cn", "Co", "Cf", "Zs"])
NAMES = st.text(PRINTABLE, min_size=1, max_size=12).filter(lambda name: not {"", ".", ".."} & set(name.split("/")))


@given(NAMES)
def test_a_pattern_of_data_alone_matches_just_that_file(name: str) -> None:
    for base in (S3, FOLDER):
        pattern = expand([("p/", False), (name, True)], base, pattern=True)
        uri = literal(pattern) if base == S3 else pattern
        assert not is_pattern(pattern)
        assert literal_prefix(pattern) == uri
        assert assign([pattern], [uri, uri + "x", base + "p/other"]) == {pattern: (uri,)}
        wild = expand([("p/", False), (name, True), (".*", False)], base, pattern=True)
        assert assign([wild], [uri + ".jpg", uri, base + "p/other.jpg"])[wild] == (uri + ".jpg",)


def test_wildcards() -> None:
    names = ["s3://b/a.jpg", "s3://b/ab.jpg", "s3://b/x/a.jpg", "s3://b/x/y/a.png", "s3://b/.jpg"]
    found = assign(["s3://b/*.jpg", "s3://b/?.jpg", "s3://b/**/a.*", "s3://b/**", "s3://b/no*", "s3://b/a.jpg"], names)
    assert found == {
        "s3://b/*.jpg": ("s3://b/.jpg", "s3://b/a.jpg", "s3://b/ab.jpg"),
        "s3://b/?.jpg": ("s3://b/a.jpg",),
        "s3://b/**/a.*": ("s3://b/a.jpg", "s3://b/x/a.jpg", "s3://b/x/y/a.png"),
        "s3://b/**": tuple(sorted(names)),
        "s3://b/no*": (),
        "s3://b/a.jpg": ("s3://b/a.jpg",),
    }


def test_one_question_mark_is_one_character_in_a_file_uri_too() -> None:
    assert assign(["file:///a?.jpg"], ["file:///a%20.jpg", "file:///ab.jpg", "file:///abc.jpg"]) == {
        "file:///a?.jpg": ("file:///a%20.jpg", "file:///ab.jpg")
    }


def test_the_fewest_folders_to_list() -> None:
    assert folders(["s3://b/p/A_*", "s3://b/p/B_*", "s3://b/p/deep/C", "s3://c/*", "s3://b/pp/x"]) == (
        "s3://b/p/",
        "s3://b/pp/",
        "s3://c/",
    )


def test_prefixes_end_at_folders() -> None:
    assert allowed("s3://b/p/x", ["s3://b/p"])
    assert allowed("s3://b/p/x", ["s3://a/", "s3://b/p/"])
    assert not allowed("s3://b/pp/x", ["s3://b/p"])
    assert not allowed("s3://b/p/x", [])
    assert allowed("s3://b/p/x", None)


def test_names_of_files_as_people_read_them() -> None:
    assert file_name("file:///a/b%20c.jpg") == "b c.jpg"
    assert file_name("s3://b/c%20d.jpg") == "c%20d.jpg"


@pytest.mark.parametrize(
    ("pattern", "reached"),
    [
        ("file:///a/b/*", False),
        ("file:///a/b/link/*.png", True),
        ("file:///a/b/l*/x.png", True),
        ("file:///a/b/other/x.png", False),
        ("file:///a/**/*.png", True),
        ("file:///a/b/link/**/x.png", True),
        ("file:///a/b/link/deep/**/x.png", True),
        ("file:///a/c/**/*.png", False),
    ],
)
def test_what_could_match_below_a_folder(pattern: str, reached: bool) -> None:
    assert reaches(pattern, "file:///a/b/link/") is reached


def test_uris_that_may_be_one_file() -> None:
    assert one_file("file:///a/M%C3%9CG.png") == one_file("file:///A/mu%CC%88g.png"), "ü in one and in two characters"
    assert one_file("file:///a/stra%C3%9Fe") != one_file("file:///a/strasse")
    assert one_file("s3://a/Mug.png") != one_file("s3://a/mug.png")
