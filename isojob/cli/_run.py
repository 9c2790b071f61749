"""``isojob run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from isojob.cli import _options
from isojob.cli._execute import execute
from isojob.cli._images import load
from isojob.cli._live import Request
from isojob.cli._options import OptionError
from isojob.cli._workdir import place
from isojob.limits import Limits
from isojob.sandbox import PROTECTIONS

__all__ = ["HELP", "run"]

HELP = (
    "Run one program in a sandbox of its own; flags are named as those of docker run.\n\n"
    "The exit status is the job's own; 128+N if signal N ended it; 137 if it ran into a limit (the "
    "account says which); 127 if the program is not found, 126 if it cannot be executed, 125 if "
    "isojob could not run it, not bring back what --collect asks for or not read all of its own "
    "stdin. Ctrl-C ends the job, and the status is 130."
)

_DEFAULTS = Limits()
_LIMITS = "Limits ('none' is unlimited; bytes need their unit: 64MiB or 64MB, not 64M)"
_VIEW = "What the job sees"
_FILES = "Files and streams"
_REPORT = "Report"


def _limit(*flags: str, metavar: str, help: str, field: str | None = None) -> Any:
    text = help
    default = None if field is None else getattr(_DEFAULTS, field)
    if default is not None:
        shown = f"{default // 2**20}MiB" if metavar == "SIZE" else f"{default:g}"
        # Escaped: rich would take the brackets for markup.
        text = f"{text} \\[default: {shown}]"
    return typer.Option(*flags, metavar=metavar, help=text, rich_help_panel=_LIMITS)


def _view(*flags: str, metavar: str, help: str) -> Any:
    return typer.Option(*flags, metavar=metavar, help=help, rich_help_panel=_VIEW)


def _file(*flags: str, metavar: str | None = None, help: str) -> Any:
    return typer.Option(*flags, metavar=metavar, help=help, rich_help_panel=_FILES)


def run(
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CMD",
            help="Program and arguments; a name without a slash is looked up in the job's PATH. "
            "With --image as for docker run: arguments of its entry point, if it has one.",
            show_default=False,
        ),
    ] = None,
    *,
    memory: Annotated[
        str | None,
        _limit(
            "--memory",
            "-m",
            metavar="SIZE",
            help="Memory of all processes, page cache and tmpfs together; swap is always 0.",
            field="memory",
        ),
    ] = None,
    cpus: Annotated[
        str | None, _limit("--cpus", metavar="NUMBER", help="Processors' worth of time, as 0.5.")
    ] = None,
    cpuset_cpus: Annotated[
        str | None, _limit("--cpuset-cpus", metavar="LIST", help="Processors to run on, as 0-1,3.")
    ] = None,
    pids_limit: Annotated[
        str | None,
        _limit(
            "--pids-limit", metavar="N", help="Processes and threads at once.", field="processes"
        ),
    ] = None,
    cpu_time: Annotated[
        str | None,
        _limit(
            "--cpu-time", metavar="SECONDS", help="CPU time of all processes.", field="cpu_time"
        ),
    ] = None,
    wall_time: Annotated[
        str | None,
        _limit("--wall-time", metavar="SECONDS", help="Time from the start.", field="wall_time"),
    ] = None,
    output_limit: Annotated[
        str | None,
        _limit("--output-limit", metavar="SIZE", help="Of stdout and of stderr.", field="output"),
    ] = None,
    collect_limit: Annotated[
        str | None,
        _limit(
            "--collect-limit", metavar="SIZE", help="Of all files brought back.", field="collect"
        ),
    ] = None,
    disk: Annotated[
        str | None,
        _limit(
            "--disk",
            metavar="SIZE",
            help="/box, /tmp and /dev/shm together; counts as memory, too.",
            field="disk",
        ),
    ] = None,
    device_read_bps: Annotated[
        str | None,
        _limit(
            "--device-read-bps",
            metavar="SIZE",
            help="A second, from the disks behind the directories that the job sees.",
        ),
    ] = None,
    device_write_bps: Annotated[
        str | None, _limit("--device-write-bps", metavar="SIZE", help="A second, to them.")
    ] = None,
    device_read_iops: Annotated[
        str | None, _limit("--device-read-iops", metavar="N", help="Reads a second.")
    ] = None,
    device_write_iops: Annotated[
        str | None, _limit("--device-write-iops", metavar="N", help="Writes a second.")
    ] = None,
    ulimit: Annotated[
        list[str] | None,
        _limit(
            "--ulimit",
            metavar="NAME=N",
            help="nofile, fsize, stack, core or as; in bytes but for nofile.",
        ),
    ] = None,
    rootfs: Annotated[
        str | None,
        _view(
            "--rootfs",
            metavar="DIR[:O]",
            help="An unpacked image to use as root; by default the host's /usr, /bin, /lib... "
            "With :O the job writes to a view of its own, as in Podman.",
        ),
    ] = None,
    image: Annotated[
        str | None,
        _view(
            "--image",
            metavar="IMAGE[:O]",
            help="A container image (of docker save or skopeo, or an OCI layout), unpacked once: "
            "its files, variables, program and working directory. :O as for --rootfs.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        _view("--reference", metavar="NAME", help="Which --image, if the archive has several."),
    ] = None,
    volume: Annotated[
        list[str] | None,
        _view(
            "--volume",
            "-v",
            metavar="SRC:DST[:ro|rw]",
            help="Show a file or directory of the host. Read-only unless :rw, unlike Docker.",
        ),
    ] = None,
    mount: Annotated[
        list[str] | None,
        _view(
            "--mount",
            metavar="type=...,target=...",
            help="type=bind,source=,target=,readonly=false or type=tmpfs,target=,tmpfs-size=.",
        ),
    ] = None,
    tmpfs: Annotated[
        list[str] | None,
        _view("--tmpfs", metavar="PATH[:size=64MiB]", help="An empty writable directory."),
    ] = None,
    network: Annotated[
        str,
        _view("--network", metavar="none", help="Only none: a network of its own, with nothing."),
    ] = "none",
    read_only: Annotated[
        bool,
        typer.Option(
            "--read-only",
            help="Accepted for Docker's sake: the root is, without :O; /box and /tmp are not.",
            rich_help_panel=_VIEW,
        ),
    ] = False,
    rm: Annotated[
        bool,
        typer.Option(
            "--rm",
            help="Accepted for Docker's sake: nothing of a job is left behind.",
            rich_help_panel=_VIEW,
        ),
    ] = False,
    user: Annotated[
        str | None,
        _view("--user", "-u", metavar="UID[:GID]", help="Ids seen inside, never the host's."),
    ] = None,
    hostname: Annotated[
        str | None, _view("--hostname", "-h", metavar="NAME", help="What uname tells the job.")
    ] = None,
    security_opt: Annotated[
        list[str] | None,
        _view(
            "--security-opt",
            metavar="seccomp=PROFILE",
            help="default, compute, unconfined, or a JSON file in Docker's format.",
        ),
    ] = None,
    allow_missing: Annotated[
        list[str] | None,
        _view(
            "--allow-missing",
            metavar="NAME",
            help=f"Run even if the host cannot give this: {', '.join(PROTECTIONS)}.",
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        _view("--env", "-e", metavar="NAME[=VALUE]", help="Nothing else is passed on."),
    ] = None,
    env_file: Annotated[
        list[Path] | None, _view("--env-file", metavar="FILE", help="Lines as for --env.")
    ] = None,
    workdir: Annotated[
        str | None,
        _file(
            "--workdir",
            "-w",
            metavar="DIR",
            help="Where to start: in what the root or a mount has there; where nothing is, it is "
            "the job's own directory instead of /box. Without it a job of an --image starts in "
            "the image's, but with --file in /box.",
        ),
    ] = None,
    file: Annotated[
        list[str] | None,
        _file("--file", metavar="NAME=PATH", help="Copy a file into the working directory."),
    ] = None,
    collect: Annotated[
        list[str] | None,
        _file("--collect", metavar="PATTERN", help="Files to bring back; needs --collect-to."),
    ] = None,
    collect_to: Annotated[
        Path | None,
        _file("--collect-to", metavar="DIR", help="Where to; no link in it is followed."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace files there.", rich_help_panel=_FILES),
    ] = False,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive", "-i", help="Feed our stdin to the job.", rich_help_panel=_FILES
        ),
    ] = False,
    tty: Annotated[bool, typer.Option("--tty", "-t", hidden=True)] = False,
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print the whole result, output included, as JSON and nothing else.",
            rich_help_panel=_REPORT,
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", help="No account on stderr at the end.", rich_help_panel=_REPORT
        ),
    ] = False,
) -> int:
    """What `HELP` says; typer reads the flags from the annotations."""
    del read_only, rm  # there is nothing to do
    if tty:
        raise OptionError(
            "--tty", "no terminal here: -i alone, or isojob.open_isolated(pty=True) from Python"
        )
    if network != "none":
        raise OptionError("--network", f"{network!r}: only none is there")
    if collect_to is not None and not collect:
        raise OptionError("--collect-to", "nothing is collected: give --collect, too")
    if collect and collect_to is None and not json:
        raise OptionError("--collect", "give --collect-to, too (or --json, which has the files)")
    root, cwd, command = None, None, command or []
    if image is not None:
        if rootfs is not None:
            raise OptionError("--image", "it is the root: leave out --rootfs")
        loaded, root = load(image, reference)
        command = loaded.command(*command)
        cwd = loaded.workdir if not file else None
    elif reference is not None:
        raise OptionError("--reference", "it chooses among the images of --image: give that, too")
    if not command:
        raise OptionError("CMD", "give a program to run" if image is None else "the image has none")
    limits = _options.make_limits(
        {
            "memory": memory,
            "cpus": cpus,
            "cpuset": cpuset_cpus,
            "processes": pids_limit,
            "cpu_time": cpu_time,
            "wall_time": wall_time,
            "output": output_limit,
            "collect": collect_limit,
            "disk": disk,
            "io_read_bps": device_read_bps,
            "io_write_bps": device_write_bps,
            "io_read_iops": device_read_iops,
            "io_write_iops": device_write_iops,
        },
        ulimit or (),
    )
    # The outer first, whichever way each is given.
    mounts = sorted(
        (
            *map(_options.volume, volume or ()),
            *map(_options.mount, mount or ()),
            *map(_options.tmpfs, tmpfs or ()),
        ),
        key=lambda one: one.target.count("/"),
    )
    own = None
    if workdir is not None:
        path = root.path if root is not None else rootfs and rootfs.removesuffix(":O")
        own, cwd = place(workdir, path, mounts)
    sandbox = _options.make_sandbox(
        rootfs=rootfs,
        root=root,
        mounts=mounts,
        seccomp=_options.profile(security_opt or ()),
        identity=user,
        allow_missing=allow_missing or (),
        workdir=own,
        hostname=hostname,
    )
    request = Request(
        command=command,
        limits=limits,
        sandbox=sandbox,
        cwd=cwd,
        env=_options.environment(env or (), env_file or ()),
        files=_options.files(file or ()),
        collect=collect or (),
        interactive=interactive,
        capture=json,
    )
    return execute(request, collect_to, force=force, quiet=quiet)
