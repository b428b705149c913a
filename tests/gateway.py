"""A real S3 on loopback: a Ceph object gateway, one monitor and one storage daemon, which keeps everything in memory.

Needs root and Debian's packages of the group `gateway` in deploy/packages. All three run in the foreground, as
children, and are ended by their process ids. About twelve seconds until it answers.

    python -m tests.gateway BUCKET      runs one until it is interrupted, and prints how to reach it
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import http.client
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("monmaptool", "ceph-mon", "ceph-osd", "ceph", "radosgw", "radosgw-admin")
START_SECONDS = 120
MEMORY = 2 << 30
"""Bytes that the storage daemon may keep."""
REGION = "us-east-1"

_CONFIGURATION = """[global]
fsid = {fsid}
mon_host = v1:127.0.0.1:{monitor}
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_data_avail_warn = 2
mon_data_avail_crit = 1
ms_bind_ipv6 = false
public_addr = 127.0.0.1
run_dir = {root}
log_file = {root}/$name.log
pid_file =
admin_socket =
osd_objectstore = memstore
memstore_device_bytes = {memory}
[client.rgw.a]
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_data = {root}/rgw
"""


def missing_tools() -> list[str]:
    """What has to be installed first."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@dataclass(frozen=True)
class User:
    """Somebody with credentials."""

    name: str
    access_key: str
    secret_key: str


class Gateway:
    """One cluster. `start` it, and `stop` it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port = _free_port()
        self._configuration = root / "ceph.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def endpoint(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self, user: User) -> dict[str, str]:
        """What says all of it to an S3 client."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": user.access_key,
            "AWS_SECRET_ACCESS_KEY": user.secret_key,
            "AWS_REGION": REGION,
        }

    def start(self) -> Gateway:
        """Make the cluster and wait until it answers."""
        for name in ("mon", "osd", "rgw"):
            (self.root / name).mkdir(parents=True)
        fsid, monitor = str(uuid.uuid4()), _free_port()
        self._configuration.write_text(
            _CONFIGURATION.format(fsid=fsid, monitor=monitor, root=self.root, memory=MEMORY, port=self.port)
        )
        try:
            table, mon, osd = (str(self.root / name) for name in ("monmap", "mon", "osd"))
            self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{monitor}]", table)
            self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", table, "--mon-data", mon)
            self._daemon("ceph-mon", "-i", "a", "--mon-data", mon)
            self._run("ceph", "osd", "create")
            self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-data", osd)
            self._daemon("ceph-osd", "-i", "0", "--osd-data", osd)
            self._daemon("radosgw", "-n", "client.rgw.a")
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the daemons, the last one first."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons = []

    def user(self, name: str) -> User:
        """A new user."""
        made = User(name, f"KEY{name.upper()}", hashlib.sha256(name.encode()).hexdigest()[:40])
        self._admin(
            "user", "create", f"--uid={name}", f"--display-name={name}",
            f"--access-key={made.access_key}", f"--secret-key={made.secret_key}",
        )  # fmt: skip
        return made

    def quota(self, user: User, size: int) -> None:
        """Let all the buckets of a user hold at most `size` bytes."""
        scope = f"--uid={user.name}", "--quota-scope=user"
        self._admin("quota", "set", *scope, f"--max-size={size}")
        self._admin("quota", "enable", *scope)

    def bucket(self, user: User, name: str) -> str:
        """A new bucket of a user's; its name."""
        status, answer = self.request(user, "PUT", f"/{name}")
        assert status == 200, answer
        return name

    def request(self, user: User, method: str, path: str) -> tuple[int, bytes]:
        """One signed request without a body (AWS Signature Version 4); its status and answer."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        nothing = hashlib.sha256(b"").hexdigest()
        headers = {"host": f"127.0.0.1:{self.port}", "x-amz-content-sha256": nothing, "x-amz-date": now}
        names = ";".join(headers)
        lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
        scope = f"{now[:8]}/{REGION}/s3/aws4_request"
        canonical = f"{method}\n{path}\n\n{lines}\n{names}\n{nothing}"
        text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        key = f"AWS4{user.secret_key}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        signature = hmac.digest(key, text.encode(), "sha256").hex()
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={user.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
        )
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    # --- processes ----------------------------------------------------------------------------------------------------

    def _words(self, program: str, *arguments: str) -> list[str]:
        configuration = [] if program == "monmaptool" else ["-c", str(self._configuration)]
        return [program, *configuration, *arguments]

    def _run(self, program: str, *arguments: str) -> None:
        with (self.root / "up.log").open("ab") as log:
            words = self._words(program, *arguments)
            subprocess.run(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, check=True, timeout=START_SECONDS)

    def _admin(self, *arguments: str) -> None:
        self._run("radosgw-admin", "-n", "client.rgw.a", *arguments)

    def _daemon(self, program: str, *arguments: str) -> None:
        with (self.root / f"{program}.out").open("ab") as out:
            words = [*self._words(program, *arguments), "-f"]
            self._daemons.append(
                subprocess.Popen(words, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True)
            )

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while True:
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > end:
                raise AssertionError(f"the gateway did not start ({ended or 'in time'}): see {self.root}")
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                time.sleep(0.2)
            else:
                return


def main(bucket: str) -> None:
    """Run one with a bucket until SIGINT or SIGTERM."""
    with tempfile.TemporaryDirectory(prefix="rgw-") as root:
        gateway = Gateway(Path(root)).start()
        try:
            user = gateway.user("operator")
            gateway.bucket(user, bucket)
            for name, value in gateway.environment(user).items():
                print(f"export {name}={value}")
            print(f"# the store is s3://{bucket}/PREFIX; what is in it is lost at the end", flush=True)
            # Not before: a mask is inherited, and the daemons are to be ended by a signal.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            signal.sigwait({signal.SIGINT, signal.SIGTERM})
        finally:
            gateway.stop()


if __name__ == "__main__":
    main(sys.argv[1])
