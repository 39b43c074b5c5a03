"""The mutants of tests/mutants.py: found where they should be, and a small sample of them killed."""

import ast
import textwrap

import mutants
import pytest
from mutants import ROOT, Mutant, generate, sample

TOY = textwrap.dedent('''
    """A toy."""
    import triton
    import triton.language as tl

    HOST = 3 + 4


    @triton.jit(do_not_specialize=["M"])
    def toy_kernel(x_ptr, y_ptr, M, N, stride_xm, stride_ym, BLOCK: tl.constexpr):
        """Text with 1 < 2 in it, and an é before it."""
        rows = tl.program_id(0).to(tl.int64) * 2 + tl.arange(0, 2)
        mask = (rows < M)[:, None] & (tl.arange(0, BLOCK) < N)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xm, mask=mask, other=0.0)  # é
        if not BLOCK:
            x += tl.rsqrt(tl.sum(x, axis=1))
        tl.store(
            y_ptr + rows[:, None] * stride_ym,
            tl.where(x < 0, -x, float("-inf")), mask=mask,
        )


    def host(x, y):
        if x < 5:
            return y * 2


    def toy(x, y):
        x = x.contiguous()
        M, N = x.shape
        toy_kernel[(triton.cdiv(M, 2),)](x, y, M, N, x.stride(0), y.stride(0), BLOCK=M > 1, num_warps=4)
''').lstrip()


def found(rule: str) -> set[tuple[str, str]]:
    return {(m.old, m.new) for m in generate("toy.py", TOY) if m.rule == rule}


@pytest.mark.parametrize("rule, wanted", [
    ("a comparison changed", {("<", "<=")}),
    ("an operator changed", {("*", "+"), ("+", "-"), ("&", "|"), ("+=", "-=")}),
    ("a term dropped", {("x_ptr + rows[:, None] * stride_xm", "(x_ptr)")}),
    ("a factor dropped", {("rows[:, None] * stride_xm", "(stride_xm)"),
                          ("rows[:, None] * stride_xm", "(rows[:, None])")}),
    ("64 bits dropped", {("tl.program_id(0).to(tl.int64)", "(tl.program_id(0))")}),
    ("a mask widened", {("mask", "(mask) | True"),
                        ("(rows < M)[:, None] & (tl.arange(0, BLOCK) < N)[None, :]", "((rows < M)[:, None])")}),
    ("another filler", {("0.0", "1.0")}),
    ("another axis", {("1", "0")}),
    ("a function changed", {("tl.sum", "tl.max"), ("tl.rsqrt", "tl.sqrt")}),
    ("a sign dropped", {("-x", "(x)")}),
    ("branches swapped", {('-x, float("-inf")', 'float("-inf"), -x')}),
    ("an infinity dropped", {('float("-inf")', "0.0")}),
    ("a condition negated", {("not BLOCK", "not (not BLOCK)")}),
    ("a sum dropped", {("+=", "=")}),
    ("a constant off by one", {("2", "3"), ("0", "1")}),
    ("another stride", {("stride_xm", "stride_ym"), ("stride_ym", "stride_xm"), ("0", "-1")}),
    ("arguments swapped", {("x, y", "y, x"), ("M, N", "N, M"),
                           ("x.stride(0), y.stride(0)", "y.stride(0), x.stride(0)")}),
    ("a switch negated", {("M > 1", "not (M > 1)")}),
    ("a partial tile dropped", {("triton.cdiv(M, 2)", "((M) // (2))")}),
    ("a layout assumed", {("x.contiguous()", "x")}),
])  # fmt: skip
def test_each_rule(rule, wanted):
    assert wanted <= found(rule), found(rule)


def test_a_store_of_several_lines_is_removed():
    (mutant,) = [m for m in generate("toy.py", TOY) if m.rule == "a store removed"]
    assert mutant.old.startswith("tl.store(\n") and mutant.new == "pass"
    assert "tl.store" not in mutant.applied(TOY) and "def host" in mutant.applied(TOY)


def test_every_mutant_parses_and_differs():
    whole = generate("toy.py", TOY)
    assert len(whole) == len(set(whole)) > 40
    trees = {ast.dump(ast.parse(m.applied(TOY))) for m in whole}
    assert ast.dump(ast.parse(TOY)) not in trees
    for m in whole:
        assert TOY.splitlines()[m.line - 1] in TOY[: m.end + 80].splitlines() and m.old in TOY


def test_host_code_docstrings_and_constants_of_the_language_are_left_alone():
    for m in generate("toy.py", TOY):
        line = TOY.splitlines()[m.line - 1]
        assert m.function in ("toy_kernel", "toy") and "Text" not in line and "HOST" not in line
        assert (m.old, m.new) not in {("4", "5"), ("0, BLOCK", "1, BLOCK")}


def test_a_sample_takes_the_rules_in_turn():
    whole = generate("toy.py", TOY)
    rules = len({m.rule for m in whole})
    drawn = sample(whole, rules, seed=3)
    assert len({m.rule for m in drawn}) == rules
    assert drawn == sample(whole, rules, seed=3) != sample(whole, rules, seed=4)
    assert sample(whole, 0, seed=3) == whole and len(sample(whole, rules + 5, seed=3)) == rules + 5
    assert sample([], 5, seed=0) == []


def test_equivalent_mutants_give_their_reason():
    assert all(len(reason) > 20 for reason in mutants.EQUIVALENT.values())
    files = {p.name: p.read_text() for p in (ROOT / "kernels").glob("*.py")}
    rules = {m.rule for name, text in files.items() for m in generate(name, text)}
    for file, rule, line, _ in mutants.EQUIVALENT:
        assert file in files and rule in rules and len(line) >= 8
    known = next(iter(mutants.EQUIVALENT))
    drawn = [m for m in generate(known[0], files[known[0]]) if mutants.why_equivalent(m)]
    assert drawn and all(m.file == known[0] for m in drawn)


def test_what_counts():
    m = Mutant("toy.py", "toy", 1, "a", "a store removed", 0, 1, "a", "b")
    outcomes = ["killed", "timeout", "survived", "equivalent", "unborn", "killed"]
    assert mutants.share([mutants.Result(m, outcome) for outcome in outcomes]) == (3, 4)


# One of each of several files and rules, all of them found by a test that runs early: (file, rule, line, old).
PINNED = [
    ("attention.py", "64 bits dropped", "b, h = (head // H).to(tl.int64)", "(head // H).to(tl.int64)"),
    ("decode_attention.py", "branches swapped", "m = tl.where(split == 0", "sink, m"),
    ("embedding.py", "a store removed", "tl.store(head_ptr", ""),
    ("glu.py", "another stride", "g = load_tile(gate_ptr", "stride_gm"),
    ("multi_tensor.py", "branches swapped", "live = tl.where(norm", "live, 0"),
    ("rms_norm.py", "a factor dropped", "dx = rstd * (g - x_hat * mean)", "x_hat * mean"),
]  # fmt: skip


@pytest.mark.timeout(600)
def test_a_sample_is_killed():
    """The whole run is ``python tests/mutants.py``; this shows that it works and that the tests have teeth."""
    drawn = []
    for file, rule, line, old in PINNED:
        whole = generate(file, (ROOT / "kernels" / file).read_text())
        fits = [m for m in whole if m.rule == rule and m.text.startswith(line) and old in ("", m.old)]
        assert fits, f"{file} has no such line any more, choose another: {line}"
        drawn.append(fits[0])
    results = mutants.run(drawn, timeout=240)
    assert all(r.outcome in ("killed", "timeout") for r in results), "\n".join(mutants.table(results))


def test_every_kernel_has_tests_that_must_kill_its_mutants():
    for path in (ROOT / "kernels").glob("*.py"):
        for m in {m.function: m for m in generate(path.name, path.read_text())}.values():
            assert mutants.target(m)[0], f"no test runs {m.function} of {path.name}"
