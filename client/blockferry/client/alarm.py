"""The failure hook of a policy."""

from __future__ import annotations

from collections.abc import Mapping

from blockferry.client.agent import Watched
from blockferry.client.hooks import run_hook


async def sound(one: Watched, environment: Mapping[str, str]) -> None:
    """Run it, for `hook_timeout` at most. Raises HOOK."""
    policy = one.policy
    await run_hook("failure", policy.hooks.failure, environment, policy.hook_timeout, one.name)
