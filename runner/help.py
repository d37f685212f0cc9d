"""--help: the header's first paragraph and commands, how to read the rest, and the flags in the groups of the source,
which tyro does not know."""

import ast
import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
import types
import typing
from pathlib import Path

SHORT = {int: "N", float: "X", str: "TEXT"}


def documented(cls):
    """Fields of a dataclass in the order of its source -> [(name, group, text)]; groups: `# --- name ---`."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines, body = source.splitlines(), ast.parse(source).body[0].body
    groups = {i: found[1] for i, line in enumerate(lines, 1) if (found := re.match(r"\s*# --- (.+) ---", line))}
    result = []
    for field, text in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            group = max((i for i in groups if i < field.lineno), default=0)
            says = text.value.value if isinstance(text, ast.Expr) else ""
            result.append((field.target.id, groups.get(group, ""), " ".join(says.split())))
    return result


def type_text(kind):
    """What a flag takes: N (a whole number), X (a number), TEXT, a choice, or several of one."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return type_text(parts[0])
    if origin is typing.Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if origin is tuple:
        return f"{type_text(parts[0])} ..."
    if origin in (types.UnionType, typing.Union):
        return type_text(next(x for x in parts if x is not types.NoneType))
    return SHORT.get(kind, "TEXT")


def commands(doc):
    """The lines of a header's field `Run`, as they stand there."""
    found = re.search(r"^Run(.*?)(?=^\S|\Z)", doc, re.M | re.S)
    return textwrap.dedent(f"   {found[1]}").strip().splitlines() if found else []


def help_text(Args, names, doc):
    """First paragraph and commands of the header, names of the presets, a legend, then every flag with its default."""
    width = min(shutil.get_terminal_size((110, 20)).columns, 120)
    script = Path(sys.argv[0]).name
    wrap = lambda text, indent: textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    lines = [f"usage: python {script} [flags]", "", wrap(" ".join(doc.split("\n\n")[0].split()), ""), ""]
    if examples := commands(doc):
        lines += ["examples:", *(f"  {line}" for line in examples), ""]
    if names:
        lines += [wrap(f"presets (--preset; sets several flags, those on the line win): {', '.join(names)}", ""), ""]
    about = f"""N: a whole number, also as 1e6; X: a number; ...: one or more; [the default, before a preset]; a switch
    that a preset turned on is turned off by --no-... Letters such as K and B, numbers such as D1, and what paper, code
    or reference mean: the top of {script}, and docs/{Path(script).stem}.md."""
    lines += [wrap(" ".join(about.split()), ""), ""]
    kinds, plain, told = typing.get_type_hints(Args, include_extras=True), Args(), {}
    classes = [cls for cls in reversed(Args.__mro__) if dataclasses.is_dataclass(cls)]
    for name, group, text in (entry for cls in classes for entry in documented(cls)):
        told[name] = (told[name][0] if name in told else group, text)  # a later class may say more, in the same place
    groups = list(dict.fromkeys(group for group, _ in told.values()))
    for group in groups:
        lines += [f"{group or 'flags'}:"]
        for name, (home, text) in told.items():
            if home != group:
                continue
            renamed = [m.name for m in getattr(kinds[name], "__metadata__", ()) if getattr(m, "name", None)]  # by tyro
            flag, default = f"--{(renamed or [name])[0].replace('_', '-')}", getattr(plain, name)
            if isinstance(default, bool):
                head = f"  {flag}, --no-{name.replace('_', '-')}" if default else f"  {flag}"
            else:
                shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
                head = f"  {flag} {type_text(kinds[name])}" + (f"  [{shown}]" if shown not in ("", None) else "")
            lines += [head, wrap(text, " " * 8)]
        lines += [""]
    return "\n".join(lines[:-1])
