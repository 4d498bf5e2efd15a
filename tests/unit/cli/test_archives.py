"""`export` and `import`: one file, verified before anything is written, restored with equal hashes."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kontext_batch.cli import common, main
from kontext_batch.errors import BadArchive, InfrastructureError
from kontext_batch.services import archives
from kontext_batch.services.archives import Archive
from tests.unit.cli.test_retention import TWO_STEPS, objects, sha_of

Members = dict[str, bytes]


@pytest.fixture
def exported(studio: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """An archive of a run of two photos, each with an intermediate and an output."""
    (studio / "chain.yaml").write_text(TWO_STEPS)
    assert main.main(["run", "chain.yaml"]) == 0
    assert main.main(["export", "1", "one.tar"]) == 0
    assert "run 1: 4 steps, 2 pictures, 2 photos in one.tar" in capsys.readouterr().out
    return studio / "one.tar"


def imported(capsys: pytest.CaptureFixture[str], archive: str = "one.tar", *more: str) -> Any:
    capsys.readouterr()
    assert main.main(["import", archive, "--workspace", "else/kontext-out", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def members(archive: Path) -> Members:
    with tarfile.open(archive) as tar:
        return {each.name: tar.extractfile(each).read() for each in tar}  # type: ignore[union-attr]


def tar_of(parts: Members, change: Callable[[tarfile.TarInfo], None] = lambda info: None) -> io.BytesIO:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            change(info)
            tar.addfile(info, io.BytesIO(data))
    file.seek(0)
    return file


def sealed(parts: Members, **changes: Any) -> Members:
    """With a manifest that knows of all members: whoever changes an archive changes that too."""
    others = {name: data for name, data in parts.items() if name != "manifest.json"}
    manifest = json.loads(parts["manifest.json"])
    manifest["members"] = [
        {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in others.items()
    ]
    return {**others, "manifest.json": json.dumps({**manifest, **changes}).encode()}


def test_a_run_is_restored_elsewhere_with_equal_hashes(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    studio = exported.parent
    told = imported(capsys, "one.tar", "--to", "else")
    assert (told["changed"], told["pictures"], told["files"]) == (True, 2, 5)
    assert (told["imported"]["new_steps"], told["imported"]["known"]) == (4, False)
    for name in ("chain.yaml", "photos/mug.png", "photos/bag.png", "out/mug.png", "out/bag.png"):
        assert sha_of(studio / "else" / name) == sha_of(studio / name), name
    again = imported(capsys, "one.tar", "--to", "else")
    assert (again["changed"], again["pictures"], again["files"], again["imported"]["known"]) == (False, 0, 0, True)
    assert main.main(["import", "one.tar", "--workspace", "else/kontext-out"]) == 0
    assert "all of it is here already, nothing was changed" in capsys.readouterr().out
    assert main.main(["db", "verify", "--objects", "--workspace", "else/kontext-out"]) == 0
    before = objects(studio / "else")
    for each in (studio / "else" / "out").iterdir():
        each.unlink()
    assert main.main(["run", "else/chain.yaml", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert events[-1]["state"] == "done"
    assert objects(studio / "else") == before, "nothing was computed"
    assert main.main(["status", "2", "--workspace", "else/kontext-out"]) == 0
    assert "4 were cached" in capsys.readouterr().out
    for command in ("lineage", "steps show", "steps logs", "explain"):
        assert main.main([*command.split(), "else/out/mug.png", "--workspace", "else/kontext-out"]) == 0, command
    capsys.readouterr()
    assert main.main(["audit", "list", "--json", "--workspace", "else/kontext-out"]) == 0
    acts = json.loads(capsys.readouterr().out)
    assert [(each["action"], each["subject"]) for each in acts] == [("run", "run:2"), ("import", "run:1")]
    assert acts[1]["details"] == {"archive": "one.tar", "run": 1}


def test_equal_runs_make_equal_archives(exported: Path) -> None:
    assert main.main(["export", "1", "two.tar"]) == 0
    assert exported.read_bytes() == (exported.parent / "two.tar").read_bytes()
    assert main.main(["export", "1", "two.tar"]) == 2, "nothing is written over"
    assert main.main(["export", "9", "nine.tar"]) == 2
    assert not list(exported.parent.glob(".*tar*")), "nothing half-done is left"


def test_intermediates_come_when_they_are_asked_for(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["export", "1", "all.tar", "--intermediates"]) == 0
    assert imported(capsys)["pictures"] == 2
    more = imported(capsys, "all.tar")
    assert (more["pictures"], more["imported"]["known"], more["imported"]["new_steps"]) == (2, True, 0)
    assert objects(exported.parent / "else") == objects(exported.parent)


def test_what_is_gone_is_told(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (exported.parent / "photos" / "mug.png").write_bytes(b"another")
    (exported.parent / "photos" / "bag.png").unlink()
    assert main.main(["export", "1", "two.tar"]) == 0
    said = capsys.readouterr().out
    assert "0 photos" in said
    assert "mug.png has other bytes by now" in said
    assert "bag.png is not there" in said
    assert imported(capsys, "two.tar")["imported"]["new_steps"] == 4


def test_what_was_taken_down_does_not_come_back(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["forget", "photos/mug.png", "--reason", "why", "--yes"]) == 0
    before = objects(exported.parent)
    capsys.readouterr()
    assert main.main(["import", "one.tar", "--to", "else"]) == 0
    assert objects(exported.parent) == before
    assert sorted(each.name for each in (exported.parent / "else").rglob("*.png")) == ["bag.png", "bag.png"]
    assert main.main(["db", "verify", "--objects"]) == 0


def test_files_are_never_written_over_others(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (exported.parent / "else").mkdir()
    (exported.parent / "else" / "chain.yaml").write_text("mine")
    told = imported(capsys, "one.tar", "--to", "else")
    assert told["kept"] == [(exported.parent / "else" / "chain.yaml").as_uri()]
    assert (exported.parent / "else" / "chain.yaml").read_text() == "mine"


def test_a_flipped_byte_anywhere_is_refused(exported: Path) -> None:
    whole = exported.read_bytes()
    with tarfile.open(exported) as tar:
        found = [(each.name, each.offset_data, each.size) for each in tar if each.size and each.name != "manifest.json"]
    assert {name.partition("/")[0] for name, _, _ in found} == {"recipe.yaml", "lineage", "inputs", "objects"}
    for name, offset, size in found:
        changed = bytearray(whole)
        changed[offset + size // 2] ^= 1
        with pytest.raises(BadArchive, match="its sha256 is not what the manifest says"):
            Archive(io.BytesIO(changed))
        assert name
    for cut in (0, 100, len(whole) // 2, len(whole) - 12_000):
        with pytest.raises(BadArchive):
            Archive(io.BytesIO(whole[:cut]))
    with pytest.raises(BadArchive):
        Archive(io.BytesIO(b"no tar at all" * 1000))


@pytest.mark.parametrize(
    "name", ["../evil.png", "/etc/evil", "objects/../../x.png", "objects/x.png", "lineage/else.jsonl", "a/b"]
)
def test_no_other_names_are_taken(exported: Path, name: str) -> None:
    with pytest.raises(BadArchive, match="no name that an archive of a run has"):
        Archive(tar_of(sealed({**members(exported), name: b"x"})))


def test_links_folders_and_doubles_are_refused(exported: Path) -> None:
    parts = members(exported)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE):

        def change(info: tarfile.TarInfo, kind: bytes = kind) -> None:
            if info.name == "recipe.yaml":
                info.type, info.linkname, info.size = kind, "/etc/passwd", 0

        with pytest.raises(BadArchive):
            Archive(tar_of(parts, change))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in [*parts.items(), ("recipe.yaml", b"other")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(BadArchive, match="twice"):
        Archive(file)


def test_members_and_manifest_agree(exported: Path) -> None:
    parts = members(exported)
    picture = next(name for name in parts if name.startswith("objects/"))
    for missing in (picture, "recipe.yaml", "lineage/steps.jsonl", "manifest.json"):
        with pytest.raises(BadArchive, match="missing"):
            Archive(tar_of({name: data for name, data in parts.items() if name != missing}))
    unknown = {**parts, f"objects/{'0' * 64}.png": b"x"}
    with pytest.raises(BadArchive, match="the manifest does not know of it"):
        Archive(tar_of(unknown))
    with pytest.raises(BadArchive, match="its name is not its sha256"):
        Archive(tar_of(sealed(unknown)))
    with pytest.raises(BadArchive, match=r"version 2 of the format.*upgrade"):
        Archive(tar_of(sealed(parts, version=2)))
    for wrong in ({"format": "other"}, {"version": None}, {"version": 0}):
        with pytest.raises(BadArchive):
            Archive(tar_of(sealed(parts, **wrong)))
    Archive(tar_of(sealed(parts)))


def test_a_step_that_is_not_what_its_key_says_is_refused(exported: Path) -> None:
    parts = members(exported)
    steps = [json.loads(line) for line in parts["lineage/steps.jsonl"].splitlines()]
    changes: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda step: step["params"].update(format="jpeg"), "its key is not that of what it says it was"),
        (lambda step: step.update(key="b2:" + "0" * 40), "its key is not that of what it says it was"),
        (lambda step: step["parents"].append({"role": "image", "position": 0, "id": 99}), "does not come before it"),
        (lambda step: step.update(operation="shell"), "no operation 'shell' is known"),
        (lambda step: step["outputs"].update(image="0" * 64), "is not in lineage/artifacts.jsonl"),
        (lambda step: step.pop("outputs"), "a row is not as rows are"),
        (lambda step: step.update(state="great"), "a row is not as rows are"),
        (lambda step: step.update(sources=7), "a row is not as rows are"),
        (lambda step: step["tries"][0].update(outcome="great"), "an attempt has no outcome that there is"),
    ]
    for change, said in changes:
        changed = json.loads(json.dumps(steps))
        change(changed[0])
        lines = "".join(json.dumps(each) + "\n" for each in changed).encode()
        with pytest.raises(BadArchive, match=said):
            Archive(tar_of(sealed({**parts, "lineage/steps.jsonl": lines})))


def test_rows_that_contradict_one_another_change_nothing(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = members(exported)

    def rows(section: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in parts[f"lineage/{section}.jsonl"].splitlines()]

    def lines(found: list[dict[str, Any]]) -> bytes:
        return "".join(json.dumps(each) + "\n" for each in found).encode()

    run, instances, artifacts = rows("run"), rows("instances"), rows("artifacts")
    assert imported(capsys)["changed"]
    for section, changed in (
        ("run", [{**run[0], "origin": {"run": 9, "identity": "x"}, "owner": None}]),
        ("run", [{**run[0], "origin": {"run": 9, "identity": "x"}, "created": "yesterday"}]),
        ("run", [{**run[0], "origin": {"run": 9, "identity": "x"}, "owner": "a\0b"}]),
        ("run", [{"id": 1}]),
        ("instances", [instances[0], *instances]),
        ("artifacts", [{**each, "media_type": "text/html"} for each in artifacts]),
    ):
        changes: Members = {f"lineage/{section}.jsonl": lines(changed)}
        if section != "run":
            changes["lineage/run.jsonl"] = lines([{**run[0], "origin": {"run": 9, "identity": "x"}}])
        (exported.parent / "bad.tar").write_bytes(tar_of(sealed({**parts, **changes})).getvalue())
        capsys.readouterr()
        where = "else/kontext-out" if section != "artifacts" else "third/kontext-out"
        assert main.main(["import", "bad.tar", "--workspace", where]) == 2, section
        assert "internal" not in capsys.readouterr().err
    assert main.main(["runs", "list", "--json", "--workspace", "else/kontext-out"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1


def test_a_run_that_would_go_on_here_is_refused(exported: Path) -> None:
    parts = members(exported)

    def refused(section: str, said: str, **change: Any) -> None:
        rows = [json.loads(line) | change for line in parts[f"lineage/{section}.jsonl"].splitlines()]
        changed = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with pytest.raises(BadArchive, match=said):
            Archive(tar_of(sealed({**parts, f"lineage/{section}.jsonl": changed})))

    refused("run", "only one that has ended is exported", state="running")
    refused("run", "only one that has ended is exported", state="paused")
    refused("run", "a row is not as rows are", state="great")
    refused("run", "does not say where the run came from", source=5)
    refused("run", "does not say where the run came from", origin={"run": "x", "identity": "y"})
    refused("run", "NaN is no number", budget=float("nan"))
    refused("deliveries", "does not say what was delivered where", state="great")
    refused("deliveries", "does not say what was delivered where", delivered_path=5)
    refused("deliveries", "does not say what was delivered where", file_sha256=5)


@pytest.mark.parametrize("inputs", [5, [5], [{"sha256": "0" * 64, "uris": [5]}], [{"uris": []}]])
def test_a_manifest_that_does_not_say_where_photos_lay_is_refused(exported: Path, inputs: Any) -> None:
    with pytest.raises(BadArchive, match="which photos lay where"):
        Archive(tar_of(sealed(members(exported), inputs=inputs)))


def test_a_backslash_in_a_prompt_is_no_half_character(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (studio / "chain.yaml").write_text(TWO_STEPS.replace("studio@acme.example", "'C:\\udata\\u0000'"))
    assert main.main(["run", "chain.yaml"]) == 0
    assert main.main(["export", "1", "one.tar"]) == 0
    assert imported(capsys)["changed"]


def test_what_was_taken_down_does_not_leave(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["forget", "photos/mug.png", "--reason", "why", "--yes"]) == 0
    assert main.main(["export", "1", "two.tar"]) == 0
    assert "1 pictures, 1 photos" in capsys.readouterr().out
    gone = sha_of(exported.parent / "photos" / "mug.png")
    assert not any(gone in name for name in members(exported.parent / "two.tar"))


def test_a_bad_archive_leaves_nothing_behind(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (exported.parent / "bad.tar").write_bytes(exported.read_bytes()[:20_000])
    assert main.main(["import", "bad.tar", "--workspace", "else/kontext-out"]) == 2
    assert main.main(["import", "none.tar", "--workspace", "else/kontext-out"]) == 2
    assert not (exported.parent / "else").exists()


def test_an_import_onto_a_full_disk_says_so(
    exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*args: object, **kwargs: object) -> None:
        raise InfrastructureError("disk I/O error")

    monkeypatch.setattr(archives, "import_run", no_room)
    monkeypatch.setattr(common, "_is_full", lambda folder: True)
    assert main.main(["import", "one.tar", "--workspace", "else/kontext-out"]) == 3
    assert "no space is left in else/kontext-out" in capsys.readouterr().err


def test_names_that_lead_out_are_not_unpacked() -> None:
    base = "file:///studio/"
    for uri in ("file:///studio/../x", "file:///studio/%2e%2e/x", "file:///studio/a//b", "file:///studio/a%00b", base):
        assert archives._relative(uri, base) is None, uri
    assert archives._relative("file:///studio/a%20b/c.png", base) == "a b/c.png"
    assert archives._relative("file:///else/c.png", base) is None
