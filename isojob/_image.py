"""Container images as roots: read, verified, unpacked once into a store.

OCI image layouts (a directory, or a tar of it, as ``skopeo copy ... oci-archive:`` and ``docker
save`` of today write) and the older format of ``docker save``. Every digest is verified while its
bytes are read. All layers go into one directory: a job pays for its root as for any directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import platform
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Self

from typing_extensions import override

from isojob._models import Model, Name
from isojob._unpack import MAX_BYTES, MAX_ENTRIES, Unpacker
from isojob.errors import ImageError
from isojob.sandbox import Root, Sandbox

__all__ = ["Image", "default_store"]

_MAX_JSON = 8 << 20
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_NAMES = ("org.opencontainers.image.ref.name", "io.containerd.image.name")
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


def default_store() -> Path:
    """Where images are unpacked: ``$XDG_CACHE_HOME/isojob/images``, or below ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "isojob" / "images"


class Image(Model, frozen=True):
    """An unpacked container image.

    Attributes:
        digest: Of its manifest, or of its configuration where it has none: ``sha256:...``.
        name: What it was called, if it said.
        path: The directory that holds its root file system.
        env: Its variables.
        workdir: Its working directory, for ``cwd=``; ``/`` if it has none.
        entrypoint: Its entry point, and the arguments that it has without others.
        size: Bytes of its files.
    """

    digest: str
    name: str = ""
    path: Name
    env: dict[str, str] = {}  # noqa: RUF012
    workdir: str = "/"
    entrypoint: tuple[str, ...] = ()
    size: int = 0

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        reference: str | None = None,
        store: str | os.PathLike[str] | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> Self:
        """Unpacks an image, unless it is in the store already (blocking).

        Args:
            path: A directory with an OCI image layout, or a tar archive by ``docker save`` or
                ``skopeo``.
            reference: Which, where there are several: its name.
            store: Directory for unpacked images; by default `default_store()`. Jobs read what is
                in it: it should belong to you alone.
            max_bytes: Of all its files together.

        Raises:
            ImageError: It cannot be read, its digests are wrong, or it holds what an image must
                not: names that lead out, devices, FIFOs, more than is allowed.
            OSError: The file or the store cannot be read or written.
        """
        where = default_store() if store is None else Path(store)
        where.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _opened(Path(path)) as source, _locked(where):
            found = _find(source, reference)
            target = where.resolve() / found.digest.partition(":")[2]
            if not (target / "image.json").is_file():
                _unpack(source, found, target, max_bytes)
            os.utime(target)
            return cls.model_validate_json((target / "image.json").read_text())

    @property
    def root(self) -> Root:
        """For ``Sandbox(root=...)``."""
        return Root.directory(self.path)

    def sandbox(self, **options: Any) -> Sandbox:
        """A sandbox with its root and variables.

        Args:
            **options: Of `Sandbox`; variables in ``env`` are over the image's.
        """
        env = {**self.env, **options.pop("env", {})}
        return Sandbox(root=self.root, env=env, **options)

    @classmethod
    def stored(cls, store: str | os.PathLike[str] | None = None) -> list[Self]:
        """The images of the store, the last used first."""
        where = default_store() if store is None else Path(store)
        found: list[tuple[float, Self]] = []
        for file in where.glob("*/image.json"):
            with suppress(OSError, ValueError):
                found.append(
                    (file.parent.stat().st_mtime, cls.model_validate_json(file.read_text()))
                )
        return [image for _, image in sorted(found, key=lambda pair: -pair[0])]

    @classmethod
    def prune(cls, keep: int = 0, store: str | os.PathLike[str] | None = None) -> list[Self]:
        """Removes images from the store, but for the last used.

        Pools that run on one of them fail from then on: close them first.

        Args:
            keep: How many stay.
            store: As for `load`.

        Returns:
            What was removed.
        """
        where = default_store() if store is None else Path(store)
        if not where.is_dir():
            return []
        with _locked(where):
            old = cls.stored(where)[max(0, keep) :]
            for image in old:
                _remove(Path(image.path).parent)
            return old


class _Source:
    """The files of an image, by name."""

    def open(self, name: str) -> IO[bytes]:
        """One of them.

        Raises:
            ImageError: It is missing.
        """
        raise NotImplementedError

    def has(self, name: str) -> bool:
        """Whether it is there."""
        raise NotImplementedError

    def json(self, name: str, digest: str | None = None) -> Any:
        """One that is JSON, of that digest."""
        with self.open(name) as file:
            data = file.read(_MAX_JSON + 1)
        if len(data) > _MAX_JSON:
            raise ImageError(f"{name} is too long")
        if digest is not None and f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            raise ImageError(f"{name} has another digest")
        try:
            return json.loads(data)
        except ValueError as error:
            raise ImageError(f"{name} is no JSON: {error}") from error


class _Directory(_Source):
    def __init__(self, path: Path) -> None:
        self._path = path

    @override
    def open(self, name: str) -> IO[bytes]:
        if ".." in name.split("/") or name.startswith("/"):
            raise ImageError(f"{name!r} leads out of the image")
        try:
            return (self._path / name).open("rb")
        except OSError as error:
            raise ImageError(f"{name}: {error.strerror}") from error

    @override
    def has(self, name: str) -> bool:
        return (self._path / name).is_file()


class _Archive(_Source):
    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._members = {member.name.removeprefix("./"): member for member in archive}

    @override
    def open(self, name: str) -> IO[bytes]:
        member = self._members.get(name)
        for _ in range(8):  # docker save links layers that are the same
            if member is None or not (member.issym() or member.islnk()):
                break
            name = os.path.normpath(os.path.join(os.path.dirname(name), member.linkname))
            member = self._members.get(name)
        file = None if member is None or not member.isreg() else self._archive.extractfile(member)
        if file is None:
            raise ImageError(f"there is no {name}")
        return file

    @override
    def has(self, name: str) -> bool:
        return name in self._members


@contextmanager
def _opened(path: Path) -> Iterator[_Source]:
    if path.is_dir():
        yield _Directory(path)
        return
    with path.open("rb") as file:
        try:
            archive = tarfile.open(fileobj=file, mode="r:*")  # noqa: SIM115 - closed below
            source = _Archive(archive)
        except (tarfile.TarError, EOFError) as error:
            raise ImageError(f"{path} is no image: {error}") from error
        with archive:
            yield source


@contextmanager
def _locked(store: Path) -> Iterator[None]:
    fd = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        for left in store.glob("tmp-*"):  # of an import that was killed
            _remove(left)
        yield
    finally:
        os.close(fd)


class _Found:
    """Where the parts of an image are."""

    def __init__(
        self, digest: str, name: str, config: dict[str, Any], layers: list[tuple[str, str]]
    ) -> None:
        self.digest = digest
        self.name = name
        self.config = config
        self.layers = layers
        """File and digest of each, the lowest first."""


def _find(source: _Source, reference: str | None) -> _Found:
    try:
        if source.has("index.json"):
            return _find_oci(source, source.json("index.json"), reference)
        if source.has("manifest.json"):
            return _find_docker(source, reference)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ImageError(f"its description is broken: {error!r}") from error
    raise ImageError("neither an OCI image layout nor an archive of docker save")


def _blob(descriptor: dict[str, Any]) -> tuple[str, str]:
    digest = str(descriptor["digest"])
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise ImageError(f"{digest!r} is no sha256 digest")
    return f"blobs/sha256/{match[1]}", digest


def _find_oci(
    source: _Source, index: dict[str, Any], reference: str | None, depth: int = 0
) -> _Found:
    machine = _MACHINES.get(platform.machine(), platform.machine())
    wanted = []
    for entry in index["manifests"]:
        annotations = entry.get("annotations") or {}
        names = [
            str(annotations.get(f"{key}.name", ""))
            for key in ("org.opencontainers.image.ref", "io.containerd.image")
        ]
        if reference is not None and depth == 0 and reference not in names:
            continue
        if (entry.get("platform") or {}).get("architecture", machine) == machine:
            wanted.append((names, entry))
    if len(wanted) != 1:
        known = sorted({name for names, _ in wanted for name in names if name})
        raise ImageError(
            f"{len(wanted)} images for {machine}"
            + (f": give reference=, one of {known}" if known else "")
        )
    names, entry = wanted[0]
    file, digest = _blob(entry)
    manifest = source.json(file, digest)
    if "manifests" in manifest:
        if depth > 2:
            raise ImageError("an index of indexes of indexes")
        return _find_oci(source, manifest, None, depth + 1)
    config = source.json(*_blob(manifest["config"]))
    layers = [_blob(layer) for layer in manifest["layers"]]
    return _Found(digest, next((name for name in names if name), ""), config, layers)


def _find_docker(source: _Source, reference: str | None) -> _Found:
    entries = source.json("manifest.json")
    fitting = [
        one for one in entries if reference is None or reference in (one.get("RepoTags") or [])
    ]
    if len(fitting) != 1:
        raise ImageError(f"{len(fitting)} images: give reference=, such as repository:tag")
    entry = fitting[0]
    with source.open(entry["Config"]) as file:
        digest = "sha256:" + hashlib.sha256(file.read(_MAX_JSON)).hexdigest()
    config = source.json(entry["Config"], digest)
    digests = config["rootfs"]["diff_ids"]
    if len(digests) != len(entry["Layers"]):
        raise ImageError("layers and their digests differ in number")
    name = (entry.get("RepoTags") or [""])[0]
    return _Found(digest, name, config, list(zip(entry["Layers"], digests, strict=True)))


class _Hashed(io.RawIOBase):
    """A stream that is hashed as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self._digest = hashlib.sha256()

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._digest.update(data)
        return len(data)

    @override
    def close(self) -> None:
        """Not before `rest`: who reads layers closes what it wraps."""

    def rest(self) -> str:
        """The digest of all of it."""
        while self.read(1 << 20):
            pass
        return f"sha256:{self._digest.hexdigest()}"


def _unpack(source: _Source, found: _Found, target: Path, max_bytes: int) -> None:
    work = Path(tempfile.mkdtemp(prefix="tmp-", dir=target.parent))
    try:
        root = work / "rootfs"
        root.mkdir(mode=0o755)
        unpacker = Unpacker(str(root), max_bytes=max_bytes, max_entries=MAX_ENTRIES)
        try:
            for name, digest in found.layers:
                with source.open(name) as file:
                    stream: Any = _Hashed(file)
                    unpacker.layer(stream)
                    if stream.rest() != digest:
                        raise ImageError(f"layer {name} has another digest")
        finally:
            unpacker.close()
        settings = found.config.get("config") or {}
        variables = [str(item).partition("=") for item in settings.get("Env") or []]
        image = Image(
            digest=found.digest,
            name=found.name,
            path=str(target / "rootfs"),
            env={name: value for name, _, value in variables if name},
            workdir=str(settings.get("WorkingDir") or "/"),
            entrypoint=tuple(
                str(word)
                for word in (*(settings.get("Entrypoint") or ()), *(settings.get("Cmd") or ()))
            ),
            size=unpacker.used,
        )
        (work / "image.json").write_text(image.model_dump_json())
        work.chmod(0o755)
        if target.exists():  # an earlier one that is incomplete
            _remove(target)
        work.rename(target)
    except BaseException:
        _remove(work)
        raise


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
