"""The archive's key, and how a key file or a passphrase wraps it (pure).

The key itself is random and never changes. keys/ID holds it wrapped with AES-256-GCM under a key that comes from the
content of a key file by HKDF-SHA256 (RFC 5869), or from a passphrase by scrypt (RFC 7914). An archive may have several
such objects: each opens it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Literal

from blockferry.common.archive import format
from blockferry.common.archive.format import Key
from blockferry.common.archive.seal import KEY_SIZE, Nonce
from blockferry.common.errors import BlockferryError, Code
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

MIN_KEY_FILE = 32
"""Bytes of a key file: as many as the key it stands for."""
MAX_SECRET = 1024 * 1024
"""Bytes of a key file or passphrase file: anything longer is the wrong file."""

SCRYPT = (1 << 17, 8, 1)
"""n, r, p: 128 MiB and about half a second (OWASP's password storage cheat sheet)."""
MAX_SCRYPT_MEMORY = 1 << 30
"""Bytes (128 * n * r) that a reader lets a key object ask for."""

_SALT_SIZE = 32
_WRAP = b"blockferry archive v1 wrap"
_FILE = b"blockferry archive v1 key file"


@dataclass(frozen=True)
class Secret:
    """What the user keeps: the content of a key file, or a passphrase."""

    kind: Literal["key file", "passphrase"]
    value: bytes

    @classmethod
    def key_file(cls, content: bytes, name: str) -> Secret:
        """Raises USAGE unless it can be a key file: 32 bytes to 1 MiB, random ones."""
        if not MIN_KEY_FILE <= len(content) <= MAX_SECRET:
            raise BlockferryError(
                Code.USAGE,
                f"{name} is no key file",
                cause=f"it has {len(content)} bytes",
                next=f"make one with: head -c {MIN_KEY_FILE} /dev/urandom > FILE, and keep copies of it elsewhere",
            )
        return cls("key file", content)

    @classmethod
    def passphrase(cls, content: bytes, name: str) -> Secret:
        """The first line of a file. Raises USAGE where it is empty."""
        line = content.split(b"\n", 1)[0].removesuffix(b"\r")
        if not line or len(content) > MAX_SECRET:
            raise BlockferryError(
                Code.USAGE,
                f"{name} holds no passphrase",
                cause="its first line is empty" if not line else f"it has {len(content)} bytes",
                next="write the passphrase into its first line",
            )
        return cls("passphrase", line)

    @property
    def kdf(self) -> Literal["scrypt", "hkdf-sha256"]:
        """Which derivation it takes."""
        return "scrypt" if self.kind == "passphrase" else "hkdf-sha256"


def _wrapping_key(secret: Secret, key: Key, name: str) -> bytes:
    salt = bytes.fromhex(key.salt)
    if key.kdf == "hkdf-sha256":
        return HKDF(SHA256(), KEY_SIZE, salt, _FILE).derive(secret.value)
    if not 1 < key.n <= 1 << 24 or key.n & (key.n - 1) or not 1 <= key.r <= 64 or not 1 <= key.p <= 16:
        raise format.damaged(name, "its parameters of scrypt are none")
    if 128 * key.n * key.r > MAX_SCRYPT_MEMORY:
        raise format.damaged(name, "it asks for more memory than any key needs")
    return Scrypt(salt, KEY_SIZE, key.n, key.r, key.p).derive(secret.value)


def _context(key: Key) -> bytes:
    return _WRAP + bytes.fromhex(key.archive) + bytes.fromhex(key.id)


def wrap(
    secret: Secret,
    archive_key: bytes,
    archive_id: str,
    *,
    scrypt: tuple[int, int, int] = SCRYPT,
    random: Nonce = secrets.token_bytes,
) -> Key:
    """The object that lets `secret` open an archive."""
    n, r, p = scrypt if secret.kdf == "scrypt" else (0, 0, 0)
    key = Key(
        id=random(format.ID_SIZE).hex(), archive=archive_id, kdf=secret.kdf, salt=random(_SALT_SIZE).hex(),
        n=n, r=r, p=p, nonce=random(format.NONCE_SIZE).hex(), wrapped="",
    )  # fmt: skip
    cipher = AESGCM(_wrapping_key(secret, key, format.key_name(key.id)))
    wrapped = cipher.encrypt(bytes.fromhex(key.nonce), archive_key, _context(key))
    return Key(**{**{name: getattr(key, name) for name in key.__struct_fields__}, "wrapped": wrapped.hex()})


def unwrap(secret: Secret, key: Key, name: str) -> bytes | None:
    """The archive's key, or None where this object is not for this secret."""
    if key.kdf != secret.kdf:
        return None
    if len(key.nonce) != 2 * format.NONCE_SIZE or len(key.wrapped) != 2 * (KEY_SIZE + format.TAG_SIZE):
        raise format.damaged(name, "its fields have other lengths than those of a key")
    try:
        cipher = AESGCM(_wrapping_key(secret, key, name))
        return cipher.decrypt(bytes.fromhex(key.nonce), bytes.fromhex(key.wrapped), _context(key))
    except InvalidTag:
        return None
