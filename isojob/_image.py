"""Container images as roots: read, verified, unpacked once into a store.

OCI image layouts (a directory, or a tar of it, as ``skopeo copy ... oci-archive:`` and ``docker
save`` of today write) and the older format of ``docker save``. Every digest is verified while its
bytes are read. All layers go into one directory: a job pays for its root as for any directory.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from isojob._image_source import MAX_JSON, Hashed, Source, opened
from isojob._image_store import default_store, locked, remove, workplace
from isojob._models import Model, Name, parse_bytes
from isojob._tar import decompressed
from isojob._unpack import MAX_BYTES, MAX_ENTRIES, Unpacker
from isojob._variables import NO_VARIABLES, Variables
from isojob.errors import ImageError
from isojob.mounts import Root
from isojob.sandbox import Sandbox

__all__ = ["Image"]

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
# The whole name first: docker save has "3" in the one, "docker.io/library/alpine:3" in the other.
_NAMES = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
_EVERY_MACHINES = ("", "v1", "v8")  # variants: of amd64, of arm64
_MAX_LAYERS = 500  # more than the kernel's overlay would stack


class Image(Model, frozen=True):
    """An unpacked container image.

    Attributes:
        digest: Of its manifest, or of its configuration where it has none: ``sha256:...``.
        name: What it was called, if it said.
        path: The directory that holds its root file system.
        env: Its variables.
        workdir: Its working directory, for ``cwd=``; ``/`` if it names none. It is there,
            but below /tmp, which is each job's own.
        entrypoint: Its entry point.
        cmd: What that is given without other arguments; without an entry point, what is run.
        size: Bytes of its files.
    """

    digest: str
    name: str = ""
    path: Name
    env: Variables = NO_VARIABLES
    workdir: str = "/"
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    size: int = 0

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        reference: str | None = None,
        store: str | os.PathLike[str] | None = None,
        max_bytes: int | str = MAX_BYTES,
    ) -> Self:
        """Unpacks an image, unless it is in the store already (blocking).

        Args:
            path: A directory with an OCI image layout, or a tar archive by ``docker save`` or
                ``skopeo``.
            reference: Which, where there are several: its name.
            store: Directory for unpacked images; by default `default_store()`. Jobs read what is
                in it: it should belong to you alone.
            max_bytes: Of all its files together, bytes or a string such as ``"2GiB"``.

        Raises:
            ImageError: It cannot be read, its digests are wrong, or it holds what an image must
                not: names that lead out, devices, FIFOs, sparse files, more than is allowed.
            OSError: The file or the store cannot be read or written.
            ValueError: `max_bytes` makes no sense.
        """
        max_bytes = parse_bytes(max_bytes)
        where = default_store() if store is None else Path(store)
        try:
            where.mkdir(parents=True, exist_ok=True, mode=0o700)
            with locked(where), opened(Path(path), where, max_bytes) as source:
                found = _find(source, reference)
                target = where.resolve() / found.digest.partition(":")[2]
                if not (target / "image.json").is_file():
                    _unpack(source, found, target, max_bytes)
                os.utime(target)
                try:
                    image = cls._read(target / "image.json")
                except ValueError as error:
                    raise ImageError(f"{target} holds no image: remove it") from error
                if image.size > max_bytes:  # unpacked by whom more was allowed
                    raise ImageError(f"its files are {image.size} bytes, more than is allowed")
                return image
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # It names what was being unpacked, or nothing: not the disk that is full.
            raise OSError(error.errno, error.strerror, str(where)) from error

    @classmethod
    def _read(cls, file: Path) -> Self:
        image = cls.model_validate_json(file.read_bytes())
        # Where it is, not where it was: stores are moved and copied.
        return image.model_copy(update={"path": str(file.parent / Path(image.path).name)})

    @property
    def root(self) -> Root:
        """For ``Sandbox(root=...)``: its files, and its variables."""
        return Root(kind="directory", path=self.path, env=self.env)

    def command(self, *arguments: str) -> list[str]:
        """What to run, as ``docker run IMAGE [ARGUMENTS...]`` does.

        Args:
            *arguments: In the place of the image's own `cmd`.
        """
        return [*self.entrypoint, *(arguments or self.cmd)]

    def sandbox(self, *, writable: bool = False, **options: Any) -> Sandbox:
        """A sandbox with its root and variables.

        Args:
            writable: As for `Root.directory`.
            **options: Of `Sandbox`; variables in ``env`` are over the image's.

        Raises:
            pydantic.ValidationError: An option that `Sandbox` refuses.
        """
        root = self.root.model_copy(update={"writable": writable})
        return Sandbox(root=root, **options)

    @classmethod
    def stored(cls, store: str | os.PathLike[str] | None = None) -> list[Self]:
        """The images of the store, the last used first; one that cannot be read is left out.

        Raises:
            OSError: The store itself cannot be read.
        """
        where = (default_store() if store is None else Path(store)).resolve()
        found: list[tuple[float, Self]] = []
        try:
            names = os.listdir(where)
        except FileNotFoundError:
            names = []
        for name in names:
            with suppress(OSError, ValueError):
                image = cls._read(where / name / "image.json")
                if image.digest == f"sha256:{name}":  # else it is somebody else's
                    found.append(((where / name).stat().st_mtime, image))
        return [image for _, image in sorted(found, key=lambda pair: -pair[0])]

    @classmethod
    def prune(cls, keep: int = 0, store: str | os.PathLike[str] | None = None) -> list[Self]:
        """Removes images from the store, but for the last used.

        Pools that run on one of them fail from then on: close them first. One that is loaded again
        has another `path`.

        Args:
            keep: How many stay.
            store: As for `load`.

        Returns:
            What was removed.

        Raises:
            ValueError: `keep` is no number of images.
            OSError: The store cannot be read or written.
        """
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
            raise ValueError(f"keep: {keep!r} is no number of images")
        where = default_store() if store is None else Path(store)
        if not os.path.lexists(where):
            return []
        with locked(where):
            old = cls.stored(where)[keep:]
            for image in old:
                remove(Path(image.path).parent)
            return old


class _Found:
    """Where the parts of an image are."""

    def __init__(
        self,
        digest: str,
        name: str,
        config: dict[str, Any],
        layers: list[tuple[str, str]],
        *,
        diff_ids: bool = False,
    ) -> None:
        self.digest = digest
        self.name = name
        self.config = config
        self.layers = layers
        """File and digest of each, the lowest first."""
        self.diff_ids = diff_ids
        """Whether these digests are of what the files hold, compressed as they may be."""


def _find(source: Source, reference: str | None) -> _Found:
    try:
        found = _look(source, reference)
        if not isinstance(found.config, dict):
            raise ImageError("its configuration is broken")
        if len(found.layers) > _MAX_LAYERS:
            raise ImageError(f"it has {len(found.layers)} layers, over {_MAX_LAYERS}")
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ImageError(f"its description is broken: {error!r}") from error
    return found


def _look(source: Source, reference: str | None) -> _Found:
    if source.has("index.json"):
        return _find_oci(source, source.json("index.json"), reference)
    if source.has("manifest.json"):
        return _find_docker(source, reference)
    raise ImageError("neither an OCI image layout nor an archive of docker save")


def _blob(descriptor: dict[str, Any]) -> tuple[str, str]:
    digest = str(descriptor["digest"])
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise ImageError(f"{digest!r} is no sha256 digest")
    return f"blobs/sha256/{match[1]}", digest


def _find_oci(
    source: Source,
    index: dict[str, Any],
    reference: str | None,
    name_above: str = "",
    depth: int = 0,
) -> _Found:
    machine = _MACHINES.get(platform.machine(), platform.machine())
    # By digest: an image that is saved with two tags is listed twice.
    wanted: dict[str, tuple[list[str], dict[str, Any]]] = {}
    known = set[str]()
    for entry in index["manifests"]:
        annotations = entry.get("annotations") or {}
        names = [name for key in _NAMES if (name := str(annotations.get(key, "")))]
        known.update(names[:1])
        # docker save has "docker.io/library/alpine:3" for alpine:3.
        if reference is not None and not any(
            name == reference or name.endswith(f"/{reference}") for name in names
        ):
            continue
        platform_of = entry.get("platform") or {}
        if (
            platform_of.get("architecture", machine) == machine
            and platform_of.get("os", "linux") == "linux"
        ):
            wanted.setdefault(str(entry["digest"]), (names, entry))
    fitting = list(wanted.values())
    if len(fitting) > 1 and len({tuple(names) for names, _ in fitting}) == 1:
        # One image for several generations of processors: the one that runs on all.
        fitting = [one for one in fitting if _variant(one[1]) in _EVERY_MACHINES] or fitting
    if len(fitting) != 1:
        hint = f": give reference=, one of {sorted(known)}" if known else ""
        raise ImageError(f"{len(fitting)} images for {machine}{hint}")
    names, entry = fitting[0]
    name = name_above or next(iter(names), "")
    file, digest = _blob(entry)
    manifest = source.json(file, digest)
    if "manifests" in manifest:
        if depth > 2:
            raise ImageError("an index of indexes of indexes")
        return _find_oci(source, manifest, None, name, depth + 1)
    config = source.json(*_blob(manifest["config"]))
    layers = [_blob(layer) for layer in manifest["layers"]]
    return _Found(digest, name, config, layers)


def _variant(entry: dict[str, Any]) -> str:
    return str((entry.get("platform") or {}).get("variant") or "")


def _find_docker(source: Source, reference: str | None) -> _Found:
    entries = source.json("manifest.json")
    fitting = [
        one for one in entries if reference is None or reference in (one.get("RepoTags") or [])
    ]
    if len(fitting) != 1:
        known = sorted({str(tag) for one in entries for tag in one.get("RepoTags") or []})
        raise ImageError(f"{len(fitting)} images: give reference=, one of {known}")
    entry = fitting[0]
    for named in (entry["Config"], *entry["Layers"]):
        if not isinstance(named, str) or not named.isprintable():
            raise ImageError(f"its description is broken: {named!r} is no name")
    with source.open(entry["Config"]) as file:
        digest = "sha256:" + hashlib.sha256(file.read(MAX_JSON)).hexdigest()
    match = re.search(r"(?:^|/)([0-9a-f]{64})(?:\.json)?$", entry["Config"])
    if match is not None and digest != f"sha256:{match[1]}":
        raise ImageError(f"{entry['Config']} has another digest")
    config = source.json(entry["Config"], digest)
    digests = config["rootfs"]["diff_ids"]
    if len(digests) != len(entry["Layers"]):
        raise ImageError("layers and their digests differ in number")
    name = (entry.get("RepoTags") or [""])[0]
    layers = list(zip(entry["Layers"], digests, strict=True))
    return _Found(digest, name, config, layers, diff_ids=True)


def _unpack(source: Source, found: _Found, target: Path, max_bytes: int) -> None:
    work = workplace(target)
    try:
        # Another one each time: after a pruning, pools still have the old one mounted.
        root = Path(tempfile.mkdtemp(prefix="rootfs-", dir=work))
        root.chmod(0o755)  # whatever our umask
        unpacker = Unpacker(str(root), max_bytes=max_bytes, max_entries=MAX_ENTRIES)
        try:
            for name, digest in found.layers:
                with source.open(name) as file:
                    stream: Any = Hashed(decompressed(file) if found.diff_ids else file)
                    unpacker.layer(stream)
                    if stream.digest != digest:
                        raise ImageError(f"layer {name} has another digest")
            image, text = _describe(found, str(target / root.name), unpacker.used)
            unpacker.directory(image.workdir)
        finally:
            unpacker.close()
        (work / "image.json").write_text(text, encoding="utf-8")
        work.chmod(0o755)
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _describe(found: _Found, path: str, size: int) -> tuple[Image, str]:
    """The image, and what is written down of it."""
    settings = found.config.get("config") or {}
    if not isinstance(settings, dict):
        raise ImageError("its configuration is broken")

    def words(key: str) -> list[str]:
        value = settings.get(key) or []
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise ImageError(f"its configuration is broken: {key}")
        return value

    variables = [item.partition("=") for item in words("Env")]
    workdir = settings.get("WorkingDir") or "/"
    if not isinstance(workdir, str):
        raise ImageError("its configuration is broken: WorkingDir")
    try:
        image = Image(
            digest=found.digest,
            name=found.name,
            path=path,
            env={name: value for name, _, value in variables if name},
            workdir=os.path.normpath("/" + workdir.lstrip("/")),
            entrypoint=tuple(words("Entrypoint")),
            cmd=tuple(words("Cmd")),
            size=size,
        )
        return image, image.model_dump_json()
    except ValueError as error:
        raise ImageError(f"its configuration is broken: {error}") from error
