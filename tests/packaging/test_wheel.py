"""The distributions: what is in them, where they install, and how a build fails."""

import functools
import os
import platform
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "isojob/_libexec/isojob-warm.so"
EXECUTABLE = "isojob/_libexec/isojob-zygote"
BUILD = "isojob/_libexec/build.json"

# The numbers of elf(5).
ET_DYN = 3
PT_INTERP, PT_GNU_STACK, PT_GNU_RELRO = 3, 0x6474E551, 0x6474E552
PF_X = 1


@dataclass(frozen=True)
class Distributions:
    """A built sdist, and the wheel that was built from it."""

    sdist: Path
    wheel: Path


def interpreters() -> list[str]:
    """Paths of the supported interpreters on this machine, or else the running one."""
    found = subprocess.run(
        [ROOT / "scripts" / "pythons.sh"], check=True, capture_output=True, text=True
    )
    return [line.split("\t")[1] for line in found.stdout.splitlines()] or [sys.executable]


def build(
    output: Path, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the build frontend on the checkout, isolated from the environment of the tests."""
    # The variables of the tests' environment would choose the packages of the build's.
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [sys.executable, "-m", "build", "--outdir", output, *arguments, ROOT],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=inherited | (env or {}),
    )


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Built once: the sdist from the checkout, the wheel from the sdist."""
    output = tmp_path_factory.mktemp("dist")
    done = build(output)
    assert done.returncode == 0, done.stdout
    (sdist,) = output.glob("*.tar.gz")
    (wheel,) = output.glob("*.whl")
    return Distributions(sdist, wheel)


def sources(*suffixes: str) -> set[str]:
    """The package's files in the checkout, relative to it; without suffixes all of them."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "isojob").rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and (not suffixes or path.suffix in suffixes)
    }


def profiles() -> set[str]:
    """The names of the seccomp profiles in the checkout."""
    return {path.name for path in (ROOT / "seccomp_profiles").glob("*.json")}


def program_headers(image: bytes) -> dict[int, int]:
    """Type and flags of a 64-bit little-endian ELF image's segments (elf(5), Elf64_Phdr)."""
    (offset,) = struct.unpack_from("<Q", image, 32)
    size, count = struct.unpack_from("<HH", image, 54)
    headers = (struct.unpack_from("<II", image, offset + i * size) for i in range(count))
    return dict(headers)


@functools.cache
def has_static_libc() -> bool:
    """Whether this machine's compiler can link statically."""
    found = subprocess.run(
        ["cc", "-print-file-name=libc.a"], check=True, capture_output=True, text=True
    )
    return Path(found.stdout.strip()).is_absolute()


def test_wheel_is_for_every_python_on_one_platform(distributions: Distributions) -> None:
    """The tag names no Python minor version and no ABI, but the machine it was built for."""
    tag = f"py3-none-linux_{platform.machine()}"
    assert distributions.wheel.stem.endswith(tag)
    with zipfile.ZipFile(distributions.wheel) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/WHEEL")]
        metadata = wheel.read(name).decode().splitlines()
    assert f"Tag: {tag}" in metadata
    assert "Root-Is-Purelib: false" in metadata


def test_wheel_holds_the_package_and_nothing_else(distributions: Distributions) -> None:
    """Each file of the package is there but the C sources; profiles and executable are added."""
    with zipfile.ZipFile(distributions.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {name for name in sources() if not name.startswith("isojob/native/")}
    expected |= {f"isojob/seccomp_profiles/{name}" for name in profiles()}
    assert names == expected | {EXECUTABLE, LIBRARY, BUILD}
    assert "isojob/py.typed" in names
    assert "isojob/seccomp_profiles/default.json" in names


def test_library_needs_nothing_but_the_c_library(distributions: Distributions) -> None:
    """What templates load: hardened, for any interpreter, with four names for others to see."""
    with zipfile.ZipFile(distributions.wheel) as wheel:
        image = wheel.read(LIBRARY)
    headers = program_headers(image)
    assert not headers[PT_GNU_STACK] & PF_X
    assert PT_GNU_RELRO in headers
    assert b"libpython" not in image
    exported = {word for word in image.split(b"\0") if word.startswith(b"isojob_warm_")}
    assert exported == {
        *(b"isojob_warm_open", b"isojob_warm_serve"),
        *(b"isojob_warm_forget", b"isojob_warm_hot"),
    }


def test_wheel_keeps_the_mode_of_the_executable(distributions: Distributions) -> None:
    """The zygote is installed as 0755, and it alone may be executed."""
    with zipfile.ZipFile(distributions.wheel) as wheel:
        modes = {info.filename: info.external_attr >> 16 for info in wheel.infolist()}
    assert stat.S_IMODE(modes[EXECUTABLE]) == 0o755
    assert [name for name, mode in modes.items() if mode & 0o111] == [EXECUTABLE]


def test_zygote_is_hardened(distributions: Distributions) -> None:
    """No executable stack, read-only relocations, position-independent, and static if possible."""
    with zipfile.ZipFile(distributions.wheel) as wheel:
        image = wheel.read(EXECUTABLE)
    assert image[:6] == b"\x7fELF\x02\x01", "a 64-bit little-endian ELF"
    headers = program_headers(image)
    assert not headers[PT_GNU_STACK] & PF_X
    assert PT_GNU_RELRO in headers
    assert struct.unpack_from("<H", image, 16) == (ET_DYN,)
    assert (PT_INTERP in headers) is not has_static_libc()


def test_sdist_holds_what_a_build_and_the_tests_need(distributions: Distributions) -> None:
    """C sources, profiles, build files and tests are there, products of builds are not."""
    with tarfile.open(distributions.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert sources(".c", ".h", ".py") <= names
    assert {f"seccomp_profiles/{name}" for name in profiles()} <= names
    assert {"CMakeLists.txt", "pyproject.toml", "LICENSE", "scripts/pythons.sh"} <= names
    assert Path(__file__).resolve().relative_to(ROOT).as_posix() in names
    assert not [name for name in names if name.endswith((".o", ".pyc", "isojob-zygote"))]


def install(python: str, directory: Path, *arguments: str | Path) -> Path:
    """Makes a clean environment, installs into it, and returns its folder of commands."""
    subprocess.run([python, "-m", "venv", directory], check=True)
    commands = directory / "bin"
    subprocess.run([commands / "python", "-m", "pip", "install", "--quiet", *arguments], check=True)
    return commands


def assert_complete(python: Path) -> None:
    """Asserts that the package imports without a warning, and that its executable runs."""
    program = """
import importlib.resources, isojob, subprocess
files = importlib.resources.files("isojob")
with importlib.resources.as_file(files.joinpath("_libexec", "isojob-zygote")) as path:
    null = subprocess.DEVNULL
    print(subprocess.run([path], stdin=null, stdout=null).returncode >= 0)
"""
    done = subprocess.run(
        [python, "-I", "-W", "error", "-c", program],
        check=False,
        capture_output=True,
        text=True,
        cwd=python.parent,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.parametrize("python", interpreters())
def test_wheel_installs_and_imports(
    distributions: Distributions, tmp_path: Path, python: str
) -> None:
    """In a clean environment of each interpreter the package imports and its executable runs."""
    commands = install(python, tmp_path / "env", distributions.wheel)
    assert_complete(commands / "python")


def test_editable_install_finds_the_executable(tmp_path: Path) -> None:
    """The executable is found, although the package is imported from another folder than its."""
    commands = install(sys.executable, tmp_path / "env", "--editable", ROOT)
    assert_complete(commands / "python")


def test_command_names_the_extra_that_it_needs(
    distributions: Distributions, tmp_path: Path
) -> None:
    """Without the cli extra the console script fails, and says what to install."""
    commands = install(sys.executable, tmp_path / "env", distributions.wheel)
    done = subprocess.run(
        [commands / "isojob", "--help"], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 125
    assert "isojob[cli]" in done.stderr
    assert "Traceback" not in done.stderr


def test_build_without_native_code_is_for_any_platform(tmp_path: Path) -> None:
    """Where CMake is switched off, as on other systems, the wheel is pure and has the package."""
    done = build(tmp_path, "--wheel", "-Cwheel.cmake=false")
    assert done.returncode == 0, done.stdout
    (path,) = tmp_path.glob("*.whl")
    assert path.stem.endswith("py3-none-any")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
    assert EXECUTABLE not in names
    assert {"isojob/__init__.py", "isojob/seccomp_profiles/default.json"} <= set(names)


def test_build_without_a_compiler_says_what_to_install(tmp_path: Path) -> None:
    """No compiler: the build fails, and its output names the packages to install."""
    done = build(tmp_path, "--wheel", env={"CC": str(tmp_path / "no-such-compiler")})
    assert done.returncode != 0
    assert "no working C compiler was found" in done.stdout
    assert "apt-get install gcc libc6-dev" in done.stdout
