"""
Processes that start with the imports behind them: `forked.run` is `subprocess.run`, by a fork of one that imported.

    done = forked.run([sys.executable, "-m", "seam", "demo"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr

Each is a process of its own, with its arguments, environment, folder, signals and exit status; what it saves is the
import of torch and of all that comes with it, most of what a short command costs. Some libraries read the environment
when they are imported: a command whose environment is not the tests' own starts with only those imported that do not.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# They read no variable that a test sets.
LIBRARIES = ("numpy", "torch", "scipy.signal", "soundfile", "soxr", "rich.console", "typer", "pydantic")
EVERYTHING = (
    *LIBRARIES,
    "librosa.core",
    "matplotlib.figure",
    "transformers.generation",
    "transformers.pipelines",
    "transformers.trainer",
    "seam.modeling_seam",
    "seam.evaluation.explanation_views",
    "seam.train.refinement",
    "seam.train.draft",
)
MESSAGE = 2**20  # bytes of the longest command and its environment


def run(command, *, cwd=None, env=None, timeout: float = 250) -> subprocess.CompletedProcess:
    """Run `python -m MODULE …` or `python -c SCRIPT …` of this interpreter and capture its output as text."""
    assert command[0] == sys.executable and command[1] in ("-m", "-c"), command
    env = _own_environment() if env is None else _without_pytest(env)
    is_own = _without_path(env) == _without_path(_server(EVERYTHING)[1])
    connection, _ = _server(EVERYTHING if is_own else LIBRARIES)
    request = json.dumps({"arguments": [*map(str, command[1:])], "cwd": str(cwd or Path.cwd()), "env": env}).encode()
    with open(os.devnull) as nothing, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        socket.send_fds(connection, [request], [file.fileno() for file in (nothing, out, err)])
        pid = int(connection.recv(MESSAGE))
        connection.settimeout(timeout)
        try:
            status = connection.recv(MESSAGE)
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            connection.settimeout(None)
            connection.recv(MESSAGE)
            raise subprocess.TimeoutExpired(command, timeout) from None
        finally:
            connection.settimeout(None)
        written = []
        for file in (out, err):
            file.seek(0)
            written.append(file.read().decode())
    return subprocess.CompletedProcess(command, int(status), *written)


def _own_environment() -> dict[str, str]:
    return _without_pytest(os.environ)


def _without_pytest(env) -> dict[str, str]:
    return {name: value for name, value in env.items() if not name.startswith("PYTEST_")}


def _without_path(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name != "PYTHONPATH"}


@functools.cache
def _server(modules: tuple[str, ...]) -> tuple[socket.socket, dict[str, str]]:
    """Start the process that is forked, on first use; returns a connection to it, and its environment."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = _without_path(_own_environment())
    command = [sys.executable, __file__, str(its.fileno()), *modules]
    process = subprocess.Popen(command, env=env, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)
    its.close()
    atexit.register(process.wait)
    atexit.register(ours.close)  # which ends it; before that is waited for
    return ours, env


def _serve(connection: socket.socket) -> dict:
    """Fork for each request; returns in the fork. Ends with the process that asks."""
    while True:
        request, files, _, _ = socket.recv_fds(connection, MESSAGE, 3)
        if not request:
            sys.exit()
        threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        # A fork has only one of them, and the locks of all. jemalloc, which pyarrow brings, is prepared for that.
        assert len([name for name in threads if name != "jemalloc_bg_thd"]) <= 1, threads
        pid = os.fork()
        if pid == 0:
            for target, file in enumerate(files):
                os.dup2(file, target)
                os.close(file)
            connection.close()
            return json.loads(request)
        for file in files:
            os.close(file)
        connection.send(str(pid).encode())
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.send(str(status).encode())


def _become(arguments: list[str], cwd: str, env: dict[str, str]) -> None:
    """Do what `python *arguments` does. Exceptions are the caller's, as at the top of any program."""
    import numpy as np

    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    np.random.seed()  # or all forks draw the same
    path = env.get("PYTHONPATH")
    sys.path[:0] = ["" if arguments[0] == "-c" else cwd, *(path.split(os.pathsep) if path else [])]
    option, what, *rest = arguments
    sys.argv = [what if option == "-m" else "-c", *rest]
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(what, "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    del sys.path[0]  # this folder
    server = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()  # no fork has to go through what was imported
    _become(**_serve(server))
