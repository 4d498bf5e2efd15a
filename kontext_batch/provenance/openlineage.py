"""Lineage as OpenLineage run events (2-0-2), one START and one end for each attempt.

Event times are those of the attempts; nothing is sent: whoever keeps a catalogue posts the lines. Run ids are made of
what is stored, so that the same attempt has the same id in every export.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import version
from typing import Any
from urllib.parse import unquote
from uuid import NAMESPACE_URL, uuid5

from kontext_batch.planning.states import RunState
from kontext_batch.ports import AttemptRow, RunSummary
from kontext_batch.ports.tracing import Origin, StepRead, TracedStep

SCHEMA = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
RUN_FACET = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunFacet"
FACETS = "https://openlineage.io/spec/facets"
NAMESPACE = "kontext-batch"
ENDS = {"ok": "COMPLETE", "error": "FAIL", "retry": "FAIL", "lost": "ABORT", "released": "ABORT", "fenced": "ABORT"}
"""Outcome of an attempt -> what its run ended with."""
RUN_ENDS = {RunState.DONE: "COMPLETE", RunState.PARTIAL: "COMPLETE", RunState.FAILED: "FAIL"}
"""Final state of a run; the others: it was aborted."""

Event = dict[str, Any]


def producer() -> str:
    return f"urn:kontext-batch:{version('kontext-batch')}"


def step_events(traced: TracedStep) -> Iterator[Event]:
    """Of each attempt, in order."""
    for attempt in traced.attempts:
        yield _event(traced, attempt, "START", attempt.started)
        if attempt.ended is not None:
            yield _event(traced, attempt, ENDS.get(attempt.outcome or "", "OTHER"), attempt.ended)


def run_events(summary: RunSummary) -> Iterator[Event]:
    """Of the run itself, which the steps name as their parent."""
    job = _job(summary.recipe, summary.owner, "RUN")
    run = {"runId": _run_id(summary.id, summary.created), "facets": {"processing_engine": _engine()}}
    yield _written("START", summary.created, run, job)
    if summary.finished is not None:
        yield _written(RUN_ENDS.get(summary.state, "ABORT"), summary.finished, run, job)


def _event(traced: TracedStep, attempt: AttemptRow, kind: str, moment: datetime) -> Event:
    step, origin = traced.step, traced.origin
    facets: dict[str, Any] = {"processing_engine": _engine(), "kontextBatch_step": _step_facet(traced, attempt)}
    if attempt.started >= origin.created:  # else it was computed for an earlier run
        facets["parent"] = _parent(origin)
    if kind == "FAIL":
        facets["errorMessage"] = {
            **_facet("1-0-1/ErrorMessageRunFacet"),
            "message": attempt.error or step.error or "",
            "programmingLanguage": "PYTHON",
        }
    run = {
        "runId": str(uuid5(NAMESPACE_URL, f"kontext-batch:{step.key}:{attempt.started.isoformat()}")),
        "facets": facets,
    }
    job = _job(f"{origin.recipe}.{step.node}", origin.owner, step.operation.upper())
    inputs = [each for each in map(_input, traced.reads) if each is not None]
    return _written(kind, moment, run, job, inputs, _outputs(traced) if kind == "COMPLETE" else [])


def _written(
    kind: str,
    moment: datetime,
    run: dict[str, Any],
    job: dict[str, Any],
    inputs: list[dict[str, Any]] | None = None,
    outputs: list[dict[str, Any]] | None = None,
) -> Event:
    return {
        "eventType": kind,
        "eventTime": moment.isoformat(),
        "producer": producer(),
        "schemaURL": SCHEMA,
        "run": run,
        "job": job,
        "inputs": inputs or [],
        "outputs": outputs or [],
    }


def _step_facet(traced: TracedStep, attempt: AttemptRow) -> dict[str, Any]:
    step, origin = traced.step, traced.origin
    facet: dict[str, Any] = {
        "_producer": producer(),
        "_schemaURL": RUN_FACET,
        "key": step.key,
        "operation": step.operation,
        "axes": dict(step.axes),
        "candidate": step.candidate,
        "params": dict(step.params),
        "attempt": attempt.number,
        "worker": attempt.worker_id,
        "recipe": {
            "sha256": origin.recipe_sha256,
            "source": origin.source,
            "file": origin.file,
            "line": origin.line,
        },
    }
    for batch in traced.batches:
        if batch.id == attempt.batch_id:
            facet["batch"] = {
                "id": batch.id,
                "device": batch.device,
                "numericMode": batch.numeric_mode,
                "libraries": dict(batch.libraries),
                "joined": batch.joined,
                "left": batch.left,
                "mates": [mate.key for mate in batch.mates],
            }
    return facet


def _parent(origin: Origin) -> dict[str, Any]:
    return {
        **_facet("1-2-0/ParentRunFacet"),
        "run": {"runId": _run_id(origin.run_id, origin.created)},
        "job": {"namespace": NAMESPACE, "name": origin.recipe},
    }


def _job(name: str, owner: str, kind: str) -> dict[str, Any]:
    return {
        "namespace": NAMESPACE,
        "name": name,
        "facets": {
            "jobType": {
                **_facet("2-0-4/JobTypeJobFacet"),
                "processingType": "BATCH",
                "integration": "KONTEXT_BATCH",
                "jobType": kind,
            },
            "ownership": {**_facet("1-0-1/OwnershipJobFacet"), "owners": [{"name": owner, "type": "OWNER"}]},
        },
    }


def _engine() -> dict[str, Any]:
    return {
        **_facet("1-1-1/ProcessingEngineRunFacet"),
        "version": version("kontext-batch"),
        "name": "kontext-batch",
    }


def _input(read: StepRead) -> dict[str, Any] | None:
    return None if read.uri is None else _dataset(read.uri, read.sha256)


def _outputs(traced: TracedStep) -> list[dict[str, Any]]:
    """The picture, and the files that were delivered of it."""
    made = traced.step.artifact
    if made is None:
        return []
    statistics = {**_facet("1-0-2/OutputStatisticsOutputDatasetFacet"), "size": made.bytes, "fileCount": 1}
    files = {
        each.delivered_path: each.file_sha256 or each.sha256
        for each in traced.deliveries
        if each.state == "delivered" and each.delivered_path is not None
    }
    picture = {**_dataset(made.uri, made.sha256), "outputFacets": {"outputStatistics": statistics}}
    return [picture, *(_dataset(uri, sha256) for uri, sha256 in files.items())]


def _dataset(uri: str, sha256: str | None) -> dict[str, Any]:
    """Named as OpenLineage names files: a bucket and its key, `file` and a path."""
    scheme, _, rest = uri.partition("://")
    if scheme == "file":
        namespace, name = "file", unquote(rest)
    else:
        bucket, _, name = rest.partition("/")
        namespace = f"{scheme}://{bucket}"
    found: dict[str, Any] = {"namespace": namespace, "name": name}
    if sha256 is not None:
        found["facets"] = {
            "version": {**_facet("1-0-1/DatasetVersionDatasetFacet"), "datasetVersion": f"sha256:{sha256}"}
        }
    return found


def _facet(name: str) -> dict[str, str]:
    number, _, facet = name.partition("/")
    return {"_producer": producer(), "_schemaURL": f"{FACETS}/{number}/{facet}.json#/$defs/{facet}"}


def _run_id(run_id: int, created: datetime) -> str:
    return str(uuid5(NAMESPACE_URL, f"kontext-batch:run:{run_id}:{created.isoformat()}"))
