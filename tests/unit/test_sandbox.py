"""What a sandbox may be made of: nothing that opens the host by a typo."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from isojob.mounts import Mount, Root
from isojob.sandbox import PROTECTIONS, Sandbox
from isojob.seccomp import SeccompProfile


def refusal(make: Any, *args: Any, **fields: Any) -> str:
    """The text of the refusal that this call must meet."""
    with pytest.raises(ValidationError) as caught:
        make(*args, **fields)
    return str(caught.value)


FULL = Sandbox(
    root=Root.directory("/srv/image"),
    mounts=(Mount.bind("/srv/data", "/data"), Mount.tmpfs("/scratch", size="64MiB")),
    env={"B": "2", "A": "1", "RAW": "\udcff"},
    hostname="judge-1.example",
    workdir="/home/job",
    uid=1,
    gid=65533,
    allow_missing={"io_limit", "cpuset"},
)


def test_defaults() -> None:
    """The host's toolchain, no network, the default profile, an ordinary user, nothing missing."""
    sandbox = Sandbox()
    assert sandbox.root == Root.host()
    assert (sandbox.mounts, sandbox.network) == ((), "none")
    assert sandbox.seccomp == SeccompProfile.default()
    assert (sandbox.workdir, sandbox.hostname) == ("/box", "isojob")
    assert (sandbox.uid, sandbox.gid) == (1000, 1000)
    assert (dict(sandbox.env), sandbox.allow_missing) == ({}, frozenset())


def test_the_environment_is_isojobs_own() -> None:
    """Nothing of the host's environment gets in."""
    assert Sandbox().environment() == {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/box",
        "TMPDIR": "/tmp",
        "LANG": "C.UTF-8",
    }


def test_the_environment_is_layered() -> None:
    """The call's variables go over the sandbox's, and those over isojob's; HOME follows workdir."""
    sandbox = Sandbox(env={"LANG": "C", "X": "sandbox"}, workdir="/home/job")
    layered = sandbox.environment({"X": "call", "PATH": ""})
    assert layered == {"PATH": "", "HOME": "/home/job", "TMPDIR": "/tmp", "LANG": "C", "X": "call"}
    assert sandbox.environment()["X"] == "sandbox"


@pytest.mark.parametrize(
    "variables",
    [{"": "x"}, {"A=B": "x"}, {"A\0": "x"}, {"A": "x\0"}, {"A": 1}, {1: "A"}, {"A": b"x"}],
)
def test_variables_that_no_program_reads_right_are_refused(variables: Any) -> None:
    """Neither the sandbox nor a call can smuggle a second variable into one string."""
    assert "env" in refusal(Sandbox, env=variables)
    with pytest.raises(ValueError, match=r"name|value"):
        Sandbox().environment(variables)


def test_the_environment_cannot_be_changed_afterwards() -> None:
    """The sandbox keeps a copy, and gives out no mutable one."""
    given_env = {"A": "1"}
    sandbox = Sandbox(env=given_env)
    given_env["A"] = "2"
    sandbox.environment()["A"] = "3"
    assert sandbox.env == {"A": "1"}
    assert not hasattr(sandbox.env, "__setitem__")


def test_sandboxes_hash_by_value() -> None:
    """Equal sandboxes are one key, whatever the order the variables were written in."""
    assert Sandbox(env={"A": "1", "B": "2"}) == Sandbox(env={"B": "2", "A": "1"})
    assert len({Sandbox(env={"A": "1", "B": "2"}), Sandbox(env={"B": "2", "A": "1"})}) == 1
    assert len({FULL, Sandbox(), Sandbox(uid=2), Sandbox(env={"A": "1"})}) == 4


def test_sandboxes_survive_json_and_pickle() -> None:
    """A round trip gives an equal sandbox with an equal hash, undecodable bytes included."""
    copies = (
        Sandbox.model_validate_json(FULL.model_dump_json()),
        Sandbox.model_validate(FULL.model_dump()),
        pickle.loads(pickle.dumps(FULL)),
        FULL.model_copy(),
        FULL.model_copy(update={"uid": 1}),
    )
    for copy in copies:
        assert copy == FULL
        assert hash(copy) == hash(FULL)


def test_sandboxes_are_frozen_and_know_no_other_field() -> None:
    """A misspelt field is refused, and a template cannot change under a pool."""
    assert "Extra inputs" in refusal(Sandbox, mount=())
    with pytest.raises(ValidationError, match="frozen"):
        Sandbox().uid = 2  # type: ignore[misc]


def test_lists_and_sets_are_taken() -> None:
    """Mounts may come as a list, protections as any collection; both are stored frozen."""
    mount = Mount.tmpfs("/scratch", size=2**20)
    assert Sandbox(mounts=[mount]).mounts == (mount,)
    for names in (["cpus"], ("cpus",), {"cpus"}, frozenset({"cpus"})):
        assert Sandbox(allow_missing=names).allow_missing == frozenset({"cpus"})


def test_every_protection_can_be_given_up_by_name() -> None:
    """Exactly the names in PROTECTIONS are taken; a typo, or one string, gives up nothing."""
    assert Sandbox(allow_missing=set(PROTECTIONS)).allow_missing == frozenset(PROTECTIONS)
    assert "unknown: seccmp; there are cgroup" in refusal(Sandbox, allow_missing={"seccmp"})
    assert "allow_missing" in refusal(Sandbox, allow_missing="cgroup")


def test_there_is_no_network_but_none() -> None:
    """A misspelt or missing mode is no network at all."""
    assert "network" in refusal(Sandbox, network="host")


@pytest.mark.parametrize("value", [0, -1, 65534, 65535, 2**32, True, "1000", 1000.0, None])
def test_ids_are_ordinary_ones(value: object) -> None:
    """Neither root nor nobody nor 'no id', and no bool."""
    assert "uid" in refusal(Sandbox, uid=value)
    assert "gid" in refusal(Sandbox, gid=value)


@pytest.mark.parametrize("name", ["a", "isojob", "A-1", "a.b", "1", "x" * 63, "x." * 31 + "yz"])
def test_hostnames(name: str) -> None:
    """Labels of letters, digits and hyphens, 64 characters in all."""
    assert Sandbox(hostname=name).hostname == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-a",
        "a-",
        "a_b",
        "a b",
        "a..b",
        ".a",
        "a.",
        "ä",
        "a\n",
        "a\0",
        "x" * 64,
        "x." * 32 + "x",
    ],
)
def test_hostnames_that_are_none(name: str) -> None:
    """What hostname(7) does not allow is refused."""
    assert "hostname" in refusal(Sandbox, hostname=name)


BAD_PATHS = [
    "", ".", "..", "a", "a/b", "./a", "/", "//", "//a", "/a/", "/a//b", "/./a", "/a/.",
    "/..", "/../a", "/a/..", "/a/../b", "/a\0b", "/\ud800",
]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS)
def test_paths_are_absolute_and_normal(path: str) -> None:
    """A path that two readers could resolve differently is refused everywhere."""
    assert "target" in refusal(Mount.bind, "/srv", path)
    assert "target" in refusal(Mount.tmpfs, path, size="1MiB")
    assert "source" in refusal(Mount.bind, path, "/data")
    assert "path" in refusal(Root.directory, path)
    assert "workdir" in refusal(Sandbox, workdir=path)


@pytest.mark.parametrize(
    "target", ["/proc", "/proc/1", "/dev", "/dev/shm", "/dev/null", "/dev/a/b", "/box", "/tmp"]
)
def test_isojobs_own_mounts_cannot_be_covered(target: str) -> None:
    """No mount goes over the job's tmpfs, which bears its disk limit, nor into /proc and /dev."""
    assert "target" in refusal(Mount.bind, "/srv", target)
    assert "target" in refusal(Mount.tmpfs, target, size="1MiB")


def test_the_working_directory_is_the_jobs_own() -> None:
    """A mount there would be hidden by it; below it is shown."""
    for workdir, target in (("/data", "/data"), ("/a/b", "/a/b")):
        assert "the working directory" in refusal(
            Sandbox, workdir=workdir, mounts=[Mount.bind("/srv", target)]
        )
    Sandbox(workdir="/data", mounts=[Mount.bind("/srv", "/data/x")])
    for mount in (Mount.tmpfs("/a", size="1MiB"), Mount.bind("/srv", "/a", read_only=False)):
        assert "use cwd=" in refusal(Sandbox, workdir="/a/b", mounts=[mount])


@pytest.mark.parametrize("place", ["/box", "/tmp", "/t"])
def test_mounts_of_each_job_are_counted(place: str) -> None:
    """A tmpfs, and what lies in one or in what a job has anyway; of others there may be more."""
    tmpfs = Mount.tmpfs("/t", size="1MiB")
    binds = [Mount.bind("/srv", f"{place}/{number}") for number in range(64)]
    others = [Mount.bind("/srv", f"/o/{number}") for number in range(100)]
    Sandbox(mounts=[tmpfs, *binds[1:], *others])
    assert "at most 64" in refusal(Sandbox, mounts=[tmpfs, *binds])


@pytest.mark.parametrize(
    "target", ["/data", "/box/data", "/tmp/x", "/process", "/devel", "/usr/lib/x"]
)
def test_other_targets_are_taken(target: str) -> None:
    """A name that only begins like a reserved one is not reserved."""
    assert Mount.bind("/srv", target).target == target


@pytest.mark.parametrize(
    "source",
    ["/", "/proc", "/proc/1/root", "/sys", "/sys/fs", "/sys/fs/cgroup", "/sys/fs/cgroup/a"],
)
def test_sources_that_give_the_host_away_are_refused(source: str) -> None:
    """Neither the whole host, nor its processes, nor its cgroups."""
    assert "source" in refusal(Mount.bind, source, "/data")
    assert "path" in refusal(Root.directory, source)


@pytest.mark.parametrize("target", ["/proc", "/proc/self", "/dev", "/dev/shm"])
def test_no_job_starts_in_proc_or_dev(target: str) -> None:
    """The working directory is a place for files."""
    assert "workdir" in refusal(Sandbox, workdir=target)


@pytest.mark.parametrize("workdir", ["/a:b", "/a\nroot2:x:0:0::/:/bin/sh"])
def test_no_working_directory_ends_a_field_of_passwd(workdir: str) -> None:
    """It is the job's home there."""
    assert "/etc/passwd" in refusal(Sandbox, workdir=workdir)


def test_bind_mounts() -> None:
    """Read-only unless asked otherwise; sources may be any kind of path."""
    mount = Mount.bind("/srv/data", "/data")
    assert (mount.type, mount.source, mount.read_only) == ("bind", "/srv/data", True)
    assert not Mount.bind("/srv/data", "/data", read_only=False).read_only
    assert Mount.bind(Path("/srv/data"), "/data") == mount == Mount.bind(b"/srv/data", "/data")
    assert os.fsencode(Mount.bind(b"/\xff", "/data").source or "") == b"/\xff"


def test_tmpfs_mounts() -> None:
    """Writable, and bounded in bytes and files."""
    mount = Mount.tmpfs("/scratch", size="64MiB")
    assert (mount.type, mount.size, mount.inodes) == ("tmpfs", 64 * 2**20, 16384)
    assert not mount.read_only
    assert Mount.tmpfs("/scratch", size=65536, inodes=1).inodes == 1


@pytest.mark.parametrize("size", [0, 65535, -1, True, None, "64M", "0MiB", 1e6])
def test_a_tmpfs_always_has_a_size(size: object) -> None:
    """0 would be unlimited to the kernel, and None has no meaning here."""
    assert "size" in refusal(Mount.tmpfs, "/scratch", size=size)


@pytest.mark.parametrize("inodes", [0, -1, True, None, "5"])
def test_a_tmpfs_always_bounds_its_files(inodes: object) -> None:
    """0 would be unlimited to the kernel."""
    assert "inodes" in refusal(Mount.tmpfs, "/scratch", size="1MiB", inodes=inodes)


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "bind"},
        {"type": "bind", "source": "/srv", "size": 2**20},
        {"type": "bind", "source": "/srv", "inodes": 5},
        {"type": "tmpfs"},
        {"type": "tmpfs", "size": 2**20},
        {"type": "tmpfs", "size": 2**20, "inodes": 5, "source": "/srv"},
        {"type": "proc"},
    ],
)
def test_mounts_have_what_their_type_needs(fields: dict[str, Any]) -> None:
    """Fields of one type do not stand idle on another."""
    refusal(Mount, target="/data", **fields)


@pytest.mark.parametrize(
    ("first", "second"), [("/data", "/data"), ("/data/a", "/data"), ("/data/a/b", "/data")]
)
def test_a_mount_that_would_be_hidden_is_refused(first: str, second: str) -> None:
    """Mounts apply in order, so a later one must not cover an earlier one."""
    both = [Mount.bind("/srv/1", first), Mount.bind("/srv/2", second)]
    assert f"'{second}' hides '{first}'" in refusal(Sandbox, mounts=both)


def test_mounts_within_mounts_and_beside_them() -> None:
    """The outer mount first is fine, and so is a neighbour with a longer name."""
    targets = ["/data", "/data/a", "/data2", "/database"]
    mounts = tuple(Mount.bind("/srv", target) for target in targets)
    assert Sandbox(mounts=mounts).mounts == mounts


def test_roots() -> None:
    """A directory has a path, the host has none."""
    assert (Root.host().kind, Root.host().path) == ("host", None)
    assert Root.directory(Path("/srv/image")).path == "/srv/image"
    assert "a path belongs to" in refusal(Root, kind="directory")
    assert "a path belongs to" in refusal(Root, kind="host", path="/srv/image")
    assert "kind" in refusal(Root, kind="layers")


@given(st.text(max_size=10))
def test_no_taken_target_leaves_its_place(text: str) -> None:
    """Whatever a caller writes, a target that is taken is the path it seems to be."""
    path = f"/{text}"
    try:
        target = Mount.bind("/srv", path).target
    except ValidationError:
        return
    assert os.path.normpath(target) == target == path
    assert not target.startswith(("/proc/", "/dev/"))
