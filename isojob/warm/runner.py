"""What a template runs: preloads modules, lets itself be forked, and runs one job in each fork.

``python runner.py LIBRARY [MODULE...]``, by any CPython from 3.8 on: nothing newer, and nothing but
the standard library. Descriptors 3, 4, 5: socket to the zygote, init's executable, configuration.
"""

import sys

_BARE = frozenset(sys.modules)  # where nothing was imported yet

# Also in every job's sys.modules, loaded. What jobs use of it they would import in a millisecond.
import array
import builtins
import codecs
import ctypes
import gc
import importlib
import importlib.machinery
import io
import json
import os
import signal
import stat
import time
import traceback

_ending = type(sys)("ending")  # for nobody's sys.modules
_ending.__file__ = os.path.dirname(os.path.abspath(__file__)) + "/ending.py"
with open(_ending.__file__, "rb") as _file:
    exec(compile(_file.read(), _ending.__file__, "exec"), _ending.__dict__)
_ANNOTATED = "__annotations__" in globals()
_STREAMS = [(file.encoding, file.errors) for file in (sys.stdin, sys.stdout, sys.stderr)]
_SAFE_PATH = getattr(sys.flags, "safe_path", False)
_writes_no_bytecode = sys.dont_write_bytecode
_getpid, _open = os.getpid, open
_TRACES = ((sys.gettrace, sys.settrace), (sys.getprofile, sys.setprofile))


def _tell(text):
    data = text.encode("utf-8", "backslashreplace")
    os.write(3, data if len(data) <= 8000 else data[:2000] + b"\n...\n" + data[-5000:])


_QUIET = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
"""Threads of a preload end with the fork; these start theirs when they are imported."""


def _preload(names):
    """Imports them, one after the other, and says which fails."""
    os.environ.update(dict.fromkeys(_QUIET, "1"))
    _lead_streams(*[os.open(os.devnull, os.O_RDWR)] * 3)  # what they print is for nobody
    for name in names:
        _tell("I" + name)
        try:
            importlib.import_module(name)
            if len(os.listdir("/proc/self/task")) > 1:
                raise RuntimeError("it starts threads, which no fork inherits")
            with open("/proc/self/maps") as maps:
                if any(line.split()[1][1::2] == "ws" for line in maps):
                    raise RuntimeError("it makes shared memory, which all jobs would have")
        except BaseException as error:
            said = _ending.describe(error)
            _tell("E" + name + "\0" + _ending.sentence(said) + "\0" + said["traceback"])
            os._exit(1)


def _settle():
    """What forks would otherwise do each for itself, or copy for nothing."""
    # compile() makes the types of syntax trees first, a millisecond long.
    exec(compile(_SAMPLE, "sample", "exec"), {"print": str})
    try:
        json.loads("{")
    except ValueError as error:
        _ending.dumps({"x": [_ending.describe(error), 1.5, True]})
    _environment(_usual)
    for folder in [folder for folder, found in sys.path_importer_cache.items() if found is None]:
        del sys.path_importer_cache[folder]  # a job may bring it
    # Streams that most jobs will find good: they depend on what they lead to.
    read, write = os.pipe()
    os.close(read)
    _lead_streams(os.open(os.devnull, os.O_RDONLY), write, write)
    _ending.last = next(reversed(sys.modules))
    gc.collect()
    gc.freeze()


_usual = [name + b"=" + value for name, value in os.environb.items()]  # a job's
_SAMPLE = b"""
def f(n):
    return [str(i) for i in range(n)]
try:
    print(len(f(100)))
    f("x")
except TypeError as error:
    text = repr(error)
result = {"text": text, "list": f(9), "number": 1.5}
"""


def _rehearse(native, job):
    """Runs a job in a fork of ours, to see which pages it gets: others will need them, too."""
    # Other templates have the same /tmp.
    with open(path := f"/tmp/rehearsal-{os.getpid()}", "wb") as program:
        program.write(_SAMPLE)
    job.argv = (ctypes.c_char_p * 5)(path.encode(), b"", b"[]", b"rehearsal.py", None)
    job.envp = (ctypes.c_char_p * (len(_usual) + 1))(*_usual, None)
    room = ctypes.create_string_buffer(_ending.ROOM + 4096)
    job.result, job.size = ctypes.addressof(room), len(room)
    wait, go = os.pipe()

    def stay():
        os.close(go)
        os.read(wait, 1)
        os._exit(0)

    # Holds what we had: a page that only we write to meanwhile would be the job's alone, too.
    if (holder := os.fork()) == 0:
        stay()
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if len(os.listdir("/proc/self/task")) > 1:
                _tell("E\0RuntimeError: it starts threads in forks (os.register_at_fork)\0")
                os._exit(1)
            os.dup2(write, 1)
            _run_job(job, lambda code: (os.write(1, b"\0"), stay()))
        finally:
            os._exit(1)
    os.close(write)
    while os.read(read, 4096)[-1:] not in (b"\0", b""):
        pass
    try:
        ranges = _pages(child)
    except OSError:  # not told: then they come when they are needed
        ranges = array.array("Q")
    for fd in (go, wait, read):
        os.close(fd)
    for pid in (holder, child):
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:  # a preload ignores SIGCHLD
            pass
    os.remove(path)
    native.isojob_warm_hot(ctypes.c_void_p(ranges.buffer_info()[0]), len(ranges) // 3)


def _pages(pid):
    """Ranges of pages that it has got since the fork: addresses, lengths, how to get them.

    By pagemap(5), what it has written to: bit 63 a page that is there, bit 56 nobody else's; of
    files (61) one in sixteen: the kernel maps those around it. A million pages are only reserved.
    """
    size, found = os.sysconf("SC_PAGESIZE"), array.array("Q")
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/pagemap", "rb", 0) as pagemap:
        for line in maps:
            where, mode = line.split()[:2]
            low, high = (int(word, 16) // size for word in where.split("-"))
            if mode[0] != "r" or mode[3] != "p" or high - low > 1 << 20:
                continue
            bit, advice, around, last = (56, 23, 1, -1) if mode[1] == "w" else (61, 22, 16, -1)
            pagemap.seek(8 * low)
            entries = array.array("Q", pagemap.read(8 * (high - low)))
            for at, entry in enumerate(entries, low):
                if entry >> 63 & entry >> bit & 1 and at // around != last:
                    last = at // around
                    if found and at * size == found[-3] + found[-2] and found[-1] == advice:
                        found[-2] += size
                    else:
                        found.extend((at * size, size, advice))
    return found


class _Job(ctypes.Structure):
    """``struct warm_job`` of native/warm/warm.c."""

    _fields_ = [
        ("argv", ctypes.POINTER(ctypes.c_char_p)),
        ("envp", ctypes.POINTER(ctypes.c_char_p)),
        ("result", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
    ]


def _strings(at):
    found = []
    while (value := at[len(found)]) is not None:
        found.append(value)
    return found


def _serve(library, names):
    """Returns in forks alone, each with its job."""
    # PyDLL: with the interpreter's lock, for what it calls is the interpreter.
    native = ctypes.PyDLL(library)
    if number := native.isojob_warm_open(4, 5):
        raise OSError(number, "the configuration")
    job = _Job()
    job.native = native
    while True:
        _preload(names)
        _settle()
        _rehearse(native, job)
        _tell("R")
        if native.isojob_warm_serve(3, ctypes.byref(job)):
            return job
        # Another template, beside the one that we were.
        names = [name.decode() for name in _strings(job.argv)]


def _run_job(job, end=os._exit):
    """Becomes the job."""

    me = _getpid()

    def answer(text):
        if _getpid() != me:
            return
        data = text.encode("ascii", "backslashreplace")
        if len(data) + 8 <= job.size:
            ctypes.memmove(job.result + 8, data, len(data))
            # The length last: half an answer is none.
            ctypes.memmove(job.result, len(data).to_bytes(8, "little"), 8)

    fds = [fd for fd in (0, 1, 2) if stat.S_IFMT(os.fstat(fd).st_mode) != _KINDS[fd]]
    if (variables := _strings(job.envp)) != _usual:
        before, zone = _stream_options(), os.environ.get("TZ")
        _environment(variables)
        fds = fds if _stream_options() == before else (0, 1, 2)
        if os.environ.get("TZ") != zone:
            time.tzset()
    _streams(fds)
    # `random` sees to itself (os.register_at_fork).
    if (numpy := sys.modules.get("numpy.random")) is not None:
        numpy.seed()

    def leave(code):
        if not _ending.other_threads():  # one may have locked a stream for ever
            job.native.fflush(None)  # streams of C
        end(code)

    argv = _strings(job.argv)
    job.native.isojob_warm_forget()
    _job(argv, job.size - 8 - _ending.ROOM, answer, leave)


def _environment(variables):
    # What is there already stays: each change takes longer than all comparisons.
    wanted = dict(variable.split(b"=", 1) for variable in variables)
    there = os.environ._data
    for name in [name for name in there if name not in wanted]:
        del os.environb[name]
    for name, value in wanted.items():
        if there.get(name) != value:
            os.environb[name] = value


_KINDS = (stat.S_IFCHR, stat.S_IFIFO, stat.S_IFIFO)  # no input, captured output


def _lead_streams(*sources):
    for fd, source in enumerate(sources):
        os.dup2(source, fd)
    for source in set(sources):
        os.close(source)
    _streams((0, 1, 2))


def _stream_options():
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    unbuffered = os.environ.get("PYTHONUNBUFFERED", "0").strip("0") != ""
    return unbuffered, encoding, errors or ("strict" if encoding else "")


def _streams(fds):
    """sys.stdin, stdout and stderr as the interpreter makes them, those that are wanted."""
    unbuffered, encoding, errors = _stream_options()
    for fd in fds:
        name, mode = ("stdin", "stdout", "stderr")[fd], "rww"[fd]
        direct = unbuffered and mode == "w"
        buffered = _open(fd, mode + "b", 0 if direct else -1, closefd=False)
        raw = buffered if direct else buffered.raw
        raw.name = "<" + name + ">"
        text = io.TextIOWrapper(
            buffered,
            encoding=codecs.lookup(encoding or _STREAMS[fd][0]).name,
            errors="backslashreplace" if fd == 2 else errors or _STREAMS[fd][1],
            newline="\n",
            line_buffering=raw.isatty() or fd == 2,
            write_through=unbuffered,
        )
        text.mode = mode
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)


def _make_way(folder):
    """Where the program has modules of its own, those of that name are not loaded already."""
    try:
        names = {entry.partition(".")[0] for entry in os.listdir(folder)}
    except OSError:
        return
    for name in [name for name in names if name in sys.modules and name not in _BARE]:
        found = importlib.machinery.PathFinder.find_spec(name, [folder])
        if found is None or found.loader is None:  # a directory hides nothing
            continue
        spec = getattr(sys.modules[name], "__spec__", None)
        if found.origin != getattr(spec, "origin", None):
            for loaded in list(sys.modules):
                if loaded == name or loaded.startswith(name + "."):
                    del sys.modules[loaded]


def _run(path, argument, call, kept):
    """Runs the job as ``__main__``; its value."""
    if call:
        module, _, name = call.partition(":")
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found(*argument)
    main = type(sys)("__main__")
    main.__builtins__ = builtins
    main.__file__ = path
    main.__cached__ = None
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    if _ANNOTATED:  # until 3.13
        main.__annotations__ = {}
    for given in argument:
        main.argument = given
    sys.modules["__main__"] = main
    kept.append(main.__dict__)
    with open(path, "rb") as file:
        source = file.read()
    exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)
    return main.__dict__.get("result")


def _job(argv, most, answer, end):
    """argv: path, call, argument (JSON in a list, or an empty one), then sys.argv.

    most: Bytes that the value's JSON may have.
    """
    path, call, argument = (word.decode("utf-8", "surrogateescape") for word in argv[:3])
    sys.argv = [word.decode("utf-8", "surrogateescape") for word in argv[3:]]
    if hasattr(sys, "orig_argv"):  # since 3.10
        sys.orig_argv = [sys.executable, *sys.argv]
    folder = path.rpartition("/")[0]
    home = folder or os.getcwd()
    if not path or not _SAFE_PATH:
        sys.path.insert(0, folder)
    if path and not _SAFE_PATH:
        _make_way(folder)
    sys.dont_write_bytecode = _writes_no_bytecode
    value, failed, said = None, None, {"exception": None}
    kept = []  # the program's variables, whatever it does to sys.modules
    code = 0
    interrupted = False
    try:
        value = _run(path, () if argument == "[]" else json.loads(argument), call, kept)
    except BaseException as error:
        failed = error
    for get, end_it in _TRACES:
        if get() is not None:  # else hooks would see it (PEP 578)
            end_it(None)
    _ending.flush()
    # Not above: what went wrong in a hook would be told as if it came of this.
    if isinstance(failed, SystemExit):
        value = kept[0].get("result") if kept else None
        code = _ending.exit_code(failed)
    elif failed is not None:
        said["exception"] = _ending.describe(failed)
        code = _ending.report(failed)
        interrupted = code is None and type(failed) is KeyboardInterrupt
        code = 1 if code is None else code
    answer(_ending.words(value, most, said))
    said = value = kept = failed = None

    def die(_):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
        end(128 + signal.SIGINT)  # it is blocked

    _ending.finish(code, home, die if interrupted else end)


def _main():
    library, *names = sys.argv[1:]
    if not _SAFE_PATH:
        sys.path.pop(0)  # this directory
    sys.dont_write_bytecode = True  # while we preload: the root is read-only
    try:
        job = _serve(library, names)
    except BaseException as error:
        _tell("E" + "\0" + f"{type(error).__name__}: {error}" + "\0" + traceback.format_exc())
        os._exit(1)
    _run_job(job)


if __name__ == "__main__":
    _main()
