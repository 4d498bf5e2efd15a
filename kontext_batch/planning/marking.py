"""What a picture file says of its own making: IPTC's digital source type and an asset id, as an XMP packet.

Nothing else is in it: no prompt, no name, no path. The asset id is the key of the step that made the picture, so that
a file which has left the house can be looked up again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_CODES: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/"
GENERATED: Final = f"{_CODES}trainedAlgorithmicMedia"
"""Made by a model from words alone."""
EDITED: Final = f"{_CODES}compositeWithTrainedAlgorithmicMedia"
"""Made by a model and from a picture that is none of its own."""
COMPOSITE: Final = f"{_CODES}composite"
"""Put together from pictures, without a model."""

_SCHEME: Final = "kontext-batch:"
_ASSET: Final = re.compile(rb"kontext-batch:(b2:[0-9a-f]{40})(?![0-9a-f])")

# Single-line and without the usual padding: a byte limit counts every byte of it, and nobody edits it in place.
_PACKET: Final = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" '
    'xmlns:xmpMM="http://ns.adobe.com/xap/1.0/mm/" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'dc:identifier="{asset}" xmpMM:DocumentID="{asset}"{source_type}/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


@dataclass(frozen=True, slots=True)
class Ancestry:
    """What went into a picture, directly or by way of earlier steps."""

    model: bool = False
    """A model sampled it, or something that it was made of."""
    photo: bool = False
    """A picture that no step made."""


def digital_source_type(ancestry: Ancestry) -> str | None:
    """IPTC's term as a URI; None for what no model took part in: a photo that is only converted stays a photo."""
    if not ancestry.model:
        return None
    return EDITED if ancestry.photo else GENERATED


def asset_id(key: str) -> str:
    """How files, sidecars and manifests name what the step of this key made."""
    return f"{_SCHEME}{key}"


def xmp_packet(key: str, ancestry: Ancestry) -> bytes:
    """XMP of a picture that the step of this key makes; the same bytes whenever it is made."""
    source_type = digital_source_type(ancestry)
    attribute = "" if source_type is None else f' Iptc4xmpExt:DigitalSourceType="{source_type}"'
    return _PACKET.format(asset=asset_id(key), source_type=attribute).encode()


def marked_key(xmp: bytes) -> str | None:
    """The step key in an XMP packet, wherever other programs have moved it to; None when there is none.

    Found by its look, not by parsing: files come from anywhere, and XML from anywhere is not to be trusted.
    """
    found = _ASSET.search(xmp)
    return None if found is None else found[1].decode()
