"""The published schemas that exports are held against; `tests/data/*/README.md` say where they are from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft4Validator, Draft202012Validator, FormatChecker
from referencing import Registry, Resource

DATA = Path(__file__).parents[2] / "data"
OPENLINEAGE = "https://openlineage.io/spec/2-0-2/OpenLineage.json"


def read(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


@cache
def _openlineage() -> Registry[Any]:
    folder = DATA / "openlineage"
    schemas = [json.loads(file.read_text()) for file in (folder / "OpenLineage.json", *(folder / "facets").iterdir())]
    return Registry().with_resources((schema["$id"], Resource.from_contents(schema)) for schema in schemas)


def check_prov(document: Mapping[str, Any]) -> None:
    """Raises `ValidationError`; times are checked too, names are not: the schema calls all of them URIs."""
    checker = FormatChecker(formats=("date-time",))
    Draft4Validator(read("prov/prov-json-schema.json"), format_checker=checker).validate(document)


def check_event(event: Mapping[str, Any]) -> None:
    """The event by the core schema, and each of its facets by the schema that it names. Raises `ValidationError`."""
    _validate(f"{OPENLINEAGE}#/$defs/RunEvent", event)
    assert event["schemaURL"] == f"{OPENLINEAGE}#/$defs/RunEvent"
    datasets = [*event["inputs"], *event["outputs"]]
    holders = [event["run"].get("facets"), event["job"].get("facets")]
    holders += [each.get(kind) for each in datasets for kind in ("facets", "outputFacets")]
    for facets in holders:
        for facet in (facets or {}).values():
            _validate(facet["_schemaURL"], facet)


def _validate(reference: str, value: Any) -> None:
    Draft202012Validator({"$ref": reference}, registry=_openlineage(), format_checker=FormatChecker()).validate(value)
