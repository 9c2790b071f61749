"""isojob: untrusted programs, isolated, limited and accounted for, from asyncio and trio.

The layers, each importing only what is below it::

    _run            run_isolated, the process-wide pools
    _python         PythonPool: jobs in warm interpreters
    _pool           Pool: zygote, stock of parked cells, admission
    _cell _lease    one job in one cell: send, stream, cancel, collect
    _zygote _job _streams _account
    wire            sans-IO protocol          host/  cgroups/  seccomp/
    limits result sandbox verdict errors      models and pure functions
    native/         C: zygote, init, launcher
"""

import typing as _typing
from importlib import import_module as _import_module

from isojob._cache import Cache as Cache
from isojob._job import CAPTURE as CAPTURE
from isojob._job import DEVNULL as DEVNULL
from isojob._job import STDOUT as STDOUT
from isojob._pair import PairResult as PairResult
from isojob._pool import Pool as Pool
from isojob._pool import PoolStatistics as PoolStatistics
from isojob._process import PIPE as PIPE
from isojob._process import IsolatedProcess as IsolatedProcess
from isojob._run import open_isolated as open_isolated
from isojob._run import run_group as run_group
from isojob._run import run_isolated as run_isolated
from isojob._run import run_isolated_sync as run_isolated_sync
from isojob._run import run_pair as run_pair
from isojob._session import Session as Session
from isojob.errors import CommandNotExecutableError as CommandNotExecutableError
from isojob.errors import CommandNotFoundError as CommandNotFoundError
from isojob.errors import HostNotSupportedError as HostNotSupportedError
from isojob.errors import ImageError as ImageError
from isojob.errors import IsojobError as IsojobError
from isojob.errors import JobFailedError as JobFailedError
from isojob.errors import PoolBrokenError as PoolBrokenError
from isojob.errors import PoolClosedError as PoolClosedError
from isojob.errors import PreloadError as PreloadError
from isojob.errors import ProfileError as ProfileError
from isojob.errors import QueueFullError as QueueFullError
from isojob.errors import SandboxSetupError as SandboxSetupError
from isojob.limits import Limits as Limits
from isojob.mounts import Mount as Mount
from isojob.mounts import Root as Root
from isojob.result import Evidence as Evidence
from isojob.result import Posture as Posture
from isojob.result import Result as Result
from isojob.result import Status as Status
from isojob.result import Usage as Usage
from isojob.sandbox import Sandbox as Sandbox
from isojob.seccomp import SeccompProfile as SeccompProfile

if _typing.TYPE_CHECKING:
    from isojob._image import Image as Image
    from isojob._languages import Language as Language
    from isojob._languages import Program as Program
    from isojob._languages import languages as languages
    from isojob._python import PythonException as PythonException
    from isojob._python import PythonPool as PythonPool
    from isojob._python import PythonResult as PythonResult
    from isojob._python import run_python as run_python


_LATER = {
    "Image": "isojob._image",
    "Language": "isojob._languages",
    "languages": "isojob._languages",
    "Program": "isojob._languages",
    "PythonException": "isojob._python",
    "PythonPool": "isojob._python",
    "PythonResult": "isojob._python",
    "run_python": "isojob._python",
}


def __getattr__(name: str) -> object:
    # On first use: most programs need none of them.
    if name in _LATER:
        return globals().setdefault(name, getattr(_import_module(_LATER[name]), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"
