"""Lineage as a drawing for Graphviz: `... --dot | dot -Tsvg`."""

from __future__ import annotations

from collections.abc import Iterator

from kontext_batch.planning.render import axes_text
from kontext_batch.ports.tracing import StepDelivery
from kontext_batch.services.lineage import Impact, Lineage

LONGEST = 60
"""Characters of a prompt or place in a drawing."""


def lineage_dot(lineage: Lineage) -> str:
    """Photos, steps and delivered files; arrows go from what is read to what is made."""
    lines = list(_photos(lineage))
    for each in lineage.steps:
        step = each.step
        label = [
            f"{step.id} {step.node}",
            axes_text(step.axes),
            step.operation,
            _short(step.params.get("prompt") or ""),
        ]
        lines.append(_node(f"s{step.id}", label, "box"))
        for read in each.reads:
            start = f"s{read.step_id}" if read.step_id is not None else _photo(read.uri, read.sha256)
            lines.append(f"  {_quoted(start)} -> {_quoted(f's{step.id}')} [label={_quoted(read.role)}];")
        lines += _deliveries(each.deliveries)
    return _graph(lines)


def impact_dot(impact: Impact) -> str:
    """What is asked about, the steps that are told, and their delivered files."""
    told = {each.id for each in impact.steps}
    lines = [_node("subject", [_short(impact.subject.name)], "note")]
    for each in impact.steps:
        lines.append(_node(f"s{each.id}", [f"{each.id} {each.node}", axes_text(each.axes), each.operation], "box"))
        parents = [f"s{parent}" for parent in each.parents if parent in told]
        lines += [f"  {_quoted(parent)} -> {_quoted(f's{each.id}')};" for parent in parents or ["subject"]]
        lines += _deliveries(each.deliveries)
    return _graph(lines)


def _photos(lineage: Lineage) -> Iterator[str]:
    for read in lineage.photos:
        yield _node(_photo(read.uri, read.sha256), [_end(read.uri or ""), (read.sha256 or "")[:12]], "note")


def _photo(uri: str | None, sha256: str | None) -> str:
    return f"photo {uri} {sha256}"


def _deliveries(deliveries: tuple[StepDelivery, ...]) -> Iterator[str]:
    for each in deliveries:
        place = each.delivered_path or each.path
        node = f"file {each.run_id} {each.path}"
        yield _node(node, [_end(place), f"run {each.run_id}, {each.state}"], "folder")
        yield f"  {_quoted(f's{each.step_id}')} -> {_quoted(node)};"


def _node(name: str, label: list[str], shape: str) -> str:
    return f"  {_quoted(name)} [shape={shape}, label={_quoted(chr(10).join(filter(None, label)))}];"


def _graph(lines: list[str]) -> str:
    return "\n".join(["digraph lineage {", '  rankdir=LR; node [fontname="sans-serif"];', *lines, "}"])


def _quoted(text: str) -> str:
    """A double-quoted string; a backslash would begin an escape of Graphviz."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\r", "").replace("\n", "\\n")
    return f'"{escaped}"'


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _end(text: str) -> str:
    """The end of a place says more than its beginning."""
    return text if len(text) <= LONGEST else f"...{text[3 - LONGEST :]}"
