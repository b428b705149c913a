"""Who may do what: roles and the decision (pure), then the one who asks for it at each call. What each call needs is
said by the program that serves it.

Whoever is not let in learns just that. The log says who it was, what was missing, and which setting would grant it.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any, Protocol
from urllib.parse import unquote

import grpc.aio
import structlog
from blockferry.common.certificates import Certificate, describe
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.settings import Grant
from blockferry.common.tls import Material

Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger("blockferry.access")


class Right(enum.Enum):
    """What a call needs. The value completes "may not ..."."""

    LOOK = "look at"
    READ = "read the data of"
    WRITE = "sync to"
    VERIFY = "verify"
    MANAGE = "promote, demote, adopt or delete"


# Reading data is the agent's alone. It has had all of it anyway, and failback needs it; whoever watches or decides
# needs none of it, and the certificate on an operator's laptop should not be a copy of every disk.
ROLES: dict[str, frozenset[Right]] = {
    "agent": frozenset({Right.LOOK, Right.READ, Right.WRITE}),
    "operator": frozenset({Right.LOOK, Right.VERIFY, Right.MANAGE}),
    "viewer": frozenset({Right.LOOK}),
}


def allows(names: frozenset[str], grants: Iterable[Grant], right: Right, volume: str | None) -> bool:
    """The decision: whether a grant to one of these names has a role with this right, on this volume (None: on any)."""
    return any(
        right in ROLES[grant.role]
        and _folded(grant.san) in names
        and (volume is None or any(fnmatchcase(volume, pattern) for pattern in grant.volumes))
        for grant in grants
    )


def _folded(name: str) -> str:
    """Host names have no case; URIs do, and are compared as they are."""
    return name if ":" in name and not name.startswith("dns:") else name.lower()


Need = tuple[Right, Sequence[object]]
"""A right, and on what: names of volumes, and whatever else the program knows how to look up. On nothing: somewhere."""


# --- who calls ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """Who calls. `key` is the same for everybody with the same names: renewing a certificate changes nothing."""

    key: str
    label: str
    names: frozenset[str] = frozenset()
    certificate: Certificate | None = None
    local: bool = False
    """Came through a UNIX socket: whoever may open it administers this host."""


LOCAL = Identity("", "local administrator", local=True)
ANONYMOUS = Identity("", "anonymous")
"""Plaintext over TCP."""


def identity_of(context: Context) -> str:
    """Who calls, for accounts and logs: the names of the certificate, else the host, else `local`."""
    caller = caller_of(context)
    if caller.certificate is not None:
        return caller.key
    return "local" if caller.local else unquote(context.peer()).partition(":")[2].rpartition(":")[0].strip("[]")


def caller_of(context: Context) -> Identity:
    """Who calls, going by what TLS has checked and by the socket; nothing that a client says counts."""
    for pem in context.auth_context().get("x509_pem_cert", ()):
        return _of_certificate(bytes(pem))
    return LOCAL if context.peer().startswith("unix:") else ANONYMOUS


@functools.lru_cache(maxsize=1024)
def _of_certificate(pem: bytes) -> Identity:
    certificate = describe(pem, "the client's certificate")[0]
    typed = [f"{kind}:{text}" for kind, text in certificate.names]
    names = frozenset(_folded(text) for _, text in certificate.names) | frozenset(typed)
    key = " ".join(sorted(typed)) or f"fingerprint:{certificate.fingerprint}"
    return Identity(key, certificate.label, names, certificate)


class Trust(Protocol):
    """Where what is trusted now is found."""

    @property
    def material(self) -> Material: ...


class AccessControl:
    """Asks for the decision at each call. Without grants everybody who can connect may do everything."""

    def __init__(
        self,
        needs: Mapping[str, Callable[[Any], Need]],
        grants: Sequence[Grant] = (),
        trust: Trust | None = None,
    ) -> None:
        """`needs` is by `Service/Method`. A call that is not there is refused to everybody."""
        self.grants = tuple(grants)
        self._needs = needs
        self._trust = trust

    def admit(self, method: str, request: Any, context: Context) -> Callable[[], None]:
        """Raise PERMISSION or TLS unless the caller may do this; returns what says whether it still may."""
        identity = caller_of(context)
        self._check_certificate(identity, method)
        need = self._needs.get(method)
        if need is None:
            raise denied(identity, method, None, "no role has this call")
        right, targets = need(request)
        if not targets:
            self.require(identity, method, right, None)
        for target in targets:
            self.require_target(identity, method, right, target)
        return lambda: self._check_certificate(identity, method)

    def may_look(self, context: Context, volume: str) -> bool:
        """Whether a volume is listed for the caller."""
        return self._allows(caller_of(context), Right.LOOK, volume)

    def _allows(self, identity: Identity, right: Right, volume: str | None) -> bool:
        return not self.grants or identity.local or allows(identity.names, self.grants, right, volume)

    def require_target(self, identity: Identity, method: str, right: Right, target: object) -> None:
        """Raise PERMISSION unless the caller has a right on a target: here, on a volume of that name."""
        assert isinstance(target, str)
        self.require(identity, method, right, target)

    def require(self, identity: Identity, method: str, right: Right, volume: str | None) -> None:
        """Raise PERMISSION unless the caller has a right on a volume (None: on any)."""
        if self._allows(identity, right, volume):
            return
        role = min((role for role, rights in ROLES.items() if right in rights), key=lambda role: len(ROLES[role]))
        if identity.certificate is None:
            grant = "none without an identity: connect with TLS, or through a UNIX socket"
        elif not identity.certificate.names:
            grant = "none to a certificate without subject alternative names"
        else:
            grant = f'[[grant]] san = "{identity.certificate.names[0][1]}", role = "{role}"'
            grant += f', volumes = ["{volume}"]' if volume else ""
        raise denied(identity, method, volume, f"may not {right.value} {volume or 'any volume'}", grant)

    def _check_certificate(self, identity: Identity, method: str) -> None:
        """TLS has checked it once, when the connection was made, perhaps weeks ago."""
        certificate = identity.certificate
        if certificate is None:
            return
        problem = certificate.problem(datetime.now(UTC))
        if self._trust is not None and certificate in self._trust.material.revocations:
            problem = "it was revoked"
        if problem:
            log.warning(
                "certificate refused",
                identity=identity.label,
                problem=problem,
                method=method,
                serial=f"{certificate.serial:x}",
                fingerprint=certificate.fingerprint,
            )
            raise BlockferryError(
                Code.TLS,
                "the server refuses this certificate",
                cause=problem,
                next="renew it" if "expired" in problem else "have a new one issued",
            )


def denied(identity: Identity, method: str, volume: str | None, missing: str, grant: str = "") -> BlockferryError:
    """What the caller hears; the log hears the rest."""
    log.warning(
        "denied",
        identity=identity.label,
        method=method,
        missing=missing,
        **({"volume": volume} if volume else {}),
        **({"grant": grant} if grant else {}),
    )
    return BlockferryError(
        Code.PERMISSION,
        f"{method.partition('/')[2]} is denied",
        cause="this identity may not do that",
        next="ask whoever administers the server; its log says what is missing",
    )
