"""Presets: published settings by the data's name, and budgets on top of them."""

import re

import envs.buffers
from runner.flags import refuse


def preset_name(data, known):
    """The name of `known` for a dataset: its own, else that of the same set in another version."""
    same = lambda name: re.sub(r"-v\d+$", "", name)
    return data if data in known else next((name for name in known if same(name) == same(data)), data)


def preset(args, published, budgets, quick, own=None):
    """--quick, or what is published for the file's dataset with the budget of --preset on top -> name, {field: value}.

    own: what stands where nothing is published. --preset may also name a published set in place of the file's;
    `published` is the set of the file's name, where that is one of ours, too (`ours/x`, benchmark/suite.py); `ours` is
    what a file of your own gets.
    """
    given, known = preset_name(args.preset, published), (*dict.fromkeys((*budgets, "ours", "published")), *published)
    refuse({
        f"--preset {args.preset}: unknown; one of {', '.join(known)}": not args.preset or given in known,
        "--quick is a preset of its own; leave --preset out": not (args.quick and args.preset),
        "--dataset: name a file that udg_select.py wrote, or try --quick": args.quick or args.dataset,
    })  # fmt: skip
    if args.quick:
        return "quick", quick
    if given == "ours":
        return "ours", own or {}
    data = envs.buffers.read_metadata(args.dataset)["dataset_name"]
    name = data.removeprefix("ours/") if given == "published" else data
    named = given if given in published else preset_name(name, published)
    remedy = f"name a set, as --preset {next(iter(published))}"
    nothing = f"--preset published: nothing is published for {data}; {remedy}"
    refuse({nothing: given != "published" or named in published or "published" in budgets})
    found = published.get(named, own or {}) | budgets.get(given, {})
    rest = "the rest as" if budgets.get(given) else "as"
    about = f"{rest} published for {named}; the data is {data}"
    general = "; the settings of the other sets" if given == "published" else ""
    about = about if named in published else f"nothing is published for {data}{general}"
    return f"{args.preset or 'by the file'} ({about})", found
