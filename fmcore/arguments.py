"""Options of a command, as frozen dataclasses, and what is typed on a command line.

A dataclass may hold others; the names of all their fields together are the flags, flat: ``seq_len`` is ``--seq-len``.
Types are int, float, str, bool (``--x``, ``--no-x``), Path, Literal, each of them or None, and tuple[str, ...] (repeat
the flag). The comment behind a field is its help. ``read`` checks what was typed and says in one line what is wrong;
``build`` makes the dataclass with argparse, for machines without tyro.
"""

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fmcore.errors import InputError

Options = TypeVar("Options")
KINDS = {int: "an integer", float: "a number", str: "text", Path: "a path"}
FIELD = re.compile(r"\s+(\w+)\s*:.*?#\s+(.*)")


@dataclass(frozen=True)
class Flag:
    """One option as it is typed."""

    name: str  # without dashes in front
    path: tuple[str, ...]  # fields from the command's dataclass down to it
    kind: type  # of a value
    choices: tuple[str, ...]  # of a Literal
    optional: bool  # None is allowed
    many: bool  # may be repeated
    default: Any  # MISSING: it must be given
    help: str

    def value(self, text: str) -> Any:
        """What ``text`` means. ``InputError`` if it means nothing of this type."""
        if self.optional and text == "None":
            return None
        if self.choices and text not in self.choices:
            wanted = ", ".join(self.choices)
            raise InputError(f"--{self.name} must be one of {wanted}, got {text!r}{near(text, self.choices)}")
        try:
            return self.kind(text)
        except ValueError:
            raise InputError(f"--{self.name} must be {KINDS[self.kind]}, got {text!r}") from None


def prog() -> str:
    """How this process was started, for commands that people copy."""
    if Path(sys.argv[0]).name != "__main__.py":
        return "fmcore"
    # Inside a virtual environment the bare name is another Python, unless the environment is active.
    python = Path(sys.executable)
    near = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else Path(python.name)
    return f"{near} -m fmcore"


def near(word: str, known: Sequence[str], before: str = "") -> str:
    """The hint "; did you mean ...?" when one of ``known`` is like ``word``, else nothing."""
    found = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {before}{found[0]}?" if found else ""


def flags(options: type, default: Any = None, path: tuple[str, ...] = ()) -> Iterator[Flag]:
    """All flags of a dataclass, in order."""
    hints, notes = get_type_hints(options), comments(options)
    for field in fields(options):
        kind, where = hints[field.name], (*path, field.name)
        value = field.default if default is None else getattr(default, field.name)
        if isinstance(kind, type) and is_dataclass(kind):
            yield from flags(kind, None if value is MISSING else value, where)
            continue
        alternatives = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        base = next(k for k in alternatives if k is not NoneType)
        choices, many = get_args(base) if get_origin(base) is Literal else (), get_origin(base) is tuple
        yield Flag(
            field.name.replace("_", "-"),
            where,
            str if choices or many else base,
            choices,
            NoneType in alternatives,
            many,
            value,
            notes.get(field.name, ""),
        )


def comments(options: type) -> dict[str, str]:
    """The comment behind each field, where the source is at hand."""
    try:
        lines = inspect.getsource(options).splitlines()
    except OSError:
        return {}
    return {found[1]: found[2] for line in lines if (found := FIELD.fullmatch(line))}


def read(argv: Sequence[str], known: Mapping[str, Flag], command: str) -> dict[str, list[str]]:
    """What was typed: the values of each flag by its name, ["yes"] or ["no"] for a bool.

    Raises ``InputError`` that says what is wrong.
    """
    found: dict[str, list[str]] = {}
    rest = list(argv)
    while rest:
        word, given, value = rest.pop(0).partition("=")
        name, flag, off = _named(word, known, command)
        if flag.kind is bool:
            if given:
                raise InputError(f"{command}: {word} takes no value, got {value!r}; --no-{name} is the opposite")
            found[name] = ["no" if off else "yes"]
            continue
        if not given:
            if not rest or rest[0].startswith("--"):
                got = f"the option {rest[0]}; {word}=... takes a value that starts with dashes" if rest else "nothing"
                raise InputError(
                    f"{command}: {word} needs {'a value' if flag.choices else KINDS[flag.kind]}, got {got}"
                )
            value = rest.pop(0)
        try:
            flag.value(value)
        except InputError as e:
            raise InputError(f"{command}: {e}") from None
        found[name] = [*(found.get(name, []) if flag.many else []), value]
    for name, flag in known.items():
        if flag.default is MISSING and name not in found:
            raise InputError(f"{command}: --{name} must be given: {flag.help}")
    return found


def _named(word: str, known: Mapping[str, Flag], command: str) -> tuple[str, Flag, bool]:
    """The flag that ``word`` names, and whether it is the --no- form."""
    if not word.startswith("-") or not word.strip("-"):
        raise InputError(
            f"{command}: wanted options, which start with --, got {word!r}; `fmcore {command} --help` lists them"
        )
    name = word[2:].replace("_", "-") if word.startswith("--") else ""
    positive = name.removeprefix("no-")
    if name in known:
        return name, known[name], False
    if positive != name and positive in known and known[positive].kind is bool:
        return positive, known[positive], True
    hint = near(word.lstrip("-").replace("_", "-"), list(known), "--")
    raise InputError(f"{command}: no option {word}{hint or f'; `fmcore {command} --help` lists what there is'}")


def canonical(found: Mapping[str, Sequence[str]], known: Mapping[str, Flag]) -> list[str]:
    """The same command line in one spelling, so that every parser reads it alike."""
    words = []
    for name, values in found.items():
        if known[name].kind is bool:
            words.append(f"--{name}" if values == ["yes"] else f"--no-{name}")
        else:
            words += [f"--{name}={value}" for value in values]
    return words


def build(options: type[Options], argv: Sequence[str], default: Options | None = None, prog: str = "fmcore") -> Options:
    """Make ``options`` from a command line with argparse; what is not typed comes from ``default`` or the fields."""
    parser = argparse.ArgumentParser(
        prog, description=inspect.getdoc(options), allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    groups: dict[tuple[str, ...], Any] = {(): parser}
    for flag in flags(options, default):
        where = flag.path[:-1]
        if where not in groups:
            groups[where] = parser.add_argument_group(f"{where[-1]} options")
        # Not the default in the namespace: what is absent there was not typed.
        note = flag.help if flag.default is MISSING or flag.many else f"{flag.help} (default: {flag.default})".strip()
        note = note.replace("%", "%%")
        add = partial(groups[where].add_argument, f"--{flag.name}", dest=".".join(flag.path), help=note)
        if flag.kind is bool:
            add(action=argparse.BooleanOptionalAction)
        else:
            add(
                type=flag.value,
                metavar=_metavar(flag),
                action="append" if flag.many else "store",
                required=flag.default is MISSING,
            )
    typed: dict[str, Any] = {}
    for path, value in vars(parser.parse_args(list(argv))).items():
        *parts, last = path.split(".")
        inner = typed
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = tuple(value) if isinstance(value, list) else value
    return _make(options, typed, default)


def _metavar(flag: Flag) -> str:
    return "{" + ",".join(flag.choices) + "}" if flag.choices else flag.kind.__name__.upper()


def _make(options: type[Options], typed: Mapping[str, Any], default: Options | None) -> Options:
    """``options`` with the fields in ``typed``, which nests as the dataclasses do; the rest come from ``default``."""
    hints = get_type_hints(options)
    values = {}
    for field in fields(options):  # type: ignore[arg-type]
        if field.name in typed:
            value, start = typed[field.name], field.default if default is None else getattr(default, field.name)
            if isinstance(kind := hints[field.name], type) and is_dataclass(kind):
                value = _make(kind, value, None if start is MISSING else start)
            values[field.name] = value
    return options(**values) if default is None else replace(default, **values)  # type: ignore[type-var]
