"""docs/observability.md says what is so: every metric, alerts over metrics that there are, a snippet that verifies."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY

from kontext_batch.observability import metrics
from kontext_batch.observability.fleet import Fleet
from kontext_batch.planning.events import MAX_TRIES
from kontext_batch.services.watch import LOOK_SECONDS
from kontext_batch.settings import Settings
from kontext_batch.webhooks import TIMEOUT, HttpPost, Target
from tests.unit.receiver import Receiver, receiving

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "observability.md").read_text(encoding="utf-8")
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def documented() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> (type, labels), by the tables."""
    rows = re.findall(r"^\| `(kontext_batch_\w+)` \| (\w+) \|(.*?)\| ", TEXT, re.MULTILINE)
    return {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def exported() -> dict[str, tuple[str, tuple[str, ...]]]:
    metrics.ACTIVITY.begin()
    time.sleep(0.001)
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    fleet = Fleet()
    fleet.show(
        steps={("l", "s"): 1},
        queue_age={"l": 1.0},
        runs={"s": 1},
        pending_deliveries=0,
        workers=0,
        longest_silence=0.0,
        sends={("w", "s"): 1},
        looked_at=0.0,
        took=0.0,
    )
    of_fleet = {family.name: tuple(family.samples[0].labels) for family in fleet.collect()}
    for family in [*REGISTRY.collect(), *fleet.collect()]:
        if family.name.startswith("kontext_batch_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            collector: Any = REGISTRY._names_to_collectors.get(family.name)
            labels = of_fleet.get(family.name, getattr(collector, "_labelnames", ()))
            found[name] = (family.type, tuple(labels))
    return found


def test_every_metric_is_documented_as_it_is() -> None:
    assert documented() == exported()


def test_alerts_and_questions_name_metrics_that_there_are() -> None:
    [rules] = re.findall(r"```yaml\n(groups:.*?)```", TEXT, re.DOTALL)
    [group] = yaml.safe_load(rules)["groups"]
    assert len(group["rules"]) >= 8
    expressions = [rule["expr"] for rule in group["rules"]]
    expressions += re.findall(r"^- .*?: `(.*)`$", TEXT, re.MULTILINE)
    assert len(expressions) > len(group["rules"])
    known = set(exported())
    known |= {
        f"{name}_{part}" for name, (kind, _) in exported().items() if kind == "histogram" for part in ("sum", "count")
    }
    for expression in expressions:
        named = set(re.findall(r"kontext_batch_\w+", expression))
        assert named, expression
        assert named <= known, expression


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.mark.parametrize("secret", [SECRET, "a secret that is text"])
def test_the_snippet_verifies_what_is_sent(receiver: Receiver, tmp_path: Path, secret: str) -> None:
    [snippet] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    verified = names["verified"]
    (tmp_path / "secret").write_text(f"another secret of text\n{secret}\n")
    post = HttpPost({"dam": Target(receiver.url, secret_file=tmp_path / "secret")})
    post.post("dam", "evt_1", b'{"type":"run.done"}')
    [got] = receiver.requests
    assert verified(secret, got.headers, got.body)
    assert not verified("some other secret", got.headers, got.body)
    assert not verified(secret, got.headers, got.body + b" ")
    assert not verified(secret, {**got.headers, "webhook-id": "evt_2"}, got.body)
    HttpPost(post.targets, clock=lambda: time.time() - 3600).post("dam", "evt_1", b"{}")
    assert not verified(secret, receiver.requests[1].headers, receiver.requests[1].body)


def test_numbers_in_the_text_are_those_of_the_code() -> None:
    assert f"{MAX_TRIES} times" in TEXT
    assert f"within {TIMEOUT:g} seconds" in TEXT
    assert f"every {LOOK_SECONDS:g} seconds" in TEXT
    assert f"`stalled_seconds` ({Settings().stalled_seconds:g})" in TEXT


def test_every_setting_is_in_the_docs() -> None:
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    assert [name for name in Settings.model_fields if f"| `{name}` |" not in text] == []
