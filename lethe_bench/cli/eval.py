"""``lethe eval``: accuracy against memory on live servers."""

from __future__ import annotations

import argparse
import difflib
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lethe_bench import models
from lethe_bench.accuracy.experiment import Experiment
from lethe_bench.accuracy.loading import load
from lethe_bench.cli import server_args
from lethe_bench.cli.checks import check_ports, say
from lethe_bench.cli.options import check_model, check_out, integer, number
from lethe_bench.servers import ServerError
from lethe_sglang.allocation.profile import load as load_profile
from lethe_sglang.allocation.profile import save
from lethe_sglang.cli.show_profile import render
from lethe_sglang.config import ConfigError
from lethe_sglang.processes import ending_on_signals
from lethe_sglang.profiling.run import with_rule

if TYPE_CHECKING:
    from lethe_bench.fidelity.run import Experiment as Forced

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_OWN_SERVER_ARGS = {
    "--model-path": "use --model",
    "--port": "use --port of the command",
    "--host": "",
    "--context-length": "",
    "--max-running-requests": "use at_once or loads of the file",
    "--max-total-tokens": "use at_once or pool_tokens of the file",
    "--enable-custom-logit-processor": "",
}
"""What a server of forced replies gets from the command."""


def add_parser(subparsers: Subparsers) -> None:
    """Register ``lethe eval``."""
    parser = subparsers.add_parser(
        "eval",
        description="Ask a model the same problems with the full cache and with eviction policies at several budgets.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    run_parser = actions.add_parser(
        "run",
        help="get the replies that an experiment still lacks",
        description="Start the servers that an experiment needs, one after the other, and get every reply that is not "
        "in the results directory yet. Ctrl-C is safe: the same command goes on.",
        allow_abbrev=False,
    )
    run_parser.add_argument("file", metavar="FILE", type=Path, help="YAML file of the experiment (configs/eval/)")
    run_parser.add_argument("--out", metavar="DIR", type=Path, help="results directory (default: out/eval/NAME)")
    run_parser.add_argument("--only", metavar="ARM", nargs="+", default=[], help="run these arms only")
    run_parser.add_argument("--limit", metavar="N", type=integer(1), help="run the first N problems of each task only")
    run_parser.add_argument("--model-path", metavar="PATH", help="directory of the model; beats the file's model_path")
    run_parser.add_argument("--data-dir", metavar="DIR", type=Path, help="where relative paths of datasets start")
    run_parser.add_argument("--port", metavar="N", type=integer(1, 65535), default=31000, help="port of the servers")
    run_parser.add_argument(
        "--servers",
        metavar="N",
        type=integer(1, 16),
        default=1,
        help="servers of the plugin that run side by side, on N ports from --port on (default: 1)",
    )
    report = actions.add_parser("report", help="write report.md and pictures into a results directory")
    report.add_argument("directory", metavar="DIR", type=Path, help="results directory")
    _add_fidelity_parser(actions)
    _add_layers_parser(actions)
    _add_harness_parser(actions)


def _add_fidelity_parser(actions: Subparsers) -> None:
    fidelity = actions.add_parser(
        "fidelity",
        help="measure how far eviction moves a model's next-token distribution",
        description="Force the same replies with the full cache and with every arm, compare the distributions of every "
        "step, and write fidelity.md. What is done already is not done again; Ctrl-C is safe.",
        allow_abbrev=False,
    )
    _add_forced_options(fidelity)
    fidelity.add_argument("--against", metavar="ARM", help="arm that others are compared with (default: the first)")


def _add_layers_parser(actions: Subparsers) -> None:
    layers = actions.add_parser(
        "layers",
        help="measure what each layer costs when it alone is pruned, and add that to a profile",
        description="Force the same replies with the full cache and once per layer with that layer alone pruned, and "
        "write a profile whose rule fidelity shares the budget by what that costs. Ctrl-C is safe.",
        allow_abbrev=False,
    )
    _add_forced_options(layers)
    layers.add_argument(
        "--profile", metavar="FILE", type=Path, required=True, help="a profile of the model, as lethe profile writes it"
    )
    layers.add_argument("--new", metavar="FILE", type=Path, required=True, help="where the new profile goes")
    layers.add_argument("--alpha", metavar="A", type=number(-16, 16), default=1.0, help="exponent of the shares")


def _add_forced_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="YAML file of the experiment (configs/fidelity/)")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        default="smollm2",
        help=f"{models.LEGAL} (default: smollm2, which a package carries)",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="results directory (default: out/fidelity/NAME)")
    parser.add_argument("--port", metavar="N", type=integer(1, 65535), default=31000, help="port of the server")
    parser.add_argument(
        "--in-process",
        metavar="N",
        type=integer(1),
        help="start no server: force replies in N processes, many times faster on a CPU, with the same results",
    )
    parser.add_argument(
        "--server-args", metavar="ARGS", default="", help="more arguments of SGLang: --server-args='--dtype bfloat16'"
    )


def _add_harness_parser(actions: Subparsers) -> None:
    harness = actions.add_parser(
        "lm-eval",
        help="run tasks of the lm-evaluation-harness against a running server",
        description="Run tasks of EleutherAI's lm-evaluation-harness against a server that runs already, with or "
        "without eviction. Data sets must be in the local cache; HF_HUB_OFFLINE=0 lets the harness fetch them.",
        allow_abbrev=False,
    )
    harness.add_argument("--url", metavar="URL", required=True, help="address of the server, such as http://HOST:30000")
    harness.add_argument("--tasks", metavar="LIST", required=True, help="tasks of the harness, separated by commas")
    harness.add_argument("--out", metavar="DIR", type=Path, default=Path("out/eval/lm-eval"), help="results directory")
    harness.add_argument("--model", metavar="NAME", help="name of the served model (default: what the server says)")
    harness.add_argument("--tokenizer", metavar="DIR", help="tokenizer, for tasks that count tokens")
    harness.add_argument("--chat", action="store_true", help="use the chat endpoint and the model's chat template")
    harness.add_argument("--concurrency", metavar="N", type=integer(1), default=8, help="requests open at a time")
    harness.add_argument("--limit", metavar="N", type=integer(1), help="problems per task")
    harness.add_argument("--fewshot", metavar="N", type=integer(0), help="examples in the prompt")
    harness.add_argument("--max-new-tokens", metavar="N", type=integer(1), help="longest reply")


def run(args: argparse.Namespace) -> int:
    """Do what was asked for and return the exit status.

    Raises
    ------
    ConfigError
        If an option or a file cannot be used.
    """
    actions = {"run": _run, "report": _report, "fidelity": _fidelity, "layers": _layers, "lm-eval": _harness}
    try:
        with ending_on_signals():
            return actions[args.action](args)
    except ServerError as error:
        print(f"lethe eval: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lethe eval: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    from lethe_bench.accuracy.prompts import Prompts
    from lethe_bench.accuracy.run import Run  # tqdm: only when something is run
    from lethe_bench.accuracy.store import Store

    experiment = load(args.file, {} if args.model_path is None else {"model_path": args.model_path})
    _check(experiment, args)
    items = {task: found[: args.limit] for task, found in experiment.items(args.data_dir).items()}
    store = Store(args.out or Path("out") / "eval" / experiment.name)
    try:
        with store.locked():
            store.begin(experiment, _command(args, experiment))
            prompts = Prompts(experiment.model_path, experiment.chat_template_kwargs)
            Run(
                experiment=experiment,
                store=store,
                prompts=prompts,
                items=items,
                only=tuple(args.only),
                port=args.port,
                servers=args.servers,
                say=say,
            ).all()
    except PermissionError as error:
        raise ConfigError(
            f"--out {store.directory}: {error.strerror}; give a directory that can be written to"
        ) from None
    return 0


def _report(args: argparse.Namespace) -> int:
    from lethe_bench.accuracy.report import write

    print(write(args.directory))
    return 0


def _fidelity(args: argparse.Namespace) -> int:
    from lethe_bench.fidelity import report
    from lethe_bench.fidelity.run import load

    experiment = load(args.file)
    against = next(iter(experiment.arms)) if args.against is None else args.against
    if against not in experiment.arms:
        raise ConfigError(f"--against {against}: no such arm; legal: {', '.join(experiment.arms)}")
    out = args.out or Path("out") / "fidelity" / experiment.name
    with _writable(out):
        _force(args, experiment, models.directory(args.model, say), out)
        print(report.write(out, against, experiment))
    return 0


def _layers(args: argparse.Namespace) -> int:
    from lethe_bench.fidelity import layers
    from lethe_bench.fidelity.run import load as load_experiment

    old, experiment = load_profile(args.profile, f"--profile {args.profile}"), load_experiment(args.file)
    check_out(args.new)
    if experiment.loads:
        raise ConfigError(f"{args.file}: loads: a layer is pruned alone, whatever the load; leave loads out")
    config = next(iter(experiment.configs().values()))
    one_each = layers.arms(experiment, old.model.layers)
    out = args.out or Path("out") / "fidelity" / f"{experiment.name}-layers"
    with _writable(out):
        _force(args, one_each, models.directory(args.model, say), out)
    found = layers.measured(out, old.model.layers, config.budget.tokens)
    profile = with_rule(old.model_copy(update={"fidelity": found}), "fidelity", args.alpha, config)
    save(profile, args.new)
    print(render(profile))
    print(f"written to {args.new}")
    return 0


def _force(args: argparse.Namespace, experiment: Forced, model: Path, out: Path) -> None:
    """Force what is missing, on a server or in processes of our own."""
    from lethe_bench.fidelity.inprocess import InProcess
    from lethe_bench.fidelity.run import Run

    words = server_args.split(args.server_args, f"lethe eval {args.action}", _OWN_SERVER_ARGS)
    if args.in_process is None:
        check_ports(args.port, 1)
        Run(experiment=experiment, model=model, out=out, port=args.port, server_args=words, say=say).all()
    elif words:
        raise ConfigError(f"--server-args {args.server_args!r}: --in-process starts no server; leave one of them out")
    elif experiment.loads:
        raise ConfigError("loads: they need a server, whose pool they fill; leave them or --in-process out")
    elif experiment.trajectories:
        raise ConfigError("trajectories: they need a server, which writes the replies; leave them or --in-process out")
    else:
        InProcess(experiment=experiment, model=model, out=out, jobs=args.in_process).all()


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except PermissionError as error:
        raise ConfigError(f"--out {out}: {error.strerror}; give a directory that can be written to") from None


def _harness(args: argparse.Namespace) -> int:
    from lethe_bench.accuracy.harness import HarnessPlan
    from lethe_bench.accuracy.harness import run as run_harness

    names = ("url", "model", "tokenizer", "chat", "concurrency", "limit", "fewshot", "max_new_tokens")
    tasks = tuple(task.strip() for task in args.tasks.split(",") if task.strip())
    plan = HarnessPlan(tasks=tasks, **{name: getattr(args, name) for name in names})
    for task, metrics in run_harness(plan, args.out).items():
        for metric, value in metrics.items():
            print(f"{task}\t{metric}\t{value}")
    return 0


def _check(experiment: Experiment, args: argparse.Namespace) -> None:
    """Refuse what would fail only after a server's start."""
    arms = {arm.name: arm for arm in experiment.every_arm()}
    for name in args.only:
        if name not in arms:
            near = difflib.get_close_matches(name, arms, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"--only {name}: no such arm{hint}; legal: {', '.join(arms)}")
    check_model(experiment.model_path, "model_path", ", or --model-path")
    check_ports(args.port, args.servers)


def _command(args: argparse.Namespace, experiment: Experiment) -> str:
    """Write the command line of this run without the paths of this machine."""
    words = ["lethe", "eval", "run", args.file.name]
    for option, value in (("--only", args.only), ("--limit", args.limit), ("--model-path", args.model_path)):
        if value:
            words += [option, *map(str, value if isinstance(value, list) else [value])]
    for option, directory in (("--data-dir", args.data_dir), ("--out", args.out)):
        if directory is not None:
            words += [option, directory.name if directory.is_absolute() else str(directory)]
    return shlex.join(experiment.readable(words))
