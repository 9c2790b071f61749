"""The plan of a cell's root: what the zygote puts on an empty tmpfs, in order."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from isojob.cgroups.discovery import read_text, unescape
from isojob.errors import SandboxSetupError
from isojob.mounts import Mount, check_source
from isojob.sandbox import Sandbox, mounted_inside
from isojob.wire import BindFlag, Tag, Writer

__all__ = ["MASKS", "TOOLCHAIN", "block_devices", "write_plan"]

TOOLCHAIN = (
    "usr",
    "bin",
    "sbin",
    "lib",
    "lib32",
    "lib64",
    "libx32",
    "nix/store",
    "gnu/store",
)
# What programs of the toolchain read below /etc and what holds nothing of this host's users.
_ETC_TREES = ("alternatives", "ssl/certs", "ssl/openssl.cnf", "fonts", "ld.so.conf.d")
_ETC_PREFIXES = ("java-",)
_ETC_COPIES = ("ld.so.cache", "ld.so.conf", "mime.types", "protocols", "services")
_NODES = ("null", "zero", "full", "random", "urandom", "tty")
_LINKS = (
    ("dev/fd", "/proc/self/fd"),
    ("dev/stdin", "/proc/self/fd/0"),
    ("dev/stdout", "/proc/self/fd/1"),
    ("dev/stderr", "/proc/self/fd/2"),
)

_MERGED = "dev/.layers"
"""Where the zygote mounts layers; jobs see what is bound from there."""
_LOWER = ".lower"
"""Where it has them for a root that each cell mounts itself."""

MASKS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
)
"""Parts of /proc that tell about the host, hidden in every cell; all of it is read-only."""
KEY_MASKS = ("/proc/key-users", "/proc/keys")
"""Hidden where jobs run as the caller's own uid. The kernel shows keys of the uids that its
reader's user namespace maps, and of no other (security/keys/proc.c)."""


def write_plan(
    config: Writer, out: Writer, sandbox: Sandbox, images: Mapping[str, int], *, own_ids: bool
) -> None:
    """Writes what the zygote makes once and what each cell mounts.

    Args:
        config: Takes the parts of each cell.
        out: Takes the operations that build the root, in order.
        sandbox: What it is to be.
        images: The layers that are files, in the order in which their mounts' descriptors are
            attached.
        own_ids: Whether each job has uids of its own.

    Raises:
        SandboxSetupError: A bind source is missing or not readable by the caller.
    """
    for directory in ("dev", "dev/shm", "etc"):
        out.text(Tag.ROOT_DIR, directory, 0o755)
    out.text(Tag.ROOT_DIR, "dev/.empty", 0o555)  # masks directories of /proc
    out.text(Tag.ROOT_DIR, "tmp", 0o1777)
    for node in _NODES:
        out.text(Tag.ROOT_NODE, node)
    if sandbox.root.writable:
        _writable_root(config, out, sandbox, images)
    elif sandbox.root.kind == "host":
        _host_root(out, sandbox)
    else:
        _tree_root(config, out, sandbox, images, own_ids=own_ids)
    for name, target in _LINKS:
        out.pair(Tag.ROOT_LINK, name, target)
    out.text(Tag.ROOT_DIR, sandbox.workdir, 0o755)
    for number, inside in enumerate(mounted_inside(sandbox)):
        _mount(config, out, sandbox.mounts[number], number, inside=inside)
    for mask in MASKS if own_ids else (*MASKS, *KEY_MASKS):
        config.text(Tag.MASK, mask)


def _host_root(out: Writer, sandbox: Sandbox) -> None:
    for name in TOOLCHAIN:
        _entry(out, Path("/") / name, name)
    out.pair(Tag.ROOT_LINK, "etc/mtab", "/proc/self/mounts")
    _put_etc(out, sandbox, "etc")
    for name in _ETC_COPIES:
        path = Path("/etc") / name
        if path.is_file():
            out.blob(Tag.ROOT_FILE, f"etc/{name}", path.read_bytes(), 0o644)
    try:
        listed = sorted(os.listdir("/etc"))
    except OSError:
        listed = []
    more = [name for name in listed if name.startswith(_ETC_PREFIXES)]
    for name in (*_ETC_TREES, *more):
        path = Path("/etc") / name
        if path.exists():
            out.pair(Tag.ROOT_COPY, f"etc/{name}", str(path), BindFlag.OPTIONAL)


def _tree_root(
    config: Writer, out: Writer, sandbox: Sandbox, images: Mapping[str, int], *, own_ids: bool
) -> None:
    """Every entry at the top by itself: /proc, /dev, /tmp and the working directory are ours."""
    merged = sandbox.root.kind == "layers"
    if merged:
        _layers(config, out, sandbox, images)
        out.text(Tag.ROOT_OVERLAY, _MERGED)
    else:
        _check_source(Path(sandbox.root.sources[0]))
    ours = {"proc", "dev", "tmp", "sys", *_hidden(sandbox, images, own_ids=own_ids)}
    top = _top(sandbox, images)
    for name, path in sorted(top.items()):
        if name not in ours:
            _entry(out, path, name, f"{_MERGED}/{name}" if merged else None)
    if "etc" not in top:
        _put_etc(out, sandbox, "etc")


def _layers(config: Writer, out: Writer, sandbox: Sandbox, images: Mapping[str, int]) -> None:
    """The highest first."""
    numbers = {path: number for number, path in enumerate(images)}
    _check_overlaps([path for path in sandbox.root.sources if path not in numbers])
    if numbers:
        config.number(Tag.IMAGES, len(numbers))
    for path in reversed(sandbox.root.sources):
        _check_source(Path(path))
        if path in numbers:
            out.text(Tag.ROOT_LAYER, path, 1 + numbers[path])
        else:
            out.text(Tag.ROOT_LAYER, os.path.realpath(path))


def _check_overlaps(layers: list[str]) -> None:
    """Overlayfs says ELOOP of those on one file system (Documentation/filesystems/overlayfs.rst).

    Raises:
        ValueError: One is the same as another, or inside it.
    """
    real = sorted((f"{os.path.realpath(path)}/", path) for path in layers)
    for (upper, first), (lower, second) in pairwise(real):
        if lower.startswith(upper) and os.stat(upper).st_dev == os.stat(lower).st_dev:
            raise ValueError(f"layers: {second} is inside {first}, or the same")


def _writable_root(
    config: Writer, out: Writer, sandbox: Sandbox, images: Mapping[str, int]
) -> None:
    """The layers as they are, and what a root without /etc is given; cells do the rest."""
    _layers(config, out, sandbox, images)
    out.text(Tag.ROOT_DIR, ".root", 0o755)
    out.text(Tag.ROOT_DIR, f"{_LOWER}/etc", 0o755)
    _put_etc(out, sandbox, f"{_LOWER}/etc")
    out.text(Tag.ROOT_LOWER, _LOWER)
    config.number(Tag.LOWER, len(sandbox.root.sources))


def _hidden(sandbox: Sandbox, images: Mapping[str, int], *, own_ids: bool) -> Iterator[str]:
    """The top of the working directory, unless that would take other things away from the root."""
    name, *below = sandbox.workdir[1:].split("/")
    there = [Path(_where(layer, images), name) for layer in sandbox.root.sources]
    if not below or not any(_shows(path, own_ids=own_ids) for path in there):
        yield name


def _shows(path: Path, *, own_ids: bool) -> bool:
    """Whether a job finds anything there: not in an empty directory, nor behind a closed one."""
    try:
        info = path.lstat()
        if not stat.S_ISDIR(info.st_mode):
            return True
        is_open = info.st_mode & stat.S_IXOTH if own_ids else os.access(path, os.X_OK)
        return bool(is_open) and any(path.iterdir())
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _where(layer: str, images: Mapping[str, int]) -> str:
    """A mount that is attached nowhere has no other name than its descriptor's."""
    return f"/proc/self/fd/{images[layer]}" if layer in images else layer


def _top(sandbox: Sandbox, images: Mapping[str, int]) -> dict[str, Path]:
    """The entries at the top of all layers together, each in the highest layer that has it."""
    found: dict[str, Path] = {}
    for layer in sandbox.root.sources:
        where = _where(layer, images)
        if not os.path.isdir(where):
            raise SandboxSetupError(
                "root", errno.ENOTDIR, f"{layer}; squashfs and EROFS images are for Root.layers"
            )
        with os.scandir(where) as entries:
            for entry in entries:
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:  # hides what is below
                    found.pop(entry.name, None)
                else:
                    found[entry.name] = Path(entry.path)
    return found


def _entry(out: Writer, path: Path, target: str, merged: str | None = None) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return
    if stat.S_ISLNK(mode):
        out.pair(Tag.ROOT_LINK, target, os.readlink(path))
    elif stat.S_ISDIR(mode) or stat.S_ISREG(mode):
        if merged is None:
            out.pair(Tag.ROOT_BIND, target, str(path))
        else:
            out.pair(Tag.ROOT_BIND, target, merged, BindFlag.OWN)


def _etc(sandbox: Sandbox) -> dict[str, bytes]:
    """A synthetic /etc: nobody of this host is in it."""
    home = sandbox.workdir
    files = {
        "passwd": (
            "root:x:0:0:root:/:/usr/sbin/nologin\n"
            f"job:x:{sandbox.uid}:{sandbox.gid}:job:{home}:/bin/sh\n"
            "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n"
        ),
        "group": f"root:x:0:\njob:x:{sandbox.gid}:\nnogroup:x:65534:\n",
        "hosts": f"127.0.0.1 localhost {sandbox.hostname}\n::1 localhost\n",
        "hostname": f"{sandbox.hostname}\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
        "resolv.conf": "",
        "shells": "/bin/sh\n",
    }
    return {name: text.encode("utf-8", "surrogateescape") for name, text in files.items()}


def _put_etc(out: Writer, sandbox: Sandbox, directory: str) -> None:
    for name, content in _etc(sandbox).items():
        out.blob(Tag.ROOT_FILE, f"{directory}/{name}", content, 0o644)


def _mount(config: Writer, out: Writer, mount: Mount, number: int, *, inside: bool) -> None:
    """Targets in what each cell has anew are bound there again, from a place of ours."""
    if mount.type == "bind":
        assert mount.source is not None
        source = Path(mount.source)
        _check_source(source)
        flags = BindFlag(0) if mount.read_only else BindFlag.WRITABLE
        place = f"/dev/.mounts/{number}" if inside else mount.target
        out.pair(Tag.ROOT_BIND, place, str(source.resolve()), flags)
        if inside:
            config.pair(Tag.CELL_BIND, mount.target, place)
    else:
        if not inside:
            out.text(Tag.ROOT_DIR, mount.target, 0o755)
        options = f"mode=1777,size={mount.size},nr_inodes={mount.inodes}"
        config.pair(Tag.CELL_TMPFS, mount.target, options)


def _check_source(path: Path) -> None:
    """The zygote opens it with our credentials and looks again; this makes the message better.

    Raises:
        ValueError: Links lead to where no bind may come from.
        SandboxSetupError: It is not there, or not readable.
    """
    check_source(os.path.realpath(path))
    try:
        directory = stat.S_ISDIR(path.stat().st_mode)
        wanted = os.R_OK | (os.X_OK if directory else 0)
        if not os.access(path, wanted):
            raise PermissionError(13, os.strerror(13))
    except OSError as error:
        raise SandboxSetupError("bind source", error.errno or 0, str(path)) from error


def block_devices(sandbox: Sandbox) -> tuple[str, ...]:
    """The whole disks ("8:0") behind the bound directories, which disk I/O limits apply to.

    What is mounted below one is bound with it. A partition has no limits of its own: its
    ``partition`` file tells, its parent is the disk.
    """
    sources = [f"/{name}" for name in TOOLCHAIN] if sandbox.root.kind == "host" else []
    sources += map(str, sandbox.root.sources)
    sources += [str(mount.source) for mount in sandbox.mounts if mount.source is not None]
    return tuple(dict.fromkeys(_disks(sources)))


def _disks(sources: list[str]) -> Iterator[str]:
    mounts = [line.split(" ") for line in read_text(Path("/proc/self/mountinfo")).split("\n")]
    points = {words[0]: unescape(words[4]) for words in mounts if len(words) > 4}
    bound: set[str] = set()
    for source in sources:
        with suppress(OSError):
            bound.add(_mount_of(source))
        below = os.path.realpath(source).rstrip("/") + "/"
        bound |= {number for number, point in points.items() if point.startswith(below)}
    for words in mounts:
        if words[0] in bound:
            yield from _devices(words[2], unescape(words[words.index("-") + 2]))


def _mount_of(path: str) -> str:
    """The number of its mount: on btrfs st_dev is that of a subvolume, which no mount has."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return read_text(Path(f"/proc/self/fdinfo/{fd}")).partition("mnt_id:")[2].split()[0]
    finally:
        os.close(fd)


def _devices(number: str, origin: str) -> Iterator[str]:
    """The disks of a file system with that number, mounted from there: none, one, or many."""
    # tmpfs, overlay, network, or gone: no block device to limit.
    with suppress(OSError):
        if number.startswith("0:"):  # of no device; btrfs is on some all the same
            if not origin.startswith("/"):
                return
            device = os.stat(origin)
            if not stat.S_ISBLK(device.st_mode):
                return
            number = f"{os.major(device.st_rdev)}:{os.minor(device.st_rdev)}"
        first = Path("/sys/dev/block", number).resolve(strict=True)
        together = [first]
        for devices in Path("/sys/fs/btrfs").glob("*/devices"):
            members = [member.resolve() for member in devices.iterdir()]
            if first in members:
                together = members
        for device_path in together:
            disk = device_path.parent if (device_path / "partition").exists() else device_path
            yield (disk / "dev").read_text().strip()
