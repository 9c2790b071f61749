"""Disk I/O limits, measured on the device behind a bound directory.

cgroup v1 throttles only direct I/O to a cgroup; v2 charges buffered writes on ext4 as well. The disk
is that of $SCRATCH_DIR (an ext4 in the v2 guest), else that of the temporary directory.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from environment import cgroup_version

from isojob import HostNotSupportedError, Limits, Result, Sandbox, run_isolated
from isojob.host.rootfs import block_devices

MIB = 1 << 20
RATE = 2 * MIB
SIZE = 12 * MIB


async def at_the_rate(disk: Sandbox, command: list[str], limits: Limits) -> Result:
    """A run that moved `SIZE` at `RATE`, within 20 %.

    Never faster. Slower up to twice: others may have the disk to themselves for a while.
    """
    achieved = 0.0
    for _ in range(3):
        if "of=/disk/x" in command:  # what the last job made belongs to its own uid
            Path(str(disk.mounts[0].source), "x").unlink(missing_ok=True)
        result = await run_isolated(command, sandbox=disk, limits=limits)
        assert result.ok, result.stderr
        achieved = SIZE / result.usage.wall_time / RATE
        assert achieved <= 1.2
        if achieved >= 0.8:
            return result
    raise AssertionError(f"three times too slow, at last {achieved:.2f} of the rate")


async def test_write_rate(disk: Sandbox) -> None:
    """Writes keep to the limit within 20 %."""
    how = "oflag=direct" if cgroup_version() == 1 else "conv=fsync"
    result = await at_the_rate(
        disk,
        ["dd", "if=/dev/zero", "of=/disk/x", "bs=64K", f"count={SIZE >> 16}", how],
        Limits(io_write_bps=RATE, wall_time=120),
    )
    assert result.usage.io_write_bytes is not None
    assert result.usage.io_write_bytes >= SIZE


async def test_read_rate(disk: Sandbox) -> None:
    """Direct reads keep to the limit within 20 %."""
    script = f"dd if=/dev/zero of=/disk/x bs=1M count={SIZE >> 20} conv=fsync 2>/dev/null"
    assert (await run_isolated(["sh", "-c", script], sandbox=disk)).ok
    result = await at_the_rate(
        disk,
        ["dd", "if=/disk/x", "of=/dev/null", "bs=64K", "iflag=direct"],
        Limits(io_read_bps=RATE, wall_time=120),
    )
    assert result.usage.io_read_bytes is not None
    assert result.usage.io_read_bytes >= SIZE


async def test_operations_per_second(disk: Sandbox) -> None:
    """100 direct writes at 40 a second take 2.5 s."""
    result = await run_isolated(
        ["dd", "if=/dev/zero", "of=/disk/x", "bs=4K", "count=100", "oflag=direct"],
        sandbox=disk,
        limits=Limits(io_write_iops=40, wall_time=120),
    )
    assert result.ok, result.stderr
    assert result.usage.wall_time >= 2


async def test_no_block_device(tmp_path: Path) -> None:
    """Where nothing bound is on a disk, a limit is refused rather than ignored."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or block_devices(Sandbox()):
        # The default root is on a disk here, and the limit applies to that.
        assert block_devices(Sandbox())
        return
    with pytest.raises(HostNotSupportedError, match="block device"):
        await run_isolated(["true"], limits=Limits(io_write_bps=RATE))
