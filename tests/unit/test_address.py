"""Addresses mean what they say; everything else is one INVALID_ARGUMENT, and no name can become a path."""

from __future__ import annotations

import string
from urllib.parse import quote

import pytest
from blockferry.common.address import Address, check_volume_name, is_address
from blockferry.common.errors import BlockferryError, Code
from hypothesis import example, given
from hypothesis import strategies as st

FIRST = string.ascii_letters + string.digits
names = st.builds(str.__add__, st.sampled_from(FIRST), st.text(FIRST + "._-", max_size=127))


@given(names)
@example("a" * 128)
@example("0")
@example("a..")
def test_good_names_pass(name: str) -> None:
    assert check_volume_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "-a",
        "_a",
        ".a",
        "a/b",
        "../a",
        "a\0",
        "a b",
        "a\n",
        "a@1",
        "\u00e9",
        "\u0430",
        "\uff11",
        "a" * 129,
        "a" * 300,
    ],
)
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(BlockferryError) as caught:
        check_volume_name(name)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert len(caught.value.line()) < 300


@given(st.text(max_size=200))
def test_whatever_passes_is_one_path_component(name: str) -> None:
    try:
        check_volume_name(name)
    except BlockferryError:
        return
    assert name[0] in FIRST and set(name) <= set(FIRST + "._-") and len(name) <= 128


@pytest.mark.parametrize(
    ("uri", "target", "volume", "number", "loopback"),
    [
        ("grpc://127.0.0.1:9870", "127.0.0.1:9870", "", 0, True),
        ("grpc://127.0.0.1:9870/", "127.0.0.1:9870", "", 0, True),
        ("grpc://127.0.0.1:9870/db", "127.0.0.1:9870", "db", 0, True),
        ("grpc://127.0.0.1:9870/db@17", "127.0.0.1:9870", "db", 17, True),
        ("grpc://127.5.5.5:1/db", "127.5.5.5:1", "db", 0, True),
        ("grpc://localhost:0", "localhost:0", "", 0, True),
        ("grpc://[::1]:9870/db", "[::1]:9870", "db", 0, True),
        ("grpc://[2001:db8::1]:65535/db", "[2001:db8::1]:65535", "db", 0, False),
        ("grpc://dr1.example.org:9870/a.b-c_d", "dr1.example.org:9870", "a.b-c_d", 0, False),
        ("grpc://127.0.0.1.example.org:1/db", "127.0.0.1.example.org:1", "db", 0, False),
        ("grpc://0.0.0.0:1", "0.0.0.0:1", "", 0, False),
        ("grpc+unix:///run/b.sock", "unix:/run/b.sock", "", 0, True),
        ("grpc+unix:///run/b.sock?volume=db", "unix:/run/b.sock", "db", 0, True),
        ("grpc+unix:///run/b.sock?volume=db@2", "unix:/run/b.sock", "db", 2, True),
        ("grpc+unix:///run/b%20c.sock?volume=d%62", "unix:/run/b c.sock", "db", 0, True),
    ],
)
def test_what_an_address_means(uri: str, target: str, volume: str, number: int, loopback: bool) -> None:
    assert Address.parse(uri) == Address(target, volume, number, loopback, uri)
    assert is_address(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "db.img",
        "/srv/db.img",
        "http://127.0.0.1:1/db",
        "grpcs+unix:///run/b.sock",
        "grpcs://",
        "grpcs://127.0.0.1/db",
        "grpc://",
        "grpc:///db",
        "grpc://127.0.0.1/db",
        "grpc://:9870/db",
        "grpc://127.0.0.1:65536/db",
        "grpc://127.0.0.1:-1/db",
        "grpc://127.0.0.1:x/db",
        "grpc://[::1:1/db",
        "grpc://user@127.0.0.1:1/db",
        "grpc://127.0.0.1:1/db?volume=x",
        "grpc://127.0.0.1:1/db#x",
        "grpc://127.0.0.1:1//db",
        "grpc://127.0.0.1:1/db/",
        "grpc://127.0.0.1:1/../db",
        "grpc://127.0.0.1:1/%2e%2e",
        "grpc://127.0.0.1:1/a%2fb",
        "grpc://127.0.0.1:1/a%00",
        "grpc://127.0.0.1:1/a\tb",
        "grpc://127.0.0.1:1/a\nb",
        "grpc://127.0.0.1:1/db\n",
        "grpc://127.0.0.1:1/db@",
        "grpc://127.0.0.1:1/db@0",
        "grpc://127.0.0.1:1/db@-1",
        "grpc://127.0.0.1:1/db@1x",
        "grpc://127.0.0.1:1/db@1@2",
        "grpc://127.0.0.1:1/db@\u00b2",
        "grpc://127.0.0.1:1/db@" + "9" * 30,
        "grpc://127.0.0.1:1/@1",
        "grpc+unix://",
        "grpc+unix:///",
        "grpc+unix://host/run/b.sock",
        "grpc+unix:///run/b.sock?volume=../x",
        "grpc+unix:///run/b.sock?volume=a&volume=b",
        "grpc+unix:///run/b.sock?other=x",
        "grpc+unix:///run/b%00.sock?volume=a",
    ],
)
def test_what_is_no_address_is_refused_in_one_line(uri: str) -> None:
    with pytest.raises(BlockferryError) as caught:
        Address.parse(uri)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert len(caught.value.line().splitlines()) == 1


@given(
    st.one_of(st.text(max_size=60), st.text(max_size=60).map("grpc://{}".format), st.text().map("grpc+unix:{}".format))
)
def test_no_text_breaks_the_parser(uri: str) -> None:
    try:
        found = Address.parse(uri)
    except BlockferryError as error:
        refused: Code | None = error.code
    else:
        refused = None
    assert refused in (None, Code.INVALID_ARGUMENT)
    if refused is None:
        assert found.volume == "" or check_volume_name(found.volume)
        assert found.number >= 0


@given(names, st.integers(1, 10**18 - 1), st.integers(0, 65535))
def test_names_and_numbers_survive_both_kinds_of_address(name: str, number: int, port: int) -> None:
    over_tcp = Address.parse(f"grpc://127.0.0.1:{port}/{name}@{number}")
    over_unix = Address.parse(f"grpc+unix:///s?volume={quote(name)}@{number}")
    for found in (over_tcp, over_unix):
        assert (found.volume, found.number) == (name, number)
        assert found.require_volume() is found


@pytest.mark.parametrize(("host", "bare"), [("dr1.example", "dr1.example"), ("[2001:db8::1]", "2001:db8::1")])
def test_tls_is_part_of_an_address(host: str, bare: str) -> None:
    secure, plain = (Address.parse(f"{scheme}://{host}:9870/db@2") for scheme in ("grpcs", "grpc"))
    assert (secure.tls, plain.tls) == (True, False)
    assert (secure.target, secure.volume, secure.number) == (plain.target, plain.volume, plain.number)
    assert (secure.host, secure.port) == (bare, 9870)
    socket = Address.parse("grpc+unix:///run/b.sock")
    assert (socket.tls, socket.host, socket.port) == (False, "", 0)


def test_a_volume_can_be_required() -> None:
    with pytest.raises(BlockferryError) as caught:
        Address.parse("grpc://127.0.0.1:1").require_volume()
    assert "names no volume" in caught.value.line()


@pytest.mark.parametrize(
    ("uri", "expected"),
    [("grpcs://h:1/v", True), ("grpc", True), ("db.img", False), ("./grpc://x", False), ("file:///grpc", False)],
)
def test_what_is_taken_for_an_address(uri: str, expected: bool) -> None:
    assert is_address(uri) is expected
