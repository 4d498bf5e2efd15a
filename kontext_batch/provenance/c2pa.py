"""`ports.Signer` by c2pa-python: a C2PA manifest in the file, which tells that and by what it was made with AI.

There is no thumbnail in it, neither of the picture nor of what it was made from: that would double the file and show a
photo that is not published. What it was made from is named, and not read: the manifest of a signed photo is not carried
on, for it may hold such a thumbnail.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from kontext_batch.errors import InfrastructureError, SettingsError, StepError
from kontext_batch.observability.masking import hide
from kontext_batch.planning.marking import COMPOSITE
from kontext_batch.ports import Claim

if TYPE_CHECKING:
    import c2pa
    from cryptography import x509

Algorithm = Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"]
ASSERTION: Final = "org.kontext-batch.asset"
MAX_BYTES: Final = 1_000_000
"""Of a certificate or key file."""
_SERVER: Final = re.compile("http|time.?stamp", re.IGNORECASE)
"""In what is said of a server that gives no time stamp; c2pa-python has no error of its own for it."""
_PARENT: Final = "parent"
_OFFLINE: Final = {"remote_manifest_fetch": False, "ocsp_fetch": False}
"""Nothing in a file makes this process ask the network."""
# Whose signature it is may be judged otherwise today than when it was given; what was signed may not.
_OF_THE_SIGNER: Final = ("signingCredential.", "claimSignature.outsideValidity", "timeStamp.")


@dataclass(frozen=True, slots=True)
class Credentials:
    """A certificate chain with the key of its first certificate, read and checked."""

    chain: bytes
    key: bytes = field(repr=False)
    algorithm: Algorithm
    """That is usual for the key."""
    subject: str
    """Of the certificate that signs."""
    expires: datetime
    """The first of the chain to end."""

    @staticmethod
    def read(certificates: Path, private_key: Path) -> Credentials:
        """Raises `SettingsError` that names the file and what is wrong with it."""
        _needs_extra()
        from cryptography import x509

        chain, key = _content(certificates, "c2pa_certificates"), _content(private_key, "c2pa_private_key")
        hide(*(line for line in key.decode("ascii", "ignore").split() if not line.startswith("-----")))
        try:
            found = x509.load_pem_x509_certificates(chain)
        except ValueError as error:
            raise SettingsError(f"c2pa_certificates: {certificates} holds no certificates in PEM form") from error
        for below, above in itertools.pairwise(found):
            if not _issued(below, above):
                raise SettingsError(
                    f"c2pa_certificates: in {certificates} '{_name(below)}' is not signed by '{_name(above)}', which "
                    "follows it; begin with the certificate that signs, each followed by its issuer"
                )
        leaf = found[0]
        if leaf.issuer == leaf.subject:
            raise SettingsError(
                f"c2pa_certificates: '{_name(leaf)}' in {certificates} is signed by itself, which C2PA does not take; "
                "have a certificate issued by a root, and give both, that of the signer first"
            )
        secret = _private(key, private_key)
        if _public(secret.public_key()) != _public(leaf.public_key()):
            raise SettingsError(
                f"c2pa_private_key: {private_key} is not the key of '{_name(leaf)}', the first in {certificates}"
            )
        expires = min(each.not_valid_after_utc for each in found)
        return Credentials(chain, key, _usual(secret, private_key), _name(leaf), expires)


def _needs_extra() -> None:
    if any(importlib.util.find_spec(name) is None for name in ("c2pa", "cryptography")):
        raise SettingsError(
            "c2pa_certificates is set, and c2pa-python is not installed: install kontext-batch[c2pa], or leave the "
            "setting out"
        )


def _content(path: Path, setting: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES)
    except OSError as error:
        raise SettingsError(f"{setting}: {path} cannot be read ({error.strerror})") from error


def _private(key: bytes, path: Path) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(key, password=None)
    except TypeError as error:
        raise SettingsError(
            f"c2pa_private_key: {path} is encrypted; it has to be plain, and readable to nobody else"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:  # its text may quote the key
        raise SettingsError(f"c2pa_private_key: {path} holds no private key in PEM form") from error


def _usual(key: Any, path: Path) -> Algorithm:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

    curves: dict[str, Algorithm] = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
    if isinstance(key, EllipticCurvePrivateKey) and key.curve.name in curves:
        return curves[key.curve.name]
    if isinstance(key, Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, RSAPrivateKey):
        return "ps256"
    raise SettingsError(f"c2pa_private_key: C2PA has no algorithm for the key in {path}; take EC, Ed25519 or RSA")


def _public(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    form: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return form


def _issued(below: x509.Certificate, above: x509.Certificate) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        below.verify_directly_issued_by(above)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _name(certificate: x509.Certificate) -> str:
    from cryptography.x509.oid import NameOID

    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else certificate.subject.rfc4514_string()


@dataclass(slots=True)
class C2paSigner:
    """`ports.Signer`. Belongs to one process."""

    credentials: Credentials
    algorithm: Algorithm | None = None
    """None: the usual one of the key."""
    timestamp_url: str | None = None
    """Of an RFC 3161 server, asked with each signature."""
    _signer: c2pa.Signer = field(init=False, repr=False)
    _context: c2pa.Context = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises `SettingsError` for credentials that do not sign: an expired one, a key of another algorithm."""
        import c2pa

        self._check_date()
        algorithm = self.algorithm or self.credentials.algorithm
        try:
            self._signer = c2pa.Signer.from_info(
                c2pa.C2paSignerInfo(algorithm, self.credentials.chain, self.credentials.key, self.timestamp_url)
            )
        except c2pa.C2paError as error:
            raise SettingsError(
                f"c2pa_certificates: '{self.credentials.subject}' does not sign by {algorithm} ({error})"
            ) from error
        self._context = c2pa.Context.from_dict(
            {
                "verify": {"verify_trust": False, **_OFFLINE},
                "builder": {"thumbnail": {"enabled": False}},
            }
        )

    def _check_date(self) -> None:
        expires = self.credentials.expires
        if expires <= datetime.now(UTC):
            raise SettingsError(
                f"c2pa_certificates: a certificate of '{self.credentials.subject}' has expired on {expires:%Y-%m-%d}"
            )

    def sign(self, data: bytes, media_type: str, claim: Claim) -> bytes:
        import c2pa

        self._check_date()  # a worker may live longer
        signed = BytesIO()
        try:
            with c2pa.Builder(manifest(claim, media_type), context=self._context) as builder:
                builder.sign(self._signer, media_type, BytesIO(data), signed)
        except c2pa.C2paError as error:
            if self.timestamp_url is not None and _SERVER.search(str(error)):
                raise InfrastructureError(f"no time stamp can be had from c2pa_timestamp_url: {error}") from error
            raise StepError(f"the picture cannot be signed: {error}") from error
        return signed.getvalue()

    def signed_from(self, data: bytes, media_type: str) -> str | None:
        import c2pa

        try:
            with c2pa.Reader(media_type, BytesIO(data), context=self._context) as reader:
                results = (reader.get_validation_results() or {}).get("activeManifest") or {}
                active = reader.get_active_manifest() or {}
        except c2pa.C2paError:  # no manifest, or one that is damaged
            return None
        failures = [str(each["code"]) for each in results.get("failure", ())]
        bound = any(str(each["code"]).endswith("Hash.match") for each in results.get("success", ()))
        if not bound or any(not code.startswith(_OF_THE_SIGNER) for code in failures):
            return None
        for each in active.get("assertions", ()):
            said = each.get("data")
            if each.get("label") == ASSERTION and isinstance(said, dict):  # anybody may write such a thing
                return str(said.get("sha256"))
        return None

    def try_out(self) -> None:
        """Sign a small picture, and read it back. Raises what `sign` raises."""
        from PIL import Image

        picture = BytesIO()
        Image.new("RGB", (8, 8), "grey").save(picture, "PNG")
        claim = Claim("kontext-batch:doctor", "0" * 64, None, None)
        signed = self.sign(picture.getvalue(), "image/png", claim)
        if self.signed_from(signed, "image/png") != claim.sha256:
            raise SettingsError(f"what '{self.credentials.subject}' signs does not verify")


def manifest(claim: Claim, media_type: str) -> Mapping[str, Any]:
    """The definition that c2pa-python builds from."""
    said: dict[str, Any] = {"asset": claim.asset, "sha256": claim.sha256}
    if claim.prompts:
        said["prompts"] = list(claim.prompts)
    made: dict[str, Any] = {"softwareAgent": {"name": "kontext-batch", "version": version("kontext-batch")}}
    if claim.digital_source_type is not None:
        made["digitalSourceType"] = claim.digital_source_type
    if claim.parent is None:
        made.setdefault("digitalSourceType", COMPOSITE)  # a sheet of photos; C2PA asks for some term
        actions = [{"action": "c2pa.created", **made}]
        ingredients = []
    else:
        actions = [
            {"action": "c2pa.opened", "parameters": {"ingredientIds": [_PARENT]}},
            {"action": "c2pa.edited" if claim.digital_source_type else "c2pa.converted", **made},
        ]
        parent = {"title": claim.parent.asset, "instance_id": claim.parent.asset, "label": _PARENT}
        ingredients = [{**parent, "format": "application/octet-stream", "relationship": "parentOf"}]
    return {
        "claim_generator_info": [{"name": "kontext-batch", "version": version("kontext-batch")}],
        "title": claim.asset,
        "format": media_type,
        "ingredients": ingredients,
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": actions}},
            {"label": ASSERTION, "data": said},
        ],
    }
