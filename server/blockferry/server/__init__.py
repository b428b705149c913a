"""The destination site: replicas in pools, served over gRPC."""

import os

# gRPC reads it while it is imported. Of its lowest level are failed handshakes, which handshakes.py picks out.
_said = os.environ.setdefault("GRPC_VERBOSITY", _ours := "INFO")
import grpc  # noqa: E402, F401

if _said is _ours:
    # Programs that we start are not meant.
    del os.environ["GRPC_VERBOSITY"]
