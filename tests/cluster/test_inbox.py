"""An inbox in a bucket that two beats watch, on real servers: what is dropped runs once and is answered beside it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import time
import zipfile
from dataclasses import dataclass

import pytest
from PIL import Image

from kontext_batch.planning.inbox import DropRow, DropState
from kontext_batch.planning.states import LIVE, RunState, StepState
from tests.acceptance.conftest import RECIPE, STEPS_IN_ALL
from tests.cluster.installation import Cluster, picture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.parametrize("broker_url", ["redis"], indirect=True),
]
OWNER = "studio@acme.example"
SCENES = "{beach: {place: a beach}, snow: {place: deep snow}}"
"""Of `RECIPE`."""


@dataclass(frozen=True)
class Watched:
    """An installation with an inbox, and the processes that may not end."""

    cluster: Cluster
    beats: list[subprocess.Popen[str]]
    worker: subprocess.Popen[str]

    def recipe(self, name: str, *, photos: str | None = None, scenes: str = SCENES) -> str:
        """A recipe that delivers to a folder of its name; `photos`: its input, else the photos in the bucket."""
        cluster = self.cluster
        text = RECIPE.replace("STEPS", "2").replace("OUT", f"{cluster.uri}/out/{name}").replace(SCENES, scenes)
        inputs = photos or f'{{glob: "{cluster.uri}/photos/*"}}'
        return text.replace('{glob: "photos/*", on_missing: skip}', inputs) + "budget: {outputs: 500}\n"

    def drop(self, name: str, data: str | bytes) -> None:
        self.cluster.put(f"inbox/{name}", data if isinstance(data, bytes) else data.encode())

    def answer(self, name: str) -> str:
        return self.cluster.read(f"inbox/{name}").decode()

    def state(self, stem: str) -> str:
        """What its status says; nothing when there is none yet."""
        if f"inbox/{stem}.status.json" not in self.cluster.names("inbox"):
            return ""
        return str(json.loads(self.answer(f"{stem}.status.json"))["state"])

    def drops(self) -> list[DropRow]:
        """Oldest first."""
        return list(self.cluster.ask(lambda repository: repository.drops()))[::-1]

    def run_of(self, name: str) -> int:
        """Run of the newest drop of that name."""
        run_id = next(row.run_id for row in reversed(self.drops()) if row.uri.endswith(f"/inbox/{name}"))
        assert run_id is not None, self.drops()
        return run_id

    def wait_until(self, *expected: tuple[str, DropState]) -> None:
        """Until these are all drops, and stand like that."""

        def reached() -> bool:
            found = [(row.uri.rpartition("/")[2], row.state) for row in self.drops()]
            return sorted(found) == sorted(expected)

        self.cluster.wait_for(reached, *self.beats, self.worker)

    def runs(self) -> list[int]:
        return sorted(each.id for each in self.cluster.ask(lambda repository: repository.runs()))

    def end(self) -> None:
        """The processes end when they are told to, the beats told of each run once, and the database is sound."""
        processes = [*self.beats, self.worker]
        assert [self.cluster.end(each) for each in processes] == [0, 0, 0], self.cluster.logs()
        told = re.findall(r"^run (\d+)$", self.cluster.logs(), re.MULTILINE)
        assert sorted(map(int, told)) == self.runs()
        assert self.cluster.ask(lambda repository: repository.verify()) == []


@pytest.fixture
def watched(cluster: Cluster) -> Watched:
    """Two beats that look, and a toy worker that takes half a second for a picture."""
    place = {
        "prefix": f"{cluster.uri}/inbox",
        "owner": OWNER,
        "budget": {"outputs": 500},
        "read": [f"{cluster.uri}/photos"],
        "write": [f"{cluster.uri}/out"],
    }
    cluster.environment = {**cluster.environment, "KONTEXT_BATCH_INBOXES": json.dumps([place])}
    beats = [cluster.start("workers", "beat", "--every", "0.2") for _ in range(2)]
    worker = cluster.toy_worker(KONTEXT_TOY_ROW_SECONDS="0.5")
    cluster.wait_for(lambda: cluster.logs().count("beating; Ctrl-C stops") == len(beats), *beats, worker)
    return Watched(cluster, beats, worker)


def bundle(recipe: str) -> bytes:
    """A recipe with its table and its picture."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("spring/spring.yaml", recipe)
        archive.writestr("spring/items.csv", "sku,colour\nRX-100,green\n")
        archive.writestr("spring/photos/RX-100.png", picture("green"))
    return out.getvalue()


def outputs_of(name: str, *items: str) -> list[str]:
    return [f"out/{name}/{item}_{scene}.png" for item in items for scene in ("beach", "snow")]


def test_drops_run_once_though_two_beats_watch_and_are_answered_beside_them(watched: Watched) -> None:
    cluster = watched.cluster
    good = watched.recipe("good")
    table = watched.recipe("packed", photos='{table: items.csv, key: sku, files: {file: "photos/${item.sku}.*"}}')
    wrong = watched.recipe("mended").replace("${clean}", "${claen}").replace("${scene.place}", "${scene.plaec}")
    watched.drop("good.yaml", good)
    watched.drop("packed.zip", bundle(table.replace("Remove", "It is ${item.colour}. Remove")))
    watched.drop("wrong.yaml", wrong)
    ended = [("good.yaml", DropState.FINISHED), ("packed.zip", DropState.FINISHED), ("wrong.yaml", DropState.REFUSED)]
    watched.wait_until(*ended)

    answered = {
        stem: [f"inbox/{stem}.{ending}" for ending in ("plan.txt", "report.html", "status.json")]
        for stem in ("good", "packed")
    }
    refused = ["inbox/wrong.errors.txt", "inbox/wrong.status.json", "inbox/wrong.yaml"]
    names = cluster.names("inbox")
    assert [name for name in names if ".report/" not in name] == [
        *(*answered["good"], "inbox/good.yaml"),
        *(*answered["packed"], "inbox/packed.zip"),
        *refused,
    ]
    delivered = {"good": outputs_of("good", "bag", "mug"), "packed": outputs_of("packed", "RX-100")}
    assert cluster.outputs() == [*delivered["good"], *delivered["packed"]]
    runs = {"good": watched.run_of("good.yaml"), "packed": watched.run_of("packed.zip")}
    assert watched.runs() == sorted(runs.values())
    for stem, run_id in runs.items():
        status = json.loads(watched.answer(f"{stem}.status.json"))
        assert (status["state"], status["run"], status["delivered"]) == ("done", run_id, len(delivered[stem]))
        assert watched.answer(f"{stem}.plan.txt").endswith(f"{len(delivered[stem])} outputs; budget: outputs 500\n")
        report = watched.answer(f"{stem}.report.html")
        assert f'href="{stem}.report/index.html"' in report
        assert f"inbox/{stem}.report/index.html" in names
        for name in delivered[stem]:
            assert f"<code>{cluster.uri}/{name}</code>" in report
            assert Image.open(io.BytesIO(cluster.read(name))).size == (32, 32)
        assert all(each == ["ok"] for each in cluster.outcomes(run_id))
    assert len(cluster.outcomes(runs["good"])) == STEPS_IN_ALL

    assert watched.state("wrong") == "refused"
    told = watched.answer("wrong.errors.txt").splitlines()
    for fault in ("${claen}", "${scene.plaec}"):
        line = next(number for number, text in enumerate(wrong.splitlines(), 1) if fault in text)
        assert any(each.startswith(f"wrong.yaml:{line}:") for each in told), told

    # The same bytes again are no drop; the wrong one put right is, and its errors go.
    watched.drop("good.yaml", good)
    watched.drop("wrong.yaml", watched.recipe("mended"))
    watched.wait_until(*ended, ("wrong.yaml", DropState.FINISHED))
    mended = watched.run_of("wrong.yaml")
    assert watched.runs() == sorted([*runs.values(), mended])
    assert watched.state("wrong") == "done"
    assert "inbox/wrong.errors.txt" not in cluster.names("inbox")
    assert set(outputs_of("mended", "bag", "mug")) <= set(cluster.outputs())
    assert all(each == ["ok"] for each in cluster.outcomes(mended)), "what the good one has computed is taken"
    watched.end()


def test_a_cancel_file_stops_the_run_that_was_dropped_before_it_and_no_other(watched: Watched) -> None:
    cluster = watched.cluster
    many = ", ".join(f"s{number}: {{place: place {number}}}" for number in range(100))
    watched.drop("other.yaml", watched.recipe("other"))
    watched.drop("x.yaml", watched.recipe("x", scenes=f"{{{many}}}"))
    cluster.wait_for(lambda: watched.state("x") == "running", *watched.beats, watched.worker)
    run_id = watched.run_of("x.yaml")
    cluster.wait_for(lambda: cluster.leased(run_id), *watched.beats, watched.worker)
    watched.drop("x.cancel", b"")
    ended = [("other.yaml", DropState.FINISHED), ("x.yaml", DropState.CANCELLED)]
    watched.wait_until(*ended)

    assert watched.state("x") == "cancelled"
    assert "cancelled" in watched.answer("x.report.html")
    assert cluster.ask(lambda repository: repository.run(run_id)).state is RunState.CANCELLED
    states = cluster.states(run_id)
    assert LIVE.isdisjoint(states), states
    assert states[StepState.CANCELLED] > 0
    assert watched.state("other") == "done"

    # The cancel file lies there; what is dropped after it runs.
    time.sleep(1.1)  # a bucket tells of times in whole seconds
    watched.drop("x.yaml", watched.recipe("x"))
    watched.wait_until(*ended, ("x.yaml", DropState.FINISHED))
    assert watched.state("x") == "done"
    assert "inbox/x.cancel" in cluster.names("inbox")
    assert {*outputs_of("other", "bag", "mug"), *outputs_of("x", "bag", "mug")} <= set(cluster.outputs())
    assert watched.runs() == sorted([run_id, watched.run_of("other.yaml"), watched.run_of("x.yaml")])
    watched.end()
