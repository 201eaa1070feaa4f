"""Batches of work, spread over threads and processes, and kept on disk as each is done."""

from __future__ import annotations

import _thread
import functools
import logging
import os
import signal
import sys
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from recbole_uip.files import atomic_write

__all__ = [
    "Work",
    "even_batches",
    "in_parallel",
    "is_main_process",
    "n_processes",
    "stop_with_parent",
]

logger = logging.getLogger(__name__)

Number = TypeVar("Number")
Result = TypeVar("Result")


def n_processes() -> int:
    """Processes that ``accelerate launch`` or ``torchrun`` has started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this is the process that goes on alone where work cannot be shared."""
    return int(os.environ.get("RANK", 0)) == 0


@functools.cache  # a worker does many tasks
def stop_with_parent() -> None:
    """End this process when the one that started it is gone, and what it does before that.

    A worker whose parent was killed would otherwise go on to the end of its task.
    """
    parent = os.getppid()
    # An exception, so that temporary folders go; workers do not listen to SIGINT.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        _thread.interrupt_main(signal.SIGTERM)
        time.sleep(5.0)
        os._exit(1)  # a worker waits for its next task, which nobody will give

    threading.Thread(target=watch, daemon=True).start()


def even_batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Rows in batches of like length, longest first, at most ``budget`` padded tokens each.

    Longest first: if memory does not suffice, that shows at once.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, budget // max(1, int(lengths[order[start]])))
        yield order[start : start + size]
        start += size


def in_parallel(
    function: Callable[[Number], Result],
    numbers: Iterable[Number],
    n_workers: int,
    on_cpu: bool = True,
) -> Iterator[tuple[Number, Result]]:
    """``(number, function(number))``, in order, ``n_workers`` at a time.

    On a CPU they share its threads. Threads that each work on a batch of their own never wait
    for one another; threads that share every matrix product do so thousands of times per batch,
    and on a machine that has other work, too, that costs most of the speed (measured: a factor of
    three).
    """
    import torch

    n_threads = torch.get_num_threads()
    share = max(1, n_threads // n_workers) if on_cpu else n_threads
    pool = ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(share,))
    waiting: deque[tuple[Number, Future[Result]]] = deque()
    try:
        for number in numbers:
            waiting.append((number, pool.submit(function, number)))
            if len(waiting) > 2 * n_workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n_threads)  # part of the workers' setting is the process's


class Work:
    """Runs the same function on many numbers; see :func:`recbole_uip.em.gradient.in_turn`.

    Number i is done by process i modulo their number, and its result depends on i alone. So any
    number of processes and threads gives the same results, and a run that is killed goes on, when
    it is started again, from all batches that were done.

    Parameters
    ----------
    folder : Path
        Where results are kept; its name must tell all that they depend on.
    workers : int
        Threads.
    on_cpu : bool
        Whether threads share the CPU's, and processes talk by gloo rather than by the GPUs' own
        library.
    """

    def __init__(self, folder: Path, workers: int = 1, on_cpu: bool = True) -> None:
        self.folder = Path(folder)
        self.workers, self.on_cpu = workers, on_cpu
        self.rank, self.size = 0, n_processes()
        if self.size > 1:
            from accelerate import PartialState

            self.rank = PartialState(cpu=on_cpu).process_index

    def __call__(
        self,
        phase: str,
        function: Callable[[int], dict[str, np.ndarray]],
        n: int,
        shared: Sequence[str] = (),
    ) -> list[dict[str, np.ndarray]]:
        """Results of ``function(0)`` to ``function(n - 1)``, in order.

        Of other processes' results only the arrays ``shared``.
        """
        mine = range(self.rank, n, self.size)
        results: dict[int, dict[str, np.ndarray]] = {}
        missing = []
        for number in mine:
            kept = _read(self._path(phase, number))
            if kept is None:
                missing.append(number)
            else:
                results[number] = kept
        if len(missing) < len(mine):
            logger.info("%s: %d of %d batches were done before", phase, len(results), len(mine))

        def work(number: int) -> dict[str, np.ndarray]:
            result = function(number)
            with atomic_write(self._path(phase, number)) as file:
                np.savez(file, **result)
            return result

        with tqdm(total=len(missing), desc=phase, unit="batch", leave=False, delay=2) as bar:
            for number, result in in_parallel(work, missing, self.workers, self.on_cpu):
                results[number] = result
                bar.update()
        if self.size > 1:
            from accelerate.utils import gather_object

            parts = [
                (number, {name: result[name] for name in shared})
                for number, result in results.items()
            ]
            for number, result in gather_object(parts):
                results.setdefault(number, result)
        return [results[number] for number in range(n)]

    def _path(self, phase: str, number: int) -> Path:
        return self.folder / phase / f"{number:06d}.npz"


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None if it is not there, or not whole."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        logger.warning("%s is damaged (%s): the batch is done again", path, error)
        return None
