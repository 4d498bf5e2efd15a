"""What a hold is put on, as one types it."""

from __future__ import annotations

from kontext_batch.errors import ObjectNotFound
from kontext_batch.ports import Repository


def held_subject(
    repository: Repository, sha256: str | None, *, shown: str, kind: str | None = None, uri: str | None = None
) -> str:
    """`photo:<sha256>` or `picture:<sha256>` of what has these bytes, else of what was seen or delivered at `uri`.

    `kind`: which of the two is meant. Raises `ObjectNotFound` for what is neither, or both.
    """
    photos, pictures = set[str](), set[str]()
    if sha256 is not None:
        photos = {sha256} if repository.places(sha256) else set()
        pictures = {sha256} if repository.find_steps(sha256) else set()
    if uri is not None and not photos | pictures:
        photos = set(repository.photos(uri))
        pictures = {row.artifact.sha256 for row in repository.find_steps(uri) if row.artifact is not None}
    found = [f"photo:{each}" for each in sorted(photos) if kind in (None, "photo")]
    found += [f"picture:{each}" for each in sorted(pictures) if kind in (None, "picture")]
    if not found:
        raise ObjectNotFound(f"{shown}: no photo that was read here, and no picture that was made here")
    if len(found) > 1:
        raise ObjectNotFound(f"{shown} may mean more than one thing: name one of {', '.join(found)}")
    return found[0]
