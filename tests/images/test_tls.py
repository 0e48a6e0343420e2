"""A pinned address does not weaken TLS: the certificate must be the host's, not the address's."""

import datetime
import ssl
from pathlib import Path

import httpx
import pytest

from gemma_serve.errors import InvalidRequestError
from gemma_serve.images.fetching import ImageFetcher
from gemma_serve.images.limits import ImageLimits
from tests.images.web import FakeResolver, reply, serve

pytest.importorskip("cryptography")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

HOST = "images.test"


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate for ``HOST``, with its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "certificate.pem"
    path.write_bytes(
        signed.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


async def fetch_over_tls(host: str, certificate: Path) -> bytes:
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate)
    client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_side.load_verify_locations(certificate)
    fetcher = ImageFetcher(
        ImageLimits(allow_private_addresses=True),
        resolve=FakeResolver(**{host: [["127.0.0.1"]]}),
        transport=httpx.AsyncHTTPTransport(verify=client_side),
    )
    async with serve({"/": reply(b"image")}, tls=server_side) as web:
        try:
            return await fetcher.fetch(web.url("/", host=host, scheme="https"))
        finally:
            await fetcher.aclose()


async def test_certificate_of_the_host_is_accepted(certificate: Path) -> None:
    assert await fetch_over_tls(HOST, certificate) == b"image"


@pytest.mark.parametrize("host", ["other.test", "127.0.0.1"])
async def test_certificate_of_another_host_is_refused(host: str, certificate: Path) -> None:
    with pytest.raises(InvalidRequestError, match="the connection failed"):
        await fetch_over_tls(host, certificate)
