"""The commands of a small private authority: pki init, issue, renew, revoke, show."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

from blockferry.client import authority
from blockferry.client.authority import Authority
from blockferry.client.cli.main import Command
from blockferry.client.cli.render import Console
from blockferry.client.report import SCHEMA
from blockferry.common.certificates import Certificate, describe
from blockferry.common.tls import read_file
from blockferry.common.volumes import in_thread


def _fields(path: Path, certificate: Certificate) -> dict[str, object]:
    return {
        "path": str(path),
        "names": [f"{kind}:{text}" for kind, text in certificate.names],
        "subject": certificate.subject,
        "issuer": certificate.issuer,
        "serial": f"{certificate.serial:x}",
        "not_before": certificate.not_before.isoformat(),
        "not_after": certificate.not_after.isoformat(),
        "fingerprint": certificate.fingerprint,
        "authority": certificate.authority,
        "problem": certificate.problem(datetime.now(UTC)) or None,
        "warning": certificate.warning(datetime.now(UTC)) or None,
    }


def _lines(path: Path, certificate: Certificate) -> list[str]:
    now = datetime.now(UTC)
    names = ", ".join(f"{kind}:{text}" for kind, text in certificate.names)
    lines = [
        f"{path}: {'authority' if certificate.authority else 'certificate'}",
        f"  names        {names or 'none'}",
        f"  subject      {certificate.subject or 'none'}",
        f"  issuer       {certificate.issuer}",
        f"  valid        {certificate.not_before:%Y-%m-%d %H:%M} to {certificate.not_after:%Y-%m-%d %H:%M} UTC",
        f"  serial       {certificate.serial:x}",
        f"  fingerprint  SHA-256 {certificate.fingerprint}",
    ]
    text = certificate.problem(now) or certificate.warning(now)
    return [*lines, f"  WARNING      {text}"] if text else lines


async def _init(arguments: argparse.Namespace, console: Console) -> int:
    made = await in_thread(Authority.create, arguments.directory, arguments.name, arguments.days)
    path = arguments.directory / "ca.crt"
    console.result(
        {"schema": SCHEMA, **_fields(path, made.certificate), "key": str(arguments.directory / "ca.key")},
        [
            *_lines(path, made.certificate),
            f"  key          {arguments.directory / 'ca.key'}: whoever has it can be anybody; keep the directory on a "
            "machine that is neither site's",
        ],
    )
    return 0


async def _issue(arguments: argparse.Namespace, console: Console) -> int:
    names = [authority.parse_name(text) for text in arguments.names]
    prefix: Path = arguments.out or authority.default_prefix(arguments.directory, arguments.names)
    ours = await in_thread(Authority, arguments.directory)
    issued = await in_thread(ours.issue, names, arguments.days, prefix)
    path, key = prefix.with_name(prefix.name + ".crt"), prefix.with_name(prefix.name + ".key")
    console.result(
        {"schema": SCHEMA, **_fields(path, issued), "key": str(key)},
        [*_lines(path, issued), f"  key          {key}: move it to the host it is for, and let no copy stay"],
    )
    return 0


async def _renew(arguments: argparse.Namespace, console: Console) -> int:
    ours = await in_thread(Authority, arguments.directory)
    renewed = await in_thread(ours.renew, arguments.certificate, arguments.days)
    report = {"schema": SCHEMA, **_fields(arguments.certificate, renewed)}
    console.result(report, _lines(arguments.certificate, renewed))
    return 0


async def _revoke(arguments: argparse.Namespace, console: Console) -> int:
    ours = await in_thread(Authority, arguments.directory)
    revoked = await in_thread(ours.revoke, arguments.certificate)
    path = arguments.directory / "ca.crl"
    console.result(
        {"schema": SCHEMA, **_fields(arguments.certificate, revoked), "crl": str(path)},
        [
            f"{arguments.certificate}: revoked ({revoked.label}, serial {revoked.serial:x})",
            f"  now          copy {path} to every server: each refuses the certificate within seconds",
        ],
    )
    return 0


async def _show(arguments: argparse.Namespace, console: Console) -> int:
    found = [
        (path, one) for path in arguments.certificates for one in describe(await in_thread(read_file, path), str(path))
    ]
    report = {"schema": SCHEMA, "certificates": [_fields(path, one) for path, one in found]}
    console.result(report, [line for path, one in found for line in _lines(path, one)])
    return 0


COMMANDS: dict[str, Command] = {
    "pki_init": _init,
    "pki_issue": _issue,
    "pki_renew": _renew,
    "pki_revoke": _revoke,
    "pki_show": _show,
}
