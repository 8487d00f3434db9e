"""The command line: one verb, one module. A verb's module is imported when it is called, so `--help` is fast.

Exit codes: 0 done, or stopped with a checkpoint; 1 a bug (traceback); 2 something the user can mend (one line).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from pathlib import Path

from rating_train import __version__, log, run_dir
from rating_train.config.load import load_config
from rating_train.config.schema import Config
from rating_train.errors import EXIT_BUG, EXIT_DONE, EXIT_USER_ERROR, UserError
from rating_train.processes import die_with_parent

VERBS = {
    "demo": "make the demo catalogue and a tiny model",
    "prepare": "turn a catalogue and its images into shards",
    "verify": "check a dataset, every byte of it",
    "train": "train a regressor (under torchrun, Slurm, or alone)",
    "evaluate": "score a checkpoint: PLCC, SRCC, RMSE, MAE, CES",
    "cost": "parameters, MACs, FLOPs, C, E and CES of a configuration",
    "report": "plots of a run, or of a dataset",
    "status": "how far a run is, and which checkpoints are whole",
}


def main(argv: list[str] | None = None) -> int:
    """Parse, run the verb, and return (or, in a multi-process job, leave with) its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="rating-train", description=__import__("rating_train").__doc__)
    parser.add_argument("--version", action="version", version=f"rating-train {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, summary in VERBS.items():
        sub = verbs.add_parser(verb, help=summary, description=summary)
        if verb in arguments[:1]:  # only the verb that was asked for needs its options
            add_verb_arguments(verb, sub)
    return leave(_run(parser.parse_args(arguments)))


def add_verb_arguments(verb: str, parser: argparse.ArgumentParser) -> None:
    """The options of one verb. Those of `train` and `evaluate` stand here: their modules import torch."""
    if verb == "train":
        _train_arguments(parser)
    elif verb == "evaluate":
        _evaluate_arguments(parser)
    else:
        importlib.import_module(f"rating_train.{verb}").add_arguments(parser)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file")
    _add_set(parser)
    parser.add_argument(
        "--resume", default="auto", help="auto (default), never, must, or the path of a checkpoint directory"
    )


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--checkpoint", default="best", help="best (default), latest or a step")
    parser.add_argument("--split", default="", help="split to score (default: that of the run's evaluations)")
    _add_set(parser)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="A.B=V", help="override one setting")


# The settings are checked before torch is imported: a typo is answered at once.


def _train(args: argparse.Namespace) -> int:
    config = _load(args.config, args.set)
    from rating_train.train import train

    train(config, args.resume)
    return EXIT_DONE


def _evaluate(args: argparse.Namespace) -> int:
    if not (args.run / run_dir.CONFIG_FILE).is_file():
        raise UserError(
            "not a run directory: it has no config.yaml",
            where=args.run,
            fix="give the folder that `train` made",
        )
    config = _load(args.run / run_dir.CONFIG_FILE, args.set)
    from rating_train.collectives import on_main
    from rating_train.evaluate import evaluate_run, render

    row = evaluate_run(args.run, config, args.checkpoint, args.split)
    on_main(lambda: print(render(row)))
    return EXIT_DONE


def _load(path: str | Path, overrides: list[str]) -> Config:
    try:
        return load_config(path, overrides)
    except UserError as e:
        e.__dict__["raised_on_all_ranks"] = True  # every rank reads the same file: say it once
        raise


def _run(args: argparse.Namespace) -> int:
    if log.has_agent():
        # torchrun's ranks are in sessions of their own: if its agent is killed, they would train on unseen, and
        # the next job beside them.
        die_with_parent()
    rank = log.process_rank()
    log.set_up(rank)
    verbs = {"train": _train, "evaluate": _evaluate}
    try:
        if args.verb in verbs:
            return verbs[args.verb](args)
        return importlib.import_module(f"rating_train.{args.verb}").run(args)
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
    import multiprocessing

    from rating_train.world import disconnect

    if code == EXIT_DONE:  # after a failure others may be gone: do not wait for them
        disconnect()
    # Loader processes ignore SIGTERM (see data/loader.py), by which multiprocessing's own exit would wait for them.
    for child in multiprocessing.active_children():
        child.kill()
    logging.shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    raise SystemExit(main())
