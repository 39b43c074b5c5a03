"""``fmcore`` on the command line.

What a person can mend is one line on stderr and exit code 2; 130 and 143 mean stopped by a signal, everything saved.
Options are built from dataclasses with tyro, or with argparse where tyro is not installed; both mean the same.
"""

import contextlib
import errno
import importlib
import io
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fmcore import __version__, arguments
from fmcore.errors import InputError

# The module and the class of a command's options, and what it is for. Nothing heavy is imported before it is known.
COMMANDS = {
    "demo": ("fmcore.demo", "DemoOptions", "the whole life of a small model: pre-train, adapt, prompt, report"),
    "pretrain": ("fmcore.commands", "Pretrain", "train a fresh model on text"),
    "finetune": ("fmcore.commands", "Finetune", "adapt a model to other text (LoRA, or every weight)"),
    "generate": ("fmcore.commands", "Generate", "continue prompts with text of a model"),
    "evaluate": ("fmcore.commands", "Evaluate", "bits per byte and perplexity of a model on held-out text"),
    "export": ("fmcore.commands", "Export", "write a model as a Hugging Face folder"),
    "doctor": ("fmcore.doctor", "DoctorOptions", "what is installed, which GPU, which operators run which body"),
}
EPILOG = (
    "FMCORE_DEBUG=1 shows the traceback of an error; FMCORE_BODY=op=body,... chooses the bodies of operators "
    "(see fmcore doctor)."
)
# Refusals of the operating system that a person can mend.
REFUSED = {
    errno.ENOSPC,
    errno.EFBIG,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EMFILE,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (by default this process's own) and return its exit code."""
    # Before PyTorch is loaded: on a machine with other work, threads that spin while they wait for each other took
    # 2.5 times as long as threads that soon sleep in one run; with less load neither was ahead (LOG.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        with _warnings_in_one_line():
            code = _run(list(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone (``| head``). Python flushes once more when it ends: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as e:
        line = _line(e)
        if line is None:
            raise
        if os.environ.get("FMCORE_DEBUG"):
            traceback.print_exc()
        print(f"fmcore: {line}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    command = argv.pop(0) if argv else "--help"
    if command in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if command in ("-V", "--version", "version"):
        print(f"fmcore {__version__}")
        return 0
    if command not in COMMANDS:
        hint = arguments.near(command, list(COMMANDS)) or f"; there are {', '.join(COMMANDS)}"
        raise InputError(f"no command {command!r}{hint}")
    module, name, _ = COMMANDS[command]
    options = getattr(importlib.import_module(module), name)
    if "-h" in argv or "--help" in argv:
        with contextlib.suppress(SystemExit):
            _build(options, ["--help"], None, command)
        print(EPILOG)
        return 0
    return _execute(command, *parse(options, argv, command))


def parse(options: type, argv: Sequence[str], command: str) -> tuple[Any, Any]:
    """The options that ``argv`` means, and the checkpoint that they go on from, or ``None``.

    Raises ``InputError`` that says what is wrong with the command line.
    """
    known = {flag.name: flag for flag in arguments.flags(options)}
    typed = arguments.read(argv, known, command)
    checkpoint = default = None
    if hasattr(options, "saved") and typed.get("resume") == ["yes"]:
        from fmcore.jobs import find_run

        run = Path(typed.get("run", [known["run"].default])[0])
        checkpoint = find_run(run)
        default = options.saved(checkpoint, run)
    return _build(options, arguments.canonical(typed, known), default, command), checkpoint


def _build(options: type, argv: list[str], default: Any, command: str) -> Any:
    """The options of a checked command line, by tyro where it is installed, else by ``arguments.build``."""
    prog = f"fmcore {command}"
    try:
        import tyro
    except ImportError:
        return arguments.build(options, argv, default, prog)
    said = io.StringIO()
    given = {} if default is None else {"default": default}
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction)
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(options, args=argv, prog=prog, config=config, **given)
    except SystemExit as e:
        if not e.code:
            raise
    # tyro draws a box around what a dataclass said about its values; here it says so itself.
    arguments.build(options, argv, default, prog)
    raise InputError(f"{command}: {said.getvalue()}")


def _execute(command: str, options: Any, checkpoint: Any) -> int:
    if command == "doctor":
        return options.execute()
    from fmcore.train.loop import Interrupted

    try:
        if command == "demo":
            importlib.import_module("fmcore.demo").demo(options)
        else:
            options.execute(checkpoint)
    except Interrupted as e:
        print(
            f"fmcore: {e}; go on with: {arguments.prog()} {command} --run {shlex.quote(str(e.run))} --resume",
            file=sys.stderr,
        )
        return e.code
    return 0


def _overview() -> str:
    title = f"fmcore {__version__}: a training engine for foundation models"
    lines = [title, "", "usage: fmcore COMMAND [OPTIONS]", ""]
    lines += [f"  {command:10} {summary}" for command, (_, _, summary) in COMMANDS.items()]
    return "\n".join([*lines, "", "fmcore COMMAND --help lists the options of a command.", EPILOG])


def _line(e: Exception) -> str | None:
    """What to tell a person about ``e``, in one line; ``None`` if it is a fault of the program."""
    if isinstance(e, InputError):
        text = str(e)
    elif isinstance(e, ModuleNotFoundError) and e.name and not e.name.startswith("fmcore"):
        package = e.name.partition(".")[0]
        text = f"the package {package!r} must be installed, found none; `fmcore doctor` shows what there is"
    elif isinstance(e, OSError) and e.errno in REFUSED:
        text = f"{e.filename or 'output'}: {e.strerror}"
    elif type(e).__name__ == "OutOfMemoryError":
        text = f"the GPU has too little memory; lower --batch-size, --seq-len or the model ({e})"
    else:
        return None
    return " ".join(text.split())


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Inside the block a warning is one line on stderr, without file and source: people read it, too."""
    with warnings.catch_warnings():
        if not os.environ.get("FMCORE_DEBUG"):
            warnings.showwarning = _show_warning
        yield


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    print(f"fmcore: warning: {' '.join(str(message).split())}", file=file or sys.stderr)
