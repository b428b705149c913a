"""Errors keep every field on their way through gRPC, and nothing a peer sends makes reading them fail."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import grpc
import grpc.aio
import pytest
from blockferry.common import rpc
from blockferry.common.errors import BlockferryError, Code
from blockferry.common.rpc import from_rpc_error, to_status
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

DETAILS = "grpc-status-details-bin"
ADDRESS = "grpc://127.0.0.1:1/db"

texts = st.text(max_size=40)


def rpc_error(code: grpc.StatusCode, details: str, trailing: bytes | None = None) -> grpc.aio.AioRpcError:
    metadata = grpc.aio.Metadata(*([(DETAILS, trailing)] if trailing is not None else []))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details=details)


def travelled(error: BlockferryError) -> BlockferryError:
    """What a client makes of an error that a server raised."""
    status = to_status(error)
    return from_rpc_error(rpc_error(grpc.StatusCode.UNKNOWN, status.message, status.SerializeToString()), ADDRESS)


@given(
    st.sampled_from(Code), texts, texts, texts, st.none() | texts,
    st.none() | st.integers(0, 2**64), st.none() | st.integers(0, 2**64), st.none() | texts, st.none() | texts,
)  # fmt: skip
def test_all_fields_arrive(
    code: Code, what: str, cause: str, next: str, volume: str | None,
    offset: int | None, length: int | None, expected: str | None, found: str | None,
) -> None:  # fmt: skip
    sent = BlockferryError(
        code, what, cause=cause, next=next, volume=volume, offset=offset, length=length, expected=expected, found=found
    )
    received = travelled(sent)
    assert received.fields() == sent.fields()
    assert received.line() == sent.line()


@pytest.mark.parametrize("code", Code)
def test_every_kind_of_error_has_a_status_that_is_not_ok(code: Code) -> None:
    assert to_status(BlockferryError(code, "failed")).code != grpc.StatusCode.OK.value[0]


def test_stale_writers_and_bad_requests_have_the_statuses_of_the_contract() -> None:
    assert to_status(BlockferryError(Code.STALE_EPOCH, "over")).code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert to_status(BlockferryError(Code.INVALID_ARGUMENT, "bad")).code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


def test_a_path_that_is_not_utf8_still_arrives() -> None:
    # What os.fsdecode makes of the byte 0xff: protobuf strings cannot hold it.
    received = travelled(BlockferryError(Code.NOT_FOUND, "cannot open /srv/\udcff", volume="/srv/\udcff"))
    assert received.code is Code.NOT_FOUND
    assert received.volume == "/srv/\\udcff"


@given(st.binary(max_size=60))
def test_details_that_cannot_be_read_are_passed_over(garbage: bytes) -> None:
    error = from_rpc_error(rpc_error(grpc.StatusCode.INTERNAL, "trouble", garbage), ADDRESS)
    assert (error.code, error.cause) == (Code.INTERNAL, "trouble")


@pytest.mark.parametrize(
    ("domain", "reason"), [("blockferry", "FROM_THE_FUTURE"), ("blockferry", ""), ("example.org", "IN_USE")]
)
def test_an_unknown_reason_or_domain_is_no_error_of_ours(domain: str, reason: str) -> None:
    status = status_pb2.Status(code=13, message="trouble")
    status.details.add().Pack(error_details_pb2.ErrorInfo(domain=domain, reason=reason))
    error = from_rpc_error(rpc_error(grpc.StatusCode.INTERNAL, "trouble", status.SerializeToString()), ADDRESS)
    assert error.code is Code.INTERNAL


@pytest.mark.parametrize("text", ["", "-1", "one", "\u00b2", "1.5", " 1"])
def test_a_number_that_is_none_is_left_out(text: str) -> None:
    status = status_pb2.Status(code=13)
    info = error_details_pb2.ErrorInfo(domain="blockferry", reason="IO_ERROR", metadata={"offset": text})
    status.details.add().Pack(info)
    error = from_rpc_error(rpc_error(grpc.StatusCode.DATA_LOSS, "", status.SerializeToString()), ADDRESS)
    assert (error.code, error.offset) == (Code.IO_ERROR, None)


@pytest.mark.parametrize(
    ("status", "details", "code", "what"),
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect to all", Code.UNAVAILABLE, f"cannot reach {ADDRESS}"),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", Code.UNAVAILABLE, f"lost the connection to {ADDRESS}"),
        (grpc.StatusCode.CANCELLED, "", Code.UNAVAILABLE, f"lost the connection to {ADDRESS}"),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", Code.PROTOCOL, f"{ADDRESS} does not know this call"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "too large", Code.LIMITED, f"{ADDRESS} refuses a call"),
    ],
)  # fmt: skip
def test_what_a_bare_status_means(status: grpc.StatusCode, details: str, code: Code, what: str) -> None:
    error = from_rpc_error(rpc_error(status, details), ADDRESS)
    assert (error.code, error.what) == (code, what)
    assert error.next


def test_grpc_knows_every_option() -> None:
    """It passes over names that it does not know without a word."""
    found = importlib.util.find_spec("grpc._cython.cygrpc")
    assert found is not None and found.origin is not None
    library = Path(found.origin).read_bytes()
    names = {name for name, _ in [*rpc._SERVER_OPTIONS, *rpc._CLIENT_OPTIONS]} | set(rpc._BOUNDS)
    assert len(names) == 16
    assert {name for name in names if b"%s\0" % name.encode() not in library} == set()
    assert b"grpc.http2.min_recv_ping_interval_without_data_ms\0" not in library
