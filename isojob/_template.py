"""What a warm interpreter is started with: the template that a pool's launchers are forked from."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

from isojob import wire
from isojob._interpreter import Interpreter
from isojob.cgroups import Driver
from isojob.errors import HostNotSupportedError, IsojobError, PreloadError, ProfileError
from isojob.limits import Limits
from isojob.sandbox import Sandbox
from isojob.seccomp._profile import shipped
from isojob.wire import Message, Tag, Writer

__all__ = ["Imports", "Template"]

_PLACE = "/dev/.warm"
"""Where cells see our runner; /dev is ours in every root."""


@cache
def _library() -> bytes:
    source = files("isojob").joinpath("_libexec", "isojob-warm.so")
    try:
        with as_file(source) as path:
            return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise HostNotSupportedError(
            "this installation of isojob has no isojob-warm.so",
            "reinstall isojob on Linux with a C compiler: pip install --force-reinstall isojob",
        ) from error


@cache
def _source(name: str) -> bytes:
    return files("isojob").joinpath("warm", name).read_bytes()


@cache
def _filter() -> bytes:
    """What a template may call: what its cells need to be made, and no deep part of the kernel."""
    return shipped("template").compile().bpf


@dataclass(frozen=True)
class Template:
    """A warm interpreter.

    Attributes:
        interpreter: Which.
        preload: Modules that it imports before its first fork.
        limits: Of its imports.
        seconds: How long they may take.
    """

    interpreter: Interpreter
    preload: tuple[str, ...]
    limits: Limits
    seconds: float

    def sandbox(self, sandbox: Sandbox) -> Sandbox:
        """With what the interpreter needs, behind the mounts of the caller."""
        taken = [mount.target for mount in sandbox.mounts]
        more = [
            mount
            for mount in self.interpreter.mounts(sandbox.root)
            if not any(f"{mount.target}/".startswith(f"{target}/") for target in taken)
        ]
        return sandbox.model_copy(update={"mounts": (*sandbox.mounts, *more)}) if more else sandbox

    def write(self, config: Writer, plan: Writer, driver: Driver, sandbox: Sandbox) -> None:
        """Writes the fields of the zygote's configuration that are for it."""
        command = (self.interpreter.executable, f"{_PLACE}/runner.py", f"{_PLACE}/warm.so")
        compiled = sandbox.seccomp.compile()
        if compiled.bpf and not compiled.preload:
            raise ProfileError(
                f"seccomp profile {sandbox.seccomp.name!r} does not allow all that a launcher "
                "calls; a warm interpreter has its filter before it has its job"
            )
        for argument in (*command, *self.preload):
            config.text(Tag.TEMPLATE_ARG, argument)
        for name, value in sandbox.environment().items():
            config.text(Tag.TEMPLATE_ENV, f"{name}={value}")
        config.put(Tag.TEMPLATE_FILTER, _filter())
        mask, writes = driver.cell(self.limits, ())
        config.number(Tag.TEMPLATE_MASK, mask)
        for write in writes:
            if write.file == "memory.oom.group":
                continue  # the inits of its cells are in there, too
            index = write.hierarchy | (wire.OPTIONAL_WRITE if write.optional else 0)
            config.blob(Tag.TEMPLATE_WRITE, write.file, write.value, index)
        for name in ("runner.py", "ending.py"):
            plan.blob(Tag.ROOT_FILE, f"{_PLACE}/{name}", _source(name), 0o444)
        plan.blob(Tag.ROOT_FILE, f"{_PLACE}/warm.so", _library(), 0o555)


class Imports:
    """What a template says while it preloads.

    Args:
        template: Which.
    """

    def __init__(self, template: Template) -> None:
        self._template = template
        self._deadline = time.monotonic() + template.seconds
        self._module = ""

    @property
    def left(self) -> float:
        """Seconds until it is too late.

        Raises:
            PreloadError: It is, however much it still says.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self.late()
        return left

    def hear(self, message: Message) -> None:
        """Takes one message.

        Raises:
            PreloadError: An import has failed.
        """
        text = (message.first(Tag.TEXT) or b"").decode("utf-8", "replace")
        if text.startswith("I"):
            self._module = text[1:]
        elif text.startswith("E"):
            module, _, rest = text[1:].partition("\0")
            why, _, trace = rest.partition("\0")
            raise PreloadError(module or self._module or "the interpreter", why, trace)

    def died(self) -> IsojobError:
        """It is dead."""
        limit = self._template.limits.memory
        most = "" if limit is None else f", or needed more than {limit >> 20} MiB"
        return PreloadError(
            self._module or self._template.interpreter.executable,
            f"the template died while it imported this: it exited, crashed{most}",
        )

    def late(self) -> PreloadError:
        """It is not ready in time."""
        return PreloadError(
            self._module or self._template.interpreter.executable,
            f"the imports were not done after {self._template.seconds:g} s",
        )
