"""Each language whose programs are here compiles, runs, fails to compile, and keeps its limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from environment import SLOW
from pydantic import ValidationError

import isojob
from isojob import Cache, CommandNotExecutableError, Language, Limits, Pool, Status

ADD = {
    "c": '#include <stdio.h>\nint main(void){int a,b;scanf("%d%d",&a,&b);printf("%d\\n",a+b);}',
    "cpp": "#include <iostream>\nint main(){int a,b;std::cin>>a>>b;std::cout<<a+b<<std::endl;}",
    "python": "print(sum(map(int, input().split())))",
    "java": "import java.util.*; public class Main { public static void main(String[] x) {"
    " Scanner s = new Scanner(System.in); System.out.println(s.nextInt() + s.nextInt()); } }",
    "javascript": "const [a, b] = require('fs').readFileSync(0, 'utf8').split(' ').map(Number);"
    " console.log(a + b);",
    "go": 'package main\nimport "fmt"\nfunc main() { var a, b int; fmt.Scan(&a, &b);'
    " fmt.Println(a + b) }",
    "rust": "fn main() { let mut s = String::new(); std::io::stdin().read_line(&mut s).unwrap();"
    ' let n: i64 = s.split_whitespace().map(|x| x.parse::<i64>().unwrap()).sum(); println!("{}", n); }',
}


def scaled(name: str) -> Language:
    """A language whose limits allow for this machine."""
    language = isojob.languages[name]
    if not language.available:
        pytest.skip(f"{language.name} is not installed below /usr")
    times = {"cpu_time": 60.0 * SLOW, "wall_time": 90.0 * SLOW}
    return language.model_copy(
        update={
            "compile_limits": language.compile_limits.model_copy(update=times),
            "limits": language.limits.model_copy(update=times),
        }
    )


HOGS = {
    "java": "public class Main { public static void main(String[] x) {"
    " java.util.ArrayList<long[]> l = new java.util.ArrayList<>();"
    " while (true) l.add(new long[1000000]); } }",
    "javascript": "const l = []; while (true) l.push(new Array(1000000).fill(1.5));",
}


@pytest.mark.parametrize("name", sorted(ADD) if SLOW == 1 else ["c", "python"])
async def test_language(name: str) -> None:
    """Right input, right output; nonsense does not compile; a second build is not one."""
    language = scaled(name)
    assert isojob.languages.for_file(f"x{language.extensions[0]}").name == language.name
    cache = Cache()
    async with Pool() as pool:
        for _ in range(2):
            async with pool.session(cache=cache) as session:
                program = language.program(ADD[name].encode())
                built = await program.build(session)
                assert built is None or built.ok, (built, built.stderr_text)
                result = await program.run(session, input=b"40 2\n")
                assert (result.stdout, result.status) == (b"42\n", "ok"), (result, result.stderr)
        assert cache.hits == (1 if language.outputs else 0)
        async with pool.session() as session:
            built = await language.program(b"this is { no program (").build(session)
            assert built is not None and built.status == Status.NONZERO_EXIT
            assert built.stdout or built.stderr


SEVERAL: dict[str, dict[str, str]] = {
    "c": {
        "a.c": '#include "b.h"\nint main(void) { return say(); }',
        "b.c": '#include <stdio.h>\n#include "b.h"\nint say(void) { return puts("two") < 0; }',
        "b.h": "int say(void);",
    },
    "python": {"main.py": "import b.c", "b/__init__.py": "", "b/c.py": "print('two')", "ast.py": ""},
    "java": {
        "Main.java": "public class Main { public static void main(String[] x) { a.B.say(); } }",
        "a/B.java": 'package a; public class B { public static void say() { System.out.println("two"); } }',
    },
    "javascript": {"main.js": "require('./b').say()", "b.js": "exports.say = () => console.log('two')"},
    "go": {
        "main.go": "package main\nfunc main() { say() }",
        "b.go": 'package main\nimport "fmt"\nfunc say() { fmt.Println("two") }',
    },
    "rust": {"main.rs": "mod b; fn main() { b::say() }", "b.rs": 'pub fn say() { println!("two"); }'},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SEVERAL) if SLOW == 1 else ["c", "python"])
async def test_several_files(name: str) -> None:
    """A program of several files, and one whose only file has a name of its own."""
    language = scaled(name)
    files = {name: text.encode() for name, text in SEVERAL[name].items()}
    async with Pool() as pool:
        async with pool.session() as session:
            program = language.program(files)
            built = await program.build(session)
            assert built is None or built.ok, (built, built.stderr_text)
            result = await program.run(session)
            assert (result.stdout, result.status) == (b"two\n", "ok"), (result, result.stderr)
        other = ADD[name].replace("Main", "Sum")
        async with pool.session() as session:
            program = language.program({f"Sum{language.extensions[0]}": other.encode()})
            built = await program.build(session)
            assert built is None or built.ok, (built, built.stderr_text)
            result = await program.run(session, input=b"40 2\n")
            assert (result.stdout, result.status) == (b"42\n", "ok"), (result, result.stderr)


@pytest.mark.parametrize(
    ("language", "file"), [("c", "-o.c"), ("python", "-c.py"), ("rust", "-o.rs")]
)
async def test_names_are_no_options(language: str, file: str, tmp_path: Path) -> None:
    """A stranger chooses the names of sources; neither compiler nor interpreter is misled."""
    (tmp_path / file).write_text(ADD[language])
    program = scaled(language).program(tmp_path / file)
    async with Pool() as pool, pool.session() as session:
        built = await program.build(session)
        assert built is not None
        assert built.ok, (built, built.stderr_text)
        assert (await program.run(session, input=b"40 2\n", env=None)).stdout == b"42\n"


async def test_nothing_to_run() -> None:
    """What the compiler is content with need not be a program; a large one is kept whole."""
    c = scaled("c")
    library = c.model_copy(update={"compile": ("gcc", "-c", "-o", "main", "{sources}")})
    large = b"int a[5000000] = {1}; int main(void) { return a[0] - 1; }"
    async with Pool() as pool:
        async with pool.session() as session:
            program = library.program(b"int f;")
            built = await program.build(session)
            assert built is not None
            assert built.ok, (built, built.stderr_text)
            with pytest.raises(CommandNotExecutableError):
                await program.run(session)
        async with pool.session() as session:
            program = c.program(large)
            built = await program.build(session)
            assert built is not None
            assert built.ok, (built, built.stderr_text)
            assert (await program.run(session)).ok


def test_which_file_to_start_with() -> None:
    """Known, or refused before anything starts."""
    python, c = isojob.languages["python"], isojob.languages["c"]
    assert python.program({"main.py": b"", "other.py": b""}).main == "main.py"
    assert python.program({"x.py": b"", "x.txt": b""}).main == "x.py"
    assert python.program({"x.py": b""}).command() == ["python3", "./x.py"]
    assert python.program({"{stem}.py": b""}).command() == ["python3", "./{stem}.py"]
    with pytest.raises(ValueError, match=r"which of a.py, b.py .* Call it main.py"):
        python.program({"a.py": b"", "b.py": b""})
    assert c.program({"a.c": b"", "b.c": b""}).command() == ["./main"]
    with pytest.raises(ValueError, match="C: no source file among x.py"):
        c.program({"x.py": b""})
    for name in ("-version.java", "@x.java"):
        with pytest.raises(ValueError, match="would be taken for an option"):
            isojob.languages["java"].program({name: b""})
    with pytest.raises(ValueError, match="no file"):
        c.program({})
    with pytest.raises(ValueError, match=r"must be a relative path"):
        c.program({"../x.c": b""})
    with pytest.raises(
        TypeError, match="source must be bytes, a pathlib.Path or a mapping, not str"
    ):
        c.program("int main;")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="outputs: name what compiling makes"):
        Language(name="", extensions=(), source="a", compile=("cc", "a"), execute=("./a",))
    with pytest.raises(ValidationError, match="execute"):
        Language(name="", extensions=(), source="a", compile=("cc", "a"), execute=())
    heap = isojob.languages["java"].program(b"")
    assert "-Xmx96m" in heap.command(Limits(memory="128MiB")) and heap.command()[-1] == "Main"
    assert isojob.languages["go"].program(b"").env(Limits(memory="64MiB"))["GOMEMLIMIT"] == "48MiB"


@pytest.mark.parametrize("limits", [{"memory": 3}, "x"])
async def test_limits_that_are_none(limits: Any) -> None:
    """Named as in every other call."""
    program = isojob.languages["java"].program(b"")
    for function in (program.command, program.env):
        with pytest.raises(TypeError, match="limits must be isojob.Limits"):
            function(limits)
    async with Pool() as pool, pool.session() as session:
        with pytest.raises(TypeError, match="limits must be isojob.Limits"):
            await program.run(session, limits=limits)


@pytest.mark.parametrize(
    "source",
    [
        b"return 1",
        b"def f():\n    break",
        b"def f():\n    x = 1\n    global x",
        b"from __future__ import nothing",
        b"x = 1\0",
        b"# coding: nothing\n",
    ],
)
async def test_what_python_does_not_compile(source: bytes) -> None:
    """Also what only its compiler refuses, not its parser, fails before it is run."""
    async with Pool() as pool, pool.session() as session:
        built = await scaled("python").program(source).build(session)
        assert built is not None
        assert built.status == Status.NONZERO_EXIT, built
        assert b"Error: " in (built.stderr or b"")


async def test_python_is_compiled_without_a_word() -> None:
    """What is dubious is no error; nothing is run, nor a module of the program's in Python's stead."""
    files = {
        "main.py": b"# coding: latin-1\nassert ('\xe4', 'is true')\nif 1 is 1: print('\\d')\n",
        **dict.fromkeys(("ast.py", "sys.py", "warnings.py", "encodings/__init__.py"), b"1 / 0"),
    }
    async with Pool() as pool, pool.session() as session:
        built = await scaled("python").program(files).build(session)
        assert built is not None
        assert (built.status, built.stdout, built.stderr) == ("ok", b"", b""), built


@pytest.mark.skipif(SLOW > 1, reason="takes minutes on an emulated CPU")
async def test_memory_of_runtimes() -> None:
    """Runtimes that manage a heap are told its size: their own error, or the limit, not a hang."""
    limits = Limits(memory="256MiB", cpu_time=30, wall_time=60)
    async with Pool() as pool:
        for name, source in HOGS.items():
            if not isojob.languages[name].available:
                continue
            async with pool.session() as session:
                program = scaled(name).program(source.encode())
                built = await program.build(session)
                assert built is not None
                assert built.ok, (built, built.stderr)
                result = await program.run(session, limits=limits)
                assert result.status in ("nonzero_exit", "memory_limit", "signaled"), result


async def test_one_of_the_users() -> None:
    """A language is a few lines."""
    shell = Language(name="Shell", extensions=(".sh",), source="main.sh", execute=("sh", "main.sh"))
    isojob.languages["shell"] = shell
    try:
        assert shell.available
        assert isojob.languages.for_file("a.sh") is shell
        async with Pool() as pool, pool.session() as session:
            program = shell.program(b"echo $1 $X")
            assert await program.build(session) is None
            result = await program.run(session, env={"X": "2"})
            assert result.stdout == b"2\n"
    finally:
        del isojob.languages["shell"]
    with pytest.raises(LookupError):
        isojob.languages.for_file("a.sh")


async def test_a_package_whose_name_is_too_long() -> None:
    """What a source makes its compiler write is no error of the caller's."""
    java = scaled("java")
    package = ".".join(f"{'p' * 240}{n}" for n in range(9))
    source = f"package {package}; public class Main {{ }}".encode()
    async with Pool() as pool, pool.session() as session:
        built = await java.program(source).build(session)
        assert built is not None and built.ok, built
        assert list(built.uncollected.values()) == ["too long"]
