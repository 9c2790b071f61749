"""Languages that judges and graders meet: how to compile and run, with limits that fit.

`languages` is a table to look up and to add to::

    isojob.languages["zig"] = isojob.Language(
        name="Zig", extensions=(".zig",), source="main.zig",
        compile=("zig", "build-exe", "main.zig"), outputs=("main",), execute=("./main",),
    )

The commands are those of Debian's packages; the programs have to be in the sandbox's root.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from pydantic import Field

from isojob._models import Model
from isojob.limits import Limits

if TYPE_CHECKING:
    from isojob._session import Session
    from isojob.result import Result

__all__ = ["Language", "Languages", "languages"]

_PATH = "/usr/local/bin:/usr/bin:/bin"
_BUILD = Limits(
    cpu_time=30, wall_time=60, memory="1GiB", processes=64, output="1MiB", disk="256MiB"
)


class Language(Model, frozen=True):
    """How programs in one language are compiled and run.

    In the commands ``{heap}`` stands for three quarters of the run's memory limit in MiB, for
    runtimes that reserve more than they use unless they are told.

    Attributes:
        name: For people.
        extensions: Of its source files.
        source: What the program's file is called in the working directory.
        compile: Command that compiles or checks it; empty: there is nothing to do.
        outputs: Names and patterns of what compiling makes, and running needs.
        execute: Command that runs it.
        env: Variables for both.
        compile_limits: Of compiling.
        limits: Of running, where the caller gives none.
    """

    name: str
    extensions: tuple[str, ...]
    source: str
    compile: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    execute: tuple[str, ...]
    env: dict[str, str] = Field(default_factory=dict)
    compile_limits: Limits = _BUILD
    limits: Limits = Limits()

    @property
    def available(self) -> bool:
        """Whether this host has its programs where `Root.host()` shows them."""
        programs = [command[0] for command in (self.compile, self.execute) if command]
        return all(
            program.startswith("./") or shutil.which(program, path=_PATH) for program in programs
        )

    def command(self, limits: Limits | None = None) -> list[str]:
        """The command that runs a program under these limits."""
        memory = (self.limits if limits is None else limits).memory
        heap = 2**20 if memory is None else max(16, memory * 3 // 4 >> 20)
        return [part.replace("{heap}", str(heap)) for part in self.execute]

    async def build(self, session: Session, source: bytes | None = None) -> Result | None:
        """Compiles a program in a session; with a cache only if it has not been before.

        Args:
            session: Whose directory holds, or is to hold, the source.
            source: The program; None: it is there already.

        Returns:
            The compiler's result, or None where there is nothing to compile.
        """
        if source is not None:
            await session.put({self.source: source})
        if not self.compile:
            return None
        if not self.outputs:  # a check
            return await session.run(
                self.compile, keep=False, limits=self.compile_limits, env=self.env
            )
        return await session.run(
            self.compile, outputs=self.outputs, limits=self.compile_limits, env=self.env
        )

    async def run(
        self, session: Session, *, limits: Limits | None = None, **options: Any
    ) -> Result:
        """Runs the program once, on a private copy of the session's directory.

        Args:
            session: Where it was built.
            limits: By default the language's.
            **options: As for `Session.run`.
        """
        limits = self.limits if limits is None else limits
        env = {**self.env, **options.pop("env", {})}
        return await session.run(
            self.command(limits), keep=False, limits=limits, env=env, **options
        )


class Languages(dict[str, Language]):
    """Languages by name; yours to add to."""

    def for_file(self, name: str | os.PathLike[str]) -> Language:
        """The language of a source file, by its extension.

        Raises:
            LookupError: None has that extension.
        """
        extension = os.path.splitext(os.fspath(name))[1]
        for language in self.values():
            if extension in language.extensions:
                return language
        raise LookupError(f"no language has the extension {extension!r}")


languages = Languages(
    {
        "c": Language(
            name="C",
            extensions=(".c",),
            source="main.c",
            compile=("gcc", "-std=c17", "-O2", "-o", "main", "main.c", "-lm"),
            outputs=("main",),
            execute=("./main",),
        ),
        "cpp": Language(
            name="C++",
            extensions=(".cc", ".cpp", ".cxx", ".c++"),
            source="main.cpp",
            compile=("g++", "-std=c++20", "-O2", "-o", "main", "main.cpp"),
            outputs=("main",),
            execute=("./main",),
        ),
        "python": Language(
            name="Python",
            extensions=(".py",),
            source="main.py",
            compile=(
                "python3",
                "-c",
                "import ast; ast.parse(open('main.py', 'rb').read(), 'main.py')",
            ),
            execute=("python3", "main.py"),
        ),
        "java": Language(
            name="Java",
            extensions=(".java",),
            source="Main.java",
            compile=("javac", "-J-Xmx512m", "-encoding", "UTF-8", "-d", ".", "Main.java"),
            outputs=("*.class",),
            execute=(
                "java",
                "-Xmx{heap}m",
                "-Xss64m",
                "-XX:+UseSerialGC",
                "-XX:TieredStopAtLevel=1",
                "-XX:-UsePerfData",
                "Main",
            ),
        ),
        "javascript": Language(
            name="JavaScript",
            extensions=(".js", ".mjs"),
            source="main.js",
            compile=("node", "--check", "main.js"),
            execute=("node", "--max-old-space-size={heap}", "main.js"),
        ),
        "go": Language(
            name="Go",
            extensions=(".go",),
            source="main.go",
            compile=("go", "build", "-o", "main", "main.go"),
            outputs=("main",),
            execute=("./main",),
            env={"GOCACHE": "/tmp/go", "GOTOOLCHAIN": "local", "GOFLAGS": "-p=2"},  # noqa: S108
        ),
        "rust": Language(
            name="Rust",
            extensions=(".rs",),
            source="main.rs",
            compile=("rustc", "--edition", "2021", "-O", "-o", "main", "main.rs"),
            outputs=("main",),
            execute=("./main",),
        ),
    }
)
