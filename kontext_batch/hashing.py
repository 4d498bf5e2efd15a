"""Canonical JSON and content hashes. The form is a contract: a change of it changes every step key."""

from __future__ import annotations

import hashlib
import json
from typing import Any

ALGORITHM = "b2"  # BLAKE2b, 160 bits; the tag makes a later change detectable instead of splitting the key space
_DIGEST_BYTES = 20


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces; equal values give equal text.

    Raises `ValueError` for NaN and infinities, `TypeError` for what JSON does not know.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_hash(value: Any) -> str:
    """`b2:` and 40 hex digits over the canonical JSON of `value`."""
    digest = hashlib.blake2b(canonical_json(value).encode(), digest_size=_DIGEST_BYTES)
    return f"{ALGORITHM}:{digest.hexdigest()}"


def sha256_hex(data: bytes) -> str:
    """Lower-case hex sha256 of an object's bytes: the name of an artifact and of an input."""
    return hashlib.sha256(data).hexdigest()
