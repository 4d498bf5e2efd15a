"""One call to a receiver over real HTTP: signed, bounded, and nowhere but there."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from kontext_batch.errors import InfrastructureError, ObjectNotFound, SettingsError
from kontext_batch.observability import mask, masking
from kontext_batch.settings import load_settings
from kontext_batch.webhooks import HttpPost, Target, signature
from tests.unit.receiver import Receiver, receiving

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_known", set())


def poster(receiver: Receiver, monkeypatch: pytest.MonkeyPatch, *, path: str = "/hook", timeout: float = 5) -> HttpPost:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    return HttpPost({"dam": Target(receiver.url + path, secret_env="HOOK_SECRET")}, timeout=timeout)


def test_the_signature_is_that_of_standard_webhooks() -> None:
    """The example that their libraries are tested with."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    made = signature([key], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_an_event_arrives_signed(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    poster(receiver, monkeypatch, path="/hook?team=a").post("dam", "evt_1", b'{"type":"run.done"}')
    [got] = receiver.requests
    assert (got.path, got.body) == ("/hook?team=a", b'{"type":"run.done"}')
    assert got.headers["content-type"] == "application/json"
    assert abs(int(got.headers["webhook-timestamp"]) - time.time()) < 60
    signed = f"evt_1.{got.headers['webhook-timestamp']}.".encode() + got.body
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert got.headers["webhook-signature"] == f"v1,{expected}"


def test_every_secret_of_a_file_signs(receiver: Receiver, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n\nan old secret of text\n")
    HttpPost({"dam": Target(receiver.url, secret_file=file)}).post("dam", "evt_1", b"{}")
    first, second = receiver.requests[0].headers["webhook-signature"].split(" ")
    assert first.startswith("v1,")
    assert second.startswith("v1,")
    assert first != second
    assert mask(f"{SECRET} and an old secret of text") == "*** and ***"


@pytest.mark.parametrize(
    ("status", "told"), [(500, "HTTP 500"), (404, "HTTP 404"), (302, "redirects"), (308, "redirects")]
)
def test_what_is_not_taken_is_told_and_no_redirect_is_followed(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, status: int, told: str
) -> None:
    receiver.answers = [status]
    with pytest.raises(InfrastructureError, match=told):
        poster(receiver, monkeypatch).post("dam", "evt_1", b"{}")
    assert [each.path for each in receiver.requests] == ["/hook"]


def test_a_receiver_that_is_gone_says_so(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver.answers = [410]
    with pytest.raises(ObjectNotFound, match="410"):
        poster(receiver, monkeypatch).post("dam", "evt_1", b"{}")


def test_an_answer_that_drips_is_cut_off(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver.drip = 0.15  # each byte comes within the time of a single read
    started = time.monotonic()
    with pytest.raises(InfrastructureError, match=r"no answer within 0\.5 s"):
        poster(receiver, monkeypatch, timeout=0.5).post("dam", "evt_1", b"{}")
    assert time.monotonic() - started < 3


def test_a_receiver_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = Receiver(port=server.getsockname()[1])
        with pytest.raises(InfrastructureError, match=r"no answer within 0\.3 s"):
            poster(silent, monkeypatch, timeout=0.3).post("dam", "evt_1", b"{}")
    with pytest.raises(InfrastructureError, match="refused") as caught:
        poster(silent, monkeypatch, path="/secret-path").post("dam", "evt_1", b"{}")
    assert "secret-path" not in str(caught.value)


def test_a_tls_handshake_that_drips_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connected, _ = server.accept()
            with connected, contextlib.suppress(OSError):
                connected.recv(1)
                for byte in b"\x16\x03\x03\x40\x00" + bytes(1000):  # a record of 16 kB, to be waited for
                    connected.sendall(bytes([byte]))
                    time.sleep(0.15)

        thread = threading.Thread(target=drip)
        thread.start()
        monkeypatch.setenv("HOOK_SECRET", SECRET)
        url = f"https://127.0.0.1:{server.getsockname()[1]}/"
        started = time.monotonic()
        with pytest.raises(InfrastructureError, match=r"no answer within 0\.5 s"):
            HttpPost({"dam": Target(url, secret_env="HOOK_SECRET")}, timeout=0.5).post("dam", "evt_1", b"{}")
        assert time.monotonic() - started < 3
        thread.join()


def test_certificates_are_checked(receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = make_certificate(tmp_path, "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    receiver.secure(context)
    monkeypatch.setenv("HOOK_SECRET", SECRET)

    def post(host: str) -> None:
        target = Target(f"https://{host}:{receiver.port}/", secret_env="HOOK_SECRET")
        HttpPost({"dam": target}).post("dam", "evt_1", b"{}")

    with pytest.raises(InfrastructureError, match="certificate verify failed"):
        post("localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with pytest.raises(InfrastructureError, match="certificate verify failed"):
        post("127.0.0.1")  # a name that the certificate does not have
    assert receiver.requests == []
    post("localhost")
    assert receiver.requests[0].headers["host"] == f"localhost:{receiver.port}"


def make_certificate(folder: Path, name: str) -> Path:
    """A file with a key and the certificate that it signed itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    issued = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(issued, issued, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    kept = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file = folder / "certificate.pem"
    file.write_bytes(kept + certificate.public_bytes(Encoding.PEM))
    return file


def test_a_host_that_cannot_be_a_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    with pytest.raises(InfrastructureError):
        HttpPost({"dam": Target("http://a..b/", secret_env="HOOK_SECRET")}).post("dam", "evt_1", b"{}")


@pytest.mark.parametrize(
    ("secret", "told"),
    [("", "holds no secret"), ("short", "at least 16 bytes"), ("whsec_???", "base64")],
)
def test_a_secret_that_is_none_is_told_without_it(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, secret: str, told: str
) -> None:
    post = poster(receiver, monkeypatch)
    monkeypatch.setenv("HOOK_SECRET", secret)
    with pytest.raises(InfrastructureError, match=told) as caught:
        post.post("dam", "evt_1", b"{}")
    assert "HOOK_SECRET" in str(caught.value)
    assert not secret or secret not in str(caught.value)
    assert receiver.requests == []


def test_a_secret_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.txt.*No such file"):
        Target("http://x/", secret_file=tmp_path / "none.txt").secrets()


# ------------------------------------------------------------------------------------------------------- settings

HOOK = 'webhooks: [{name: dam, url: "https://dam.example/hook", secret_env: S}]\n'


def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> object:
    (tmp_path / "kontext-batch.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return load_settings()


def test_webhooks_are_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(tmp_path, monkeypatch, HOOK)
    [hook] = load_settings().webhooks
    assert (hook.name, hook.events, hook.owners) == ("dam", ("run.finished",), None)
    monkeypatch.setenv(
        "KONTEXT_BATCH_WEBHOOKS",
        '[{"name": "x", "url": "http://[::1]:9/", "secret_file": "/s", "events": ["run.failed"], "owners": ["a"]}]',
    )
    [hook] = load_settings().webhooks
    assert (hook.name, hook.secret_file, hook.events, hook.owners) == ("x", Path("/s"), ("run.failed",), ("a",))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (HOOK.replace("https:", "ftp:"), "https://HOST/PATH is expected"),
        (HOOK.replace("https://dam.example/hook", "file:///etc/passwd"), "https://HOST/PATH is expected"),
        (HOOK.replace("dam.example", "u:hidden-word@dam.example"), "without user, password"),
        (HOOK.replace("dam.example", "dam.example:99999"), "this is no URL"),
        (HOOK.replace("secret_env: S", "secret: hidden-word"), r"webhooks\.0\.secret"),
        (HOOK.replace(", secret_env: S", ""), "one of secret_env and secret_file"),
        (HOOK.replace("secret_env: S", "secret_env: S, events: [run.ended]"), r"webhooks\.0\.events"),
        (HOOK.replace("secret_env: S", "secret_env: S, owners: []"), "owners"),
        (HOOK.replace("name: dam", "name: 'the dam'"), r"webhooks\.0\.name"),
        (HOOK.replace("}]", '}, {name: dam, url: "http://x/", secret_env: S}]'), "same name"),
    ],
)
def test_a_webhook_that_is_wrong_is_told_without_what_is_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, told: str
) -> None:
    with pytest.raises(SettingsError, match=told) as caught:
        loaded(tmp_path, monkeypatch, text)
    assert "hidden-word" not in f"{caught.value} {caught.value.__cause__}"
