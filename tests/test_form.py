"""The form of the scripts: what a reader relies on when moving from one to the next.

python tests/test_form.py --fix      copies every shared block from its canonical script into the others
"""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALL = ("wurl_sac", "udg_select", "mopo", "cped", "qdq", "dac")
SCRIPTS = [name for name in ALL if (ROOT / f"{name}.py").exists()]
LEARNERS = [name for name in SCRIPTS if name != "udg_select"]
BANNERS = ("data", "networks", "losses", "update", "evaluation", "training", "run")
PACKAGES = {"jax", "flax", "optax", "chex", "tyro", "numpy", "scipy", "matplotlib", "tensorboardX", "wandb", "envs"}
# Names that are a script's own by nature: each has its own flags to refuse, memory to count, things to measure, figures
# to draw and networks to train, so that equal code would only be the frame around what differs.
OWN = {"Args", "main", "make_train", "make_evaluation", "check_args", "announce", "finish", "plot_run"}
MAX_FUNCTION, MAX_NESTING = 60, 3


@functools.cache
def source(name):
    return (ROOT / f"{name}.py").read_text()


@functools.cache
def tree(name):
    return ast.parse(source(name))


@functools.cache
def blocks(name):
    """Top-level functions and classes: name -> node."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in tree(name).body if isinstance(node, kinds)}


def is_own(block):
    """Losses, updates and states belong to their script; they carry its name where they would collide."""
    return block in OWN or block.endswith(("_loss", "_update", "_preset", "State"))


def shared():
    """Block name -> the scripts that have it, the canonical one (the first) in front."""
    homes = {}
    for name in SCRIPTS:
        for block in blocks(name):
            homes.setdefault(block, []).append(name)
    return {block: names for block, names in homes.items() if len(names) > 1 and not is_own(block)}


def lines_of(name, node):
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return source(name).splitlines()[first - 1 : node.end_lineno]


def test_same_name_is_same_code():
    differ = [
        f"{block}: {home} and {other}"
        for block, (home, *others) in shared().items()
        for other in others
        if lines_of(home, blocks(home)[block]) != lines_of(other, blocks(other)[block])
    ]
    assert not differ, f"{differ}; run: python tests/test_form.py --fix"


@pytest.mark.parametrize("name", LEARNERS)
def test_banners_in_order(name):
    found = re.findall(r"^# === (.+) ===$", source(name), re.M)
    assert [b for b in found if b in BANNERS] == list(BANNERS), found


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports(name):
    imported = {
        (alias.name if isinstance(node, ast.Import) else node.module).split(".")[0]
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported <= PACKAGES | set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", SCRIPTS)
def test_header(name):
    header = ast.get_docstring(tree(name))
    for field in ("Paper", "arXiv", "Algorithm", "Symbols", "Deviations", "Files", "Run", "Expect"):
        assert field in header, field


@pytest.mark.parametrize("name", SCRIPTS)
def test_deviations_agree(name):
    """Every Dn of the header stands on its line of code and on the docs page, and no other does."""
    text, header = source(name), ast.get_docstring(tree(name), clean=False)
    in_header = set(re.findall(r"^\s+(D\d+) ", header, re.M))
    code = text.replace(header, "", 1)
    in_code = set(re.findall(r"\b(D\d+)\b", " ".join(re.findall(r"#.*|\"\"\"[^\"]*\"\"\"", code))))
    page = (ROOT / "docs" / f"{name}.md").read_text()
    in_page = set(re.findall(r"^\|\s*(D\d+)\s*\|", page, re.M))
    assert in_header == in_code == in_page, (in_header ^ in_code, in_header ^ in_page)


@pytest.mark.parametrize("name", SCRIPTS)
def test_args_documented_and_used(name):
    node = blocks(name)["Args"]
    fields = [x.target.id for x in node.body if isinstance(x, ast.AnnAssign)]
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign):
            documented = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            assert documented and len(text.value.value) > 10, field.target.id
    read = {x.attr for x in ast.walk(tree(name)) if isinstance(x, ast.Attribute)}
    assert not set(fields) - read, f"never read: {set(fields) - read}"
    frozen = {k.arg: k.value.value for d in node.decorator_list for k in getattr(d, "keywords", [])}
    assert frozen.get("frozen") is True


def test_same_flag_has_the_same_type():
    types = {}
    for name in SCRIPTS:
        for x in blocks(name)["Args"].body:
            if isinstance(x, ast.AnnAssign):
                types.setdefault(x.target.id, set()).add(ast.unparse(x.annotation))
    own = {"objective", "penalty", "model"}
    assert not {field: kinds for field, kinds in types.items() if len(kinds) > 1 and field not in own}


def nesting(node, depth=0):
    """Deepest nesting of loops, branches and inner functions; an elif is no deeper than its if."""
    kinds = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.FunctionDef)
    deepest = depth
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                is_elif = isinstance(node, ast.If) and field == "orelse" and isinstance(child, ast.If)
                deepest = max(deepest, nesting(child, depth + (isinstance(child, kinds) and not is_elif)))
    return deepest


@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_are_short_and_flat(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef) and node.name != "make_train":
            assert node.end_lineno - node.lineno < MAX_FUNCTION, node.name
            assert nesting(node) <= MAX_NESTING, node.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_works(name):
    done = subprocess.run([sys.executable, f"{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--seed" in done.stdout, done.stderr[-500:]


def fix():
    for block, (home, *others) in shared().items():
        wanted = lines_of(home, blocks(home)[block])
        for other in others:
            for cached in (source, tree, blocks):
                cached.cache_clear()
            node, lines = blocks(other)[block], source(other).splitlines()
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            lines[first - 1 : node.end_lineno] = wanted
            (ROOT / f"{other}.py").write_text("\n".join(lines) + "\n")


if __name__ == "__main__" and "--fix" in sys.argv:
    fix()
