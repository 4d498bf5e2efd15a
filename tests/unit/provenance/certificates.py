"""A root that signs a signer's certificate, as a company has them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NO = dict.fromkeys(
    (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
        *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    ),
    False,
)


@dataclass(frozen=True)
class Signing:
    """Files of a signer."""

    certificates: Path
    private_key: Path
    root: bytes
    """PEM, for whoever trusts it."""


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def private_pem(key: Any) -> bytes:
    made: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return made


def certificate(name: str, key: Any, issuer: str, issuer_key: Any, *, days: float) -> x509.Certificate:
    """Of an authority where it signs itself, else of a signer of claims."""
    is_root = name == issuer
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_named(name))
        .issuer_name(_named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=400))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if is_root:
        usage = x509.KeyUsage(**{**NO, "key_cert_sign": True, "crl_sign": True})
    else:
        usage = x509.KeyUsage(**{**NO, "digital_signature": True})
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purpose, critical=False)
    return builder.add_extension(usage, critical=True).sign(issuer_key, hashes.SHA256())


def _named(name: str) -> x509.Name:
    # Without an organisation c2pa-python takes no certificate.
    words = [(NameOID.ORGANIZATION_NAME, "Acme"), (NameOID.COMMON_NAME, name)]
    return x509.Name([x509.NameAttribute(kind, word) for kind, word in words])


def signing(folder: Path, *, days: float = 365, key: Any = None) -> Signing:
    """A chain that is valid for so long, and its key."""
    root_key = ec.generate_private_key(ec.SECP256R1())
    leaf_key = key or ec.generate_private_key(ec.SECP256R1())
    root = certificate("Acme Root", root_key, "Acme Root", root_key, days=3650)
    leaf = certificate("Acme Studio", leaf_key, "Acme Root", root_key, days=days)
    chain, private = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(pem(leaf) + pem(root))
    private.write_bytes(private_pem(leaf_key))
    return Signing(chain, private, pem(root))
