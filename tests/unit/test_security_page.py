"""docs/security.md: each line against a threat names a test, and each test that it names exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
THREATS = [
    line
    for section in TEXT.split("\n## ")[2:]
    if "| Threat |" in section
    for line in re.findall(r"^\|.*\|$", section, re.M)[2:]
]


@cache
def functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(each.name for each in tree.body if isinstance(each, ast.FunctionDef))


def test_there_are_threats() -> None:
    assert len(THREATS) > 30


@pytest.mark.parametrize("line", THREATS, ids=lambda line: line.split("|")[1].strip()[:50])
def test_each_line_names_a_test_that_exists(line: str) -> None:
    _, threat, stands, tests, _ = line.split("|")
    assert threat.strip()
    assert stands.strip()
    named = NAMED.findall(tests)
    assert ", ".join(f"`{file}::{name}`" for file, name in named) == tests.strip(), "tests, and nothing else"
    assert named
    for file, name in named:
        assert name in functions_of(file), f"{file}::{name}"
