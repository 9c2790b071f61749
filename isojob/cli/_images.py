"""``isojob image``: container images, unpacked as roots for jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from rich.table import Table

from isojob._image import Image
from isojob._image_store import default_store
from isojob.cli._console import make_console
from isojob.cli._options import OptionError
from isojob.mounts import Root

__all__ = ["image", "load"]

image = typer.Typer(
    help="Unpack container images ahead of `isojob run --image`, or as directories.",
    no_args_is_help=True,
)

_Store: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--store", metavar="DIR", help=f"Where they are kept: by default {default_store()}."
    ),
]


def load(text: str, reference: str | None = None) -> tuple[Image, Root]:
    """``IMAGE[:O]``: an image, unpacked into the default store if it is not there, and its root.

    Raises:
        OptionError: It cannot be read.
        ImageError: It is no image, or there are several.
    """
    path = text.removesuffix(":O")
    try:
        one = Image.load(path, reference=reference)
    except OSError as error:
        raise OptionError("--image", str(error)) from error
    return one, one.sandbox(writable=path != text).root


@image.command("import")
def import_(
    path: Annotated[
        Path,
        typer.Argument(metavar="IMAGE", help="An OCI layout, an archive of docker save or skopeo."),
    ],
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="NAME", help="Which, if there are several.")
    ] = None,
    store: _Store = None,
) -> int:
    """Unpack an image, unless it is there already, and print the directory of its root."""
    try:
        typer.echo(Image.load(path, reference=reference, store=store).path)
    except OSError as error:
        raise OptionError("IMAGE", str(error)) from error
    return 0


@image.command("list")
def list_(store: _Store = None) -> int:
    """List the images that are unpacked, the last used first."""
    table = Table(box=None)
    for heading in ("DIGEST", "NAME", "SIZE", "ROOT"):
        table.add_column(heading, overflow="fold")
    try:
        stored = Image.stored(store)
    except OSError as error:
        raise OptionError("--store", str(error)) from error
    for one in stored:
        size = f"{one.size / 2**20:.1f} MiB"
        table.add_row(one.digest[:19], _plain(one.name), size, one.path)
    make_console().print(table)
    return 0


@image.command("prune")
def prune(
    keep: Annotated[int, typer.Option("--keep", min=0, help="How many stay, the last used.")] = 0,
    store: _Store = None,
) -> int:
    """Remove unpacked images. Pools that use one of them fail from then on."""
    try:
        removed = Image.prune(keep, store)
    except OSError as error:
        raise OptionError("--store", str(error)) from error
    for one in removed:
        typer.echo(f"removed {one.digest} {_plain(one.name)}".rstrip())
    return 0


def _plain(name: str) -> str:
    """A name as its author wrote it, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in name)
