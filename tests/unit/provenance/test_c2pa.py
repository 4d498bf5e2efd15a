"""Signed manifests: read back, trusted by whoever trusts our root, broken by a changed byte, and silent of secrets."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from PIL import Image

from kontext_batch.errors import InfrastructureError, SettingsError, StepError
from kontext_batch.hashing import sha256_hex
from kontext_batch.observability.masking import mask
from kontext_batch.operations.encoding import FORMATS, encode
from kontext_batch.operations.pictures import open_picture
from kontext_batch.planning.marking import EDITED, GENERATED, Ancestry, asset_id, xmp_packet
from kontext_batch.ports import Claim, Parent
from kontext_batch.provenance.c2pa import ASSERTION, C2paSigner, Credentials
from kontext_batch.provenance.marks import step_key_of
from tests.unit.provenance.certificates import Signing, certificate, pem, private_pem, signing

c2pa = pytest.importorskip("c2pa", reason="the extra c2pa is not installed")

KEY = "b2:" + "ab" * 20
PHOTO = f"sha256:{'c' * 64}"
PROMPT = "Put the unreleased bag on a beach."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Signing:
    return signing(tmp_path_factory.mktemp("signing"))


@pytest.fixture(scope="module")
def signer(files: Signing) -> C2paSigner:
    return C2paSigner(Credentials.read(files.certificates, files.private_key))


def picture(name: str = "png", size: int = 96) -> bytes:
    image = Image.effect_noise((size, size), 80).convert("RGB")
    return encode(image, name, 80, None, xmp=xmp_packet(KEY, Ancestry(model=True, photo=True))).data


def claim(data: bytes, **changes: Any) -> Claim:
    said: dict[str, Any] = {"digital_source_type": EDITED, "parent": Parent(PHOTO), **changes}
    return Claim(asset_id(KEY), sha256_hex(data), **said)


def read(data: bytes, media_type: str, root: bytes | None = None) -> tuple[str, dict[str, Any]]:
    """State of validation and active manifest, for whoever trusts `root`."""
    trust = {} if root is None else {"trust": {"user_anchors": root.decode()}, "verify": {"verify_trust": True}}
    with c2pa.Reader(media_type, BytesIO(data), context=c2pa.Context.from_dict(trust)) as reader:
        return str(reader.get_validation_state()), dict(reader.get_active_manifest())


@pytest.mark.parametrize("name", FORMATS)
def test_a_signed_file_is_trusted_with_our_root_and_its_pixels_are_the_same(
    signer: C2paSigner, files: Signing, name: str
) -> None:
    data, media_type = picture(name), FORMATS[name].media_type
    signed = signer.sign(data, media_type, claim(data))

    state, manifest = read(signed, media_type, files.root)
    assert state == "Trusted"
    assert read(signed, media_type)[0] == "Valid"
    assert manifest["signature_info"]["common_name"] == "Acme Studio"
    assert open_picture(signed).tobytes() == open_picture(data).tobytes()
    assert step_key_of(signed) == KEY, "the mark stays"
    assert len(signed) - len(data) < 10_000

    (actions,) = [each["data"]["actions"] for each in manifest["assertions"] if "actions" in each["label"]]
    assert [each["action"] for each in actions] == ["c2pa.opened", "c2pa.edited"]
    assert actions[1]["digitalSourceType"] == EDITED
    (ingredient,) = manifest["ingredients"]
    assert (ingredient["relationship"], ingredient["instance_id"]) == ("parentOf", PHOTO)
    (said,) = [each["data"] for each in manifest["assertions"] if each["label"] == ASSERTION]
    assert said == {"asset": asset_id(KEY), "sha256": sha256_hex(data)}


@pytest.mark.parametrize("name", FORMATS)
def test_a_changed_byte_is_found(signer: C2paSigner, name: str) -> None:
    data, media_type = picture(name), FORMATS[name].media_type
    signed = bytearray(signer.sign(data, media_type, claim(data)))
    assert signer.signed_from(bytes(signed), media_type) == sha256_hex(data)
    assert signer.signed_from(data, media_type) is None
    signed[100 if name == "webp" else -100] ^= 1  # of the picture: WebP has its manifest at the end
    assert read(bytes(signed), media_type)[0] == "Invalid"
    assert signer.signed_from(bytes(signed), media_type) is None


def test_no_thumbnail_and_no_prompt_is_in_a_signed_file(signer: C2paSigner) -> None:
    data = picture()
    signed = signer.sign(data, "image/png", claim(data))
    with c2pa.Reader("image/png", BytesIO(signed)) as reader:
        everything = reader.json() + reader.detailed_json()
    assert "thumbnail" not in everything
    assert b"thumbnail" not in signed
    assert PROMPT.encode() not in signed
    asked = signer.sign(data, "image/png", claim(data, prompts=(PROMPT,)))
    assert PROMPT in json.dumps(read(asked, "image/png")[1])


@pytest.mark.parametrize(
    ("source_type", "parent", "actions"),
    [
        (GENERATED, None, ["c2pa.created"]),
        (GENERATED, Parent(asset_id(KEY)), ["c2pa.opened", "c2pa.edited"]),
        (None, Parent(PHOTO), ["c2pa.opened", "c2pa.converted"]),
        (None, None, ["c2pa.created"]),
    ],
)
def test_every_kind_of_making_gives_a_valid_manifest(
    signer: C2paSigner, source_type: str | None, parent: Parent | None, actions: list[str]
) -> None:
    data = picture()
    signed = signer.sign(data, "image/png", claim(data, digital_source_type=source_type, parent=parent))
    state, manifest = read(signed, "image/png")
    assert state == "Valid"
    (found,) = [each["data"]["actions"] for each in manifest["assertions"] if "actions" in each["label"]]
    assert [each["action"] for each in found] == actions
    assert found[-1].get("digitalSourceType", source_type) == (source_type or found[-1].get("digitalSourceType"))


def test_two_signatures_differ_and_are_known_as_of_one_picture(signer: C2paSigner, tmp_path: Path) -> None:
    data = picture("jpeg")
    first, second = (signer.sign(data, "image/jpeg", claim(data)) for _ in range(2))
    assert first != second
    stranger = signing(tmp_path)  # a renewed certificate: what the old one signed is still the picture
    renewed = C2paSigner(Credentials.read(stranger.certificates, stranger.private_key))
    assert renewed.signed_from(first, "image/jpeg") == sha256_hex(data)


def test_what_an_expired_certificate_signed_is_known_again(
    tmp_path: Path, signer: C2paSigner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each renewal would deliver every picture of a nightly recipe once more."""
    data = picture()
    signed = signer.sign(data, "image/png", claim(data))
    results = {"activeManifest": {"success": [{"code": "assertion.dataHash.match"}], "failure": []}}
    for code, known in (
        ("signingCredential.expired", True),
        ("claimSignature.outsideValidity", True),
        ("claimSignature.mismatch", False),
        ("assertion.hashedURI.mismatch", False),
    ):
        results["activeManifest"]["failure"] = [{"code": code}]
        monkeypatch.setattr(c2pa.Reader, "get_validation_results", lambda reader: results)
        assert (signer.signed_from(signed, "image/png") is not None) is known, code


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (ec.generate_private_key(ec.SECP384R1()), "es384"),
        (ed25519.Ed25519PrivateKey.generate(), "ed25519"),
        (rsa.generate_private_key(65537, 2048), "ps256"),
    ],
)
def test_the_algorithm_is_that_of_the_key(tmp_path: Path, key: Any, algorithm: str) -> None:
    files = signing(tmp_path, key=key)
    credentials = Credentials.read(files.certificates, files.private_key)
    assert credentials.algorithm == algorithm
    C2paSigner(credentials).try_out()


def test_a_certificate_that_ends_while_a_worker_lives_signs_no_more(files: Signing) -> None:
    credentials = Credentials.read(files.certificates, files.private_key)
    old = C2paSigner(credentials)
    old.credentials = replace(credentials, expires=datetime.now(UTC))
    data = picture()
    with pytest.raises(SettingsError, match="has expired"):
        old.sign(data, "image/png", claim(data))


def test_an_algorithm_of_another_key_is_told(files: Signing) -> None:
    with pytest.raises(SettingsError, match="'Acme Studio' does not sign by ps256"):
        C2paSigner(Credentials.read(files.certificates, files.private_key), "ps256")


def broken(folder: Path, fault: str) -> Signing:
    files = signing(folder, days=-1 if fault == "expired" else 365)
    key = ec.generate_private_key(ec.SECP256R1())
    chain = files.certificates.read_bytes()
    if fault == "another key":
        files.private_key.write_bytes(private_pem(key))
    elif fault == "alone":
        files.certificates.write_bytes(pem(certificate("Acme", key, "Acme", key, days=9)))
        files.private_key.write_bytes(private_pem(key))
    elif fault == "order":
        end = b"-----END CERTIFICATE-----\n"
        first, second, _ = chain.split(end)
        files.certificates.write_bytes(second + end + first + end)
    elif fault == "no certificate":
        files.certificates.write_bytes(b"nothing")
    elif fault == "no key":
        files.private_key.write_bytes(b"-----BEGIN PRIVATE KEY-----\nopensesame\n-----END PRIVATE KEY-----\n")
    elif fault == "encrypted":
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"open sesame"))
        files.private_key.write_bytes(secret)
    elif fault == "gone":
        files.private_key.unlink()
    return files


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("another key", "is not the key of 'Acme Studio'"),
        ("alone", "is signed by itself"),
        ("order", "begin with the certificate that signs"),
        ("no certificate", "holds no certificates"),
        ("no key", "holds no private key"),
        ("encrypted", "is encrypted"),
        ("gone", "cannot be read"),
        ("expired", "has expired"),
    ],
)
def test_what_is_wrong_with_a_signer_is_told_with_the_setting(tmp_path: Path, fault: str, told: str) -> None:
    files = broken(tmp_path, fault)
    with pytest.raises(SettingsError, match=r"^c2pa_(certificates|private_key): ") as error:
        C2paSigner(Credentials.read(files.certificates, files.private_key))
    assert told in str(error.value)
    assert "opensesame" not in str(error.value)


def test_the_key_is_masked_wherever_it_turns_up(files: Signing) -> None:
    credentials = Credentials.read(files.certificates, files.private_key)
    lines = files.private_key.read_text().split("\n")
    assert lines[1] not in mask(f"an error that quotes {lines[1]}")
    assert lines[1] not in repr(credentials) + repr(C2paSigner(credentials))


def test_a_missing_extra_is_told(files: Signing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"install kontext-batch\[c2pa\]"):
        Credentials.read(files.certificates, files.private_key)


def test_a_time_stamp_that_cannot_be_had_is_an_outage(files: Signing) -> None:
    credentials = Credentials.read(files.certificates, files.private_key)
    signer = C2paSigner(credentials, timestamp_url="http://127.0.0.1:9/")
    data = picture()
    with pytest.raises(InfrastructureError, match="c2pa_timestamp_url"):
        signer.sign(data, "image/png", claim(data))


def test_what_is_no_picture_is_not_signed(signer: C2paSigner) -> None:
    with pytest.raises(StepError, match="cannot be signed"):
        signer.sign(b"nonsense", "image/png", claim(b"nonsense"))
    assert signer.signed_from(b"nonsense", "image/png") is None
