"""The configuration of a server: what its keys mean, everything wrong at once, and that nothing breaks the loader."""

from __future__ import annotations

import os
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
from blockferry.common.config import (
    KINDS,
    LARGEST_FILE,
    ClientLimits,
    ConfigError,
    DeviceConfig,
    LimitsConfig,
    PoolConfig,
    ServerConfig,
    kind_of,
    load_document,
    load_server,
    parse,
    validate,
)
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.retention import Retention
from blockferry.common.settings import Grant, Tls
from blockferry.common.strict import read
from hypothesis import example, given
from hypothesis import strategies as st

EVERYTHING = """\
listen = ["grpcs://127.0.0.1:9870", "grpc+unix:///run/blockferry/server.sock"]
insecure = false
scrub_every = "7d"
[tls]
cert = "/etc/blockferry/server.crt"
key = "/etc/blockferry/server.key"
ca = "/etc/blockferry/ca.crt"
crl = "/etc/blockferry/ca.crl"
[pool.main]
path = "/srv/replicas"
reserve = "10G"
quota = "100G"
journal_limit = "5G"
keep_at_least = { last = 3, daily = 3 }
[pool.second]
path = "/srv/more"
[device.db2]
path = "/dev/disk/by-id/wwn-1"
journal = "/srv/journal"
journal_limit = "50G"
keep_at_least = { last = 1 }
[device.db3]
path = "nbd+unix:///db3?socket=/run/nbd.sock"
journal = "/srv/journal"
[limits]
lease = "30s"
message_size = "8M"
sessions = 10
calls = 11
connections = 12
calls_per_second = 13
bytes_in_flight = "512M"
[limits.per_client]
sessions = 1
calls = 2
connections = 3
calls_per_second = 4
bytes_in_flight = "16M"
[[grant]]
san = "agent.site-a"
role = "agent"
volumes = ["db", "erp-*"]
[[grant]]
san = "admin"
role = "operator"
"""

MEANT = ServerConfig(
    listen=("grpcs://127.0.0.1:9870", "grpc+unix:///run/blockferry/server.sock"),
    insecure=False,
    scrub_every=7 * 86400,
    tls=Tls(
        cert=Path("/etc/blockferry/server.crt"),
        key=Path("/etc/blockferry/server.key"),
        ca=Path("/etc/blockferry/ca.crt"),
        crl=Path("/etc/blockferry/ca.crl"),
    ),
    pool={
        "main": PoolConfig(Path("/srv/replicas"), 10 << 30, 100 << 30, 5 << 30, Retention(last=3, daily=3)),
        "second": PoolConfig(Path("/srv/more")),
    },
    device={
        "db2": DeviceConfig("/dev/disk/by-id/wwn-1", Path("/srv/journal"), 50 << 30, Retention(last=1)),
        "db3": DeviceConfig("nbd+unix:///db3?socket=/run/nbd.sock", Path("/srv/journal")),
    },
    limits=LimitsConfig(
        lease=30.0,
        message_size=8 << 20,
        sessions=10,
        calls=11,
        connections=12,
        calls_per_second=13,
        bytes_in_flight=512 << 20,
        per_client=ClientLimits(1, 2, 3, 4, 16 << 20),
    ),
    grant=(
        Grant("agent.site-a", "agent", ("db", "erp-*")),
        Grant("admin", "operator"),
    ),
)


POOL = "[pool.main]\npath = '/p'\n"


def lines(text: str) -> list[str]:
    """All that is wrong with a server's file."""
    with pytest.raises(ConfigError) as caught:
        validate("server", parse(text.encode(), "f"), "f")
    assert caught.value.code is Code.INVALID_ARGUMENT
    return [problem.line() for problem in caught.value.problems]


def test_every_key_is_read_as_documented() -> None:
    assert read(ServerConfig, tomllib.loads(EVERYTHING)) == (MEANT, [])


def test_an_empty_file_is_all_defaults() -> None:
    assert validate("server", parse(b"", "f"), "f") == ServerConfig()


TLS = "[tls]\ncert = '/c'\nkey = '/k'\nca = '/a'\n"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("listen = ['grpcs://0.0.0.0:1']", ["listen[0]: TLS needs a certificate; add a section [tls]"]),
        (f"listen = ['grpcs://0.0.0.0:1']\n{TLS}", []),
        (f"listen = ['grpc+unix:///s', 'grpc://127.0.0.1:1']\n{TLS}[[grant]]\nsan = 'x'\nrole = 'agent'",
         ["listen[1]: with grants nobody could use it"]),
        (f"listen = ['grpc+unix:///s']\n{TLS}[[grant]]\nsan = 'x'\nrole = 'agent'", []),
    ],
)  # fmt: skip
def test_addresses_and_identities_go_together(text: str, lines: list[str]) -> None:
    try:
        validate("server", tomllib.loads(text), "f")
    except ConfigError as error:
        found = [problem.line() for problem in error.problems]
    else:
        found = []
    assert len(found) == len(lines)
    for line, words in zip(found, lines, strict=True):
        assert words in line


def test_one_device_has_one_name() -> None:
    text = "".join(f"[device.{name}]\npath = '/dev/sdb'\njournal = '/srv'\n" for name in ("a", "b"))
    with pytest.raises(ConfigError) as caught:
        validate("server", tomllib.loads(text), "f")
    assert [problem.line() for problem in caught.value.problems] == [
        "device.b.path: is the device of a too; give each device one name"
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("listn = []", "listn: is not a known key; did you mean listen?"),
        (f"{POOL}reserv = 1", "pool.main.reserv: is not a known key; did you mean pool.main.reserve?"),
        (
            "[limits.per_client]\nsesions = 1",
            "limits.per_client.sesions: is not a known key; did you mean limits.per_client.sessions?",
        ),
        (f"{POOL}reserve = '10X'", "pool.main.reserve: '10X' is not a size; write a number with K, M, G or T"),
        (f"{POOL}quota = -1", "pool.main.quota: '-1' is not a size; write a number with K, M, G or T"),
        (f"{POOL}quota = 1.5",
         'pool.main.quota: must be a size such as "10G", not a number with a fraction'),
        ("[pool.main]\nreserve = '10G'", "pool.main.path: is missing"),
        ("[pool.main]\npath = 'srv'", "pool.main.path: 'srv' is not an absolute path; write it from / on"),
        ('[pool.main]\npath = "/a\\u0000b"', "pool.main.path: '/a\\x00b' is not an absolute path; write it from / on"),
        (
            POOL + "keep_at_least = { lst = 1 }",
            "pool.main.keep_at_least.lst: is not a known key; did you mean pool.main.keep_at_least.last?",
        ),
        (
            POOL + "keep_at_least = { last = -1 }",
            "pool.main.keep_at_least.last: must be a whole number from 0 to 4294967295, not -1",
        ),
        (f"{POOL}keep_at_least = 'last=3'", "pool.main.keep_at_least: must be a table, not text"),
        ("scrub_every = 60", "scrub_every: '60' is not a duration; write a number with s, m, h or d, such as 7d, or 0"),
        ("[limits]\nlease = 60", 'limits.lease: must be a duration such as "60s", not a whole number'),
        ("[limits]\nlease = '0.01s'", "limits.lease: '0.01s' is out of range; write 0.1s to 24h"),
        ("[limits]\nlease = '25h'", "limits.lease: '25h' is out of range; write 0.1s to 24h"),
        ("[limits]\nmessage_size = '1K'", "limits.message_size: '1K' is out of range; write 5M to 64M"),
        ("[limits]\nsessions = 0", "limits.sessions: must be a whole number from 1 to 1000000, not 0"),
        ("[limits]\nbytes_in_flight = '2T'", "limits.bytes_in_flight: '2T' is out of range; write 1M to 1T"),
        ("listen = ['http://x']", "listen[0]: 'http://x' is not a usable address: http scheme; write "
         "grpc://HOST:PORT/VOLUME, grpcs:// for TLS, or grpc+unix:///SOCKET?volume=VOLUME"),
        ("listen = ['grpc://127.0.0.1:1/db']", "listen[0]: 'grpc://127.0.0.1:1/db' names a volume; write "
         "grpc://HOST:PORT or grpc+unix:///SOCKET: a server serves them all"),
        ("listen = []", "listen: a server that listens nowhere serves nobody; name an address, or leave it out"),
        (
            "listen = ['grpc://127.0.0.1:1', 'grpc://0.0.0.0:1']",
            "listen[1]: without TLS anybody on the way could read and change whole disks; use grpcs://, a loopback "
            "address, or insecure = true here and --insecure at clients if the network itself is trusted",
        ),
        (
            "[pool.a]\npath = '/p'\n[pool.b]\npath = '/p/./'",
            "pool.b.path: is the directory of pool a too; give each pool a directory of its own",
        ),
        (
            "[pool.a]\npath = '/p/q'\n[pool.b]\npath = '/p'",
            "pool.b.path: /p and /p/q are inside each other; use directories beside each other",
        ),
        ("[device.x]\npath = 'nbd:///x'\njournal = '/j'", "device.x.path: "),
        ("[[grant]]\nsan = 'x'\nrole = 'admin'",
         'grant[0].role: must be "agent" or "operator" or "viewer", not "admin"'),
        ("[[grant]]\nsan = ''\nrole = 'agent'", "grant[0].san: "),
        ("[[grant]]\nsan = 'x'\nrole = 'agent'\nvolumes = ['']", "grant[0].volumes[0]: "),
        ("[grant]\nsan = 'x'", "grant: must be an array, not a table"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_path(text: str, line: str) -> None:
    found = [one for one in lines(text) if not one.endswith(("remove the section", "remove the grants"))]
    assert len(found) == 1
    assert found[0].startswith(line) if line.endswith(": ") else found[0] == line


def test_grants_need_certificates() -> None:
    grant = "[[grant]]\nsan = 'x'\nrole = 'agent'\n"
    assert "grant: without TLS nobody can be told apart; add a section [tls], or remove the grants" in lines(grant)
    # Something is wrong there already.
    assert not any("told apart" in line for line in lines(grant + "[tls]\ncert = '/c'\n"))


def test_a_name_of_a_pool_is_a_name() -> None:
    assert lines("[pool.'../x']\npath = '/p'")[0].startswith("pool.\"../x\": '../x' is not a volume name: a name has")


def test_everything_wrong_is_said_at_once() -> None:
    found = lines(
        "listn = 1\ninsecure = 1\n[pool.a]\nreserve = 'x'\n[pool.b]\npath = '/p'\nquota = []\n[limits]\nsessions = '1'"
    )
    assert [line.split(":")[0] for line in found] == [
        "listn",
        "insecure",
        "pool.a.path",
        "pool.a.reserve",
        "pool.b.quota",
        "limits.sessions",
    ]


def test_one_mistake_is_said_once() -> None:
    # Whether an address needs `insecure` cannot be said while that is wrong.
    assert lines("listen = ['grpc://0.0.0.0:1']\ninsecure = 'yes'") == ['insecure: must be true or false, not "yes"']


def test_plaintext_for_other_machines_must_be_asked_for() -> None:
    found = validate("server", parse(b"listen = ['grpc://0.0.0.0:1']\ninsecure = true", "f"), "f")
    assert found == ServerConfig(listen=("grpc://0.0.0.0:1",), insecure=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a = \n", "line 1, column 5"),
        (b"listen = []\nlisten = []\n", "line 2, column 12"),
        (b"[pool.a]\n[pool.a]\n", "line 2"),
        (b"x = 1\ny = 'a\n", "line 3, column 1, its end"),
        ("x = 'ü".encode(), "line 1, column 7, its end"),
        (b"# \xff\n", "not UTF-8 (at line 1, column 3)"),
        (b"a = 1\n# b\nx\xff", "not UTF-8 (at line 3, column 2)"),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
        (b"a = " + b"{a=" * 100_000, "nested too deeply"),
        (b"a = " + b"9" * 5000, "a number with far too many digits"),
        (b" " * (LARGEST_FILE + 1), f"larger than {LARGEST_FILE} bytes"),
    ],
    ids=range(11),
)
def test_what_is_not_toml_is_refused_with_its_place(text: bytes, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "some/file.toml")
    (line,) = caught.value.lines()
    assert words in line
    assert line.startswith("some/file.toml: ")


def test_what_a_key_file_holds_is_never_shown() -> None:
    secret = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC"
    pem = f"-----BEGIN PRIVATE KEY-----\\n{secret}\\n-----END PRIVATE KEY-----"
    for value in (f'"{pem}"', f'["{pem}"]', f'{{ pem = "{pem}" }}'):
        with pytest.raises(ConfigError) as caught:
            validate("server", parse(f"[tls]\ncert = '/c'\nca = '/a'\nkey = {value}".encode(), "f"), "f")
        shown = repr([caught.value, caught.value.lines(), caught.value.fields(), caught.value.args])
        assert "tls.key" in shown
        assert secret not in shown
        assert caught.value.__cause__ is None


def test_one_error_is_a_line_and_many_are_bounded() -> None:
    with pytest.raises(ConfigError) as caught:
        validate("server", {f"key-{number}": 1 for number in range(250)}, "f")
    error = caught.value
    assert error.line() == (
        f"f is not a valid configuration: {error.problems[0].line()} (and 249 more); blockferry config check shows all "
        "that is wrong"
    )
    assert len(error.lines()) == 101
    assert error.lines()[-1] == "f: and 150 more"
    assert len(error.fields()["problems"]) == 250
    assert error.fields()["problems"][0] == {
        "path": "key-0",
        "cause": "is not a known key",
        "next": error.problems[0].next,
    }


def test_the_kind_of_a_file_is_told_by_its_keys() -> None:
    assert list(KINDS) == ["server", "agent"]
    documents: list[dict[str, object]] = [{}, {"pool": {}}, {"nonsense": 1}]
    for document in documents:
        assert kind_of(document) == "server"


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("insecure = true\n")
    assert load_server(file) == ServerConfig(insecure=True)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path, code in ((tmp_path / "absent", Code.NOT_FOUND), (tmp_path, Code.IO_ERROR)):
        with pytest.raises(BlockferryError) as caught:
            load_server(path)
        assert caught.value.code is code
        assert caught.value.what == f"cannot read {path}"


def test_no_more_is_read_than_a_file_may_have() -> None:
    with pytest.raises(ConfigError, match="larger than"):
        load_server(Path("/dev/zero"))


def test_a_pipe_is_as_good_as_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"insecure = true",))
    writer.start()
    assert load_document(pipe) == {"insecure": True}
    writer.join()


# --- anything at all --------------------------------------------------------------------------------------------------

LINES = EVERYTHING.splitlines()
VALUES = [
    "1",
    "-1",
    "0",
    "'x'",
    "'10G'",
    "[]",
    "{}",
    "true",
    "1.5",
    "nan",
    "1979-05-27",
    "07:32:00",
    "['/']",
    "",
    "0xFF",
]


def lines_are_lines(error: ConfigError) -> None:
    assert error.problems
    for line in error.lines():
        assert line.startswith("f: ") and line == " ".join(line.split())
        assert len(line) < 1500


def loads_or_refuses(data: bytes) -> None:
    """Nothing but a configuration or the loader's own error comes out."""
    try:
        found = validate("server", parse(data, "f"), "f")
    except ConfigError as error:
        lines_are_lines(error)
        return
    assert isinstance(found, ServerConfig)
    assert 0.1 <= found.limits.lease <= 86400
    assert found.listen and all(pool.path.is_absolute() for pool in found.pool.values())


@given(st.binary(max_size=200))
@example(b"a = 0x" + b"f" * 200_000)
@example(b"a" + b".a" * 2_000 + b" = 1")
@example(b"[" + b"pool." * 10_000 + b"a]")
@example(b"pool.main = " + b"[" * 400 + b"]" * 400)
def test_no_bytes_break_the_loader(data: bytes) -> None:
    loads_or_refuses(data)


@given(st.text(alphabet="ab=[]{}'\".,#\n 019-:T\\u", max_size=120))
def test_no_text_that_looks_like_toml_breaks_the_loader(text: str) -> None:
    loads_or_refuses(text.encode())


@st.composite
def _mutations(draw: st.DrawFn) -> bytes:
    """A right file with a few lines changed, moved, doubled, dropped or given other values, or with other bytes."""
    changed = list(LINES)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(changed) - 1))
        match draw(st.sampled_from(["drop", "double", "swap", "value", "key", "garble"])):
            case "drop" if len(changed) > 1:
                del changed[at]
            case "double":
                changed.insert(at, changed[at])
            case "swap":
                other = draw(st.integers(0, len(changed) - 1))
                changed[at], changed[other] = changed[other], changed[at]
            case "value":
                changed[at] = f"{changed[at].partition('=')[0]}= {draw(st.sampled_from(VALUES) | st.text(max_size=5))}"
            case "key":
                changed[at] = draw(st.text(alphabet="abcdlimtsonger_.-[] \"'", max_size=10)) + changed[at]
            case _:
                cut = draw(st.integers(0, len(changed[at])))
                changed[at] = changed[at][:cut] + draw(st.text(max_size=3)) + changed[at][cut + 1 :]
    data = bytearray("\n".join(changed).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(0, 2))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@given(_mutations())
def test_no_change_to_a_right_file_breaks_the_loader(data: bytes) -> None:
    loads_or_refuses(data)


_toml_values: st.SearchStrategy[Any] = st.recursive(
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.dates()
    | st.sampled_from(["10G", "60s", "/p"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["main", "path", "key", "last", "sessions", "per_client", "san", "role"])
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(ServerConfig.__struct_fields__), _toml_values))
def test_no_document_breaks_the_loader(document: dict[str, Any]) -> None:
    try:
        validate("server", document, "f")
    except ConfigError as error:
        lines_are_lines(error)
