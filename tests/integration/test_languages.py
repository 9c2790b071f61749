"""Each language whose programs are here compiles, runs, fails to compile, and keeps its limits."""

from __future__ import annotations

import pytest
from environment import SLOW

import isojob
from isojob import Cache, Language, Limits, Pool, Status

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


HOGS = {
    "java": "public class Main { public static void main(String[] x) {"
    " java.util.ArrayList<long[]> l = new java.util.ArrayList<>();"
    " while (true) l.add(new long[1000000]); } }",
    "javascript": "const l = []; while (true) l.push(new Array(1000000).fill(1.5));",
}


@pytest.mark.parametrize("name", sorted(ADD) if SLOW == 1 else ["c", "python"])
async def test_language(name: str) -> None:
    """Right input, right output; nonsense does not compile; a second build is not one."""
    language = isojob.languages[name]
    if not language.available:
        pytest.skip(f"{language.name} is not installed below /usr")
    assert isojob.languages.for_file(f"x{language.extensions[0]}") is language
    cache = Cache()
    limits = Limits(cpu_time=20 * SLOW, wall_time=60 * SLOW)
    slow = language.model_copy(
        update={"compile_limits": Limits(cpu_time=60 * SLOW, wall_time=90 * SLOW, memory="2GiB")}
    )
    async with Pool() as pool:
        for _ in range(2):
            async with pool.session(cache=cache) as session:
                built = await slow.build(session, ADD[name].encode())
                assert built is None or built.ok, (built, built.stderr_text)
                result = await slow.run(session, input=b"40 2\n", limits=limits)
                assert (result.stdout, result.status) == (b"42\n", "ok"), (result, result.stderr)
        assert cache.hits == (1 if language.outputs else 0)
        async with pool.session(files={language.source: b"this is { no program ("}) as session:
            built = await slow.build(session)
            assert built is not None and built.status == Status.NONZERO_EXIT
            assert built.stdout or built.stderr


@pytest.mark.skipif(SLOW > 1, reason="takes minutes on an emulated CPU")
async def test_memory_of_runtimes() -> None:
    """Runtimes that manage a heap are told its size: their own error, or the limit, not a hang."""
    async with Pool() as pool:
        for name, source in HOGS.items():
            language = isojob.languages[name]
            if not language.available:
                continue
            limits = Limits(memory="256MiB", cpu_time=30 * SLOW, wall_time=60 * SLOW)
            async with pool.session() as session:
                built = await language.model_copy(
                    update={"compile_limits": limits.model_copy(update={"memory": "1GiB"})}
                ).build(session, source.encode())
                assert built is not None
                assert built.ok, (built, built.stderr)
                result = await language.run(session, limits=limits)
                assert result.status in ("nonzero_exit", "memory_limit", "signaled"), result


async def test_one_of_the_users() -> None:
    """A language is a few lines."""
    shell = Language(name="Shell", extensions=(".sh",), source="main.sh", execute=("sh", "main.sh"))
    isojob.languages["shell"] = shell
    try:
        assert shell.available
        assert isojob.languages.for_file("a.sh") is shell
        async with Pool() as pool, pool.session() as session:
            assert await shell.build(session, b"echo $1 $X") is None
            result = await shell.run(session, env={"X": "2"})
            assert result.stdout == b"2\n"
    finally:
        del isojob.languages["shell"]
    with pytest.raises(LookupError):
        isojob.languages.for_file("a.sh")
