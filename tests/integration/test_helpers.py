"""What zygote and init could do if somebody took them over."""

from __future__ import annotations

import os
from pathlib import Path

import anyio
from environment import SLOW, children_of

from isojob import Pool, Sandbox, run_isolated
from isojob.seccomp import SeccompProfile


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def capabilities(pid: int) -> set[int]:
    """The numbers of linux/capability.h that it has or could take."""
    permitted = int(status_of(pid)["CapPrm"], 16)
    return {number for number in range(64) if permitted >> number & 1}


async def test_they_give_up_what_they_can() -> None:
    """The zygote has five capabilities or six, init two and a filter of its own that no job inherits."""
    async with Pool(parked=1) as pool:
        await pool.run(["true"])
        await anyio.sleep(0.3 * SLOW)
        assert pool._stock.zygote is not None
        zygote = pool._stock.zygote.pid
        (init,) = children_of(zygote)
        expected = {1, 5, 6, 7, 21}  # DAC_OVERRIDE, KILL, SETGID, SETUID, SYS_ADMIN
        if pool.stock.posture.privilege == "user":
            expected.add(31)  # SETFCAP, without which its one id cannot be mapped
        assert capabilities(zygote) == expected
        assert capabilities(init) == {2, 5}, "DAC_READ_SEARCH, KILL"
        ours = int(status_of(os.getpid())["Seccomp_filters"])
        assert int(status_of(zygote)["Seccomp_filters"]) == ours
        assert int(status_of(init)["Seccomp_filters"]) == ours + 1
    sandbox = Sandbox(seccomp=SeccompProfile.unconfined())
    seen = await run_isolated(["grep", "Seccomp_filters", "/proc/self/status"], sandbox=sandbox)
    assert int(seen.stdout_text.split()[1]) == ours + 1
