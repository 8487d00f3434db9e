"""The command line: one verb, one module. A verb's module is imported only when it is called, so `--help` is fast.

Exit codes: 0 done, or stopped with a checkpoint; 1 a bug (traceback); 2 a problem that the user can fix (one line);
3 an evaluation that does not meet `--require`; 75 no progress (stacks in the run directory).
"""

from __future__ import annotations

import argparse
import errno
import gc
import importlib
import logging
import os
import signal
import sys
import traceback
from typing import Any

from rating_train import __version__, log
from rating_train.errors import EXIT_BUG, EXIT_DONE, EXIT_REQUIREMENT, EXIT_USER_ERROR, UserError
from rating_train.processes import die_with_parent

EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE  # as the shell has it

#: What the file system says that its user can change: error number -> what to do.
_USER_ERRNOS = {
    errno.EACCES: "check the permissions of that path",
    errno.EPERM: "check the permissions of that path",
    errno.EROFS: "choose a folder on a file system that can be written",
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "free some of the quota, or choose a folder on another disk",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EISDIR: "check the path: it is a directory",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "check the path: its symbolic links form a circle",
}

VERBS = {
    "demo": "make the demo catalogue and a tiny model",
    "prepare": "turn a catalogue and its images into shards",
    "verify": "check every byte of a dataset",
    "features": "store what a frozen vision tower computes, once",
    "train": "train a regressor (under torchrun, Slurm, or alone)",
    "evaluate": "score a model on a split: metrics, intervals, CES",
    "compare": "which run is better on the same items, by how much",
    "predict": "score a catalogue into a CSV or Parquet file",
    "export": "write a checkpoint as a folder that transformers loads",
    "cost": "parameters, MACs, FLOPs, C, E and CES of a configuration",
    "bench": "how fast the parts of training are, against limits",
    "report": "plot a run, or describe a dataset",
    "status": "show the progress of a run and which checkpoints are valid",
    "submit": "submit training, and an evaluation after it, to Slurm",
    "preflight": "check the nodes of a job: PASS or FAIL, and how to fix it",
}


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments, run the verb, and return (or, in a multi-process job, exit with) its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="rating-train", description=__import__("rating_train").__doc__)
    parser.add_argument("--version", action="version", version=f"rating-train {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, summary in VERBS.items():
        sub = verbs.add_parser(verb, help=summary, description=summary)
        if verb in arguments[:1]:  # only the given verb needs its options
            verb_module(verb).add_arguments(sub)
    return leave(_run(parser.parse_args(arguments)))


def verb_module(verb: str) -> Any:
    """Return the module of a verb, which has ``add_arguments(parser)`` and ``run(args) -> exit code``."""
    return importlib.import_module(f"rating_train.commands.{verb}")


def _run(args: argparse.Namespace) -> int:
    if log.has_agent():
        # torchrun's ranks run in their own sessions: if its agent is killed, they would keep training unnoticed,
        # beside the next job.
        die_with_parent()
    rank = log.process_rank()
    log.set_up(rank)
    try:
        code: int = verb_module(args.verb).run(args)
        sys.stdout.flush()  # here, where a reader that has gone is an error that can be told from others
        return code
    except BrokenPipeError:  # `... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return EXIT_BROKEN_PIPE
    except UserError as e:
        if rank == 0 or not e.on_all_ranks:
            print(f"rating-train {args.verb}: error: {e}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"rating-train {args.verb}: interrupted", file=sys.stderr)
        return 130
    except OSError as e:
        if e.errno not in _USER_ERRNOS:
            traceback.print_exc()
            return EXIT_BUG
        logging.getLogger(__name__).debug("where it was raised", exc_info=True)  # RATING_TRAIN_LOG=DEBUG
        named = f" | where: {e.filename}" if e.filename else ""
        print(
            f"rating-train {args.verb}: error: {e.strerror}{named} | fix: {_USER_ERRNOS[e.errno]}",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    except Exception:  # a bug
        traceback.print_exc()
        return EXIT_BUG


def leave(code: int) -> int:
    """Return ``code``; a process that joined a process group exits at once instead.

    Gloo's threads, held by DeepSpeed's objects, are destroyed at interpreter exit in no particular order, which
    sometimes aborts the process ("terminate called without an active exception") after all its work is done. So the
    exit handlers run here, and the interpreter's own teardown is skipped.
    """
    gc.unfreeze()  # an interpreter that ends frees what it imported; triton's bindings complain about what is left
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return code
    import atexit
    import multiprocessing

    from rating_train.distributed.world import disconnect

    if code in (EXIT_DONE, EXIT_REQUIREMENT):  # after a failure other ranks may be gone: do not wait for them
        disconnect()
    # DataLoader workers ignore SIGTERM (data/workers/reading.py): multiprocessing's own exit would wait for them.
    for child in multiprocessing.active_children():
        child.kill()
    logging.shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    raise SystemExit(main())
