"""Command lines: a flag for every setting of a run, types of arguments that several programs have, and Ctrl-C.

Settings go, weakest first: defaults, `--preset`, the run that is resumed, `--config FILE`, flags. The model's shape is
that of `--init_from` where no preset, run, file or flag gives one.
"""

import argparse
import functools
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from engine.config import (
    PRESETS,
    Config,
    ConfigError,
    Setting,
    did_you_mean,
    from_dict,
    load_file,
    merge,
    preset,
    require,
    setting_meant,
    settings,
)

INTERRUPTED = 128 + signal.SIGINT  # as shells have it


def ends_on_ctrl_c(says: str = "interrupted") -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Have a program's `main` return 130 after this line where it is interrupted, and no traceback."""

    def decorated(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def ending(*arguments: Any, **options: Any) -> int:
            try:
                return main(*arguments, **options)
            except KeyboardInterrupt:
                print(says, file=sys.stderr, flush=True)
                return INTERRUPTED

        return ending

    return decorated


@contextmanager
def beyond_ctrl_c() -> Iterator[None]:
    """Have the processes that are started within it never interrupted: who started them ends them, in its own way."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a process hands on to those that it starts
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def positive(text: str) -> int:
    """Return a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def positives(text: str) -> list[int]:
    """Return whole numbers from 1 on, separated by commas."""
    return [positive(part) for part in text.split(",")]


def let_go_of_output() -> None:
    """After a BrokenPipeError: the reader, such as `head`, has enough, and Python's own flush at exit must not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class CommandLine(argparse.ArgumentParser):
    """A program's flags, described by its docstring. Dashes and underscores are the same, and nothing is abbreviated.

    A mistake ends the program with 2 and one line, which for an unknown flag or choice has the nearest name.
    """

    def __init__(self, documentation: str, **options: Any) -> None:
        description, _, epilog = documentation.partition("\n\n")
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False} | options
        super().__init__(description=description, epilog=epilog, **options)

    def parse_known_args(
        self, arguments: list[str] | None = None, namespace: None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        arguments = sys.argv[1:] if arguments is None else arguments
        return super().parse_known_args([_underscored(argument) for argument in arguments], namespace)

    def parse_args(self, arguments: list[str] | None = None, namespace: None = None) -> argparse.Namespace:
        given, unknown = self.parse_known_args(arguments, namespace)
        if unknown and not unknown[0].startswith("-"):
            self.error(f"{unknown[0]!r} belongs to no flag: flags begin with --, and most have one value")
        if unknown:
            known = [name.lstrip("-") for name in self._option_string_actions]
            name = unknown[0].lstrip("-").partition("=")[0]
            self.error(f"unknown flag {unknown[0]!r}{setting_meant(name, known, '--')}")
        return given

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), map(str, action.choices))
            raise

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"error: {message}\n")


def _underscored(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


class _Parser(CommandLine):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message)


def parse(arguments: list[str]) -> tuple[Config, types.SimpleNamespace]:
    """Return the configuration that the command line asks for, and what is no part of it.

    `resume` is None, "latest", "auto", or a checkpoint's or run's path; `shape_from_weights`: the model's shape is that
    of `--init_from`; and there is `local_rank`. Dashes and underscores in flags are the same.
    ConfigError: an unknown flag (with the nearest name), a value of the wrong type, settings that exclude each other.
    """
    flags = settings()
    parser = _Parser("Train a GPT.", prog="engine/train.py", formatter_class=argparse.HelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="a JSON configuration, such as a run's config.json")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="CHECKPOINT",
        help="go on with run_dir's newest checkpoint, or this one; auto: begin where there is none",
    )
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher's
    for flag in flags.values():
        choices = (
            typing.get_args(flag.kind)
            if typing.get_origin(flag.kind) is Literal
            else PRESETS
            if flag.name == "preset"
            else ()
        )
        shown = f" ({', '.join(choices)})" if choices else ""
        options = {"nargs": "?", "const": "true"} if flag.kind is bool or True in flag.also else {}
        metavar = {int: "N", float: "X", bool: "true|false"}.get(flag.kind, "NAME" if choices else "TEXT")
        parser.add_argument(
            f"--{flag.name}", help=f"{flag.help}{shown} [{_shown(flag)}]".replace("%", "%%"), metavar=metavar, **options
        )
    given = parser.parse_args(arguments)
    chosen: dict[str, Any] = {}
    for name, flag in flags.items():
        value = getattr(given, name)  # a string; None where the flag was not given
        if value is not None:
            where = chosen.setdefault(flag.section, {}) if flag.section else chosen
            where[name] = flag.convert(value)
    base = load_file(given.config) if given.config else {}
    if given.resume:
        base = merge(_resumed(given.resume, merge(base, chosen)), base)
    _require_both_files(merge(base, chosen).get("data", {}), flags)
    name = chosen.get("preset", base.get("preset", "13m"))
    shaped = given.config or base or "preset" in chosen or chosen.get("model", {}).keys() - {"z_loss"}
    shape_from_weights = bool(chosen.get("init_from")) and not shaped
    shape = {"model": _shape_of(chosen["init_from"])} if shape_from_weights else {}
    config = from_dict(merge(preset(name), base, shape, chosen), given.config or "command line")
    options = {"resume": given.resume, "local_rank": given.local_rank, "shape_from_weights": shape_from_weights}
    return config, types.SimpleNamespace(**options)


def config_of(flags: list[str], options: argparse.Namespace, named: Iterable[str] | None = None) -> Config:
    """Return the configuration of a training run by the flags that a program with `options` of its own leaves.

    ConfigError as `parse`; a mistyped flag may be meant for either. named: the settings that the program takes, None
    for all.
    """
    known = settings() if named is None else named
    for flag in flags:
        name = flag.removeprefix("--").partition("=")[0]
        unknown = flag.startswith("--") and name not in {*settings(), "config", "resume"}
        require(not unknown, f"unknown flag {flag!r}{setting_meant(name, [*vars(options), *known], '--')}")
    return parse(flags)[0]


def _shown(flag: Setting) -> str:
    """What `--help` shows as a flag's default."""
    values = {tree.get(flag.section, {}).get(flag.name, flag.default) for tree in PRESETS.values()}
    return "preset's" if len(values) > 1 else "auto" if values == {None} else str(values.pop())


def _require_both_files(data: dict[str, Any], flags: dict[str, Setting]) -> None:
    """ConfigError for one file without the other, which would be judged by a text that has nothing to do with it."""
    given = [name for name in ("train_file", "val_file") if name in data]
    if len(given) == 1 and data[given[0]] != flags[given[0]].default:
        other = "val_file" if given == ["train_file"] else "train_file"
        raise ConfigError(
            f"--{given[0]} {data[given[0]]} without --{other}, which would be {flags[other].default}: give both; "
            "python tools/prepare.py --val_fraction 0.01 makes them of one folder"
        )


def _shape_of(path: str) -> dict[str, Any]:
    """The shape of the model that `--init_from` begins with; ConfigError where there is none to be read."""
    from engine.formats import R50K_PADDED, R50K_TOKENS, WeightsError  # PyTorch: most programs here begin without it
    from engine.weights import read_shape

    try:
        shape = asdict(read_shape(path))
    except WeightsError as error:
        raise ConfigError(f"--init_from: {error}") from None
    del shape["z_loss"]  # how it was trained
    if shape["vocab_size"] == R50K_TOKENS:
        shape["vocab_size"] = R50K_PADDED  # as the presets have it, and export takes it back
    return shape


def _resumed(checkpoint: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """The saved configuration of the run that `--resume` names, where there is one yet; its run_dir is where it is now.

    ConfigError where nothing is there, or where another preset is chosen than the run's.
    """
    if checkpoint in ("latest", "auto"):
        folder = run_dir = Path(chosen.get("run_dir") or f"runs/{chosen.get('preset', '13m')}")
        if not (folder / "config.json").exists():
            return {}
    else:
        folder = run_dir = Path(checkpoint)
        require(
            (folder / "config.json").exists(),
            f"--resume {checkpoint}: no checkpoint there ({folder / 'config.json'} is missing)",
        )
        if (folder / "state.json").exists():  # a checkpoint: of the run two folders up, unless it lies alone
            inside = folder.resolve().parent.name == "checkpoints"
            run_dir = os.path.normpath(folder / "../..") if inside else None
    saved = load_file(folder / "config.json")
    named, theirs = chosen.get("preset"), saved.get("preset", "13m")
    require(named in (None, theirs), f"--preset {named}: {folder} is a run of {theirs}: leave --preset out to go on")
    return saved | ({"run_dir": str(run_dir)} if run_dir else {})
