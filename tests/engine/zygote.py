"""Python programs as forks of a process that has imported SGLang: imports are most of a start.

The program starts as from a command line, in a session of its own, and so do the processes that it spawns: they get
their pickled arguments and load plugins for themselves. Only the imports are there already. What is forked has run
nothing, has no thread and has loaded no plugin.

    warm.py              starts programs, for the tests
      zygote             imports, then forks a program for each request
        program
          spawner        forks in place of new interpreters; has run nothing of the program
          its children   of multiprocessing, and modules that it runs with ``subprocess``
            spawner      where a child has children: under ``--dp-size`` a controller starts the schedulers
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import gc
import inspect
import json
import multiprocessing.util
import os
import runpy
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

IMPORTED = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
)

SOURCES = Path(__file__).parents[2] / "lethe_sglang" / "engine" / "upstream.json"
"""What every start reads the source of; a fork finds it read, unless it is not what it was any more."""

PR_SET_CHILD_SUBREAPER = 36
_HIGH = 500
"""Descriptors that are passed on wait above this number until those that they replace are closed."""


def zygote() -> dict:
    """Answer requests; returns, in a fork, what that fork is to run."""
    for name in IMPORTED:
        import_module(name)
    import_module("setproctitle").getproctitle()  # finds where titles go, which it cannot in a fork's own environment
    inspect.getsource = functools.cache(inspect.getsource)
    _ask_at_once()
    _propagate_by_index()
    _wait_for_requests()
    if os.environ.get("TRITON_INTERPRET") == "1":
        _hasten_interpreter()
    for target in json.loads(SOURCES.read_text()):
        with contextlib.suppress(AttributeError):  # of a module that is not imported; it may have to wait for a plugin
            inspect.getsource(inspect.unwrap(functools.reduce(getattr, target.split(".")[1:], sys.modules["sglang"])))
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would not survive a fork"
    assert "lethe_sglang" not in sys.modules
    gc.freeze()
    return _asked(socket.socket(fileno=int(sys.argv[1])))


def _asked(listener: socket.socket) -> dict:
    """Answer whoever is on a line, until nobody is; returns, in a fork, what that fork is to run."""
    selector, lines = selectors.DefaultSelector(), {}
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                line, _ = listener.accept()
                lines[line] = line.makefile()
                selector.register(line, selectors.EVENT_READ)
                continue
            asked = lines[key.fileobj].readline()
            if not asked:
                selector.unregister(key.fileobj)
                lines.pop(key.fileobj).close()
                key.fileobj.close()
                if not lines:
                    Path(listener.getsockname()).unlink(missing_ok=True)
                    os._exit(0)
                continue
            request, answer = json.loads(asked), None
            if "poll" in request:
                pid, status = os.waitpid(request["poll"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            elif request:
                answer = os.fork()
                if not answer:
                    for file in (selector, listener, *lines.values(), *lines):
                        file.close()
                    return request
            key.fileobj.sendall(json.dumps(answer).encode() + b"\n")


def _ask_at_once() -> None:
    """Let a server not wait a whole second before its own first request."""
    server = import_module("sglang.srt.entrypoints.http_server")
    server.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.1))})


def _propagate_by_index() -> None:
    """Find who has imported a hooked function without a walk over all modules for each hook: half of a start."""
    registry = import_module("sglang.srt.plugins.hook_registry")
    known = set(sys.modules)
    holders = collections.defaultdict(list)
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "sglang"]:
        for name, value in vars(module).items() if isinstance(module, ModuleType) else ():
            holders[id(value)].append((module, name))

    @functools.wraps(registry._propagate_patch)
    def propagate(original: object, wrapped: object, source: object) -> int:
        later = [module for name, module in list(sys.modules.items()) if name not in known]
        later = [module for module in later if isinstance(module, ModuleType)]
        found = [(module, name) for module in later for name, value in vars(module).items() if value is original]
        found += [(module, name) for module, name in holders[id(original)] if vars(module).get(name) is original]
        for module, name in found:
            if module is not source:
                setattr(module, name, wrapped)
        return len(found)

    registry._propagate_patch = propagate


def _wait_for_requests() -> None:
    """Let the controller of data-parallel replicas sleep until it is asked: it would take a core of two."""
    controller = import_module("sglang.srt.managers.data_parallel_controller")
    original = controller.sock_recv

    def receive(socket, flags: int = 0) -> object:
        socket.poll(50)
        return original(socket, flags)

    controller.sock_recv = receive


def _hasten_interpreter() -> None:
    """Take from Triton's interpreter what is most of its time, and nothing that a server's replies depend on.

    Its language stays patched, instead of anew for each launch. Sums are not checked for overflow, by a second one of
    64 bits each: ``tests/kernels`` has them checked.
    """
    interpreter = import_module("triton.runtime.interpreter")
    interpreter._patch_lang = functools.cache(interpreter._patch_lang)
    interpreter._LangPatchScope.restore = lambda scope: None
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _by_name(numpy_type: Callable) -> Callable:
    """Let the interpreter look a type up by its name, instead of in a table that it builds anew each time."""
    found: dict[str, object] = {}

    def lookup(dtype):
        name = dtype.scalar.name
        if name not in found:
            found[name] = numpy_type(dtype)
        return found[name]

    return lookup


def run(command: list[str], environment: dict[str, str], out: str, errors: str, folder: str) -> None:
    """Become a program."""
    os.setsid()
    for number, file in enumerate((os.devnull, out, errors)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    for number in (1, 2):
        os.ftruncate(number, 0)
    _execute(command, environment, folder)


def _execute(command: list[str], environment: dict[str, str], folder: str) -> None:
    """Do what a command line says behind the interpreter."""
    os.chdir(folder)
    _set_environment(environment)
    spawner = Spawner()
    _spawn_from(spawner)
    _run_modules_from(spawner)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    main = sys.modules["__main__"] = ModuleType("__main__")
    match command:
        case ["-c", code, *arguments]:
            sys.path.insert(0, "")
            sys.argv = ["-c", *arguments]
            exec(code, vars(main))
        case ["-m", module, *arguments]:
            sys.path.insert(0, folder)
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [file, *arguments]:
            sys.path.insert(0, str(Path(file).parent))
            sys.argv = [file, *arguments]
            runpy.run_path(file, run_name="__main__")


def _set_environment(environment: dict[str, str]) -> None:
    """Take over a program's environment, and what the scheduler's module has read of it."""
    os.environ.clear()
    os.environ.update(environment)
    scheduler = import_module("sglang.srt.managers.scheduler")
    for name in ("TEST_RETRACT", "TEST_RETRACT_INTERVAL"):
        assert hasattr(scheduler, name)
        setattr(scheduler, name, getattr(scheduler.envs, f"SGLANG_{name}").get())


def _spawn_from(spawner: Spawner) -> None:
    """Let multiprocessing's processes come from the spawner, and its resource tracker from where it did."""
    original = multiprocessing.util.spawnv_passfds

    def spawn(path, arguments, descriptors):
        if arguments[-1] != "--multiprocessing-fork":
            return original(path, arguments, descriptors)
        numbers = {int(number): int(number) for number in descriptors}
        return spawner.spawn(numbers, code=arguments[-2], spawns="--dp-size" in sys.argv)

    multiprocessing.util.spawnv_passfds = spawn


def _run_modules_from(spawner: Spawner) -> None:
    """Let ``subprocess`` fork ``[sys.executable, "-m", MODULE, ...]`` from the spawner, if nothing unusual is asked."""
    original = subprocess.Popen._execute_child
    signature = inspect.signature(original)

    def execute(self, *given):
        asked = signature.bind(self, *given).arguments
        command = asked["args"]
        unusual = asked["shell"] or asked["preexec_fn"] or asked["pass_fds"] or not asked["close_fds"]
        if unusual or not isinstance(command, list) or command[:2] != [sys.executable, "-m"]:
            return original(self, *given)
        pipes = [asked[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        standard = {number: own if own != -1 else number for number, own in enumerate((pipes[0], pipes[3], pipes[5]))}
        folder, session = asked["cwd"] or str(Path.cwd()), asked["start_new_session"]
        words = list(map(str, command[1:]))
        self.pid = spawner.spawn(standard, asked["env"], command=words, folder=str(folder), session=session)
        self._child_created = True
        self._close_pipe_fds(*pipes)

    subprocess.Popen._execute_child = execute


class Spawner:
    """A fork of the program before it has run anything, which forks the program's children.

    They go through a process that ends at once, so that they become the program's own: it is their subreaper, may wait
    for them and is who they see as their parent. ``unused`` are descriptors that they do not get.
    """

    def __init__(self, unused: list[int] | None = None):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._line, line = socket.socketpair()
        program = os.getpid()
        if os.fork():
            line.close()
            return
        self._line.close()
        for descriptor in unused or ():
            os.close(descriptor)
        _answer(line, program)

    def spawn(self, descriptors: dict[int, int], environment: dict[str, str] | None = None, **what) -> int:
        """Start a child with descriptors of this process under numbers of its own; returns the child's number."""
        whole = dict(os.environ if environment is None else environment)
        message = json.dumps({"numbers": list(descriptors), "environment": whole, **what}).encode()
        socket.send_fds(self._line, [len(message).to_bytes(4, "big")], list(descriptors.values()))
        self._line.sendall(message)
        return int.from_bytes(_exactly(self._line, 4), "big")


def _exactly(line: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := line.recv(size - len(data))):
        data += more
    return data


def _answer(line: socket.socket, program: int) -> None:
    """Fork children until the program is gone."""
    while True:
        head, received, _, _ = socket.recv_fds(line, 4, 64)
        if not head:
            os._exit(0)
        request = json.loads(_exactly(line, int.from_bytes(head, "big")))
        reader, writer = os.pipe()
        between = os.fork()
        if not between:
            child = os.fork()
            if not child:
                if request.get("session"):
                    os.setsid()  # before anybody knows its number and may kill the group
                os.write(writer, os.getpid().to_bytes(4, "big"))
                os.close(reader), os.close(writer), line.close()
                _become_child(request, received, program)
            os._exit(0)
        os.waitpid(between, 0)
        line.sendall(os.read(reader, 4))
        for descriptor in (reader, writer, *received):
            os.close(descriptor)


def _become_child(request: dict, received: list[int], program: int) -> None:
    """Do what the command line of a spawned process says, once the program is this process's parent."""
    while os.getppid() != program:
        time.sleep(0.001)
    if request.get("spawns"):
        _spawn_from(Spawner(received))
    waiting = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _HIGH) for descriptor in received]
    for descriptor in received:
        os.close(descriptor)
    for descriptor, number in zip(waiting, request["numbers"], strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if "command" in request:
        _execute(request["command"], request["environment"], request["folder"])
    else:
        _set_environment(request["environment"])
        sys.argv = ["-c", "--multiprocessing-fork"]
        exec(request["code"], {"__name__": "__main__"})
    sys.exit()


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))
    run(**zygote())
