"""The command line: `jaxkit list`, `jaxkit run`, `jaxkit report`, `jaxkit bench`.

A mistake in the arguments is one line that says what there is, with exit code 2; a run that cannot
go on is one line with exit code 1. Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from jaxkit_experiments import REGISTRY, load_experiment

__all__ = ["main"]

_COMMANDS = ("list", "run", "report", "bench")


class _UsageError(Exception):
    """A mistake in the arguments."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Example:
      >>> main(["rum"])  # on standard error: unknown command 'rum'; did you mean run?
      2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(arguments)
    except _UsageError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here.", 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; nothing is left to tell
        return 141


def _fail(message: str, code: int) -> int:
    print("jaxkit: error: " + " ".join(message.split()), file=sys.stderr)
    return code


def _main(arguments: list[str]) -> int:
    parser = _Parser(prog="jaxkit", description=_HELP, formatter_class=_Raw, allow_abbrev=False)
    parser.add_argument("command", nargs="?", metavar="list | run | report | bench")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    command, *rest = arguments
    _choose("command", command, _COMMANDS)
    return {"list": _list, "run": _run, "report": _report, "bench": _bench}[command](rest)


_HELP = """\
jaxkit list                        the experiments
jaxkit run NAME [--preset cpu]     run one: progress, table, claims, plots, run folder
jaxkit run NAME --help             its options
jaxkit report [RUNS ...]           one HTML page of run folders
jaxkit bench NAME                  speed and memory"""
_Raw = argparse.RawDescriptionHelpFormatter


def _list(arguments: list[str]) -> int:
    parser = _Parser(prog="jaxkit list", description="List the experiments.", allow_abbrev=False)
    parser.add_argument("--names", action="store_true", help="names alone")
    names_only = parser.parse_args(arguments).names
    width = max(map(len, REGISTRY), default=0)
    for name in REGISTRY:
        print(name if names_only else f"{name:{width}}  {load_experiment(name).title}")
    return 0


def _run(arguments: list[str]) -> int:
    parser = _Parser(
        prog="jaxkit run",
        description="Run an experiment; a killed run resumes, a finished one is shown again.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("name", metavar="NAME", help="the experiment; `jaxkit list` shows them")
    parser.add_argument("--preset", default="cpu", help="smoke, cpu (the default) or gpu")
    parser.add_argument("--data", type=Path, help="path of the real data set, where one is named")
    parser.add_argument("--out", type=Path, help="run folder; by default runs/NAME-PRESET")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on with the run there (default)")
    how.add_argument("--fresh", action="store_true", help="empty the run folder and start anew")
    wants_help = any(argument in ("-h", "--help") for argument in arguments)
    if arguments and not arguments[0].startswith("-"):
        name = arguments[0]
        _choose("experiment", name, REGISTRY)
    elif wants_help:
        parser.print_help()
        return 0
    else:
        raise _UsageError(f"run takes the NAME of an experiment first: {', '.join(REGISTRY)}.")
    known, overrides = parser.parse_known_args(arguments)
    _join_processes()  # before anything that an experiment's module might ask of a device
    experiment = load_experiment(name)
    _choose("preset", known.preset, experiment.presets)
    if wants_help:
        parser.print_help()
        print(f"\nand these, with their values in preset {known.preset}:\n")
        _override(experiment, known.preset, ["--help"])
        return 0
    config = _override(experiment, known.preset, overrides)
    if known.data is not None and not known.data.exists():
        raise _UsageError(f"--data must be a file or a folder; there is nothing at {known.data}.")

    from jaxkit_experiments.runfolder import RunError
    from jaxkit_experiments.runner import run_experiment

    out = known.out or Path("runs") / f"{name}-{known.preset}"
    if known.resume and not (out / "config.json").exists():
        raise _UsageError(f"--resume: there is no run in {out}.")
    unknown = [arm for arm in config.arms if experiment.arms and arm not in experiment.arms]
    for arm in unknown:
        _choose("arm", arm, experiment.arms)
    try:
        run_experiment(
            experiment, config, out, preset=known.preset, data=known.data, fresh=known.fresh
        )
    except RunError as error:
        return _fail(str(error), 1)
    except (ValueError, OSError) as error:
        # A value or a file that one of our own checks refuses; anything else is a fault to show.
        if isinstance(error, ValueError) and not _raised_by_us(error):
            raise
        return _fail(str(error), 1)
    return 0


def _raised_by_us(error: BaseException) -> bool:
    """Whether the exception was raised in jaxkit's packages, not in a library below them."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return name.partition(".")[0] in ("jaxkit", "jaxkit_experiments", "jaxkit_kernels")


def _join_processes() -> None:
    """Join the other processes of the run, if the environment names any."""
    import os

    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        import jax

        jax.distributed.initialize(
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
            process_id=int(os.environ["JAX_PROCESS_ID"]),
        )


def _override(experiment: Any, preset: str, overrides: list[str]) -> Any:
    """The preset's config with `--field value` overrides."""
    fields = dict.fromkeys(_fields(experiment.config_class))
    for argument in overrides:
        if not argument.startswith("--") or argument == "--help":
            continue
        field = argument[2:].partition("=")[0].replace("-", "_")
        if field not in fields and field.removeprefix("no_") not in fields:
            _choose("override", argument.partition("=")[0], [_flag(each) for each in fields])
    import tyro

    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        if overrides != ["--help"]:
            stack.enter_context(contextlib.redirect_stdout(said))
            stack.enter_context(contextlib.redirect_stderr(said))
        try:
            return tyro.cli(
                experiment.config_class,
                default=experiment.presets[preset],
                args=overrides,
                prog=f"jaxkit run {experiment.name}",
            )
        except ValueError as error:
            raise _UsageError(str(error)) from None
        except SystemExit as stop:
            if not stop.code:
                return None
            raise _UsageError(_first_message(said.getvalue())) from None


def _fields(config_class: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields of a dataclass."""
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _fields(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _first_message(boxed: str) -> str:
    """The message of an error that is drawn in a box: its lines up to the first rule."""
    lines: list[str] = []
    for line in boxed.splitlines()[1:]:
        text = line.strip().strip("│").strip()
        if set(text) <= set("─╰╯"):
            break
        lines.append(text)
    return " ".join(lines).removeprefix("Error parsing ") or "the overrides cannot be read."


def _report(arguments: list[str]) -> int:
    parser = _Parser(
        prog="jaxkit report", description="One HTML page of run folders.", allow_abbrev=False
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        default=[Path("runs")],
        help="run folders, or folders of them; by default runs",
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page")
    known = parser.parse_args(arguments)

    from jaxkit_experiments.report import find_runs, write_report
    from jaxkit_experiments.runfolder import RunError

    folders = find_runs(known.runs)
    if not folders:
        raise _UsageError(f"no run folder in {', '.join(map(str, known.runs))}.")
    try:
        write_report(folders, known.out)
    except RunError as error:
        return _fail(str(error), 1)
    print(f"{known.out}: {len(folders)} run{'s' if len(folders) > 1 else ''}")
    return 0


def _bench(arguments: list[str]) -> int:
    names = _benchmarks()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: jaxkit bench NAME [options]\n\nNAME is one of: {', '.join(names)}")
        return 0 if arguments else 2
    name, *rest = arguments
    _choose("benchmark", name, names)
    module = importlib.import_module(f"jaxkit_experiments.speed.{name}")
    return module.main(rest) or 0


def _benchmarks() -> list[str]:
    """The modules of `jaxkit_experiments.speed` that have a `main`, without importing them."""
    package = importlib.util.find_spec("jaxkit_experiments.speed")
    if package is None or package.submodule_search_locations is None:
        return []
    return [
        module.name
        for module in pkgutil.iter_modules(package.submodule_search_locations)
        if "\ndef main(" in (Path(module.module_finder.path) / f"{module.name}.py").read_text()  # type: ignore[union-attr]
    ]


def _choose(kind: str, value: str, choices: Any) -> None:
    """Raise a usage error unless `value` is one of `choices`, naming the nearest."""
    from difflib import get_close_matches

    names = list(choices)
    if value in names:
        return
    bare = {name.lstrip("-"): name for name in names}
    near = [bare[name] for name in get_close_matches(value.lstrip("-"), bare, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names)}."
    raise _UsageError(f"unknown {kind} {value!r}; {hint}")


if __name__ == "__main__":
    sys.exit(main())
