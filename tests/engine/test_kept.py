"""Results that are kept: found again, bounded, counted."""

from __future__ import annotations

from engine.kept import Kept


class Tripling:
    """Makes three of a letter, and remembers what it made."""

    def __init__(self, most_bytes: int) -> None:
        self.kept: Kept[str, str] = Kept(most_bytes, size=len)
        self.made: list[str] = []

    def __call__(self, letter: str) -> str:
        def make() -> str:
            self.made.append(letter)
            return letter * 3

        return self.kept.get(letter, make)


def test_what_was_made_is_not_made_again() -> None:
    triple = Tripling(100)
    assert [triple(letter) for letter in "abaa"] == ["aaa", "bbb", "aaa", "aaa"]
    assert triple.made == ["a", "b"]
    assert (triple.kept.hits, triple.kept.misses, triple.kept.nbytes) == (2, 2, 6)


def test_the_least_recently_used_goes_first() -> None:
    triple = Tripling(6)
    for letter in "abaca":  # "c" needs the place of "b"
        triple(letter)
    assert triple.made == ["a", "b", "c"]
    assert triple.kept.nbytes == 6
    triple("b")
    assert triple.made == ["a", "b", "c", "b"]


def test_what_is_too_large_is_given_and_not_kept() -> None:
    kept: Kept[str, str] = Kept(2, size=len)
    assert kept.get("a", lambda: "long") == "long"
    assert kept.nbytes == 0


def test_clearing_forgets_the_results_and_not_the_counts() -> None:
    kept: Kept[str, str] = Kept(100, size=len)
    kept.get("a", lambda: "a")
    kept.clear()
    kept.get("a", lambda: "a")
    assert (kept.hits, kept.misses) == (0, 2)
