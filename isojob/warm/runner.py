"""What a template runs: preloads modules, lets itself be forked, and runs one job in each fork.

Run by any CPython from 3.8 on, so nothing newer, and nothing but the standard library:

    python runner.py LIBRARY [MODULE...]

Descriptors 3, 4 and 5 are the socket to the zygote, init's executable and the configuration.
"""

# Also in every job's sys.modules, loaded. What jobs use of it they would import in a millisecond.
import atexit
import builtins
import ctypes
import gc
import importlib
import io
import json
import os
import signal
import sys
import traceback


def _tell(text):
    data = text.encode("utf-8", "backslashreplace")
    os.write(3, data if len(data) <= 8000 else data[:2000] + b"\n...\n" + data[-5000:])


def _preload(names):
    """Imports them, one after the other, and says which fails."""
    for name in names:
        _tell("I" + name)
        try:
            importlib.import_module(name)
        except BaseException as error:
            lines = traceback.format_exception(type(error), error, error.__traceback__)
            _tell("E" + name + "\0" + f"{type(error).__name__}: {error}" + "\0" + "".join(lines))
            os._exit(1)
        if len(os.listdir("/proc/self/task")) > 1:
            _tell("E" + name + "\0it starts threads, which no fork inherits\0")
            os._exit(1)


def _settle():
    """What forks would otherwise do each for itself, or copy for nothing."""
    gc.collect()
    gc.freeze()


def _serve(library):
    class Job(ctypes.Structure):
        _fields_ = [
            ("argv", ctypes.POINTER(ctypes.c_char_p)),
            ("envp", ctypes.POINTER(ctypes.c_char_p)),
            ("result", ctypes.c_void_p),
            ("size", ctypes.c_uint64),
        ]

    # PyDLL: with the interpreter's lock, for what it calls is the interpreter.
    native = ctypes.PyDLL(library)
    if number := native.isojob_warm_open(4, 5):
        raise OSError(number, "the configuration")
    job = Job()

    def strings(at):
        found = []
        while (value := at[len(found)]) is not None:
            found.append(value)
        return found

    while True:
        _settle()
        _tell("R")
        if native.isojob_warm_serve(3, ctypes.byref(job)):
            break
        # Another template, beside the one that we were.
        _preload([name.decode() for name in strings(job.argv)])

    def answer(data):
        if job.result and len(data) + 8 <= job.size:
            ctypes.memmove(job.result + 8, data, len(data))
            # The length last: half an answer is none.
            ctypes.memmove(job.result, len(data).to_bytes(8, "little"), 8)
            return True
        return not job.result

    return strings(job.argv), strings(job.envp), answer


def _environment(variables):
    os.environ.clear()
    for variable in variables:
        name, _, value = variable.partition(b"=")
        os.environb[name] = value


def _streams():
    """sys.stdin, stdout and stderr as the interpreter makes them: ours were /dev/null."""
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        old = getattr(sys, name)
        raw = io.FileIO(fd, mode + "b", closefd=False)
        tty = raw.isatty()
        if mode == "r":
            buffered = io.BufferedReader(raw)
        else:
            buffered = raw if unbuffered else io.BufferedWriter(raw)
        raw.name = "<" + name + ">"
        text = io.TextIOWrapper(
            buffered,
            encoding=encoding or old.encoding,
            errors="backslashreplace" if fd == 2 else errors or old.errors,
            newline="\n" if mode == "w" else None,
            line_buffering=tty or fd == 2,
            write_through=unbuffered and mode == "w",
        )
        text.mode = mode
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)


def _reseed():
    """What this fork has in common with others. `random` sees to itself (os.register_at_fork)."""
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        numpy.seed()


def _run(path, argument, call):
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
    for given in argument:
        main.argument = given
    sys.modules["__main__"] = main
    with open(path, "rb") as file:
        source = file.read()
    exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)
    return main.__dict__.get("result")


def _describe(error):
    """Type, message and traceback, without our own frames."""
    at = error.__traceback__
    while at is not None and at.tb_frame.f_code.co_filename == __file__:
        at = at.tb_next
    error.__traceback__ = at
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ not in ("builtins", "__main__"):
        name = f"{kind.__module__}.{name}"
    try:
        message = str(error)
    except Exception:
        message = "<exception str() failed>"
    text = "".join(traceback.format_exception(kind, error, at))
    return {"type": name, "message": message, "traceback": text}


def _exit_code(code):
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF if -(2**63) <= code < 2**63 else 255
    try:
        print(code, file=sys.stderr)
    except Exception:
        pass
    return 1


def _finish(code):
    """What Py_FinalizeEx does that anybody sees; taking a large heap apart is not among it."""
    threading = sys.modules.get("threading")
    if threading is not None:
        try:
            threading._shutdown()
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
    atexit._run_exitfuncs()
    # Objects of the program go with its module, cycles and all; what is frozen is not looked at.
    sys.modules["__main__"] = None
    gc.collect()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException as error:
            if stream is sys.stdout:
                code = 120
                try:
                    print(f"Exception ignored in: {stream!r}", file=sys.stderr)
                    sys.__excepthook__(type(error), error, None)
                except BaseException:
                    pass
    os._exit(code)


def _job(argv, answer):
    """argv: path, call, argument (JSON in a list, or an empty one), then sys.argv."""
    path, call, argument = (word.decode("utf-8", "surrogateescape") for word in argv[:3])
    sys.argv = [word.decode("utf-8", "surrogateescape") for word in argv[3:]]
    sys.path.insert(0, path.rpartition("/")[0] if path else "")
    sys.dont_write_bytecode = False
    said = {"value": None, "exception": None}
    code = 0
    interrupted = False
    try:
        value = _run(path, json.loads(argument), call)
        if value is not None:
            said["value"] = value
    except SystemExit as error:
        main = sys.modules["__main__"].__dict__
        said["value"] = main.get("result") if "argument" in main or path else None
        code = _exit_code(error.code)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        said["exception"] = _describe(error)
        code = 1
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except BaseException:
            sys.__excepthook__(type(error), error, error.__traceback__)
        del sys.last_type, sys.last_value, sys.last_traceback
    try:
        text = json.dumps(said, allow_nan=True)
    except BaseException as error:
        said["value"] = None
        said["unserializable"] = f"{type(error).__name__}: {error}"
        text = json.dumps(said)
    if not answer(text.encode("utf-8", "surrogatepass")):
        size = len(text)
        said = {"value": None, "exception": said["exception"], "too_large": size}
        if not answer(json.dumps(said).encode("utf-8", "surrogatepass")):
            answer(json.dumps({"value": None, "exception": None, "too_large": size}).encode())
    said = text = value = None
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.stdout.flush()
        signal.raise_signal(signal.SIGINT)
    _finish(code)


def _main():
    library, *names = sys.argv[1:]
    sys.path.pop(0)  # this directory
    sys.dont_write_bytecode = True  # while we preload: the root is read-only
    try:
        _preload(names)
        argv, envp, answer = _serve(library)
    except BaseException as error:
        _tell("E" + "\0" + f"{type(error).__name__}: {error}" + "\0" + traceback.format_exc())
        os._exit(1)
    _environment(envp)
    _streams()
    _reseed()
    _job(argv, answer)


if __name__ == "__main__":
    _main()
