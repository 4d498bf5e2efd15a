"""Reading artifacts back: an object that is gone or damaged is told to the database, so that it is made again."""

from __future__ import annotations

from kontext_batch.errors import ObjectNotFound, StepError
from kontext_batch.hashing import sha256_hex
from kontext_batch.ports import Artifact, ObjectStore, Repository


def read_artifact(repository: Repository, store: ObjectStore, artifact: Artifact) -> bytes:
    """Bytes of an artifact, checked against its name. Raises `StepError` when they are not there any more."""
    try:
        data = store.read(artifact.uri)
    except ObjectNotFound:
        fault = "is gone"
    else:
        if sha256_hex(data) == artifact.sha256:
            return data
        fault = "is damaged (its sha256 differs)"
    repository.lost_artifact(artifact.sha256, store.delete)
    raise StepError(f"{artifact.uri}: the stored image {fault}; the same command makes it again")
