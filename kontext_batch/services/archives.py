"""One run as one file, and back: recipe, photos, pictures and every row that explains them.

    recipe.yaml                       as it ran
    lineage/<section>.jsonl           rows, one a line
    inputs/<sha256>.<ext>             photos that it read
    objects/<sha256>.<ext>            pictures and latents
    manifest.json                     name, size and sha256 of every other member; last, for it comes of writing them

A plain tar: pictures do not get smaller, and what cannot be compressed cannot explode. Equal runs make equal archives.
Nobody trusts one: before anything is written every member is hashed, every key is worked out anew from what it says
that the step was, and every name is made here. In memory there is one picture at a time, and a few numbers a row.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, BinaryIO, TypeGuard
from urllib.parse import unquote

from kontext_batch.errors import BadArchive, KontextBatchError, NotAllowed, ObjectChanged, ObjectNotFound, StepError
from kontext_batch.hashing import canonical_json, sha256_hex
from kontext_batch.planning import uris
from kontext_batch.planning.params import VERSIONS, step_key
from kontext_batch.planning.plan import ImageInfo, StepInput
from kontext_batch.planning.states import OPEN_RUNS, RunState, StepState
from kontext_batch.ports import SECTIONS, Act, Imported, ObjectStore, Repository, Row

FORMAT, VERSION = "kontext-batch run", 1
MANIFEST, RECIPE = "manifest.json", "recipe.yaml"
ROLES = ("image", "reference", "logo", "cell")
"""In the order in which a step's key has them."""
CHUNK = 1 << 20
LONGEST_LINE = 16 << 20
LARGEST_MANIFEST = 1 << 30
_NAME = re.compile(r"(?:inputs|objects)/[0-9a-f]{64}\.[a-z0-9]{1,5}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNSTORABLE = re.compile(rb"(?<!\\)(?:\\\\)*\\u(0000|[dD][89a-fA-F])")
DELIVERY_STATES = frozenset({"waiting", "pending", "delivered", "skipped", "failed"})
OUTCOMES = frozenset({"ok", "error", "retry", "released", "lost", "fenced"})
_LINEAGE = {f"lineage/{section}.jsonl" for section in SECTIONS}

ArtifactUri = Callable[[str, str], str]


# ---------------------------------------------------------------------------------------------------------- export


@dataclass(slots=True)
class Exported:
    """What an archive holds."""

    run_id: int
    steps: int = 0
    pictures: int = 0
    """Members of `objects/`."""
    inputs: int = 0
    left_out: list[dict[str, str]] = field(default_factory=list)
    """`sha256`, `uri` and `reason` of what should be in it and is not there, or not what it was."""


def export_run(
    repository: Repository,
    store: ObjectStore,
    run_id: int,
    file: BinaryIO,
    *,
    intermediates: bool,
    max_input_bytes: int,
    uri_of: ArtifactUri,
) -> Exported:
    """Write the run to `file`. Without `intermediates` only what it delivers comes with bytes, the rest as rows.

    Raises `ObjectNotFound`, and `SettingsError` for a run that has not ended.
    """
    told = Exported(run_id)
    [header] = repository.archived(run_id, "run")
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        writing = _Writer(tar)
        writing.add(RECIPE, header["recipe_text"].encode())
        sources: dict[str, set[str]] = {}
        for section in SECTIONS:
            with tempfile.TemporaryFile() as lines:
                for row in repository.archived(run_id, section):
                    lines.write(canonical_json(row).encode() + b"\n")
                    if section == "steps":
                        told.steps += 1
                        for each in row["sources"]:
                            sources.setdefault(each["sha256"], set()).add(each["uri"])
                writing.add_file(f"lineage/{section}.jsonl", lines)
        gone = repository.forgotten(sources)
        inputs = _add_inputs(store, sources, gone, writing, told, max_input_bytes)
        wanted = [row for row in repository.archived(run_id, "artifacts") if row["output"] or intermediates]
        gone = repository.forgotten(row["sha256"] for row in wanted)
        for row in wanted:
            kept = row["kept"] and row["sha256"] not in gone
            told.pictures += _add_picture(store, {**row, "kept": kept}, writing, told, uri_of)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "run": header["origin"]["run"],
            "recipe": header["recipe"],
            "inputs": inputs,
            "left_out": told.left_out,
            "members": writing.members,
        }
        writing.add(MANIFEST, json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False).encode())
    return told


def _add_inputs(
    store: ObjectStore,
    sources: Mapping[str, set[str]],
    gone: Container[str],
    writing: _Writer,
    told: Exported,
    max_bytes: int,
) -> list[dict[str, Any]]:
    found = []
    for sha256, places in sorted(sources.items()):
        member, reason = None, "was taken down"
        for uri in [] if sha256 in gone else sorted(places):
            data, reason = _read(store, uri, sha256, max_bytes)
            if data is not None:
                ending = re.fullmatch(r".*\.([A-Za-z0-9]{1,5})", uri)
                member = f"inputs/{sha256}.{ending[1].lower() if ending else 'bin'}"
                writing.add(member, data)
                told.inputs += 1
                break
        if member is None:
            told.left_out.append({"sha256": sha256, "uri": sorted(places)[0], "reason": reason})
        found.append({"sha256": sha256, "uris": sorted(places), "member": member})
    return found


def _add_picture(store: ObjectStore, row: Row, writing: _Writer, told: Exported, uri_of: ArtifactUri) -> bool:
    data, reason = (None, "was removed") if not row["kept"] else _read(store, row["uri"], row["sha256"], None)
    if data is None:
        told.left_out.append({"sha256": row["sha256"], "uri": row["uri"], "reason": reason})
        return False
    ending = uri_of(row["sha256"], row["media_type"]).rpartition(".")[2]
    writing.add(f"objects/{row['sha256']}.{ending}", data)
    return True


def _read(store: ObjectStore, uri: str, sha256: str, max_bytes: int | None) -> tuple[bytes | None, str]:
    """The bytes, or why there are none."""
    try:
        data = store.read(uri, max_bytes=max_bytes)
    except (ObjectNotFound, ObjectChanged, NotAllowed, StepError) as error:
        return None, str(error)
    return (data, "") if sha256_hex(data) == sha256 else (None, f"{uri} has other bytes by now")


@dataclass(slots=True)
class _Writer:
    """Adds members that say nothing of who wrote them and when."""

    tar: tarfile.TarFile
    members: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, data: bytes) -> None:
        with tempfile.SpooledTemporaryFile(max_size=CHUNK) as file:
            file.write(data)
            self.add_file(name, file)

    def add_file(self, name: str, file: IO[bytes]) -> None:
        file.seek(0)
        digest, size = _hashed(file)
        file.seek(0)
        info = tarfile.TarInfo(name)
        info.size = size
        self.tar.addfile(info, file)
        self.members.append({"name": name, "bytes": size, "sha256": digest})


def _hashed(file: IO[bytes]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


# ---------------------------------------------------------------------------------------------------------- import


class Archive:
    """An archive whose every byte is what its manifest says, and whose every step is what its key says."""

    def __init__(self, file: BinaryIO) -> None:
        """Reads all of it. Raises `BadArchive` with the first thing that is wrong."""
        try:
            file.seek(0, 2)
            self._bytes = file.tell()
            file.seek(0)
            self._tar = tarfile.open(fileobj=file, mode="r:", errorlevel=2)  # noqa: SIM115 - as long as this lives
            self._members = dict(self._sound_members())
        except (tarfile.TarError, OSError, ValueError, EOFError, RecursionError) as error:
            raise BadArchive(f"this is no archive of a run, or one that is damaged ({error})") from error
        self.manifest = self._checked_manifest()
        self._check_members()
        self._check_rows()

    def rows(self, section: str) -> Iterator[Row]:
        """Rows of a section, one after the other."""
        file = self._open(f"lineage/{section}.jsonl")
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            if _UNSTORABLE.search(line):
                raise BadArchive(f"lineage/{section}.jsonl:{number}: NUL, or half a character")
            try:
                row = json.loads(line, parse_constant=_no_number)
            except (ValueError, RecursionError) as error:
                raise BadArchive(f"lineage/{section}.jsonl:{number}: no JSON ({error})") from error
            if not isinstance(row, dict):
                raise BadArchive(f"lineage/{section}.jsonl:{number}: no object")
            yield row

    def pictures(self) -> Mapping[str, str]:
        """sha256 -> member, of the pictures and latents that are in it."""
        return {name[8:72]: name for name in self._members if name.startswith("objects/")}

    def inputs(self) -> Mapping[str, str]:
        """Likewise of the photos."""
        return {name[7:71]: name for name in self._members if name.startswith("inputs/")}

    def read(self, member: str) -> bytes:
        """Bytes of a member; checked anew, for the file may have been changed since."""
        data = self._open(member).read()
        if sha256_hex(data) != self._digests[member]:
            raise BadArchive(f"{member}: changed while it was imported")
        return data

    def _open(self, member: str) -> IO[bytes]:
        file = self._tar.extractfile(self._members[member])
        assert file is not None, "a regular file"
        return file

    def _sound_members(self) -> Iterator[tuple[str, tarfile.TarInfo]]:
        seen = set()
        for member in self._tar:
            name = member.name
            if name not in _LINEAGE | {MANIFEST, RECIPE} and not _NAME.fullmatch(name):
                raise BadArchive(f"{name[:200]!r}: no name that an archive of a run has")
            if not member.isreg() or member.issparse():
                raise BadArchive(f"{name}: no plain file")
            if name in seen:
                raise BadArchive(f"{name}: is there twice")
            if member.offset_data + member.size > self._bytes:
                raise BadArchive(f"{name}: cut off; the archive is not whole")
            seen.add(name)
            yield name, member

    def _checked_manifest(self) -> dict[str, Any]:
        member = self._members.get(MANIFEST)
        if member is None:
            raise BadArchive(f"{MANIFEST} is missing: this is no archive of a run, or it was cut off")
        if member.size > LARGEST_MANIFEST:
            raise BadArchive(f"{MANIFEST}: {member.size} bytes are too many")
        try:
            found = json.loads(self._open(MANIFEST).read())
        except (ValueError, RecursionError) as error:
            raise BadArchive(f"{MANIFEST}: no JSON ({error})") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise BadArchive(f"{MANIFEST}: this is no archive of a run of kontext-batch")
        if not _are_inputs(found.get("inputs")):
            raise BadArchive(f"{MANIFEST}: `inputs` does not say which photos lay where")
        version = found.get("version")
        if not isinstance(version, int) or version < 1:
            raise BadArchive(f"{MANIFEST}: has no version")
        if version > VERSION:
            raise BadArchive(
                f"the archive has version {version} of the format, this kontext-batch knows {VERSION}: upgrade it"
            )
        return found

    def _check_members(self) -> None:
        listed = self.manifest.get("members")
        if not isinstance(listed, list) or not all(_is_entry(each) for each in listed):
            raise BadArchive(f"{MANIFEST}: `members` is no list of names, sizes and hashes")
        self._digests = {each["name"]: each["sha256"] for each in listed}
        named = self._digests.keys() | {MANIFEST}
        for name in sorted((named | _LINEAGE | {RECIPE}) - self._members.keys()):
            raise BadArchive(f"{name}: is missing")
        for name in sorted(self._members.keys() - named):
            raise BadArchive(f"{name}: the manifest does not know of it")
        for name, digest in self._digests.items():
            if _hashed(self._open(name))[0] != digest:
                raise BadArchive(f"{name}: its sha256 is not what the manifest says")
            if _NAME.fullmatch(name) and digest != name.partition("/")[2][:64]:
                raise BadArchive(f"{name}: its name is not its sha256")

    def _check_rows(self) -> None:
        """What else would be believed: that a step made this of that."""
        headers = list(self.rows("run"))
        try:
            if len(headers) != 1:
                raise BadArchive("lineage/run.jsonl: one run is expected")
            _check_run(headers[0])
            artifacts = {str(row["sha256"]) for row in self.rows("artifacts")}
            if not all(_SHA256.fullmatch(each) for each in artifacts):
                raise BadArchive("lineage/artifacts.jsonl: a sha256 is none")
            keys: dict[int, str] = {}
            for row in self.rows("steps"):
                _check_step(row, keys, artifacts)
                keys[row["id"]] = row["key"]
            for section in ("instances", "deliveries"):
                for row in self.rows(section):
                    if row["step"] not in keys:
                        raise BadArchive(f"lineage/{section}.jsonl: step {row['step']} is not in the archive")
                    if section == "deliveries":
                        _check_delivery(row)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            if isinstance(error, BadArchive):
                raise
            raise BadArchive(f"lineage: a row is not as rows are ({type(error).__name__}: {error})") from error


def _is_entry(each: Any) -> TypeGuard[dict[str, Any]]:
    return (
        isinstance(each, dict)
        and isinstance(each.get("name"), str)
        and isinstance(each.get("sha256"), str)
        and each["name"] != MANIFEST
    )


def _are_inputs(listed: Any) -> bool:
    return isinstance(listed, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("sha256"), str)
        and isinstance(each.get("uris"), list)
        and all(isinstance(uri, str) for uri in each["uris"])
        for each in listed
    )


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _check_run(row: Row) -> None:
    """A run that is open here is computed and delivered: one that came from elsewhere has ended."""
    if RunState(row["state"]) in OPEN_RUNS:
        raise BadArchive(f"lineage/run.jsonl: the run is {row['state']}; only one that has ended is exported")
    if not (
        isinstance(row["source"], str)
        and isinstance(row["origin"]["run"], int)
        and isinstance(row["origin"]["identity"], str)
    ):
        raise BadArchive("lineage/run.jsonl: it does not say where the run came from")


def _check_delivery(row: Row) -> None:
    places = [row["path"], row["delivered_path"] or "", row["sha256"] or "", row["file_sha256"] or ""]
    if row["state"] not in DELIVERY_STATES or not all(isinstance(each, str) for each in places):
        raise BadArchive(f"lineage/deliveries.jsonl: step {row['step']}: it does not say what was delivered where")


def _check_step(row: Row, keys: Mapping[int, str], artifacts: set[str]) -> None:
    name = f"lineage/steps.jsonl: step {row['id']}"
    if not isinstance(row["id"], int) or row["id"] in keys:
        raise BadArchive(f"{name} is there twice")
    missing = [each["id"] for each in row["parents"] if each["id"] not in keys]
    if missing:
        raise BadArchive(f"{name} reads step {missing[0]}, which does not come before it")
    StepState(row["state"])
    if any(each["outcome"] not in OUTCOMES for each in row["tries"]):
        raise BadArchive(f"{name}: an attempt has no outcome that there is")
    if row["operation"] not in VERSIONS:
        raise BadArchive(f"{name}: no operation '{row['operation']}' is known; a newer kontext-batch may know it")
    inputs = [
        StepInput(each["role"], each["position"], ImageInfo(each["uri"], "", each["sha256"], 0, 0, 0, ""), None)
        for each in row["sources"]
    ]
    inputs += [StepInput(each["role"], each["position"], None, keys[each["id"]]) for each in row["parents"]]
    inputs.sort(key=lambda each: (ROLES.index(each.role), each.position))
    if step_key(row["operation"], row["params"], inputs) != row["key"]:
        raise BadArchive(
            f"{name}: its key is not that of what it says it was: it was changed, or made by another version"
        )
    unknown = set(row["outputs"].values()) - artifacts
    if unknown:
        raise BadArchive(f"{name}: its picture {min(unknown)} is not in lineage/artifacts.jsonl")


@dataclass(frozen=True, slots=True)
class Restored:
    """What an import did."""

    imported: Imported
    pictures: int
    """Whose bytes were put, and were not here."""
    files: int = 0
    """Written where the archive was unpacked to."""
    kept: tuple[str, ...] = ()
    """URIs where something else lies, which stays."""

    @property
    def changed(self) -> bool:
        """Whether anything was not here before."""
        return not self.imported.known or bool(self.imported.new_steps or self.pictures or self.files)


def import_run(
    repository: Repository, store: ObjectStore, archive: Archive, uri_of: ArtifactUri, *, by: Act
) -> Restored:
    """Restore the run. Killed in between, or done twice, it goes on, and at last changes nothing."""
    try:
        imported = repository.import_run(archive.rows, uri_of, by=by)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, KontextBatchError):
            raise
        raise BadArchive(f"a row is not as rows are ({type(error).__name__}: {error}); nothing was imported") from error
    types = {row["sha256"]: row["media_type"] for row in archive.rows("artifacts")}
    pictures = {sha256: name for sha256, name in archive.pictures().items() if sha256 in types}
    count = 0
    for sha256, uri in sorted(repository.missing_artifacts(iter(sorted(pictures))).items()):
        data = archive.read(pictures[sha256])
        repository.announce_artifact(sha256)
        store.write_if_absent(uri, data, media_type=types[sha256])

        def put(place: str, data: bytes = data, media_type: str = types[sha256]) -> None:
            """A collection may have taken it for the orphan that it was until now."""
            try:
                store.head(place)
            except ObjectNotFound:
                store.write_if_absent(place, data, media_type=media_type)

        count += repository.restore_artifact(sha256, put)
    return Restored(imported, count)


def unpack(archive: Archive, store: ObjectStore, folder: str, *, without: Iterable[str] = ()) -> tuple[int, list[str]]:
    """Write recipe, photos and delivered pictures below `folder`, as they lay around the recipe; never over anything.

    `folder`: a URI that ends in `/`. `without`: sha256 of what is not to be written. Returns how many files are new,
    and where something else lies.
    """
    [header] = archive.rows("run")
    base = header["source"].rpartition("/")[0] + "/"
    name = _relative(header["source"], base) if header["source"].endswith((".yaml", ".yml")) else RECIPE
    wanted: list[tuple[str, str]] = [(name or RECIPE, RECIPE)]
    inputs, pictures = archive.inputs(), archive.pictures()
    banned = set(without)
    for row in archive.manifest.get("inputs", ()):
        member = inputs.get(row["sha256"])
        if member is not None and row["sha256"] not in banned:
            for uri in row["uris"]:
                wanted.append((_relative(uri, base) or member, member))
    for row in archive.rows("deliveries"):
        member = pictures.get(row["sha256"] or "")
        if row["state"] == "delivered" and member is not None and row["sha256"] not in banned:
            wanted.append((_relative(row["delivered_path"], base) or f"outputs/{member[8:]}", member))
    new, other = 0, []
    for place, member in dict(wanted).items():
        data = archive.read(member)
        uri = uris.literal(uris.expand([(place, True)], folder, pattern=False))
        if store.write_if_absent(uri, data, media_type="application/octet-stream"):
            new += 1
        elif store.read(uri) != data:
            other.append(uri)
    return new, other


def _relative(uri: str, base: str) -> str | None:
    """Its path below the folder `base`; None for what lies elsewhere, or has a name that no file should have."""
    if not uri.startswith(base) or uri == base:
        return None
    rest = uri.removeprefix(base)
    path = unquote(rest) if base.startswith("file:") else rest
    segments = path.split("/")
    if not path.isprintable() or "\\" in path or any(each in ("", ".", "..") for each in segments):
        return None
    return path
