"""How a program ends, as under ``python main.py``, and what is said of it. Loaded by runner.py."""

import atexit
import gc
import json
import os
import sys
import traceback
from _thread import _count as other_threads
from _weakref import ref as weakref

dumps = json.dumps  # a job may put something else there
ROOM = 65536  # beside the value, for what else is said; isojob/_python_result.py has its twin
_modules = sys.modules
last = ""  # module of the template
_LAST = (type(sys), type, type(lambda: 0), str, int, float)  # what destructors of others need
_OURS = os.path.dirname(__file__) + "/"
_traceback = BaseException.__dict__["__traceback__"]  # whatever a class says of attributes


def strip(error):
    """Takes our own frames off."""
    at = _traceback.__get__(error)
    while at is not None and at.tb_frame.f_code.co_filename.startswith(_OURS):
        at = at.tb_next
    _traceback.__set__(error, at)
    return type(error), error, at


def describe(error):
    """Type, message and traceback."""
    kind, _, at = strip(error)
    name = kind.__qualname__
    try:
        if kind.__module__ not in ("builtins", "__main__"):
            name = f"{kind.__module__}.{name}"
        message = str(error)
    except BaseException:  # it is the job's own code
        message = "<exception str() failed>"
    try:
        text = "".join(traceback.format_exception(kind, error, at))
    except BaseException:  # of a SyntaxError everything may be anything
        text = f"{name}: {message}\n"
    return {"type": name, "message": message, "traceback": text}


def sentence(said):
    return said["type"] + ": " + said["message"]


def _complain(text):
    """Writes a line as the interpreter does, whatever has become of sys.stderr."""
    try:
        if getattr(sys, "stderr", None) is None:
            os.write(2, (text + "\n").encode("utf-8", "backslashreplace"))
        else:
            sys.stderr.write(text + "\n")
    except BaseException:
        pass


def exit_code(error):
    """What a SystemExit asks for."""
    try:
        code = error.code
    except BaseException:
        code = error
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF if -(2**63) <= (code or 0) < 2**63 else 255
    try:
        text = str(code)
    except BaseException:
        text = ""
    _complain(text)
    return 1


def report(error):
    """Tells people of an exception, as PyErr_PrintEx does; the exit code that a hook asks for."""
    trouble = strip(error)
    sys.last_type, sys.last_value, sys.last_traceback = trouble
    if sys.version_info >= (3, 12):
        sys.last_exc = error
    try:
        if not hasattr(sys, "excepthook"):
            _complain("sys.excepthook is missing")
            sys.__excepthook__(*trouble)
        else:
            sys.excepthook(*trouble)
    except SystemExit as other:
        return exit_code(other)
    except BaseException as other:
        _complain("Error in sys.excepthook:")
        sys.__excepthook__(*strip(other))
        _complain("\nOriginal exception was:")
        sys.__excepthook__(*trouble)
    return None


def _clip(text, most):
    return text if len(text) <= most else text[: most // 4] + "\n...\n" + text[-3 * most // 4 :]


def words(value, most, said):
    """The answer: the value, if it has JSON of at most so many bytes, and what else is said."""
    text = "null"
    if value is not None:
        try:
            text = dumps(value)
        except BaseException as error:
            said["unserializable"] = _clip(sentence(describe(error)), 200)
        if len(text) > most:
            text, said["too_large"] = "null", len(text)
    exception = said["exception"]
    for length in (1 << 62, 4000, 400):
        if exception is not None:
            said["exception"] = {key: _clip(each, length) for key, each in exception.items()}
        rest = dumps(said)
        if len(rest) < ROOM - 1000:
            break
    return '{"value": ' + text + ", " + rest[1:]


def flush():
    """As the interpreter does when a program has run, and says nothing of what cannot be."""
    for name in ("stderr", "stdout"):
        try:
            getattr(sys, name).flush()
        except BaseException:
            pass


def _flush_or_say(code):
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name, None)
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException as error:
            code = 120
            if name == "stdout":
                try:
                    print(f"Exception ignored in: {stream!r}", file=sys.stderr)
                    sys.__excepthook__(*strip(error))
                except BaseException:
                    pass
    return code


def _forget(folder):
    """The program's modules go, cycles and all; what is frozen is not looked at."""
    if gc.isenabled():
        gc.collect()  # puts files before their buffers, which would be closed first otherwise
    alone = other_threads() == 0  # what threads go on with is never taken apart
    loaders, names = [], ["__main__"]
    for name in reversed(_modules) if alone else ():
        if name == last:  # a look at what the template has loaded would be a copy of it
            break
        names.append(name)
    for name in names if alone else ():
        try:
            module = _modules[name]
            if module.__file__.startswith(folder):
                loader, variables = module.__loader__, module.__dict__
                _modules[name] = module = None
                if sys.getrefcount(variables) > 2:  # else they go now, one after the other
                    loader.variables = variables  # which no weak reference leads to
                    loaders.append(weakref(loader))
                variables = None
        except BaseException:
            pass
    _modules["__main__"] = module = loader = None
    gc.collect()
    _empty([loader.variables for loader in [each() for each in loaders] if loader is not None])


def _empty(modules):
    """Of what others hold by a function: a handler of a signal, typing's caches."""
    for kinds in (_LAST, ()):
        for variables in modules:
            names = [
                name
                for name, value in variables.items()
                if type(name) is str and name != "__builtins__" and not isinstance(value, kinds)
            ]
            variables.update(dict.fromkeys(names))


def finish(code, folder, end):
    """What Py_FinalizeEx does that anybody sees; taking a large heap apart is not among it."""
    if (threading := _modules.get("threading")) is not None:
        try:
            threading._shutdown()
        except BaseException as error:
            report(error)
    try:
        atexit._run_exitfuncs()
    except BaseException:  # until 3.9: the last of theirs, which was told
        pass
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        sys.__dict__.pop(name, None)
    code = _flush_or_say(code)
    for name in ("stdin", "stdout", "stderr"):  # what the program has put there instead goes, too
        setattr(sys, name, getattr(sys, f"__{name}__", None))
    try:
        _forget(folder + "/")
    except BaseException:  # of the program's: keys that compare, handlers of signals
        pass
    flush()
    end(code)
