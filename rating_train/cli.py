"""The command line: one verb, one module. Modules are imported when their verb is called, so `--help` is fast.

Exit codes: 0 done, or stopped with a checkpoint; 1 a bug (traceback); 2 something the user can mend (one line).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback

from rating_train import __version__, log
from rating_train.errors import EXIT_BUG, EXIT_USER_ERROR, UserError

VERBS = {
    "demo": ("rating_train.demo", "make the demo catalogue and a tiny model"),
    "prepare": ("rating_train.prepare", "turn a catalogue and its images into shards"),
    "train": ("rating_train.train", "train a regressor (under torchrun, Slurm, or alone)"),
    "evaluate": ("rating_train.evaluate", "score a checkpoint: PLCC, SRCC, RMSE, MAE, CES"),
    "cost": ("rating_train.cost", "parameters, MACs, FLOPs, C, E and CES of a configuration"),
    "report": ("rating_train.report", "plots of a run"),
}


def main(argv: list[str] | None = None) -> int:
    """Parse, run the verb, and return (or, in a multi-process job, leave with) its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="rating-train", description=__import__("rating_train").__doc__)
    parser.add_argument("--version", action="version", version=f"rating-train {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, (module, summary) in VERBS.items():
        sub = verbs.add_parser(verb, help=summary, description=summary)
        if verb in arguments[:1]:  # only the verb that was asked for is imported
            importlib.import_module(module).add_arguments(sub)
    args = parser.parse_args(arguments)
    return leave(_run(args))


def _run(args: argparse.Namespace) -> int:
    module = importlib.import_module(VERBS[args.verb][0])
    rank = log.process_rank()
    log.set_up(rank)
    try:
        return module.run(args)
    except UserError as e:
        if rank == 0 or not getattr(e, "raised_on_all_ranks", False):
            print(f"rating-train {args.verb}: error: {e}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"rating-train {args.verb}: interrupted", file=sys.stderr)
        return 130
    except Exception:  # the last stop: shown whole, exit code 1
        traceback.print_exc()
        return EXIT_BUG


def leave(code: int) -> int:
    """Return ``code``; a process that joined a process group leaves at once instead.

    Gloo's threads, held by objects of DeepSpeed, are destroyed at interpreter exit in no particular order,
    and now and then abort the process ("terminate called without an active exception") after all its work
    is done. So what must run at exit is run here, and the interpreter's own teardown is left out.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return code
    import atexit
    import logging

    from rating_train.world import disconnect

    if code == 0:  # after a failure others may be gone: do not wait for them
        disconnect()
    logging.shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    raise SystemExit(main())
