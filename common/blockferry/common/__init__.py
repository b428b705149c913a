"""blockferry shared by both sites: volumes, formats, and what carries them."""

import os

# gRPC's own complaints would come between a progress display and the one line an error is. It reads this once, when it
# is first imported, which happens below this package only. Set the variable to see them.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
