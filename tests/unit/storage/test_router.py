from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kontext_batch.errors import NotAllowed
from kontext_batch.storage.router import StoreRouter, open_store
from kontext_batch.storage.uris import file_uri


def test_another_scheme_is_refused_by_name(tmp_path: Path) -> None:
    store = open_store([file_uri(tmp_path)], ["s3://studio/out"])

    for uri, named in [
        ("https://evil.example/a.png", "'https:'"),
        ("ftp://x/a.png", "'ftp:'"),
        ("data:image/png;base64,AAAA", "'data:'"),
        ("/etc/passwd", "a path without a scheme"),
        ("a.png", "a path without a scheme"),
    ]:
        with pytest.raises(NotAllowed) as told:
            store.read(uri)
        assert named in str(told.value)
        assert "allowed: file:, s3:" in str(told.value)


def test_a_scheme_that_no_prefix_names_is_not_allowed(tmp_path: Path) -> None:
    store = open_store([], [file_uri(tmp_path)])

    store.write(file_uri(tmp_path / "a.png"), b"x", media_type="image/png")

    assert store.read(file_uri(tmp_path / "a.png")) == b"x"
    with pytest.raises(NotAllowed, match=r"'s3:' is not allowed here \(allowed: file:\)"):
        store.read("s3://studio/a.png")
    with pytest.raises(NotAllowed, match="allowed: none"):
        StoreRouter({}).read("s3://studio/a.png")


@pytest.mark.parametrize("prefix", ["https://x/", "/plain/path", "relative"])
def test_a_prefix_of_another_form_is_refused(prefix: str) -> None:
    with pytest.raises(NotAllowed, match="a prefix is a file: or an s3: URI"):
        open_store([prefix], [])


def test_a_folder_alone_does_not_import_boto3(tmp_path: Path) -> None:
    script = (
        "import sys; from kontext_batch.storage.router import open_store\n"
        f"open_store([], [{file_uri(tmp_path)!r}]); assert 'boto3' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
