"""Finding one's own cgroups, and what v1 and v2 make of limits and counters."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import ModuleType

import pytest

from isojob import Limits
from isojob.cgroups import base, discovery
from isojob.cgroups import v1 as v1_driver
from isojob.cgroups import v2 as v2_driver
from isojob.cgroups.discovery import ceiling, locate
from isojob.cgroups.v1 import V1
from isojob.cgroups.v2 import V2
from isojob.errors import HostNotSupportedError, SandboxSetupError
from isojob.host import rootfs
from isojob.host.posture import MAX_WRITES, check_always, check_limits

MOUNT = "30 25 0:26 {root} {point} rw,nosuid - {kind} cgroup rw,{options}\n"


def mount(point: Path, kind: str = "cgroup", root: str = "/", options: str = "memory") -> str:
    """One line of mountinfo."""
    return MOUNT.format(root=root, point=point, kind=kind, options=options)


def test_unified(tmp_path: Path) -> None:
    """v2: the mount point and our path."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    unified, legacy = locate("0::/a/b\n", mount(tmp_path, "cgroup2"))
    assert (unified, legacy) == (tmp_path / "a" / "b", {})


def test_legacy(tmp_path: Path) -> None:
    """v1: one directory by controller, also where several share a hierarchy."""
    for name in ("memory/job", "cpu,cpuacct"):
        (tmp_path / name).mkdir(parents=True)
    text = "4:memory:/job\n2:cpu,cpuacct:/\n1:name=systemd:/x\n0::/\n"
    mounts = mount(tmp_path / "memory") + mount(tmp_path / "cpu,cpuacct", options="cpu,cpuacct")
    unified, legacy = locate(text, mounts)
    assert unified is None
    assert legacy == {
        "memory": tmp_path / "memory" / "job",
        "cpu": tmp_path / "cpu,cpuacct",
        "cpuacct": tmp_path / "cpu,cpuacct",
    }


def test_container_mount(tmp_path: Path) -> None:
    """A mount that shows a part of the tree: our path is relative to it; another's is no use."""
    (tmp_path / "leaf").mkdir()
    inside = mount(tmp_path, "cgroup2", root="/docker/id")
    assert locate("0::/docker/id/leaf\n", inside)[0] == tmp_path / "leaf"
    assert locate("0::/docker/id\n", inside)[0] == tmp_path
    assert locate("0::/docker/id2\n", inside)[0] is None
    assert locate("0::/../other\n", mount(tmp_path, "cgroup2"))[0] is None


def test_escaped_mount_point(tmp_path: Path) -> None:
    """Spaces are written in octal."""
    (tmp_path / "a b").mkdir()
    line = mount(Path(str(tmp_path / "a b").replace(" ", "\\040")), "cgroup2")
    assert locate("0::/\n", line)[0] == tmp_path / "a b"


@pytest.mark.parametrize("garbage", ["", "\n", "x", "0::", "a b c - d", ":::\n"])
def test_garbage(garbage: str) -> None:
    """Unreadable lines are no cgroup, and no error."""
    assert locate(garbage, garbage) == (None, {})


@pytest.fixture
def v2(tmp_path: Path) -> V2:
    """A directory that looks like a v2 cgroup."""
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    return V2(tmp_path)


def test_v2_values(v2: V2) -> None:
    """Limits as the kernel's files want them."""
    limits = Limits(cpus=0.5, cpuset="0-1", io_read_bps=1000, io_write_iops=5, memory=None)
    mask, writes = v2.cell(limits, ("8:0",))
    assert mask == 1
    values = {write.file: write.value for write in writes}
    assert values == {
        "memory.max": b"max",
        "memory.swap.max": b"0",
        "memory.oom.group": b"1",
        "pids.max": b"128",
        "cpu.max": b"50000 100000",
        "cpuset.cpus": b"0-1",
        "io.max": b"8:0 rbps=1000 wiops=5",
    }


@pytest.mark.parametrize("cgroups", ["v1", "v2"])
def test_processors_that_are_not_there(
    cgroups: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The kernel answers ERANGE or EACCES, and v2 may say nothing and take others."""
    driver = request.getfixturevalue(cgroups)
    (tmp_path / "cpuset.cpus.effective").write_text("0-1,4-5\n")
    if cgroups == "v1":
        (tmp_path / "cpuset" / "cpuset.cpus").write_text("0-1,4-5\n")
    for cpuset in (None, "0", "1,4", "0-1,4-5"):
        check_limits(driver, Limits(cpuset=cpuset), (), set())
    for cpuset in ("2", "1-4", "8191"):
        with pytest.raises(ValueError, match=f"limits.cpuset: '{cpuset}'.*0-1,4-5"):
            check_limits(driver, Limits(cpuset=cpuset), (), {"cpuset"})


def test_v2_without_a_swap_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host can swap, and the file that forbids it is missing, the protection is."""
    (tmp_path / "cgroup.controllers").write_text("memory pids cpu cpuset io\n")
    for has_swap in (True, False):
        monkeypatch.setattr("isojob.cgroups.v2.host_has_swap", lambda answer=has_swap: answer)
        assert not V2(tmp_path).missing  # the root has no such files
        (tmp_path / "memory.max").touch()
        assert set(V2(tmp_path).missing) == ({"swap_limit"} if has_swap else set())
        (tmp_path / "memory.swap.max").touch()
        assert not V2(tmp_path).missing
        for name in ("memory.max", "memory.swap.max"):
            (tmp_path / name).unlink()


@pytest.mark.parametrize("has_swap", [True, False])
def test_v2_without_a_swap_limit_below_the_root(
    has_swap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root has no such files: whether the kernel has them is seen in the pool's own cgroup."""
    (tmp_path / "cgroup.controllers").write_text("memory pids cpu cpuset io\n")
    monkeypatch.setattr("isojob.cgroups.v2.host_has_swap", lambda: has_swap)
    monkeypatch.setattr(V2, "_enable", lambda _: None)
    (tmp_path / "isojob-1").mkdir()
    made = base.Subtree((tmp_path / "isojob-1",), (-1,), (-1,))
    monkeypatch.setattr(v2_driver, "make_subtree", lambda _: made)
    (tmp_path / "isojob-1" / "memory.max").touch()
    driver = V2(tmp_path)
    check_always(driver, set())
    driver.create()
    if has_swap:
        with pytest.raises(HostNotSupportedError, match="cannot give swap_limit"):
            check_always(driver, set())
    check_always(driver, {"swap_limit"} if has_swap else set())
    (tmp_path / "isojob-1" / "memory.swap.max").touch()
    driver = V2(tmp_path)
    driver.create()
    check_always(driver, set())


def test_a_quota_is_lifted_at_the_end(v1: V1, v2: V2) -> None:
    """What a killed job would otherwise wait for: its CPU quota, if it has one."""
    for driver in (v1, v2):
        assert driver.lift(Limits()) is None
        lifted = driver.lift(Limits(cpus=0.01))
        made = driver.cell(Limits(cpus=0.01), ())[1]
        assert lifted is not None
        assert (lifted.hierarchy, lifted.file) in {(write.hierarchy, write.file) for write in made}
        assert lifted.value in (b"-1", b"max")


def test_v2_job_writes_what_differs(v2: V2) -> None:
    """A job with the limits of its cell writes nothing."""
    parked = Limits()
    assert v2.job(parked, parked) == ()
    assert v2.job(Limits(memory=None, processes=5), parked) == ((0, b"max"), (1, b"5"))


def counted(driver: base.Driver, texts: dict[str, str]) -> list[int]:
    """What init finds in these files, as native/cgroup.c looks for it."""
    values = []
    for file in driver.files.evidence:
        for line, mark in file.counters:
            value = -1
            for text in texts.get(file.name, "").splitlines():
                if text.startswith(line):
                    value = int(
                        text[len(line) :].rpartition(mark)[2] if mark else text[len(line) :]
                    )
                    break
            values.append(value)
    return values


def count(driver: base.Driver, texts: dict[str, str]) -> base.Counters:
    """What the driver makes of it."""
    names = [file.name for file in driver.files.evidence if file.raw]
    raw = {
        index: texts[file.name].encode()
        for index, file in enumerate(driver.files.evidence)
        if file.name in names and texts.get(file.name)
    }
    return driver.counters(counted(driver, texts), raw)


def test_v2_counters(v2: V2) -> None:
    """The evidence files of a v2 cgroup."""
    counters = count(
        v2,
        {
            "memory.events": "low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\noom_group_kill 1\n",
            "memory.peak": "4096\n",
            "pids.peak": "7\n",
            "pids.events": "max 2\n",
            "cpu.stat": "usage_usec 30\nuser_usec 10\nsystem_usec 20\nthrottled_usec 5\n",
            "io.stat": "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n",
            "cpu.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1500000\n",
        },
    )
    assert counters.memory_events == {
        "low": 0,
        "high": 0,
        "max": 3,
        "oom": 1,
        "oom_kill": 2,
        "oom_group_kill": 1,
    }
    assert (counters.memory_peak, counters.pids_peak, counters.pids_events_max) == (4096, 7, 2)
    assert (counters.user_ns, counters.system_ns) == (10_000, 20_000)
    assert counters.cpu_stat == {
        "usage_usec": 30,
        "user_usec": 10,
        "system_usec": 20,
        "throttled_usec": 5,
    }
    assert counters.io == {
        "8:0": {"rbytes": 1, "wbytes": 2, "rios": 3, "wios": 4, "dbytes": 0, "dios": 0}
    }
    assert counters.pressure == {"cpu": {"some_total": 1.5}}
    assert v2.files.cpu is not None
    assert counted(v2, {"cpu.stat": "user_usec 1\nusage_usec 30\n"})[v2.files.cpu[0]] == 30


def test_v2_counters_of_an_idle_job(v2: V2) -> None:
    """Unknown is None; no I/O is an empty table, for the kernel writes nothing then."""
    assert count(v2, {}) == base.Counters(io={})


def test_v1_counters(v1: V1) -> None:
    """The evidence files of v1, with and without the hierarchies that are made by need."""
    always = {
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
        "memory.max_usage_in_bytes": "4096\n",
        "pids.peak": "7\n",
        "pids.events": "max 2\n",
        "cpuacct.usage": "30\n",
        "cpuacct.usage_user": "10\n",
        "cpuacct.usage_sys": "20\n",
    }
    expected = base.Counters(
        memory_events={"oom_kill": 3},
        memory_peak=4096,
        pids_peak=7,
        pids_events_max=2,
        user_ns=10,
        system_ns=20,
    )
    assert count(v1, always) == expected
    assert v1.files.cpu is not None and v1.files.oom is not None
    assert counted(v1, always)[v1.files.cpu[0]] == 30
    assert counted(v1, always)[v1.files.oom[1]] == 3
    needed = {
        "cpu.stat": "nr_periods 1\nnr_throttled 2\nthrottled_time 3000\n",
        "blkio.throttle.io_service_bytes": "8:0 Read 1\n8:0 Write 2\n8:0 Total 3\nTotal 3\n",
        "blkio.throttle.io_serviced": "8:0 Read 4\nTotal 4\n",
    }
    expected.cpu_stat = {
        "nr_periods": 1,
        "nr_throttled": 2,
        "throttled_time": 3000,
        "throttled_usec": 3,
    }
    expected.io = {"8:0": {"rbytes": 1, "wbytes": 2, "rios": 4}}
    assert count(v1, {**always, **needed}) == expected


@pytest.mark.parametrize("cgroups", ["v1", "v2"])
def test_an_account_that_was_too_long(cgroups: str, request: pytest.FixtureRequest) -> None:
    """What init could not read whole it sends as nothing: that is unknown, not no I/O."""
    driver = request.getfixturevalue(cgroups)
    files = [index for index, file in enumerate(driver.files.evidence) if file.raw]
    assert driver.counters(counted(driver, {}), dict.fromkeys(files, b"")).io is None


def test_v1_counters_of_fewer_hierarchies(tmp_path: Path) -> None:
    """What no hierarchy tells keeps no other counter's place."""
    own = {name: tmp_path / name for name in ("pids", "cpu")}
    for path in own.values():
        path.mkdir()
    counters = count(V1(own), {"pids.peak": "7\n", "cpu.stat": "nr_periods 1\n"})
    assert (counters.pids_peak, counters.memory_peak, counters.user_ns) == (7, None, None)
    assert counters.cpu_stat is not None
    assert counters.cpu_stat["nr_periods"] == 1


def test_missing_controllers(tmp_path: Path) -> None:
    """What is not delegated is missing by its name, with a cure."""
    (tmp_path / "cgroup.controllers").write_text("memory pids\n")
    driver = V2(tmp_path)
    assert set(driver.missing) == {"cpus", "cpuset", "io_limit"}
    assert all("Delegate" in cure for cure in driver.missing.values())


@pytest.mark.parametrize("module", [v1_driver, v2_driver], ids=["v1", "v2"])
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN, errno.EACCES])
def test_no_room_for_a_pool(
    module: ModuleType, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the host has run out of is not taken for a missing right."""

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "isojob-1"))

    monkeypatch.setattr(module, "make_subtree", fails)
    monkeypatch.setattr(V2, "_enable", lambda _: None)
    (tmp_path / "cgroup.controllers").write_text("memory pids\n")
    driver = V2(tmp_path) if module is v2_driver else V1({"memory": tmp_path, "pids": tmp_path})
    if number == errno.EACCES:
        with pytest.raises(HostNotSupportedError, match="Permission denied"):
            driver.create()
    else:
        words = {errno.ENOMEM: "memory.max", errno.EAGAIN: "cgroup.max"}[number]
        with pytest.raises(SandboxSetupError, match=words) as raised:
            driver.create()
        assert raised.value.errno == number


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOENT, errno.EACCES])
@pytest.mark.parametrize("module", [v1_driver, v2_driver], ids=["v1", "v2"])
def test_a_subtree_that_is_not_made_whole(
    module: ModuleType, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken away again: its lock would keep everybody from sweeping it while we live."""

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path))

    monkeypatch.setattr(V1, "_fill_cpuset", fails)
    monkeypatch.setattr(v2_driver, "_write", fails)
    monkeypatch.setattr(V2, "_enable", lambda _: None)
    (tmp_path / "cgroup.controllers").write_text("memory pids\n")
    driver = V2(tmp_path) if module is v2_driver else V1({"memory": tmp_path, "pids": tmp_path})
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError if number == errno.EMFILE else HostNotSupportedError) as raised:
        driver.create()
    assert getattr(raised.value, "errno", number) == number
    assert not list(tmp_path.glob("isojob-*"))
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_removing_without_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be looked at is no error: what else is to be closed waits behind it."""

    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    tree = tmp_path / "isojob-1"
    tree.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", none_left)
        base.remove_tree(tree)
    assert not tree.exists()


def test_refused_write_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses the write, not the open, which alone knows a name."""

    def fails(*_: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    for name, text in (("controllers", "memory pids\n"), ("subtree_control", ""), ("procs", "")):
        (tmp_path / f"cgroup.{name}").write_text(text)
    driver = V2(tmp_path)
    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(HostNotSupportedError, match=r"busy: .*/cgroup\.subtree_control"):
        driver.create()


def test_leaf_of_an_earlier_pool(tmp_path: Path) -> None:
    """A process in the leaf works from the leaf's parent."""
    (tmp_path / "cgroup.controllers").write_text("memory pids\n")
    (tmp_path / base.LEAF).mkdir()
    assert V2(tmp_path / base.LEAF).base == tmp_path


@pytest.fixture
def v1(tmp_path: Path) -> V1:
    """Directories that look like v1 hierarchies."""
    own = {}
    for name in ("memory", "pids", "cpuacct", "cpu", "cpuset", "blkio"):
        own[name] = tmp_path / name
        own[name].mkdir()
    (own["memory"] / "memory.memsw.limit_in_bytes").write_text("0")
    return V1(own)


def test_more_disks_than_a_cell_takes() -> None:
    """What the zygote has room for is refused by name before."""
    header = Path(__file__).parents[2] / "isojob" / "native" / "zygote.h"
    assert f"#define MAX_CG_WRITES {MAX_WRITES} " in header.read_text()
    driver = V1({name: Path("/x") for name in ("memory", "pids", "cpuacct", "blkio")})
    limits = Limits(io_read_bps=1, io_write_bps=1, io_read_iops=1, io_write_iops=1)
    disks = [f"8:{number}" for number in range(MAX_WRITES // 4)]
    check_limits(driver, limits, tuple(disks[:-1]), frozenset())
    with pytest.raises(HostNotSupportedError, match="64 disks"):
        check_limits(driver, limits, tuple(disks), frozenset())


def test_disks_below_a_bound_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is mounted there is bound with it; each disk is named once, and none that has gone."""
    disks = {
        path.name for path in Path("/sys/dev/block").iterdir() if not (path / "partition").exists()
    }
    assert disks, "this test needs a block device"

    def found(beside: str) -> list[str]:
        points = [*((disk, f"{tmp_path}{beside}/a\\040{disk}") for disk in disks)]
        points += [("4095:1", f"{tmp_path}{beside}/gone")]
        # Above all that are there.
        lines = [
            f"{number} 1 {device} / {point} rw - ext4 x rw"
            for number, (device, point) in enumerate(points, 1 << 40)
        ]
        mine = discovery.read_text(Path("/proc/self/mountinfo"))
        real = discovery.read_text
        monkeypatch.setattr(
            rootfs,
            "read_text",
            lambda path: mine + "\n".join(lines) if path.name == "mountinfo" else real(path),
        )
        try:
            return list(rootfs._disks([str(tmp_path)]))
        finally:
            monkeypatch.setattr(rootfs, "read_text", real)

    assert set(found("")) == disks
    assert len(found("-beside")) <= 1


def test_disks_of_a_file_system_without_a_number_of_one() -> None:
    """Btrfs has a number of its own; where it was mounted from tells its disk."""
    disks = {
        device: f"/dev/{(Path('/sys/dev/block') / device).resolve().name}"
        for device in os.listdir("/sys/dev/block")
        if not (Path("/sys/dev/block") / device / "partition").exists()
    }
    there = {device: node for device, node in disks.items() if os.path.exists(node)}
    if not there:
        pytest.skip("needs the node of a block device")
    for device, node in there.items():
        assert list(rootfs._devices("0:39", node)) == list(rootfs._devices(device, "x")) == [device]
    for origin in ("overlay", "tmpfs", "/dev/null", "/dev/none", "host:/export"):
        assert list(rootfs._devices("0:39", origin)) == []


def test_names_that_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any user may have mounted something at one."""
    text = MOUNT.format(root="/", point=tmp_path, kind="cgroup2", options="rw").encode()
    (tmp_path / "mountinfo").write_bytes(b"7 1 0:9 / /tmp/\xff rw - fuse x rw\n" + text)
    (tmp_path / "cgroup").write_bytes(b"0::/\n")
    texts = [discovery.read_text(tmp_path / name) for name in ("cgroup", "mountinfo")]
    monkeypatch.setattr(discovery, "Path", lambda *_: tmp_path)
    assert discovery._locate_own()[0] is not None
    assert locate(*texts)[0] == tmp_path


def test_a_cgroup_that_is_covered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something else is mounted over the file system: there is none, by name."""
    monkeypatch.setattr(discovery, "_locate_own", lambda: (tmp_path, {}))
    with pytest.raises(HostNotSupportedError, match="cannot be read") as refused:
        discovery.find()
    assert "mount cgroup2" in refused.value.cure


def test_nobody_of_another_namespace_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of a foreign pid namespace reads as 0, which is one's own group to kill(2)."""
    killed: list[int] = []
    monkeypatch.setattr("os.kill", lambda pid, _: killed.append(pid))
    (tmp_path / "cgroup.procs").write_text("0\n4711\n0\n")
    (tmp_path / "cgroup.kill").mkdir()
    base.kill_processes(tmp_path)
    assert killed == [4711]


def test_quotas_are_lifted(tmp_path: Path) -> None:
    """Of all cells, in the words of either version; nothing is made where there is no quota."""
    for cell, name, value in (
        ("cell-1", "cpu.max", "1000 100000"),
        ("cell-2", "cpu.cfs_quota_us", "1000"),
        ("cell-3", "pids.max", "5"),
    ):
        (tmp_path / cell).mkdir()
        (tmp_path / cell / name).write_text(value)
    base.lift_quotas(tmp_path)
    base.lift_quotas(tmp_path / "none")
    there = {file.name: file.read_text() for file in tmp_path.glob("*/*")}
    assert there["pids.max"] == "5"
    assert there["cpu.max"].startswith("max")
    assert there["cpu.cfs_quota_us"].startswith("-1")
    assert len(there) == 3


def test_v1_hierarchies_by_need(v1: V1) -> None:
    """cpu, cpuset and blkio are made only for limits that ask for them."""
    mask, writes = v1.cell(Limits(), ())
    assert mask == 0b111
    assert {write.file for write in writes} == {
        "memory.limit_in_bytes",
        "memory.memsw.limit_in_bytes",
        "pids.max",
    }
    mask, _ = v1.cell(Limits(cpus=1, cpuset="0", io_read_bps=5), ("8:0",))
    assert mask == 0b111111


def test_v1_order_of_memory_limits(v1: V1) -> None:
    """The memory limit never exceeds memory+swap: raising starts outside, lowering inside."""
    names = [name for _, name in v1.files.limits]
    raised = [names[index] for index, _ in v1.job(Limits(memory="1GiB"), Limits())]
    lowered = [names[index] for index, _ in v1.job(Limits(memory="64MiB"), Limits())]
    assert raised == ["memory.memsw.limit_in_bytes", "memory.limit_in_bytes"]
    assert lowered == raised[::-1]


def test_v1_comounted(tmp_path: Path) -> None:
    """Controllers in one directory are one hierarchy."""
    (tmp_path / "both").mkdir()
    driver = V1({"cpu": tmp_path / "both", "cpuacct": tmp_path / "both"})
    assert len(driver.hierarchies) == 1
    assert {"memory_limit", "process_limit"} <= set(driver.missing)


def test_memory_ceiling(tmp_path: Path) -> None:
    """The lowest limit on the way up counts; "max" and an absent file are none."""
    inner = tmp_path / "system.slice" / "app.service"
    inner.mkdir(parents=True)
    assert ceiling(inner, {}) is None
    for directory, limit in ((tmp_path, None), (inner.parent, "2147483648"), (inner, "max")):
        (directory / "cgroup.procs").touch()
        if limit is not None:
            (directory / "memory.max").write_text(f"{limit}\n")
    assert ceiling(inner, {}) == 2 << 30
    (inner / "memory.max").write_text("1048576\n")
    assert ceiling(inner, {}) == 1 << 20
    (tmp_path / "memory.stat").write_text("cache 1\nhierarchical_memory_limit 4096\n")
    assert ceiling(None, {"memory": tmp_path}) == 4096
    assert ceiling(None, {}) is None
