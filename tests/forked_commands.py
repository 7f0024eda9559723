"""Programs that start at once: `python`, `mlflow` and `tracked-replay` as forks of a process that has imported them.

Every command of the documentation is run by a test, and most of the time of a short one goes into imports. Here each
is a process of its own all the same, with its own arguments, environment, folder and exit code.

Run as a program, with the path of a socket, this file is that process.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import sleep

PROGRAMS = ("mlflow", "python", "tracked-replay")
IMPORTED = ("matplotlib.pyplot", "mlflow.cli", "mlflow.projects", "pandas", "sklearn.datasets", "tracked_replay.cli")
SOCKET = "FORKED_COMMANDS"
STAND_IN = """#!{python} -SE
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    job = [os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]
    content = json.dumps(job).encode()
    socket.send_fds(server, [len(content).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(content)
    code = server.recv(1)
sys.exit(code[0] if code else 70)
"""


@contextmanager
def forked_commands(folder: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """Start the process that forks; gives the folder with the programs, for the front of ``PATH``.

    Args:
        folder: a new one is made in it; its path must be short, as a socket's is.
        environment: of the imports, which some libraries read.
    """
    address = folder / "forked.socket"
    programs = folder / "bin"
    programs.mkdir()
    for name in PROGRAMS:
        program = programs / name
        program.write_text(STAND_IN.format(python=sys.executable, address=str(address)), encoding="utf-8")
        program.chmod(0o755)
    with subprocess.Popen([sys.executable, __file__, str(address)], env=dict(environment)) as server:
        try:
            while not address.exists():
                assert server.poll() is None, "the process that forks ended"
                sleep(0.05)
            yield programs
        finally:
            server.terminate()


def serve(address: str) -> None:
    """Import everything, then fork for whoever connects."""
    import torch

    for name in IMPORTED:
        importlib.import_module(name)
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    with socket.socket(socket.AF_UNIX) as server:
        aside = f"{address}.aside"
        server.bind(aside)
        server.listen()
        os.rename(aside, address)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever ends is gone
        while True:
            caller, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                server.close()
                _answer(caller)
            caller.close()


def _answer(caller: socket.socket) -> None:
    """Run one command in a fork and send its exit code."""
    head, files, _, _ = socket.recv_fds(caller, 8, 3)
    content = b""
    while len(content) < int.from_bytes(head, "little"):
        content += caller.recv(1 << 20)
    pid = os.fork()
    if pid == 0:
        caller.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        _run(*json.loads(content))
    _, status = os.waitpid(pid, 0)
    caller.sendall(bytes([os.waitstatus_to_exitcode(status) % 256]))
    os._exit(0)


def _run(program: str, arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """What the interpreter does with a command, in this process, which ends with it."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code: object = 0
    try:
        _program(program, arguments)
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _program(program: str, arguments: list[str]) -> None:
    if program == "mlflow":
        from mlflow.cli import cli

        sys.argv = [program, *arguments]
        cli()
    elif program == "tracked-replay":
        from tracked_replay.cli import main

        sys.argv = [program, *arguments]
        main()
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, os.getcwd())
        exec(arguments[1], {"__name__": "__main__"})  # noqa: S102
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
