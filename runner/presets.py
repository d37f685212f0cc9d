"""Presets: published settings by the data's name, and budgets on top of them."""

import envs.buffers
from runner.flags import refuse


def preset_name(data, known):
    """The name of `known` for a dataset: its own, else that of the same set in another version.

    `ours/x` (benchmark/suite.py) is D4RL's x without a version.
    """
    same = lambda name: name.removeprefix("ours/").rstrip("0123456789").removesuffix("-v")
    return data if data in known else next((name for name in known if same(name) == same(data)), data)


def preset(args, published, budgets, quick, own=None, stand_ins=True):
    """--quick, or what is published for the file's dataset with the budget of --preset on top -> name, {field: value}.

    own: what stands where nothing is published; --preset may also name a published set in place of the file's.
    stand_ins: whether a set `ours/x` takes what is published for D4RL's x.
    """
    given, known = preset_name(args.preset, published), (*budgets, *published)
    refuse({
        f"--preset {args.preset}: unknown; one of {', '.join(known)}": not args.preset or given in known,
        "--quick is a preset of its own; leave --preset out": not (args.quick and args.preset),
        "--dataset: name a file that udg_select.py wrote, or try --quick": args.quick or args.dataset,
    })  # fmt: skip
    if args.quick:
        return "quick", quick
    data = envs.buffers.read_metadata(args.dataset)["dataset_name"]
    by_file = preset_name(data, published) if stand_ins or not data.startswith("ours/") else data
    named = given if given in published else by_file
    found = published.get(named, own or {}) | budgets.get(given, {})
    about = f"as published for {named}; the data is {data}"
    about = about if named in published else f"nothing is published for {data}"
    return f"{args.preset or 'by the file'} ({about})", found
