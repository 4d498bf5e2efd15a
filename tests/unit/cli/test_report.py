"""`report`: a run as a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from kontext_batch.cli import main


def test_the_newest_run_is_written_into_the_workspace(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["report"]) == 2, "there is no workspace yet"
    assert main.main(["run", "sizes.yaml"]) == 0
    capsys.readouterr()
    assert main.main(["report"]) == 0
    index = studio / "kontext-out" / "reports" / "run-1" / "index.html"
    assert capsys.readouterr().out == f"{index}\n"
    assert "sizes, run 1: done" in index.read_text()
    assert len(list((index.parent / "pictures").iterdir())) == 2 * 6


def test_it_is_written_wherever_the_person_says(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "sizes.yaml"]) == 0
    capsys.readouterr()
    assert main.main(["report", "1", "--to", "../elsewhere/spring"]) == 0
    assert capsys.readouterr().out == f"{studio.parent / 'elsewhere' / 'spring' / 'index.html'}\n"
    (studio / "site").mkdir()
    (studio / "site" / "index.html").write_text("<h1>Ours</h1>")
    assert main.main(["report", "--to", "site"]) == 2
    assert "is no report of kontext-batch" in capsys.readouterr().err
    assert main.main(["report", "7"]) == 2
    assert "no run 7" in capsys.readouterr().err
    assert main.main(["report", "--link", "60"]) == 2
    assert "only a bucket has links" in capsys.readouterr().err
    assert main.main(["report", "--to", "http://x/y"]) == 2


def test_a_picture_that_is_gone_is_told(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "sizes.yaml"]) == 0
    (studio / "photos" / "mug.png").unlink()
    assert main.main(["report"]) == 0
    assert "1 picture cannot be shown; the report says why" in capsys.readouterr().err
