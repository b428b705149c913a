"""The files of TLS: certificate, key, authorities, revocation list; read, checked, and made into contexts.

TLS 1.2 at least: gRPC negotiates nothing older, and contexts of Python's `ssl` are told so.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from blockferry.common.certificates import Certificate, Revocations, describe, load_certificates, unusable
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.settings import Tls
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes


def complete(cert: Path | None, key: Path | None, ca: Path | None, crl: Path | None = None) -> Tls | None:
    """All files of TLS, or None for none of them. Raises USAGE where some are missing: who means TLS must not end up
    without it."""
    given = {"--tls-cert": cert, "--tls-key": key, "--tls-ca": ca}
    missing = [name for name, path in given.items() if path is None]
    if cert is None or key is None or ca is None:
        if len(missing) == len(given) and crl is None:
            return None
        raise BlockferryError(
            Code.USAGE,
            "TLS is not complete",
            cause=f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing",
            next="name certificate, key and authorities together",
        )
    return Tls(cert, key, ca, crl)


@dataclass(frozen=True)
class Material:
    """What the files held when they were read."""

    files: Tls
    chain: bytes = field(repr=False)
    key: bytes = field(repr=False)
    ca: bytes = field(repr=False)
    own: Certificate
    authorities: tuple[Certificate, ...]
    revocations: Revocations

    @classmethod
    def load(cls, files: Tls) -> Material:
        """Read and check everything. Blocks. Raises TLS, saying which file and why, or what `from_os_error` makes of a
        file that cannot be read."""
        chain, key, ca = read_file(files.cert), read_file(files.key), read_file(files.ca)
        own = describe(chain, str(files.cert))[0]
        check_pair(key, own, files.cert, files.key)
        problem = own.problem(datetime.now(UTC))
        if problem:
            raise unusable(f"the certificate {files.cert} is not valid", problem, "renew it, or correct the clock")
        authorities = describe(ca, str(files.ca))
        revocations = Revocations()
        if files.crl:
            revocations = Revocations.of(read_file(files.crl), str(files.crl), load_certificates(ca, str(files.ca)))
        return cls(files, chain, key, ca, own, tuple(authorities), revocations)

    def warnings(self, now: datetime) -> list[str]:
        """What will soon, or does already, need somebody's attention."""
        found = [(self.files.cert, self.own), *((self.files.ca, one) for one in self.authorities)]
        lines = [f"{path} ({one.label}) {one.warning(now)}" for path, one in found if one.warning(now)]
        due = self.revocations.next_update
        if due is not None and now > due:
            lines.append(f"{self.files.crl} is out of date: its successor was due on {due:%Y-%m-%d}")
        if os.stat(self.files.key).st_mode & 0o007:
            lines.append(f"{self.files.key} can be used by everybody on this machine: chmod 600 it")
        return lines

    def issued_own(self) -> bool:
        """Whether one of the authorities has issued our certificate, going by its name only."""
        return any(one.subject == self.own.issuer for one in self.authorities)


def read_file(path: Path) -> bytes:
    """The file, whole. Blocks. Raises what `from_os_error` makes of a file that cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise from_os_error(error, f"cannot read {path}") from error


def check_pair(data: bytes, own: Certificate, cert: Path, key: Path) -> PrivateKeyTypes:
    """The private key `data`, read from `key`. Raises TLS unless it is the one that the certificate is about."""
    try:
        found = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Whatever the library says of it may quote what should stay secret.
        raise unusable(
            f"{key} is not usable", "it holds no private key in PEM form without a passphrase", "check the file"
        ) from None
    public = found.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    if public != own.key:
        raise unusable(
            f"{key} does not belong to {cert}", "their keys differ", "name the pair that was issued together"
        )
    return found


def client_context(files: Tls) -> ssl.SSLContext:
    """For a client of Python's `ssl`: shows our certificate, and trusts the authorities alone. Blocks. Raises what
    `Material.load` raises."""
    Material.load(files)
    context = ssl.create_default_context(cafile=str(files.ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A key with a passphrase was refused above; never ask for one on the terminal.
    context.load_cert_chain(files.cert, files.key, lambda: b"")
    return context


def server_context(files: Tls) -> ssl.SSLContext:
    """For a server of Python's `ssl`: shows our certificate, and lets in whoever has one of the authorities', which is
    not revoked. Blocks. Raises what `Material.load` raises."""
    Material.load(files)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(files.ca)
    if files.crl is not None:
        context.load_verify_locations(files.crl)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    context.load_cert_chain(files.cert, files.key, lambda: b"")
    return context
