"""Runs third-party plugins as programs: JSON in, JSON out, and nothing else.

Every call of a plugin is a job of its own, under the profile ``compute``: no sockets, little time,
little memory. What it answers is untrusted, too, and validated before anyone uses it. A plugin
that hangs, crashes, lies or attacks costs its own call and nobody else's.

Needs nothing but isojob: ``python examples/plugin_host.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from textwrap import dedent, fill
from types import TracebackType
from typing import Annotated, Self

import anyio
from pydantic import BaseModel, Field, ValidationError

from isojob import Limits, Pool, Sandbox, SeccompProfile

LIMITS = Limits(cpu_time=1, wall_time=10, memory="64MiB", processes=4, output="16KiB", disk="1MiB")


class Article(BaseModel):
    """What plugins are given."""

    title: str
    text: str


class Suggestion(BaseModel, extra="forbid", strict=True):
    """What they must answer: exactly this, no longer than this, and nothing to fool a terminal."""

    tags: Annotated[list[Annotated[str, Field(pattern=r"^[\w -]{1,30}$")]], Field(max_length=5)]
    score: Annotated[float, Field(ge=0, le=1)]


class PluginError(Exception):
    """A plugin gave no valid answer; the message tells why."""


class PluginHost:
    """Calls plugins. Use it as an async context manager.

    Args:
        plugins: Their Python source, by name.
        limits: What each call may use.
    """

    def __init__(self, plugins: Mapping[str, str], limits: Limits = LIMITS) -> None:
        self._plugins = dict(plugins)
        self._pool = Pool(Sandbox(seccomp=SeccompProfile.compute()), limits)

    async def __aenter__(self) -> Self:
        await self._pool.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._pool.aclose()

    async def call(self, name: str, article: Article) -> Suggestion:
        """Asks one plugin.

        Raises:
            PluginError: It failed, broke a limit, or answered something else than was asked.
        """
        result = await self._pool.run(
            ["python3", "-I", "plugin.py"],
            files={"plugin.py": self._plugins[name].encode()},
            input=article.model_dump_json().encode(),
        )
        if not result.ok:
            # The plugin wrote this: as a repr it has no control codes.
            said = [f"{line[:200]!r}" for line in result.stderr_text.splitlines()[-1:]]
            raise PluginError("; ".join([str(result), *said]))
        try:
            return Suggestion.model_validate_json(result.stdout or b"")
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "answer"
            raise PluginError(f"invalid answer: {where}: {first['msg']}") from None

    async def call_all(self, article: Article) -> dict[str, Suggestion | PluginError]:
        """Asks all plugins at once; the failures of some are part of the answer."""
        answers: dict[str, Suggestion | PluginError] = {}

        async def ask(name: str) -> None:
            try:
                answers[name] = await self.call(name, article)
            except PluginError as error:
                answers[name] = error

        async with anyio.create_task_group() as tasks:
            for name in self._plugins:
                tasks.start_soon(ask, name)
        return {name: answers[name] for name in self._plugins}


def answering(expression: str) -> str:
    """The source of a plugin that answers an expression of the article's words."""
    return dedent(f"""
        import collections, json, sys
        words = json.load(sys.stdin)["text"].lower().split()
        print(json.dumps({expression}))
    """)


PLUGINS = {
    "frequent words": answering(
        """{"tags": [w for w, n in collections.Counter(words).most_common(3)], "score": 0.5}"""
    ),
    "long words": answering(
        """{"tags": sorted(set(words), key=len)[-2:], "score": min(1, len(words) / 100)}"""
    ),
    "hangs": "while True: pass",
    "hoards": "hoard = []\nwhile True: hoard.append(bytearray(1 << 20))",
    "crashes": answering("words[1000]"),
    "lies": answering("""{"tags": words, "score": 7}"""),
    "babbles": "while True: print('{' * 1000)",
    "phones home": "import socket\nsocket.create_connection(('1.1.1.1', 443))",
    # The profile lets no program make this system call and live.
    "attacks": "import ctypes\nctypes.CDLL(None).mount(b'none', b'/box', b'tmpfs', 0, None)",
}

ARTICLE = Article(
    title="On plugins",
    text="a plugin is a program that a host runs although the host did not write the program",
)


async def run() -> dict[str, Suggestion | PluginError]:
    """Asks the plugins of this example."""
    async with PluginHost(PLUGINS) as host:
        return await host.call_all(ARTICLE)


def main() -> int:
    """The command; returns its exit status."""
    answers = anyio.run(run)
    for name, answer in answers.items():
        if isinstance(answer, Suggestion):
            print(f"{name:15} tags {', '.join(answer.tags)}; score {answer.score:.2f}")
        else:
            print(fill(f"{name:15} no answer: {answer}", 80, subsequent_indent=" " * 16))
    return 0


if __name__ == "__main__":
    sys.exit(main())
