"""What a picture says of its own making."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from kontext_batch.planning.marking import (
    EDITED,
    GENERATED,
    Ancestry,
    digital_source_type,
    marked_key,
    xmp_packet,
)
from kontext_batch.planning.sidecars import is_sidecar, sidecar_path

KEY = "b2:" + "0123456789" * 4


@pytest.mark.parametrize(
    ("model", "photo", "expected"),
    [(True, True, EDITED), (True, False, GENERATED), (False, True, None), (False, False, None)],
)
def test_only_what_a_model_took_part_in_is_marked_as_made_by_one(model: bool, photo: bool, expected: str) -> None:
    assert digital_source_type(Ancestry(model, photo)) == expected
    assert (b"DigitalSourceType" in xmp_packet(KEY, Ancestry(model, photo))) is (expected is not None)


def test_a_packet_is_xmp_with_the_terms_where_readers_look_for_them() -> None:
    packet = xmp_packet(KEY, Ancestry(model=True, photo=True))
    assert packet.startswith(b'<?xpacket begin="\xef\xbb\xbf"')
    root = ElementTree.fromstring(packet)
    (description,) = root.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    assert description.attrib == {
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}about": "",
        "{http://purl.org/dc/elements/1.1/}identifier": f"kontext-batch:{KEY}",
        "{http://ns.adobe.com/xap/1.0/mm/}DocumentID": f"kontext-batch:{KEY}",
        "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType": EDITED,
    }


@pytest.mark.parametrize(
    ("xmp", "expected"),
    [
        (xmp_packet(KEY, Ancestry()), KEY),
        (f"<stRef:documentID>kontext-batch:{KEY}</stRef:documentID>".encode(), KEY),  # as an editor moves it
        (b"", None),
        (b"kontext-batch:b2:0123", None),
        (f"kontext-batch:{KEY}0".encode(), None),
        (b"\xff\xfe not text", None),
    ],
)
def test_the_key_is_found_wherever_it_stands(xmp: bytes, expected: str | None) -> None:
    assert marked_key(xmp) == expected


def test_the_sidecar_of_a_jpeg_and_of_a_png_are_two() -> None:
    assert sidecar_path("s3://out/a.jpg") == "s3://out/a.jpg.lineage.json"
    assert sidecar_path("s3://out/a.jpg") != sidecar_path("s3://out/a.png")
    assert is_sidecar(sidecar_path("s3://out/a.jpg"))
    assert not is_sidecar("s3://out/lineage.json")
