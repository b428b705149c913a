"""Real agents for tests: blockferry-agent with a configuration file and a state directory of its own.

Nothing here imports blockferry: whatever a test sees of it comes out of a process.
"""

from __future__ import annotations

import json
import signal
import subprocess
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import zygote
from tests.support import PROGRAMS, STOP_SECONDS, Report, ok, until

Settings = Mapping[str, Any]

GRACE_SECONDS = 60
"""An agent lets runs end for half a minute, and then cancels them."""


def document(sections: Mapping[str, Settings]) -> str:
    """TOML with these sections; the one without a name comes first."""
    lines = []
    for section, keys in sorted(sections.items(), key=lambda item: item[0] != ""):
        lines += [f"[{section}]"] if section else []
        # What JSON says of text, numbers and arrays is TOML, too.
        lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"


class Agent:
    """One blockferry-agent. Ended by its process id only."""

    def __init__(self, directory: Path, policies: Mapping[str, Settings], **sections: Settings) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.file = directory / "agent.toml"
        self.state = directory / "state"
        self.log = directory / "agent.log"
        self.address = ""
        self.page: str | None = ""
        """None: it has none."""
        self._process: subprocess.Popen[bytes] | None = None
        self.configure(policies, **sections)

    def configure(self, policies: Mapping[str, Settings], **sections: Settings) -> None:
        """Write the file."""
        top = {
            "state_dir": str(self.state),
            "listen": ["grpc://127.0.0.1:0"],
            "status_page": "127.0.0.1:0",
            **sections.pop("top", {}),
        }
        named = {f"policy.{name}": keys for name, keys in policies.items()}
        self.file.write_text(document({"": top, **named, **sections}))

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def words(self) -> list[str]:
        """The command line."""
        return [str(PROGRAMS / "blockferry-agent"), "--config", str(self.file)]

    def start(self) -> Agent:
        """Start, and wait until it says where it listens."""
        with self.log.open("ab") as log:
            self._process = zygote.popen(self.words, stdout=subprocess.PIPE, stderr=log)
        assert self._process.stdout is not None
        self.address = self._said()
        if self.page is not None:
            self.page = self._said()
        return self

    def _said(self) -> str:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        said, _, address = line.strip().rpartition(" ")
        assert said == "listening on", line + self.log.read_text()[-2000:]
        return address

    def _end(self, number: int, seconds: float) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(number)
        try:
            return process.wait(seconds)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        return self._end(signal.SIGTERM, GRACE_SECONDS)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL, STOP_SECONDS)

    def signal(self, number: int) -> None:
        """Send one."""
        assert self._process is not None
        self._process.send_signal(number)

    def reload(self, event: str = "configuration reloaded") -> None:
        """SIGHUP, and wait until the log says what came of it."""
        before = len(self.events(event))
        self.signal(signal.SIGHUP)
        until(lambda: len(self.events(event)) > before, event)

    # --- what it says -----------------------------------------------------------------------------------------------

    def command(self, *words: object) -> Report:
        """A command about it that must succeed."""
        return ok("agent", *words, "--agent", self.address)

    def policies(self) -> dict[str, Report]:
        """All of them by name."""
        return {one["policy"]: one for one in self.command("status")["policies"]}

    def policy(self, name: str) -> Report:
        """What it says of one."""
        (found,) = self.command("status", name)["policies"]
        assert isinstance(found, dict)
        return found

    def sync(self, name: str) -> Report:
        """Have it replicated, and wait for it."""
        (found,) = self.command("sync", name, "--wait")["policies"]
        assert isinstance(found, dict)
        return found

    def generation(self, name: str) -> int:
        """The newest one that was committed; 0 for none."""
        last = self.policy(name)["last_committed"]
        return last["generation"] if last else 0

    def events(self, event: str, **fields: object) -> list[Report]:
        """Lines of the log about an event that have these fields."""
        found = []
        for line in self.log.read_text().splitlines():
            if line.startswith("{") and line.endswith("}"):
                said = json.loads(line)
                if said["event"] == event and fields.items() <= said.items():
                    found.append(said)
        return found

    def metrics(self) -> dict[str, float]:
        """All of them, each by its name and labels as they are written."""
        assert self.page is not None
        with urllib.request.urlopen(self.page, timeout=STOP_SECONDS) as answer:
            lines = answer.read().decode().splitlines()
        pairs = [line.rpartition(" ") for line in lines if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in pairs}
