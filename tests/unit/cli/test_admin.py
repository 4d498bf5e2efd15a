"""Who did what, what is asked before something is lost, exports, batches, workers, and runs over their limits."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from kontext_batch.cli import acting, main
from kontext_batch.cli.export import _harmless
from kontext_batch.lineage import migrate
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.engine import close_database, open_database
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.registry import AdapterEntry, Registry, signature
from tests.contract.plans import worker
from tests.unit.cli.conftest import FINISH_ONLY

TOKEN = "b4b5cf0d9d3c4f3f"


def url(studio: Path) -> str:
    return f"sqlite:///{studio / 'kontext-out' / 'kontext.db'}"


def acts(capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    """What the audit says, the oldest first."""
    capsys.readouterr()
    assert main.main(["audit", "list", "--json", *options]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found[::-1]


def test_acts_are_listed_with_who_did_them(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        "submit sizes.yaml",
        "runs pause 1",
        "runs prioritize 1 4",
        "runs resume 1",
        "run sizes.yaml",
        "runs retry 1 --failed",
        "schedules add sizes.yaml --cron 0+0+29+2+*",
        "schedules run-now sizes",
        "runs cancel 2 --drain",
        "schedules pause sizes",
        "schedules remove sizes --yes",
        "steps link made --expires 60",
        "db verify --objects --forget --yes",
        "gc --keep-bytes 0 --yes",
    ):
        missing = command.startswith("db verify")
        if missing:
            next((studio / "kontext-out" / "objects").rglob("*.png")).unlink()
        code = main.main([part.replace("+", " ") for part in command.split()])
        assert code in ((1,) if missing else (0, 2)), command
    found = acts(capsys)
    assert [(each["action"], each["subject"]) for each in found] == [
        ("submit", "run:1"),
        ("runs pause", "run:1"),
        ("runs prioritize", "run:1"),
        ("runs resume", "run:1"),
        ("run", "run:1"),
        ("runs retry", "run:1"),
        ("schedules add", "schedule:sizes"),
        ("schedules run-now", "run:2"),
        ("runs cancel", "run:2"),
        ("schedules pause", "schedule:sizes"),
        ("schedules remove", "schedule:sizes"),
        *[("steps link", f"step:{number}") for number in (1, 2, 3, 4)],
        ("db verify", "artifacts"),
        ("gc", "artifacts"),
    ]
    assert {(each["who"], each["via"]) for each in found} == {(acting.user(), "cli")}
    assert found[2]["details"] == {"priority": 4}
    assert found[8]["details"] == {"drain": True}
    assert [each["details"] for each in found[11:15]] == [{"seconds": 60}] * 4
    assert found[15]["details"] == {"forget": True, "artifacts": 1}
    assert [each["action"] for each in acts(capsys, "--run", "2")] == ["schedules run-now", "runs cancel"]
    assert len(acts(capsys, "--limit", "3")) == 3
    assert main.main(["audit", "list"]) == 0
    assert "priority=4" in capsys.readouterr().out


def test_a_token_gives_its_name_and_is_kept_nowhere(
    studio: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KONTEXT_BATCH_TOKEN", TOKEN)
    assert main.main(["submit", "sizes.yaml"]) == 2
    assert "tokens_file" in capsys.readouterr().err
    assert not (studio / "kontext-out").exists()
    tokens = studio / "tokens.yaml"
    monkeypatch.setenv("KONTEXT_BATCH_TOKENS_FILE", str(tokens))
    for text in (f"{'0' * 64}: other\n", "- a\n", "a: [", None):
        if text is None:
            tokens.unlink()
        else:
            tokens.write_text(text)
        assert main.main(["submit", "sizes.yaml"]) == 2
        told = capsys.readouterr()
        assert "tokens.yaml" in told.err
        assert TOKEN not in told.err + told.out
    tokens.write_text(f"{hashlib.sha256(TOKEN.encode()).hexdigest()}: ci-nightly\n")
    assert main.main(["submit", "sizes.yaml"]) == 0
    [found] = acts(capsys)
    assert (found["who"], found["via"]) == ("ci-nightly", "cli+token")
    for file in (studio / "kontext-out").rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes()


def test_what_destroys_is_asked_about(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "sizes.yaml"]) == 0
    assert main.main(["submit", "sizes.yaml", "--limit", "1"]) == 0
    assert main.main(["submit", "sizes.yaml", "--limit", "2"]) == 0
    kept, *_ = sorted((studio / "kontext-out" / "objects").rglob("*.png"))
    away = kept.rename(studio / kept.name)
    for command in ("gc --keep-bytes 0", "runs cancel 2 3", "workers drain --all", "db verify --objects --forget"):
        capsys.readouterr()
        assert main.main(command.split()) == 2, command
        said = capsys.readouterr()
        assert "say --yes" in " ".join(said.err.split())
    assert "1 objects are missing" in said.out, "what it is about is shown before it is asked about"
    away.rename(kept)
    assert main.main(["db", "verify", "--objects", "--forget"]) == 0, "nothing was forgotten, and nothing is now"
    assert len(list((studio / "kontext-out" / "objects").rglob("*.png"))) == 4
    assert main.main(["runs", "cancel", "2", "3", "--yes"]) == 0
    assert main.main(["gc", "--keep-bytes", "0", "-y"]) == 0
    assert list((studio / "kontext-out" / "objects").rglob("*.png")) == []
    assert main.main(["gc"]) == 0, "where nothing is lost nothing is asked"


def test_who_is_asked_may_say_no(monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for answer, ends in (("y\n", False), ("n\n", True)):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        monkeypatch.setattr("sys.stderr", Terminal())
        if ends:
            with pytest.raises(typer.Exit):
                acting.confirm("All will be gone.", yes=False)
        else:
            acting.confirm("All will be gone.", yes=False)


def test_a_run_is_exported_whole(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "sizes.yaml"]) == 0
    capsys.readouterr()
    assert main.main(["runs", "export", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["axes"] for each in found] == [
        {"item": item, "size": size} for item in ("bag", "mug") for size in ("small", "large")
    ]
    for each in found:
        assert each["state"] == "done"
        assert each["artifact"]["width"] == {"small": 16, "large": 32}[each["axes"]["size"]]
        [attempt], [delivery] = each["attempts"], each["deliveries"]
        assert attempt["outcome"] == "ok"
        assert "operate" in attempt["timings"]
        assert delivery["state"] == "delivered"
        assert delivery["delivered_path"].endswith(f"/out/{each['axes']['item']}_{each['axes']['size']}.png")
    assert main.main(["runs", "export", "1", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["sha256"] for row in rows] == [each["artifact"]["sha256"] for each in found]
    assert {(row["state"], row["attempts"], row["delivery"], row["cached"]) for row in rows} == {
        ("done", "1", "delivered", "0")
    }
    assert json.loads(rows[0]["axes"]) == found[0]["axes"]
    assert main.main(["runs", "export", "9"]) == 2


def test_a_table_holds_no_formulas() -> None:
    assert [_harmless(cell) for cell in ("=1+1", "@x", "-1", "a=1", "", 5, None)] == [
        "'=1+1",
        "'@x",
        "'-1",
        "a=1",
        "",
        5,
        None,
    ]


def test_batches_and_workers_are_shown(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "sizes.yaml"]) == 0
    capsys.readouterr()
    assert main.main(["steps", "logs", "1", "--json"]) == 0
    number = str(json.loads(capsys.readouterr().out)[0]["attempts"][0]["batch_id"])
    assert main.main(["batches", "show", number, "--json"]) == 0
    batch = json.loads(capsys.readouterr().out)
    assert (batch["lane"], len(batch["members"])) == ("operations", 4)
    assert main.main(["batches", "show", number]) == 0
    assert batch["worker_id"] in capsys.readouterr().out
    for wrong in ("99", "x"):
        assert main.main(["batches", "show", wrong]) == 2
    assert main.main(["workers", "list", "--json"]) == 0
    capsys.readouterr()
    assert main.main(["workers", "list", "--all", "--json"]) == 0
    [gone] = json.loads(capsys.readouterr().out)
    assert gone["id"] == batch["worker_id"]
    assert gone["retired"]

    repository = SqlRepository(url(studio))
    repository.register_worker(worker("w1"))
    assert main.main(["workers", "drain", "w1"]) == 0
    assert main.main(["workers", "drain", "--all", "--yes"]) == 0
    told = capsys.readouterr().out
    assert told == "worker w1 finishes what it holds and ends\nno worker is at work that was not told before\n"
    assert repository.orders("w1").drain
    repository.close()
    assert main.main(["workers", "list"]) == 0
    assert "draining" in capsys.readouterr().out
    for wrong_arguments in (["w9"], [], ["w1", "--all", "--yes"]):
        assert main.main(["workers", "drain", *wrong_arguments]) == 2


def test_a_worker_that_is_told_to_drain_ends(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["submit", "sizes.yaml"]) == 0
    codes: list[int] = []
    serving = threading.Thread(target=lambda: codes.append(main.main(["workers", "start"])))
    serving.start()
    repository = SqlRepository(url(studio))
    deadline = time.monotonic() + 60
    while repository.run(1).finished is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert main.main(["workers", "drain", "--all", "--yes"]) == 0
    serving.join(60)
    assert codes == [0]
    assert repository.workers() == []
    repository.close()


def test_a_run_over_its_budget_goes_on_with_a_larger_one(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (studio / "sizes.yaml").write_text(FINISH_ONLY + "budget: {gpu_minutes: 1}\n")
    assert main.main(["submit", "sizes.yaml"]) == 0
    repository = SqlRepository(url(studio))
    repository.register_worker(worker("w1"))
    repository.close()
    engine = open_database(url(studio))
    with engine.begin() as conn:
        conn.execute(sa.insert(t.run_usage).values(run_id=1, worker_id="w1", gpu_seconds=90.0))
    close_database(engine)
    capsys.readouterr()
    assert main.main(["run", "sizes.yaml"]) == 5
    assert "has used 1.50 GPU minutes, its budget is 1" in capsys.readouterr().err
    assert main.main(["runs", "retry", "1", "--failed", "--json"]) in (0, 130)
    assert main.main(["runs", "show", "1", "--json"]) == 0
    assert main.main(["status", "1"]) == 0
    assert "sampled: 1.50 of 1 GPU minutes" in capsys.readouterr().out


def test_a_paused_run_says_why(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["submit", "sizes.yaml"]) == 0
    repository = SqlRepository(url(studio))
    repository.pause_run(1, reason="too much has failed")
    repository.close()
    for command in ("status", "runs show 1"):
        capsys.readouterr()
        assert main.main(command.split()) == 0
        assert "paused: too much has failed\n" in capsys.readouterr().out
    assert main.main(["runs", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["reason"] == "too much has failed"
    assert main.main(["runs", "retry", "1", "--failed", "--json"]) == 130
    assert "too much has failed" in json.loads(capsys.readouterr().out.splitlines()[-1])["message"]
    assert main.main(["runs", "resume", "1", "--budget", "5"]) == 0
    assert main.main(["status", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert (told["reason"], told["budget"]) == (None, {"gpu_minutes": 5.0})


def test_changes_of_registry_and_database_are_written_down(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = studio / "look.safetensors"
    file.write_bytes(b"x")
    entry = AdapterEntry(path=file, sha256="0" * 64, signature=signature(file))

    def register() -> None:
        Registry().with_adapter("look", entry).write(studio / "models.json")

    register()
    assert main.main(["adapters", "remove", "look"]) == 0, "without a workspace there is nothing to write to"
    (studio / "kontext-out").mkdir()
    migrate.upgrade(url(studio), "0003")
    assert main.main(["db", "upgrade"]) == 0
    assert main.main(["db", "upgrade"]) == 0
    register()
    assert main.main(["adapters", "remove", "look"]) == 0
    found = acts(capsys)
    assert [(each["action"], each["subject"]) for each in found] == [
        ("db upgrade", "database"),
        ("adapters remove", "adapter:look"),
    ]
    assert found[0]["details"]["old"] == "0003"
