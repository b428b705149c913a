"""The destination site: replicas in pools, served over gRPC."""

import os

# gRPC reads it while it is imported. Of its lowest level are failed handshakes, which handshakes.py picks out.
_theirs = os.environ.get("GRPC_VERBOSITY")
os.environ["GRPC_VERBOSITY"] = _theirs or "INFO"
import grpc  # noqa: E402, F401

if not _theirs:
    # Programs that we start are not meant.
    del os.environ["GRPC_VERBOSITY"]
