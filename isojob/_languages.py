"""Languages that judges and graders meet: how to compile and run, with limits that fit.

`languages` is a table to look up and to add to::

    isojob.languages["zig"] = isojob.Language(
        name="Zig", extensions=(".zig",), source="main.zig",
        compile=("zig", "build-exe", "-femit-bin=main", "./{main}"), outputs=("main",),
        execute=("./main",),
    )

The commands are those of Debian's packages; the programs have to be in the sandbox's root.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self, Unpack

from pydantic import Field, model_validator

from isojob._job import Content, check_files
from isojob._models import Model
from isojob._options import RunOptions
from isojob.limits import Limits

if TYPE_CHECKING:
    from isojob._session import Session
    from isojob.result import Result

__all__ = ["Language", "Languages", "Program", "languages"]

_PATH = "/usr/local/bin:/usr/bin:/bin"
_BUILD = Limits(
    cpu_time=30,
    wall_time=60,
    memory="1GiB",
    processes=64,
    output="1MiB",
    disk="256MiB",
    collect="64MiB",  # as large as any file can be: what it makes goes this way into the session
)
_LARGE_BUILD = _BUILD.model_copy(
    update={"cpu_time": 60.0, "wall_time": 120.0, "memory": 2 << 30, "processes": 256}
)


_WORD = re.compile(r"\{(heap|main|stem)\}")


class Language(Model, frozen=True):
    """How programs in one language are compiled and run.

    In commands, outputs and variables ``{main}`` stands for the file a program starts with,
    ``{stem}`` for its path without the extension, and ``{heap}`` for three quarters of the memory
    limit in MiB, for runtimes that reserve more than they use unless they are told. An argument
    ``{sources}`` stands for all source files.

    Attributes:
        name: For people.
        extensions: Of its source files.
        source: What the file is called that a program starts with.
        compile: Command that compiles or checks it; empty: there is nothing to do.
        outputs: Names and patterns of what compiling makes, and running needs. Without any it is
            a mere check; None: all that it does to the directory stays.
        execute: Command that runs it.
        env: Variables for both.
        compile_limits: Of compiling.
        limits: Of running, where the caller gives none.

    Raises:
        pydantic.ValidationError: It could not run, or would not keep what it compiles.
    """

    name: str
    extensions: tuple[str, ...]
    source: str
    compile: tuple[str, ...] = ()
    outputs: tuple[str, ...] | None = ()
    execute: Annotated[tuple[str, ...], Field(min_length=1)]
    env: dict[str, str] = Field(default_factory=dict)
    compile_limits: Limits = _BUILD
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _check_outputs(self) -> Self:
        if self.compile and self.execute[0].startswith("./") and self.outputs == ():
            raise ValueError("outputs: name what compiling makes, or give None to keep all")
        return self

    @property
    def available(self) -> bool:
        """Whether this host has its programs where `Root.host()` shows them."""
        programs = [command[0] for command in (self.compile, self.execute) if command]
        return all(
            program.startswith("./") or shutil.which(program, path=_PATH) for program in programs
        )

    def program(self, source: bytes | Path | Mapping[str, Content]) -> Program:
        """A program of one file or of several.

        Args:
            source: The text of one file, which gets the name `source`; or a file; or several, as
                `Pool.run` takes ``files``. Files keep their names.

        Raises:
            TypeError: It is none of these.
            ValueError: No file is a source of this language, or none of several is known to be the
                one to start with: it has to be called `source`. Or names that no job can have.
        """
        if isinstance(source, Path):
            files: Mapping[str, Content] = {source.name: source}
        elif isinstance(source, Mapping):
            files = source
        elif isinstance(source, bytes):
            files = {self.source: source}
        else:
            kind = type(source).__name__
            raise TypeError(f"source must be bytes, a pathlib.Path or a mapping, not {kind}")
        files = check_files(files, self.compile_limits)
        return Program(self, files, self._main(files))

    def _main(self, files: Mapping[str, Content]) -> str:
        if self.source in files:
            return self.source
        sources = [name for name in sorted(files) if self.has(name)]
        if not sources:
            named = ", ".join(sorted(files)) or "no file"
            raise ValueError(f"{self.name}: no source file among {named}")
        words = " ".join((*self.compile, *self.execute))
        if len(sources) > 1 and ("{main}" in words or "{stem}" in words):
            raise ValueError(
                f"{self.name}: which of {', '.join(sources)} to start with? Call it {self.source}"
            )
        if "{stem}" in words and sources[0][0] in "-@":
            raise ValueError(f"{self.name}: {sources[0]} would be taken for an option")
        return sources[0]

    def has(self, name: str | os.PathLike[str]) -> bool:
        """Whether a file of this name is a source of this language."""
        return os.path.splitext(os.fspath(name))[1] in self.extensions


@dataclass(frozen=True)
class Program:
    """A program in a language: compiled once in a session, then run there many times.

    Attributes:
        language: Its language.
        files: Its files, by name.
        main: The one it starts with.
    """

    language: Language
    files: Mapping[str, Content]
    main: str

    def command(self, limits: Limits | None = None) -> list[str]:
        """The command that runs it under these limits; by default the language's."""
        return list(self._filled(self.language.execute, self._limits(limits)))

    def env(self, limits: Limits | None = None) -> dict[str, str]:
        """The variables that go with that command."""
        variables = self.language.env
        values = self._filled(variables.values(), self._limits(limits))
        return dict(zip(variables, values, strict=True))

    async def build(self, session: Session) -> Result | None:
        """Puts the files into a session and compiles them; with a cache only once.

        A compiler can be content and yet make nothing to run, as of a library: then `run` raises
        `CommandNotFoundError` or `CommandNotExecutableError`. `Result.uncollected` tells which
        outputs could not be kept: too large, or with names too long; then none is.

        Returns:
            The compiler's result, or None where there is nothing to compile.

        Raises:
            ValueError: The program's own files are larger than the session's directory.
            IsojobError: As `Session.put` and `Session.run`.
        """
        language = self.language
        limits = language.compile_limits
        await session.put(self.files)
        if not language.compile:
            return None
        command = list(self._filled(language.compile, limits))
        env = self.env(limits)
        if not language.outputs:
            keep = language.outputs is None
            return await session.run(command, keep=keep, limits=limits, env=env)
        outputs = list(self._filled(language.outputs, limits))
        return await session.run(command, outputs=outputs, limits=limits, env=env)

    async def run(
        self, session: Session, *, limits: Limits | None = None, **options: Unpack[RunOptions]
    ) -> Result:
        """Runs it once, on a private copy of the session's directory.

        Args:
            session: Where it was built.
            limits: By default the language's, whatever those of the session are.
            **options: ``input``, ``stdin``, ``stdout``, ``stderr``, ``env``, ``cwd``, ``files`` and
                ``collect`` of `run_isolated`.

        Raises:
            CommandNotFoundError, CommandNotExecutableError: It was not built.
            IsojobError: As `Session.run`.
        """
        limits = self._limits(limits)
        options["env"] = {**self.env(limits), **(options.get("env") or {})}
        return await session.run(self.command(limits), keep=False, limits=limits, **options)

    def _limits(self, given: Limits | None) -> Limits:
        if given is None:
            return self.language.limits
        if not isinstance(given, Limits):
            raise TypeError(f"limits must be isojob.Limits, not {type(given).__name__}")
        return given

    def _filled(self, parts: Iterable[str], limits: Limits) -> Iterator[str]:
        memory = limits.memory
        words = {
            "heap": str(2**20 if memory is None else max(16, memory * 3 // 4 >> 20)),
            "main": self.main,
            "stem": os.path.splitext(self.main)[0],
        }
        for part in parts:
            if part == "{sources}":
                # No name of a stranger's choosing is taken for an option.
                yield from (f"./{name}" for name in sorted(self.files) if self.language.has(name))
            else:
                yield _WORD.sub(lambda found: words[found[1]], part)


class Languages(dict[str, Language]):
    """Languages by name; yours to add to."""

    def for_file(self, name: str | os.PathLike[str]) -> Language:
        """The language of a source file, by its extension.

        Raises:
            LookupError: None has that extension.
        """
        for language in self.values():
            if language.has(name):
                return language
        extension = os.path.splitext(os.fspath(name))[1]
        raise LookupError(f"no language has the extension {extension!r}")


# All memory may be stack: who recurses deeply is stopped by the one limit, not by another.
_NATIVE = Limits(memory="256MiB", stack="256MiB", processes=32)

languages = Languages(
    {
        "c": Language(
            name="C",
            extensions=(".c",),
            source="main.c",
            compile=("gcc", "-std=c17", "-O2", "-o", "main", "{sources}", "-lm"),
            outputs=("main",),
            execute=("./main",),
            limits=_NATIVE,
        ),
        "cpp": Language(
            name="C++",
            extensions=(".cc", ".cpp", ".cxx", ".c++"),
            source="main.cpp",
            compile=("g++", "-std=c++20", "-O2", "-o", "main", "{sources}"),
            outputs=("main",),
            execute=("./main",),
            limits=_NATIVE,
        ),
        "python": Language(
            name="Python",
            extensions=(".py",),
            source="main.py",
            compile=(
                # Not with modules of the program's; its warnings are for when it runs.
                *("python3", "-I", "-Wignore", "-c"),
                "import sys\nfor f in sys.argv[1:]: compile(open(f, 'rb').read(), f, 'exec')",
                "{sources}",
            ),
            execute=("python3", "./{main}"),
            limits=Limits(memory="256MiB", processes=32),
        ),
        "java": Language(
            name="Java",
            extensions=(".java",),
            source="Main.java",
            compile=(
                "javac",
                "-J-Xmx512m",
                "-J-XX:+UseSerialGC",  # others start threads by the CPUs of the host
                "-J-XX:-UsePerfData",
                *("-encoding", "UTF-8", "-d", ".", "{sources}"),
            ),
            outputs=tuple(f"{'*/' * depth}*.class" for depth in range(10)),  # packages
            execute=(
                "java",
                "-Xmx{heap}m",
                "-Xss64m",
                "-XX:+UseSerialGC",
                "-XX:TieredStopAtLevel=1",
                "-XX:-UsePerfData",
                "{stem}",
            ),
            compile_limits=_BUILD.model_copy(update={"processes": 256}),
            limits=Limits(memory="512MiB", processes=256),
        ),
        "javascript": Language(
            name="JavaScript",
            extensions=(".js", ".mjs"),
            source="main.js",
            compile=("node", "--check", "./{main}"),
            execute=("node", "--max-old-space-size={heap}", "./{main}"),
            limits=Limits(memory="512MiB", processes=64),
        ),
        "go": Language(
            name="Go",
            extensions=(".go",),
            source="main.go",
            compile=("go", "build", "-o", "main", "{sources}"),  # all in one directory
            outputs=("main",),
            execute=("./main",),
            env={
                "GOCACHE": "/tmp/go",  # noqa: S108
                "GOTOOLCHAIN": "local",
                "GOFLAGS": "-p=2",
                "GOMEMLIMIT": "{heap}MiB",
            },
            compile_limits=_LARGE_BUILD,
            limits=Limits(memory="256MiB", processes=64),
        ),
        "rust": Language(
            name="Rust",
            extensions=(".rs",),
            source="main.rs",
            # The name of a file need not do as a crate's.
            compile=(
                *("rustc", "--edition", "2021", "--crate-name", "main"),
                *("-O", "-o", "main", "./{main}"),
            ),
            outputs=("main",),
            execute=("./main",),
            compile_limits=_LARGE_BUILD,
            limits=_NATIVE,
        ),
    }
)
