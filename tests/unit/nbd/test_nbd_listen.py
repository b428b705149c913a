"""Where an NBD server listens, as people write it, and what its clients write."""

from __future__ import annotations

import pytest
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.nbd.uri import NbdListen, NbdUri


@pytest.mark.parametrize(
    ("text", "expected", "local"),
    [
        ("unix:/run/vm.sock", NbdListen("/run/vm.sock", "", 0), True),
        ("unix:relative:name", NbdListen("relative:name", "", 0), True),
        ("127.0.0.1:0", NbdListen("", "127.0.0.1", 0), True),
        ("localhost:10809", NbdListen("", "localhost", 10809), True),
        ("[::1]:65535", NbdListen("", "::1", 65535), True),
        ("[2001:db8::1]:10809", NbdListen("", "2001:db8::1", 10809), False),
        ("0.0.0.0:10809", NbdListen("", "0.0.0.0", 10809), False),
        ("disks.example:10809", NbdListen("", "disks.example", 10809), False),
    ],
)
def test_places(text: str, expected: NbdListen, local: bool) -> None:
    found = NbdListen.parse(text)
    assert (found, found.local) == (expected, local)


@pytest.mark.parametrize(
    "text", ["", "unix:", "unix:\0", "host", "host:", ":10809", "host:65536", "host:-1", "host:x", "::1:10809", "h:1²"]
)
def test_what_is_no_place(text: str) -> None:
    with pytest.raises(BlockferryError) as caught:
        NbdListen.parse(text)
    assert caught.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("tls", [True, False])
@pytest.mark.parametrize("text", ["unix:/run/a b?&.sock", "127.0.0.1:10809", "[::1]:10809"])
def test_clients_find_it(text: str, tls: bool) -> None:
    where = NbdListen.parse(text)
    found = NbdUri.parse(where.uri("a disk/1", tls=tls))
    assert (found.socket, found.host) == (where.socket, where.host)
    assert (found.export, found.tls, found.port) == ("a disk/1", tls, where.port or 10809)
