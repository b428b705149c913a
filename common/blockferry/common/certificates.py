"""What certificates and revocation lists say (pure): names, validity, fingerprint, who is revoked.

Only facts are read here. That a certificate was issued by an authority one trusts is checked by the TLS library.
Source: RFC 5280.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from blockferry.common.errors import BlockferryError, Code
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization

WARN_BEFORE = timedelta(days=30)
"""Coming expiry is announced this long before, or when a third of the lifetime is left where that is shorter: a
certificate of one day is no news."""

_PEM_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)


@dataclass(frozen=True)
class Certificate:
    """One certificate. Times are in UTC."""

    names: tuple[tuple[str, str], ...]
    """Subject alternative names as (kind, text): dns, ip, uri, email."""
    subject: str
    """RFC 4514; for people, nothing is ever decided by it."""
    issuer: str
    serial: int
    not_before: datetime
    not_after: datetime
    fingerprint: str
    """SHA-256 of the certificate, in hexadecimal."""
    authority: bool
    """Whether it may issue others."""
    key: bytes = field(repr=False)
    """The public key, DER."""
    issuer_name: bytes = field(repr=False)
    """DER, to find the certificate in revocation lists."""

    @classmethod
    def of(cls, found: x509.Certificate) -> Certificate:
        """Raises ValueError for one whose extensions make no sense."""
        try:
            extension = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            names = tuple(_name(one) for one in extension if isinstance(one, _KINDS))
        except x509.ExtensionNotFound:
            names = ()
        try:
            authority = found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except x509.ExtensionNotFound:
            authority = False
        return cls(
            names=names,
            subject=found.subject.rfc4514_string(),
            issuer=found.issuer.rfc4514_string(),
            serial=found.serial_number,
            not_before=found.not_valid_before_utc,
            not_after=found.not_valid_after_utc,
            fingerprint=found.fingerprint(hashes.SHA256()).hex(),
            authority=authority,
            key=found.public_key().public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            ),
            issuer_name=found.issuer.public_bytes(),
        )

    @property
    def label(self) -> str:
        """What it is called in logs and messages: all its names, else its subject."""
        return ", ".join(text for _, text in self.names) or self.subject or f"serial number {self.serial:x}"

    def problem(self, now: datetime) -> str:
        """Why it is not valid at `now`, in words; empty if it is."""
        if now > self.not_after:
            return f"it expired on {_day(self.not_after)}"
        if now < self.not_before:
            return f"it is not valid before {_day(self.not_before)}; the clock here says {_day(now)}"
        return ""

    def warning(self, now: datetime) -> str:
        """What to say of its coming expiry; empty while there is time."""
        left = self.not_after - now
        if left > min(WARN_BEFORE, (self.not_after - self.not_before) / 3):
            return ""
        return f"expires on {_day(self.not_after)}, in {max(left, timedelta()).days} days"


_KINDS = (x509.DNSName, x509.IPAddress, x509.UniformResourceIdentifier, x509.RFC822Name)


def _name(one: x509.GeneralName) -> tuple[str, str]:
    if isinstance(one, x509.DNSName):
        return "dns", one.value.lower()
    if isinstance(one, x509.IPAddress):
        return "ip", str(one.value)
    return ("uri" if isinstance(one, x509.UniformResourceIdentifier) else "email"), str(one.value)


def _day(when: datetime) -> str:
    return when.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def unusable(what: str, cause: str, next_step: str) -> BlockferryError:
    """What is wrong with a certificate, a key or a list of ours."""
    return BlockferryError(Code.TLS, what, cause=cause, next=next_step)


def load_certificates(data: bytes, where: str) -> list[x509.Certificate]:
    """All certificates of a PEM file, in its order. Raises TLS where there is none or one makes no sense."""
    try:
        found = x509.load_pem_x509_certificates(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise unusable(
            f"{where} is not usable", "it holds no certificate in PEM form", "check which file is meant"
        ) from error
    return found


def describe(data: bytes, where: str) -> list[Certificate]:
    """As `load_certificates`, with what they say."""
    try:
        return [Certificate.of(one) for one in load_certificates(data, where)]
    except (ValueError, UnsupportedAlgorithm) as error:
        raise unusable(f"{where} is not usable", str(error), "have it issued anew") from error


@dataclass(frozen=True)
class Revocations:
    """Who is revoked, by (issuer, serial number), and when the first of the lists is due to be replaced."""

    serials: frozenset[tuple[bytes, int]] = frozenset()
    next_update: datetime | None = None

    def __contains__(self, certificate: Certificate) -> bool:
        return (certificate.issuer_name, certificate.serial) in self.serials

    @classmethod
    def of(cls, data: bytes, where: str, authorities: list[x509.Certificate]) -> Revocations:
        """From all lists of a PEM file; each must be signed by one of `authorities`. Raises TLS."""
        blocks = [match[0] for match in _PEM_BLOCK.finditer(data) if match[1] == b"X509 CRL"]
        if not blocks:
            raise unusable(
                f"{where} is not usable", "it holds no revocation list in PEM form", "check which file is meant"
            )
        serials: set[tuple[bytes, int]] = set()
        due: list[datetime] = []
        for block in blocks:
            try:
                found = x509.load_pem_x509_crl(block)
                signed = any(_signed(found, authority) for authority in authorities)
                serials.update((found.issuer.public_bytes(), one.serial_number) for one in found)
            except (ValueError, UnsupportedAlgorithm) as error:
                raise unusable(f"{where} is not usable", str(error), "fetch the list anew") from error
            if not signed:
                raise unusable(
                    f"{where} is not usable",
                    f"no authority that is trusted here has signed the list of {found.issuer.rfc4514_string()}",
                    "name the list of the authority in the ca file",
                )
            if found.next_update_utc is not None:
                due.append(found.next_update_utc)
        return cls(frozenset(serials), min(due, default=None))


def _signed(found: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    return found.issuer == authority.subject and found.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
