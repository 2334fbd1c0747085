"""Jobs that start at once: forks of a process that has imported everything.

PyTorch, torchvision and Lightning take 5 to 10 seconds to import, longer than a short test. A fork has them, and runs
`run.py` with arguments, environment and output of its own. It differs from a new process in this: the system's lists of
processes show the command of the process that it is a fork of, and it has no standard input.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import threading
import weakref
from multiprocessing.context import ForkProcess
from pathlib import Path
from subprocess import TimeoutExpired
from typing import IO, Any

from hydra.core.global_hydra import GlobalHydra

RUN = Path(__file__).parents[2] / "run.py"


class Fork(ForkProcess):
    """`python run.py <arguments>` in a fork of this process; `start()` begins it.

    This process must have computed nothing on several threads and nothing on a GPU: OpenMP's threads and CUDA do not
    come along, and the fork would wait for them or fail.

    Args:
        arguments: of the command line, without the program.
        env: the whole environment. What a library reads when it is imported, such as OMP_NUM_THREADS, stays as it was.
        output: a file for what the job prints; None: where this process prints.
    """

    def __init__(self, arguments: list[str], env: dict[str, str], output: IO[Any] | None) -> None:
        super().__init__()
        self.arguments, self.env, self.output = arguments, env, output

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end and returns its exit code, 0 if this process ignores SIGCHLD, as `subprocess.Popen` does.

        Raises:
            TimeoutExpired: it runs on after `timeout` seconds.
        """
        self.join(timeout)
        if timeout is not None and self.is_alive():
            raise TimeoutExpired(self.arguments, timeout)
        return self.exitcode or 0

    def run(self) -> None:
        if self.output is not None:
            os.dup2(self.output.fileno(), 1)
            os.dup2(self.output.fileno(), 2)
        become(self.arguments, self.env)


def become(arguments: list[str], env: dict[str, str]) -> None:
    """Does in this process, a fork, what `python run.py <arguments>` does; ends with its exit code, as SystemExit."""
    atexit._clear()  # what the other process has registered is its own to clean up
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    multiprocessing.set_start_method(None, force=True)  # loaders start their workers as elsewhere
    os.environ.clear()
    os.environ.update(env)
    GlobalHydra.instance().clear()
    sys.argv = [str(RUN), *arguments]
    try:
        runpy.run_path(str(RUN), run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        # As at the end of any process: `_shutdown` first tells executors to end their workers, then an exit function
        # waits for child processes. A fork does only the second, and would wait for workers that nobody has told.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
