"""Plant small bugs in the kernels, one at a time, and see whether the tests notice.

    python tests/mutants.py                        ten mutants of every file of kernels/
    python tests/mutants.py --only rms_norm.py     of one file; --number 0 takes all that there are
    python tests/mutants.py --seed 1 --jobs 2 --out record.json
    python tests/mutants.py --list                 print the mutants and run nothing

Rules find the mutants in the source: inside functions under ``@triton.jit`` and inside the functions that launch them.
The sample takes the rules in turn, so that the many constants do not crowd out the few stores. Every mutant is written
into a copy of the tree, where the rows of tests/rows/ that name its file are run through tests/test_ops.py and the
operator's own file in tests/ops/, with those of the files that import its kernels; for blocks.py those of one small
operator that uses the helper. Quick tests of all rows go before slow ones. Left out are bodies other than Triton,
tests that compare the kernels with themselves compiled, and tests that plant bugs, which fail when a line has changed.
It is killed when a test fails or takes too long. One that no input can tell from the original stands in EQUIVALENT,
with the reason, and is not counted; neither is one that cannot be imported. Survivors are tests that are missing.

The kernels run in the interpreter, also where there is a GPU: a bad address must not take the machine with it. This
file is a pytest plugin too: it selects the tests in the copy.
"""

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("kernels", "csrc", "fmcore", "benchmarks", "tests", "pyproject.toml")
SHARED = ("blocks.py", "launch.py")
# Of all mutants that count, this share must be killed.
LEAST = 0.95


@dataclass(frozen=True)
class Mutant:
    """``new`` instead of ``source[start:end]``, which is ``old``, in a file of kernels/; ``text`` is its line."""

    file: str
    function: str
    line: int
    text: str
    rule: str
    start: int
    end: int
    old: str
    new: str

    def applied(self, source: str) -> str:
        assert source[self.start : self.end] == self.old
        return source[: self.start] + self.new + source[self.end :]

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}:{self.line} {self.rule}: {old} -> {new}"


@dataclass(frozen=True)
class Result:
    """What became of a mutant: killed, timeout (counts as killed), survived, equivalent or unborn."""

    mutant: Mutant
    outcome: str
    by: str = ""
    seconds: float = 0.0


# Mutants that no input can tell from the original: (file, rule, what its line begins with, old or "" for any): why.
EQUIVALENT: dict[tuple[str, str, str, str], str] = {
    ("decode_attention.py", "another filler", "mask=in_rows[:, None] & in_cols[None, :], other=0.0,", ""): (
        "columns of q beyond D meet zeros of k, rows beyond R are not stored"
    ),
    ("decode_attention.py", "another filler", "k = tl.load(", ""): (
        "columns of k beyond D meet zeros of q, scores of keys beyond the end are replaced"
    ),
    ("decode_attention.py", "another filler", "v_ptr + keys[:, None] * stride_vs", ""): (
        "values beyond the end have weight 0, columns beyond DV are not stored"
    ),
    ("decode_attention.py", "another filler", "sink = tl.load(", ""): "rows beyond R are not stored",
    ("decode_attention.py", "another filler", "total = tl.load(", ""): "a split that is none has share 0",
    ("decode_attention.py", "another filler", "mask=in_splits[:, None] & in_cols[None, :]", ""): (
        "a split that is none has share 0, columns beyond DV are not stored"
    ),
    (
        "decode_attention.py",
        "a constant off by one",
        "share = tl.exp2(",
        "0.0",
    ): "any number will do there, says its line",
    ("decode_attention.py", "a constant off by one", "acc = acc / tl.where(", "1.0"): "0 divided by any number is 0",
    ("decode_attention.py", "a constant off by one", "o = tl.sum(parts", "1.0"): "0 divided by any number is 0",
    ("decode_attention.py", "a comparison changed", "return tl.where(z < 0.390625", ""): (
        "both forms of tanh agree where they meet, and at 0 the sign plays no part"
    ),
    ("decode_attention.py", "64 bits dropped", "length = tl.minimum(", ""): "no cache has 2^31 keys a sequence",
    ("decode_attention.py", "64 bits dropped", "each = tl.cdiv(", ""): "no cache has 2^31 keys a sequence",
    (
        "decode_attention.py",
        "a conversion dropped",
        "blocks = tl.cdiv(",
        "",
    ): "a division of 64 bits is slower, not other",
    ("decode_attention.py", "64 bits dropped", "row = tl.program_id(0)", ""): (
        "splits need fewer than 2 programs a multiprocessor, so partial results stay below 2^28 elements"
    ),
    ("layer_norm.py", "a conversion dropped", "w = tl.load(w_ptr + cols", ""): "its product with an fp32 tile is fp32",
    ("layer_norm.py", "another filler", "mean = tl.load(mean_ptr + rows", ""): (
        "in rows beyond M dy is zero and nothing is stored, so x_hat there reaches nothing"
    ),
    (
        "rope.py",
        "another filler",
        "x1 = tl.load(",
        "",
    ): "every element goes its own way, and none off the mask is stored",
    (
        "rope.py",
        "another filler",
        "x2 = tl.load(",
        "",
    ): "every element goes its own way, and none off the mask is stored",
    ("adamw.py", "64 bits dropped", "pid = tl.program_id(0)", ""): (
        "it meets 3 alone, and 2^29 programs take 2^44 elements or 2^29 tensors"
    ),
    ("lion.py", "64 bits dropped", "pid = tl.program_id(0)", ""): (
        "it meets 3 alone, and 2^29 programs take 2^44 elements or 2^29 tensors"
    ),
    ("multi_tensor.py", "64 bits dropped", "pid = tl.program_id(0)", ""): (
        "it meets 3 alone, and 2^29 programs take 2^44 elements or 2^29 tensors"
    ),
    ("multi_tensor.py", "64 bits dropped", "t = tl.program_id(0)", ""): (
        "no list has the 2^27 tensors that it takes to leave 32 bits"
    ),
    ("activation.py", "a comparison changed", "value = tl.where(x < 0", ""): (
        "at 0 both branches are 0, and so is what comes of them"
    ),
    ("activation.py", "a comparison changed", "slope = tl.where(x <= 0, 0.0, 2 * x)", ""): (
        "at 0 both branches are 0, and so is what comes of them"
    ),
    ("activation.py", "a comparison changed", "a = tl.where(a > FAR", ""): ("at FAR itself both branches are FAR"),
    ("activation.py", "a comparison changed", "s = tl.where(x < 0", ""): ("at 0 e is 1 and both branches are 1/2"),
    ("activation.py", "a comparison changed", "slope = tl.where(x < 0", ""): (
        "at 0 the tail is 0, added or taken away"
    ),
    ("activation.py", "another filler", "x += tl.load(bias_ptr", ""): (
        "columns off the mask have a dy of 0 and are not stored"
    ),
    ("activation.py", "a conversion dropped", "x += tl.load(bias_ptr", ""): ("its sum with a tile in ACC is in ACC"),
    ("activation.py", "another filler", "bias = tl.load(bias_ptr", ""): (
        "columns off the mask have a dy of 0 and are not stored"
    ),
    ("activation.py", "a conversion dropped", "bias = tl.load(bias_ptr", ""): ("its sum with a tile in ACC is in ACC"),
    ("glu.py", "another filler", "g += tl.load(bias_ptr", ""): (
        "columns off the mask have a dy of 0 and are not stored"
    ),
    ("glu.py", "a conversion dropped", "g += tl.load(bias_ptr", ""): ("its sum with a tile in ACC is in ACC"),
    ("glu.py", "another filler", "u += tl.load(bias_ptr", ""): (
        "columns off the mask have a dy of 0 and are not stored"
    ),
    ("glu.py", "a conversion dropped", "u += tl.load(bias_ptr", ""): ("its sum with a tile in ACC is in ACC"),
    ("glu.py", "another filler", "gate_bias = tl.load(bias_ptr", ""): (
        "columns off the mask have a dy of 0 and are not stored"
    ),
    ("glu.py", "a conversion dropped", "gate_bias = tl.load(bias_ptr", ""): ("its sum with a tile in ACC is in ACC"),
    ("glu.py", "another filler", "up_bias = tl.load(bias_ptr", ""): (
        "columns off the mask have a dy of 0 and are not stored"
    ),
    ("glu.py", "a conversion dropped", "up_bias = tl.load(bias_ptr", ""): ("its sum with a tile in ACC is in ACC"),
    ("embedding.py", "a conversion dropped", "at = tl.where(tl.sum(same", ""): (
        "tl.sum adds booleans as 32-bit integers by itself"
    ),
    ("adamw.py", "a condition negated", "if TAIL:", "TAIL"): (
        "code 0 is the smallest, so places beyond the end never hold the absmax of a block"
    ),
    ("adamw.py", "a conversion dropped", "put(p_ptr, i, p.to(P)", ""): "a store converts to what its pointer points to",
    ("multi_tensor.py", "a condition negated", "if ALIGNED:", ""): (
        "a hint to the compiler of a GPU, which the widths of loads in tests/resources.json show"
    ),
}

COMPARE = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
}  # fmt: skip
BINARY = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "%"),
    ast.Mod: ("%", "//"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
}  # fmt: skip
FUNCTIONS = {
    "tl.sum": "tl.max", "tl.max": "tl.min", "tl.maximum": "tl.minimum", "tl.minimum": "tl.maximum",
    "tl.rsqrt": "tl.sqrt", "tl.sqrt": "tl.rsqrt", "tl.exp": "tl.exp2", "tl.exp2": "tl.exp", "tl.log": "tl.log2",
    "tl.log2": "tl.log", "tl.abs": "-tl.abs", "tl.sigmoid": "tl.exp",
}  # fmt: skip
# What changes speed alone, and what the language wants to be a certain number.
NO_CONSTANT = {"axis", "other", "num_warps", "num_stages", "loop_unroll_factor", "flatten", "warp_specialize"}


class _Finder:
    """The mutants of one file."""

    def __init__(self, file: str, source: str):
        self.file, self.source, self.found = file, source, list[Mutant]()
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))

    def offset(self, line: int, col: int) -> int:
        """The place in the text of a place in the tree, whose columns are bytes."""
        start = self.lines[line - 1]
        return start + len(self.source[start : self.lines[line]].encode()[:col].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def text(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.source[start:end]

    def add(self, rule: str, node: ast.AST | tuple[int, int], new: str) -> None:
        start, end = node if isinstance(node, tuple) else self.span(node)
        line = self.source.count("\n", 0, start) + 1
        text = self.source[self.lines[line - 1] : self.lines[line]].strip()
        mutant = Mutant(self.file, self.function, line, text, rule, start, end, self.source[start:end], new)
        first, last = self.whole
        try:
            changed = ast.dump(ast.parse(self.source[first:start] + new + self.source[end:last]))
        except SyntaxError:
            return
        if changed != self.tree:
            self.found.append(mutant)

    def between(self, left: ast.AST, right: ast.AST, old: str) -> tuple[int, int]:
        """Where the operator ``old`` stands between two operands."""
        at = self.source.index(old, self.span(left)[1], self.span(right)[0])
        return at, at + len(old)

    def all(self) -> list[Mutant]:
        for node in ast.parse(self.source).body:
            if isinstance(node, ast.FunctionDef):
                self.function, self.whole = node.name, self.span(node)
                self.tree = ast.dump(ast.parse(self.text(node)))
                if any(ast.unparse(d).split("(")[0] in ("triton.jit", "jit") for d in node.decorator_list):
                    self.kernel(node)
                elif launches := [n for n in ast.walk(node) if _is_launch(n)]:
                    self.launcher(node, launches)
        return sorted(set(self.found), key=lambda m: (m.start, m.end, m.rule, m.new))

    def kernel(self, function: ast.FunctionDef) -> None:
        self.strides = [a.arg for a in function.args.args if a.arg.startswith("stride")]
        body = function.body[1:] if ast.get_docstring(function) is not None else function.body
        for statement in body:
            for node in ast.walk(statement):
                if rules := getattr(self, f"_{type(node).__name__.lower()}", None):
                    rules(node)
            self.constants(statement)

    def constants(self, statement: ast.stmt) -> None:
        skipped = set()
        for node in ast.walk(statement):
            call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            named = node.arg if isinstance(node, ast.keyword) else ""
            if named in NO_CONSTANT or call in ("tl.arange", "tl.static_assert", "float"):
                skipped.update(map(id, ast.walk(node)))
            elif isinstance(node, ast.Constant) and type(node.value) in (int, float) and id(node) not in skipped:
                self.add("a constant off by one", node, repr(node.value + 1))

    def _compare(self, node: ast.Compare) -> None:
        for (left, right), op in zip(pairwise((node.left, *node.comparators)), node.ops, strict=True):
            if type(op) in COMPARE:
                old, new = COMPARE[type(op)]
                self.add("a comparison changed", self.between(left, right, old), new)

    def _binop(self, node: ast.BinOp) -> None:
        if type(node.op) not in BINARY:
            return
        old, new = BINARY[type(node.op)]
        self.add("an operator changed", self.between(node.left, node.right, old), new)
        if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
            kind = "a term dropped" if isinstance(node.op, (ast.Add, ast.Sub)) else "a factor dropped"
            self.add(kind, node, f"({self.text(node.left)})")
            if isinstance(node.op, (ast.Add, ast.Mult)):
                self.add(kind, node, f"({self.text(node.right)})")
        elif isinstance(node.op, ast.BitAnd):
            for side in (node.left, node.right):
                self.add("a mask widened", node, f"({self.text(side)})")

    def _unaryop(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self.add("a sign dropped", node, f"({self.text(node.operand)})")

    def _call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        if name in FUNCTIONS:
            self.add("a function changed", node.func, FUNCTIONS[name])
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to" and len(node.args) == 1:
            wanted = ast.unparse(node.args[0])
            what = "64 bits dropped" if wanted == "tl.int64" else "a conversion dropped"
            # tl.store converts to what its pointer points to, told or not; ``dtype`` is short for it.
            if wanted != "dtype" and not wanted.endswith("element_ty"):
                self.add(what, node, f"({self.text(node.func.value)})")
        if name == "tl.where":
            a, b = node.args[1:3]
            self.add("branches swapped", (self.span(a)[0], self.span(b)[1]), f"{self.text(b)}, {self.text(a)}")
        if name == "float" and ast.unparse(node.args[0]) == "'-inf'":
            self.add("an infinity dropped", node, "0.0")
        for keyword in node.keywords:
            value = ast.unparse(keyword.value)
            if keyword.arg == "mask":
                self.add("a mask widened", keyword.value, f"({self.text(keyword.value)}) | True")
            elif keyword.arg == "other":
                self.add("another filler", keyword.value, "1.0" if value in ("0.0", "0") else "0.0")
            elif keyword.arg == "axis" and value in ("0", "1"):
                self.add("another axis", keyword.value, "10"[int(value)])
            elif keyword.arg == "input_precision":
                self.add("a precision dropped", keyword.value, '"tf32"')

    def _expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and re.match(r"(tl\.)?store|tl\.atomic", ast.unparse(node.value.func)):
            self.add("a store removed", node, "pass")

    def _if(self, node: ast.If) -> None:
        self.add("a condition negated", node.test, f"not ({self.text(node.test)})")

    def _augassign(self, node: ast.AugAssign) -> None:
        if type(node.op) in BINARY:
            old, new = BINARY[type(node.op)]
            self.add("an operator changed", self.between(node.target, node.value, f"{old}="), f"{new}=")
            if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)):
                self.add("a sum dropped", self.between(node.target, node.value, f"{old}="), "=")

    def _name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and node.id in self.strides and len(self.strides) > 1:
            other = self.strides[(self.strides.index(node.id) + 1) % len(self.strides)]
            self.add("another stride", node, other)

    def launcher(self, function: ast.FunctionDef, launches: list[ast.Call]) -> None:
        for call in launches:
            for a, b in pairwise(call.args):
                self.add("arguments swapped", (self.span(a)[0], self.span(b)[1]), f"{self.text(b)}, {self.text(a)}")
            for keyword in call.keywords:
                if isinstance(keyword.value, (ast.Compare, ast.BoolOp)) or ast.unparse(keyword.value)[:4] == "not ":
                    self.add("a switch negated", keyword.value, f"not ({self.text(keyword.value)})")
        for node in ast.walk(function):
            if not isinstance(node, ast.Call):
                continue
            name, args = ast.unparse(node.func), node.args
            if name == "triton.cdiv":
                self.add("a partial tile dropped", node, f"(({self.text(args[0])}) // ({self.text(args[1])}))")
            elif name.endswith(".stride") and len(args) == 1:
                self.add("another stride", args[0], "-1" if ast.unparse(args[0]) == "0" else "0")
            elif name.endswith(".contiguous") and not args:
                self.add("a layout assumed", node, self.text(node.func.value))
            elif name == "unit_columns":
                self.add("a layout assumed", node, self.text(args[0]))


def _is_launch(node: ast.AST) -> bool:
    """Whether ``node`` is ``kernel[grid](...)``."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and bool(node.args)


@cache
def generate(file: str, source: str) -> list[Mutant]:
    """Every mutant of a source file of kernels/, in the order of the text."""
    return _Finder(file, source).all()


def why_equivalent(mutant: Mutant) -> str | None:
    """Why no input tells ``mutant`` from the original; ``None`` when none is known to be so."""
    for (file, rule, line, old), reason in EQUIVALENT.items():
        if (file, rule) == (mutant.file, mutant.rule) and mutant.text.startswith(line) and old in ("", mutant.old):
            return reason
    return None


def sample(mutants: list[Mutant], number: int, seed: int) -> list[Mutant]:
    """``number`` of them (0: all), the rules in turn; the same for the same source and seed."""
    rng = random.Random(seed)
    rules: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        rules.setdefault(mutant.rule, []).append(mutant)
    queues = [rng.sample(of_rule, len(of_rule)) for of_rule in rules.values()]
    rng.shuffle(queues)
    taken = list[Mutant]()
    while queues and (not number or len(taken) < number):
        taken += [queue.pop() for queue in queues][: number - len(taken) if number else None]
        queues = [queue for queue in queues if queue]
    return sorted(taken, key=lambda m: (m.start, m.end, m.rule, m.new))


def target(mutant: Mutant, kernels: Path = ROOT / "kernels") -> tuple[list[str], list[str]]:
    """What must kill it: test files, and the files of kernels/ of which the rows are run. No test: nobody uses it."""
    from cases import CASES

    with_rows = {case.file for case in CASES.values()}
    sources = {p.name: p.read_text() for p in sorted(kernels.glob("*.py"))}
    if mutant.file in SHARED:
        users = [f for f, text in sources.items() if f not in SHARED and re.search(rf"\b{mutant.function}\b", text)]
        # One with rows before one without, one that sums before one that goes element by element, then the smallest.
        users.sort(key=lambda f: (f not in with_rows, "tl.sum(" not in sources[f], len(sources[f])))
        files = users[:1]
    else:
        # Its own tests, then those of the files that run its kernels.
        names = "|".join(sorted({m.function for m in generate(mutant.file, sources[mutant.file])}))
        module = rf"from fmcore\.kernels\.{Path(mutant.file).stem} import|import {Path(mutant.file).stem}\b"
        users = [f for f, text in sources.items() if re.search(module, text) and re.search(rf"\b({names})\b", text)]
        files = [mutant.file, *(f for f in users if f != mutant.file)]
    rows = [f for f in files if f in with_rows]
    own = [f"tests/ops/test_{Path(f).stem}.py" for f in files]
    # Two operators may share the tests of what they have in common.
    imported = "|".join(rf"from fmcore\.kernels(\.| import [\w, ]*\b){Path(f).stem}\b" for f in files[:1])
    texts = {f"tests/ops/{p.name}": p.read_text() for p in sorted((ROOT / "tests" / "ops").glob("test_*.py"))}
    own += [path for path, text in texts.items() if imported and re.search(imported, text) and path not in own]
    return [*(["tests/test_ops.py"] if rows else []), *(path for path in own if path in texts)], rows


# Stages of tests, each over all rows: cheap and sharp ones first, so that most mutants cost seconds.
STAGES = (
    ("test_addresses_beyond_32_bits", "test_views", "test_padded_rows_are_not_copied"),
    ("test_as_exact_as_eager",),
    ("own",),
    ("test_expanded_gradient", "test_each_gradient_alone", "test_same_bits_each_time", "test_any_shape"),
    ("test_gradcheck", "test_results_lie_as_promised", "test_opcheck"),
)
STAGE = {name: i for i, names in enumerate(STAGES) for name in names}
# Compares the kernels with themselves.
BLIND = ("test_compiles_without_a_break",)


def pytest_collection_modifyitems(config, items: list) -> None:
    """In the copy: the rows of some files, Triton alone, and what fails soonest first."""
    if (given := os.environ.get("FMCORE_MUTANT_ROWS")) is None:
        return
    wanted, kept, dropped = given.split(","), list[tuple[tuple[int, int], object]](), []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        case, own, name = params.get("case"), item.path.name != "test_ops.py", item.originalname
        # A test that plants a bug of its own fails when the mutant has changed the line: that shows nothing.
        wrong = "planted" in name if own else case is None or case.file not in wanted
        if wrong or name in BLIND or params.get("body", "triton") != "triton":
            dropped.append(item)
        else:
            rank = (STAGE["own"], 0) if own else (STAGE.get(name, len(STAGES)), wanted.index(case.file))
            kept.append((rank, item))
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for _, item in sorted(kept, key=lambda pair: pair[0])]


def copied(folder: Path) -> Path:
    """A copy of the tree that tests can run in, links kept as links."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def judged(tree: Path, tests: list[str], rows: list[str], timeout: float) -> tuple[str, str]:
    """Run the tests in ``tree``: (survived | killed | timeout | unborn, by which test)."""
    # No bytecode: it is found by a file's size and second, which two mutants may share.
    env = os.environ | {
        "PYTHONPATH": str(tree / "tests"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "", "FMCORE_MUTANT_ROWS": ",".join(rows),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "mutants", *tests]
    try:
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return "timeout", ""
    if done.returncode not in (0, 1):
        return "unborn", done.stdout[-2000:] + done.stderr[-2000:]
    failed = re.search(r"^(?:FAILED|ERROR) \S*?/(test_\S*?::.*?)(?: - .*)?$", done.stdout, re.M)
    return ("killed", failed[1] if failed else "") if done.returncode else ("survived", "")


def run(
    mutants: list[Mutant], jobs: int = 1, timeout: float = 300.0, told: Callable[[Result], None] = lambda result: None
) -> list[Result]:
    """Plant and judge each mutant; ``told`` hears of each result as it comes."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for i in range(jobs):
            trees.put(copied(Path(folder) / str(i)))

        def one(mutant: Mutant) -> Result:
            tests, rows = target(mutant)
            if reason := why_equivalent(mutant):
                result = Result(mutant, "equivalent", reason)
            elif not tests:
                result = Result(mutant, "survived", "no operator under test uses it")
            else:
                tree, start = trees.get(), time.perf_counter()
                path = tree / "kernels" / mutant.file
                source = path.read_text()
                try:
                    path.write_text(mutant.applied(source))
                    outcome, by = judged(tree, tests, rows, timeout)
                finally:
                    path.write_text(source)
                    trees.put(tree)
                result = Result(mutant, outcome, by, round(time.perf_counter() - start, 1))
            told(result)
            return result

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, mutants))


def share(results: list[Result]) -> tuple[int, int]:
    """How many were killed, and of how many that count."""
    counted = [r for r in results if r.outcome in ("killed", "timeout", "survived")]
    return sum(r.outcome != "survived" for r in counted), len(counted)


def table(results: list[Result]) -> Iterator[str]:
    for r in results:
        yield f"{r.outcome:10} {r.mutant}{f'  [{r.by}]' if r.by and r.outcome != 'unborn' else ''}"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", action="append", metavar="FILE", help="a file of kernels/; may be given again")
    options.add_argument("--number", type=int, default=10, help="mutants of each file; 0: all")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    options.add_argument("--timeout", type=float, default=300.0, help="seconds, after which a mutant counts as killed")
    options.add_argument("--out", type=Path, help="where to write the record, JSON")
    options.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    given = options.parse_args()
    files = given.only or sorted(p.name for p in (ROOT / "kernels").glob("*.py"))
    mutants = list[Mutant]()
    for file in files:
        mutants += sample(generate(file, (ROOT / "kernels" / file).read_text()), given.number, given.seed)
    if given.list:
        print("\n".join(f"{m}{'  (equivalent)' if why_equivalent(m) else ''}" for m in mutants))
        return 0
    done = list[Result]()

    def told(result: Result) -> None:
        done.append(result)
        print(f"[{len(done)}/{len(mutants)}] {next(table([result]))}  {result.seconds:.0f} s", flush=True)

    results = run(mutants, given.jobs, given.timeout, told)
    killed, counted = share(results)
    print("\n" + "\n".join(table(sorted(results, key=lambda r: (r.outcome, r.mutant.file, r.mutant.line)))))
    print(f"\nkilled {killed} of {counted}; {len(results) - counted} not counted; seed {given.seed}")
    if given.out:
        record = {"seed": given.seed, "killed": killed, "counted": counted, "results": [asdict(r) for r in results]}
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if killed >= LEAST * counted else 1


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    sys.exit(main())
