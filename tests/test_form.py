"""The form of the scripts: what a reader relies on when moving from one to the next.

python tests/test_form.py --fix      copies every shared block from its canonical script into the others
"""

import ast
import functools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("wurl_sac", "udg_select", "mopo", "cped", "qdq", "dac")
BANNERS = ("data", "networks", "losses", "update", "evaluation", "training", "run")
PACKAGES = {"jax", "flax", "optax", "chex", "tyro", "numpy", "scipy", "envs", "runner"}
# Names that are a script's own by nature: its flags, networks, rules between flags, measurements and figures.
OWN = {
    "Args",
    "main",
    "make_train",
    "make_evaluation",
    "check_args",
    "preset",
    "write_policy",
    "plot_run",
    "idle_flags",
}
MAX_FUNCTION, MAX_NESTING = 60, 3
LINES = {"dac": 650, "udg_select": 620, "cped": 770, "wurl_sac": 895}  # in one sitting
LINES |= {"mopo": 965, "qdq": 940}  # a model and a policy; a teacher, a student and a policy


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


def place_of(node):
    """The lines of a block, decorators and all."""
    return slice(min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1, node.end_lineno)


def lines_of(name, block):
    return source(name).splitlines()[place_of(blocks(name)[block])]


def test_same_name_is_same_code():
    differ = [
        f"{block}: {home} and {other}"
        for block, (home, *others) in shared().items()
        for other in others
        if lines_of(home, block) != lines_of(other, block)
    ]
    assert not differ, f"{differ}; run: python tests/test_form.py --fix"


@pytest.mark.parametrize("name", SCRIPTS)
def test_header_imports_and_banners(name):
    header = ast.get_docstring(tree(name))
    for field in ("Paper", "arXiv", "Algorithm", "Symbols", "Deviations", "Files", "Run", "Expect"):
        assert field in header, field
    found = [banner for banner in re.findall(r"^# === (.+) ===$", source(name), re.M) if banner in BANNERS]
    assert found == list(BANNERS) or name == "udg_select", found
    imported = {
        (alias.name if isinstance(node, ast.Import) else node.module).split(".")[0]
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported <= PACKAGES | set(sys.stdlib_module_names)


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
    by_runner = {"distributed", "eval_every", "policies_at_once"}
    attributes = [x for x in ast.walk(tree(name)) if isinstance(x, ast.Attribute)]
    read = by_runner | {x.attr for x in attributes if ast.unparse(x.value) in ("args", "run.args")}
    assert not set(fields) - read, f"never read: {set(fields) - read}"
    frozen = {k.arg: k.value.value for d in node.decorator_list for k in getattr(d, "keywords", [])}
    assert frozen.get("frozen") is True


def test_same_flag_has_the_same_type():
    types = {}
    for name in SCRIPTS:
        for x in blocks(name)["Args"].body:
            if isinstance(x, ast.AnnAssign):
                types.setdefault(x.target.id, set()).add(ast.unparse(x.annotation))
    own = {"objective", "penalty", "model", "alpha"}  # other things of the same name
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
def test_a_script_is_read_in_one_sitting(name):
    """Its functions are short and flat."""
    assert source(name).count("\n") <= LINES[name]
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef) and node.name != "make_train":
            assert node.end_lineno - node.lineno < MAX_FUNCTION, node.name
            assert nesting(node) <= MAX_NESTING, node.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_works(name, monkeypatch, capsys):
    """The header's first paragraph and every flag; nothing of the header's tables."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.setattr("runner.flags.listen", lambda again: None)  # the tests keep their handlers of signals
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    fields = {x.target.id for x in blocks(name)["Args"].body if isinstance(x, ast.AnnAssign)} | {"seed"}
    flags = {"task" if field == "tasks" else field.replace("_", "-") for field in fields}
    assert not ended.value.code and flags <= set(re.findall(r"^  --([\w-]+)", said, re.M))
    first = " ".join(ast.get_docstring(tree(name)).split("\n\n")[0].split())
    assert first in " ".join(said.split()) and "Deviations" not in said
    assert f"\n  python {name}.py --quick " in said and f"docs/{name}.md" in said


def test_a_script_loads_what_its_flags_need_alone():
    """--help comes at once: physics, figures and SciPy's parts are loaded where they are used."""
    heavy = "{'scipy.optimize', 'scipy.stats', 'matplotlib.pyplot', 'mujoco', 'brax', 'gymnasium', 'h5py'}"
    code = f"import sys, wurl_sac, udg_select; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr[-500:]


# --- the packages ---


def imports_of(path, nodes=lambda tree: tree.body):
    """Modules of ours that a file imports, as dotted names: when it is loaded, or among other nodes of its tree."""
    found = set()
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("envs", "runner", *SCRIPTS)}


def modules():
    """Dotted name -> file, of both packages."""
    files = [path for package in ("envs", "runner") for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def test_layers():
    """scripts -> runner -> envs; a package imports no script, nor does a function of it."""
    for name, path in modules().items():
        above = (*SCRIPTS, "runner") if name.startswith("envs") else SCRIPTS
        assert not [x for x in imports_of(path, ast.walk) if x.split(".")[0] in above], name


def test_no_circles():
    """No module of a package imports another one that imports it; a package's __init__ stands above its modules."""
    known = modules()
    edges = {name: imports_of(path) & known.keys() - {name} for name, path in known.items()}
    packages = {name for name, path in known.items() if path.name == "__init__.py"}
    for name in known:  # `from envs import buffers` names the package, which is not what is needed of it
        edges[name] = {x for x in edges[name] if not (x in packages and name.startswith(f"{x}."))}
    left = dict(edges)
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, left


def test_a_module_of_the_runner_is_short():
    long = {name: n for name, path in modules().items() if (n := path.read_text().count("\n")) > 250}
    assert not [name for name in long if name.startswith("runner.") and not name.startswith("runner.report")], long


@pytest.mark.parametrize("words", ["check", "format --check"])
def test_ruff(words):
    done = subprocess.run([sys.executable, "-m", "ruff", *words.split(), "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-500:]


def fix():
    for block, (home, *others) in shared().items():
        wanted = lines_of(home, block)
        for other in others:
            for cached in (source, tree, blocks):
                cached.cache_clear()
            lines = source(other).splitlines()
            lines[place_of(blocks(other)[block])] = wanted
            (ROOT / f"{other}.py").write_text("\n".join(lines) + "\n")


if __name__ == "__main__" and "--fix" in sys.argv:
    fix()
