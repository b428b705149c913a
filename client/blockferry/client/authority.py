"""A small private authority in a directory: `ca.crt`, `ca.key`, `ca.crl`, and what it has issued.

EC P-256 and SHA-256 throughout: every TLS library has them. Keys are mode 0600 from their first instant.
Source: RFC 5280; that names count and subjects do not, RFC 9525.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from blockferry.common import durable
from blockferry.common.certificates import Certificate, load_certificates, unusable
from blockferry.common.errors import BlockferryError, Code, from_os_error
from blockferry.common.tls import check_pair, read_file
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS = 3650
LEAF_DAYS = 365
BACKDATED = timedelta(hours=1)
"""Clocks of two sites differ; a certificate that was issued just now is valid on both."""

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_DNS_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_][a-z0-9_-]{0,62})*", re.ASCII)


def parse_name(text: str) -> x509.GeneralName:
    """`dns:NAME`, `ip:ADDRESS`, `uri:URI`, or one of them without its kind. Raises INVALID_ARGUMENT."""
    kind, colon, value = text.partition(":")
    if not colon or kind not in ("dns", "ip", "uri"):
        value = text
        kind = "uri" if "://" in text else "ip" if _is_ip(text) else "dns"
    if kind == "ip" and _is_ip(value):
        return x509.IPAddress(ipaddress.ip_address(value))
    if kind == "uri" and re.fullmatch(r"[a-z][a-z0-9+.-]*:[!-~]+", value, re.ASCII):
        return x509.UniformResourceIdentifier(value)
    if kind == "dns" and _DNS_NAME.fullmatch(value.lower()):
        return x509.DNSName(value.lower())
    raise BlockferryError(
        Code.INVALID_ARGUMENT,
        f"{text!r} is not a name for a certificate",
        cause=f"it is no {kind} name",
        next="write a host name, an address, or dns:NAME, ip:ADDRESS, uri:URI",
    )


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def default_prefix(directory: Path, names: Sequence[str]) -> Path:
    """Where what is issued for these names goes unless another place is named. Raises USAGE where the first is no
    name for a file."""
    first = names[0].removeprefix("dns:").removeprefix("ip:")
    if not _FILE_NAME.fullmatch(first) or first == "ca":
        raise BlockferryError(
            Code.USAGE, f"{names[0]} makes no name for a file", next="say --out PREFIX for PREFIX.crt and PREFIX.key"
        )
    return directory / first


class Authority:
    """An authority that exists. All methods block."""

    def __init__(self, directory: Path) -> None:
        """Raises NOT_FOUND, UNREADABLE or TLS."""
        self.directory = directory
        data, key = read_file(directory / "ca.crt"), read_file(directory / "ca.key")
        self._certificate = load_certificates(data, str(directory / "ca.crt"))[0]
        self.certificate = Certificate.of(self._certificate)
        found = check_pair(key, self.certificate, directory / "ca.crt", directory / "ca.key")
        if not isinstance(found, ec.EllipticCurvePrivateKey):
            raise unusable(
                f"{directory} is not usable", "its key is none of those that pki init makes", "issue with the tool "
                "that made it: any authority will do"
            )  # fmt: skip
        self._key = found

    @classmethod
    def create(cls, directory: Path, name: str, days: int) -> Authority:
        """Make a new one in a directory that has none. Raises IN_USE where there is one."""
        with _told(directory):
            durable.make_directories(directory)
            # The key goes first: where we die after it, everything is refused, and nothing overwritten.
            key = _new_key(directory / "ca.key")
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
            public = key.public_key()
            start, end = _period(days)
            certificate = (
                x509.CertificateBuilder(subject, subject, public, x509.random_serial_number(), start, end)
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(_usage(authority=True), critical=True)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
                .sign(key, hashes.SHA256())
            )
            _create(directory / "ca.crt", _pem(certificate), 0o644)
        made = cls(directory)
        made._write_list([])
        return made

    def issue(self, names: Sequence[x509.GeneralName], days: int, prefix: Path) -> Certificate:
        """A key and a certificate for these names: `PREFIX.key`, `PREFIX.crt`. Raises IN_USE where either exists."""
        if not names:
            raise BlockferryError(Code.USAGE, "a certificate needs a name", next="name the host or the program")
        with _told(prefix):
            for suffix in (".crt", ".key"):
                _refuse_existing(_with(prefix, suffix))
            key = _new_key(_with(prefix, ".key"))
            certificate = self._signed(key.public_key(), names, days)
            _create(_with(prefix, ".crt"), _pem(certificate), 0o644)
        return Certificate.of(certificate)

    def renew(self, path: Path, days: int) -> Certificate:
        """Replace a certificate of ours by one for the same names and the same key that is valid for longer. The key
        itself is not needed."""
        old = load_certificates(read_file(path), str(path))[0]
        self._check_ours(old, path)
        if Certificate.of(old).serial in self.revoked:
            raise unusable(f"{path} is not renewed", "it was revoked", "issue a new one, with a new key")
        names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        public = old.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        certificate = self._signed(public, list(names), days)
        with _told(path):
            durable.write_atomic(path, _pem(certificate), mode=0o644)
        return Certificate.of(certificate)

    def revoke(self, path: Path) -> Certificate:
        """Put a certificate of ours on the list, for good; once is enough."""
        found = load_certificates(read_file(path), str(path))[0]
        self._check_ours(found, path)
        with _told(self.directory), self._alone():
            if found.serial_number not in self.revoked:
                now = datetime.now(UTC)
                entry = x509.RevokedCertificateBuilder(found.serial_number, now).build()
                self._write_list([*self._list(), entry])
        return Certificate.of(found)

    @property
    def revoked(self) -> set[int]:
        """Serial numbers of what was revoked."""
        return {one.serial_number for one in self._list()}

    def _list(self) -> list[x509.RevokedCertificate]:
        path = self.directory / "ca.crl"
        try:
            found = x509.load_pem_x509_crl(read_file(path))
            if not found.is_signature_valid(self._key.public_key()):
                raise ValueError("its signature is wrong")
        except ValueError as error:
            # Begun anew, it would let back in whoever is on it.
            raise unusable(f"{path} is not usable", str(error), "restore it from a backup") from error
        return list(found)

    def _write_list(self, entries: list[x509.RevokedCertificate]) -> None:
        now = datetime.now(UTC)
        builder = x509.CertificateRevocationListBuilder(self._certificate.subject, now, self.certificate.not_after)
        for entry in entries:
            builder = builder.add_revoked_certificate(entry)
        number = x509.CRLNumber(len(entries))
        data = builder.add_extension(number, critical=False).sign(self._key, hashes.SHA256())
        durable.write_atomic(self.directory / "ca.crl", data.public_bytes(serialization.Encoding.PEM), mode=0o644)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process of ours changes the list meanwhile: nobody on it may be forgotten."""
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _check_ours(self, found: x509.Certificate, path: Path) -> None:
        try:
            found.verify_directly_issued_by(self._certificate)
        except Exception as error:
            raise unusable(
                f"{path} is left as it is", f"{self.directory} has not issued it", "name the authority that has"
            ) from error

    def _signed(
        self, public: ec.EllipticCurvePublicKey, names: Sequence[x509.GeneralName], days: int
    ) -> x509.Certificate:
        start, end = _period(days)
        # Nobody's certificate outlives that of the authority: it would be refused all the same.
        end = min(end, self.certificate.not_after)
        issuer = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        serial = x509.random_serial_number()
        # The subject is for people who look at the certificate with other tools.
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(names[0].value)[:64])])
        return (
            x509.CertificateBuilder(self._certificate.subject, subject, public, serial, start, end)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _period(days: int) -> tuple[datetime, datetime]:
    if days < 1:
        raise BlockferryError(Code.USAGE, f"{days} days are not possible", next="say 1 or more")
    now = datetime.now(UTC).replace(microsecond=0)
    try:
        return now - BACKDATED, now + timedelta(days=days)
    except OverflowError as error:
        raise BlockferryError(Code.USAGE, f"{days} days are not possible", next="say fewer") from error


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _with(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _new_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    data = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _create(path, data, 0o600)
    return key


def _create(path: Path, data: bytes, mode: int) -> None:
    _refuse_existing(path)
    durable.write_new(path, data, mode=mode)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(17, os.strerror(17), str(path))


@contextlib.contextmanager
def _told(where: Path) -> Iterator[None]:
    """Failures of the disk as ours."""
    try:
        yield
    except FileExistsError as error:
        raise BlockferryError(
            Code.IN_USE,
            f"{error.filename2 or error.filename} exists",
            cause="keys and certificates are never overwritten",
            next="name another place, or move it away if it is not needed any more",
        ) from error
    except OSError as error:
        raise from_os_error(error, f"cannot write {where}") from error
