"""Runs a function as several ranks, each a process."""

import multiprocessing
import os
import signal
import socket
import time
import traceback


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(pipe, function, rank, size, port, arguments):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        UCX_WARN_UNUSED_ENV_VARS="n",
    )
    try:
        pipe.send((function(rank, size, *arguments), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))


def run(function, size, *arguments, timeout=240, may_die=()):
    """What function(rank, size, *arguments) returns on each rank; AssertionError with the traceback
    of the first rank that fails, or when a rank is still there after `timeout` seconds. Ranks in
    `may_die` may end without a result, which is None."""
    context = multiprocessing.get_context("spawn")
    port, ranks = _free_port(), []
    for rank in range(size):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main, args=(theirs, function, rank, size, port, arguments)
        )
        process.start()
        theirs.close()
        ranks.append((process, mine))
    deadline = time.monotonic() + timeout
    try:
        results = []
        for rank, (process, pipe) in enumerate(ranks):
            assert pipe.poll(max(0, deadline - time.monotonic())), f"rank {rank} is stuck"
            try:
                result, error = pipe.recv()
            except EOFError:
                result, error = None, None if rank in may_die else "ended without a result"
            assert error is None, f"rank {rank}: {error}"
            results.append(result)
        for rank, (process, _) in enumerate(ranks):
            process.join(max(0, deadline - time.monotonic()))
            assert process.exitcode is not None, f"rank {rank} does not end"
        return results
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()


def die():
    os.kill(os.getpid(), signal.SIGKILL)
