"""What lies in deploy/ is what the program is: its commands, its settings, its way to end."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from kontext_batch.cli.main import app
from kontext_batch.settings import CONFIG_VARIABLE, Settings, load_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
PREFIX = "KONTEXT_BATCH_"
TYPED = r"^(?:(?:#|--) *)?(?:\w+=\S+ )*kontext-batch ([a-z].*?)(?: +#.*)?$"
"""A command in a comment or on a page, at the beginning of its line."""
GOODBYE_SECONDS = 30
"""Beside grace_seconds: the denoise step in flight, and the leases that are given back."""
MANIFESTS = [each for path in KUBERNETES for each in yaml.safe_load_all(path.read_text())]
SERVICES: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
OURS = {name: each for name, each in SERVICES.items() if each["image"] == "kontext-batch"}


def with_defaults(text: str) -> str:
    """What Compose makes of `${NAME:-default}`."""
    return re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text)


def unit(path: Path) -> dict[str, list[str]]:
    """The `[Service]` of a unit: name -> values."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes=("#",), delimiters=("=",))
    parser.read_string(path.read_text())
    assert parser.sections() == ["Unit", "Service", "Install"]
    values: dict[str, list[str]] = {}
    for line in path.read_text().partition("[Service]")[2].partition("[Install]")[0].splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            values.setdefault(name, []).append(value)
    return values


def containers() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Of every workload: name, pod, container."""
    for manifest in MANIFESTS:
        if manifest["kind"] in ("Deployment", "Job"):
            pod = manifest["spec"]["template"]["spec"]
            [container] = pod["containers"]
            yield manifest["metadata"]["name"], pod, container


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Every command of ours that a file starts or asks for: where, and its arguments."""
    for name, service in OURS.items():
        if "entrypoint" not in service:
            yield f"compose {name}", list(map(with_defaults, service["command"]))
        check = service.get("healthcheck", {}).get("test", ["CMD"])
        if check[1:2] == ["kontext-batch"]:
            yield f"compose {name} health", check[2:]
    for path in UNITS:
        [line] = unit(path)["ExecStart"]
        program, *arguments = shlex.split(line.replace("%i", "cuda:0"))
        assert program == "/opt/kontext-batch/bin/kontext-batch"
        yield path.name, arguments
    for name, _, container in containers():
        yield f"kubernetes {name}", container["args"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "exec" in container.get(probe, {}):
                program, *arguments = container[probe]["exec"]["command"]
                assert program == "kontext-batch"
                yield f"kubernetes {name} {probe}", arguments
    for path in (*FILES, ROOT / "docs" / "operations.md", ROOT / "docs" / "security.md"):
        for line in re.findall(TYPED, path.read_text(), re.M):
            yield f"{path.name}: {line}", shlex.split(line)


@pytest.mark.parametrize(("where", "arguments"), list(command_lines()), ids=lambda value: str(value)[:60])
def test_commands_are_those_of_the_command_line(where: str, arguments: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    rest, name = list(arguments), "kontext-batch"
    while hasattr(command, "commands"):
        command, name = command.commands[rest[0]], f"{name} {rest[0]}"
        del rest[0]
    command.make_context(name, rest).close()  # raises for an option or argument that it does not take


def test_the_processes_of_an_installation_are_there() -> None:
    started = [" ".join(arguments) for _, arguments in command_lines()]
    for line in ("db upgrade", "workers start --operations", "workers start --device cuda:0", "workers beat"):
        assert line in started
    assert {"postgres", "redis", "s3", "migrate", "operations", "edits", "beat", "flower"} <= SERVICES.keys()
    assert [path.stem for path in UNITS] == [f"kontext-batch-{each}" for each in ("beat", "operations", "worker@")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_settings_that_are_named_exist(path: Path) -> None:
    for name in re.findall(rf"\b{PREFIX}([A-Z][A-Z_0-9]*)", path.read_text()):
        assert name.lower() in Settings.model_fields or f"{PREFIX}{name}" == CONFIG_VARIABLE, name


def test_the_settings_file_names_every_setting_and_is_sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (DEPLOY / "kontext-batch.yaml").read_text()
    lines = set(re.findall(r"^(?:# )?([a-z][a-z0-9_]*):", text, re.M))
    secrets = {each.lower() for each in re.findall(rf"#   {PREFIX}([A-Z_]+)=", text)}
    assert lines | secrets == Settings.model_fields.keys()
    full = tmp_path / "full.yaml"
    full.write_text(re.sub(r"^# ([a-z][a-z0-9_]*:)", r"\1", text, flags=re.M))
    for path in (DEPLOY / "kontext-batch.yaml", full):
        monkeypatch.setenv(CONFIG_VARIABLE, str(path))
        assert load_settings().database_url is None, "a URL with a password is no part of the file"


def environments() -> Iterator[tuple[str, dict[str, str]]]:
    """The variables of each process, secrets included."""
    for name, service in OURS.items():
        written = service.get("environment", {})
        yield f"compose {name}", {key: with_defaults(value) for key, value in written.items()}
    data = {(each["kind"], each["metadata"]["name"]): each.get("data", each.get("stringData")) for each in MANIFESTS}
    kinds = {"configMapRef": "ConfigMap", "secretRef": "Secret"}
    for name, _, container in containers():
        read = [data[kinds[how], which["name"]] for each in container["envFrom"] for how, which in each.items()]
        yield f"kubernetes {name}", {key: value for each in read for key, value in each.items()}


@pytest.mark.parametrize(("where", "environment"), list(environments()))
def test_environments_are_sound(monkeypatch: pytest.MonkeyPatch, where: str, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        assert isinstance(value, str), (where, name)
        monkeypatch.setenv(name, value)
    settings = load_settings()
    if where not in ("compose flower", "kubernetes kontext-batch-db-upgrade"):
        assert settings.database_url
        assert settings.objects, "workers on several machines share a store"
        assert settings.dtype != "auto", "it would be that of the machine that plans, which may have no GPU"


def seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)(s|min|m)?", text)
    assert match, text
    return int(match[1]) * (60 if match[2] in ("m", "min") else 1)


def stops() -> Iterator[tuple[str, float, float]]:
    """For each process: where it is started, how long its end is waited for, and its grace period."""
    for name, service in OURS.items():
        if name != "flower":
            grace = service["environment"][f"{PREFIX}GRACE_SECONDS"]
            yield f"compose {name}", seconds(service["stop_grace_period"]), float(grace)
    in_file = yaml.safe_load((DEPLOY / "kontext-batch.yaml").read_text())["grace_seconds"]
    for path in UNITS:
        yield path.name, seconds(unit(path)["TimeoutStopSec"][0]), in_file
    [configuration] = [each["data"] for each in MANIFESTS if each["kind"] == "ConfigMap"]
    for name, pod, _ in containers():
        if name != "kontext-batch-db-upgrade":
            grace = float(configuration[f"{PREFIX}GRACE_SECONDS"])
            yield f"kubernetes {name}", pod["terminationGracePeriodSeconds"], grace


@pytest.mark.parametrize(("where", "waited", "grace"), list(stops()))
def test_whoever_stops_a_worker_waits_longer_than_its_grace_period(where: str, waited: float, grace: float) -> None:
    assert waited >= grace + GOODBYE_SECONDS, where


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_end_by_the_parent_and_may_do_little(path: Path) -> None:
    values = unit(path)
    expected = {
        "KillMode": "mixed",
        "User": "kontext",
        "Restart": "always",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "EnvironmentFile": "/etc/kontext-batch/secrets.env",
        "WorkingDirectory": f"/var/lib/{values['StateDirectory'][0]}",
    }
    assert {name: values[name] for name in expected} == {name: [value] for name, value in expected.items()}
    assert values["CapabilityBoundingSet"] == [""]


def test_containers_run_as_nobody_in_particular() -> None:
    for name, pod, container in containers():
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
    last = (DEPLOY / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001$", last, re.M)
    assert {pod["securityContext"]["runAsUser"] for _, pod, _ in containers()} == {10001}


def test_kubernetes_workers_have_a_gpu_each_and_are_looked_after() -> None:
    by_name = {name: (pod, container) for name, pod, container in containers()}
    assert by_name["kontext-batch-edits"][1]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in json.dumps(by_name["kontext-batch-operations"][1])
    deployments = {each["metadata"]["name"]: each for each in MANIFESTS if each["kind"] == "Deployment"}
    budgets = {each["metadata"]["name"]: each["spec"] for each in MANIFESTS if each["kind"] == "PodDisruptionBudget"}
    assert budgets.keys() == deployments.keys()
    for name, each in deployments.items():
        labels = each["spec"]["template"]["metadata"]["labels"]
        assert each["spec"]["selector"] == budgets[name]["selector"] == {"matchLabels": labels}
        assert each["spec"]["strategy"] == {"type": "Recreate"}, "old and new code on one database"
        probes = {
            kind: by_name[name][1][f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")
        }
        assert probes == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}


def test_only_the_upgrade_may_change_tables() -> None:
    users = {}
    for where, environment in environments():
        url = environment.get(f"{PREFIX}DATABASE_URL", "")
        if where.startswith("kubernetes"):
            users[where.removeprefix("kubernetes kontext-batch-")] = url.partition("//")[2].partition(":")[0]
    assert users.pop("db-upgrade") == "kontext_owner"
    assert set(users.values()) == {"kontext_worker"}


def test_the_image_is_made_of_pins_and_of_what_is_here() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert {each.partition(" ")[0] for each in re.findall(r"^FROM (.*)$", text, re.M)} == {"python:3.11-slim"}
    for line in re.findall(r"^RUN pip install (.*)$", text, re.M):
        assert "--constraint constraints.txt" in line
    for names in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M):
        for name in names.split():
            assert (ROOT / name).exists(), name


def test_nothing_is_fetched_from_a_registry_of_somebodys_own() -> None:
    allowed = re.compile(
        r"(download\.pytorch\.org|[a-z0-9.-]+\.example|127\.0\.0\.1|localhost|redis|postgres|s3|HOST|db\.acme)$"
    )
    for path in FILES:
        for host in re.findall(r"\w+://(?:[^\s/@'\"]*@)?([\w.-]+)", path.read_text()):
            names_a_bucket = f"s3://{host}" in path.read_text()
            assert names_a_bucket or allowed.match(host), (path.name, host)
    assert {each["image"].partition(":")[0] for each in SERVICES.values()} == {
        "kontext-batch",
        "postgres",
        "redis",
        "chrislusf/seaweedfs",
    }
