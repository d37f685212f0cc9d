"""Tables on the terminal."""


def show(title, columns, rows):
    """Print an aligned table, to the right.

    columns: name -> format of its numbers, "<" for text to the left; rows: of numbers, text, or None for none.
    """
    formats = [form.replace("<", "") for form in columns.values()]
    text = lambda x, form: x if isinstance(x, str) else "-" if x is None else format(x, form)
    cells = [list(columns), *([text(*pair) for pair in zip(row, formats, strict=True)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = ["<" if "<" in form else ">" for form in columns.values()]
    lines = ["  ".join(f"{x:{side}{w}}" for x, side, w in zip(row, sides, widths, strict=True)) for row in cells]
    print(f"\n{title}", *(line.rstrip() for line in lines), "", sep="\n", flush=True)


def show_scores(task, sources, scores, order, to_reference, by):
    """Print the ranking."""
    columns = {"rank": "", "buffer": "<", "return": ".2f", "std": ".2f", "top 10%": ".2f", "newest 10%": ".2f"}
    columns |= {"per step": ".4f", "trained": ".2f", "episodes": ",", "cut": ","}
    keys = ("mean", "std", "top_decile", "recent", "per_step", "score_trained", "episodes", "cut")
    rows = [[rank, sources[k].name, *(scores[k][key] for key in keys)] for rank, k in enumerate(order, start=1)]
    if to_reference is not None:
        columns |= {"W1 ref f": ".3f", "W1 ref sa": ".3f"}
        rows = [row + [values[k] for values in to_reference] for row, k in zip(rows, order, strict=True)]
        rows.append(["", "(the reference itself)", *[""] * len(keys), *(values[-1] for values in to_reference)])
    show(f"{task.name}: returns of episodes, ranked by {by}", columns, rows)


def show_measures(task, sources, found, order, near):
    """Print what the data are worth before anything is trained, if it was measured."""
    if not found:
        return
    columns = {"rank": "", "buffer": "<"} | {name.replace("_", " "): ".3f" for name in found[0]}
    rows = [[rank, sources[k].name, *found[k].values()] for rank, k in enumerate(order, start=1)]
    rows.append(["", "(the expert's data itself)", *[""] * (len(found[0]) - 1), near.to_expert[-1]])
    show(f"{task.name}: what the data are", columns, rows)


def show_selections(task, written):
    """Print what was written, beside each other."""
    columns = {"selection": "<", "of": "<", "rows": ",", "episodes": ",", "return": ".2f", "W1 expert": ".3f"}
    rows = []
    for label, entry in written.items():
        parts = [f"{p['name']} {p['num_transitions'] / entry['num_transitions']:.0%}" for p in entry["parents"]]
        names = ", ".join(parts[:3]) + (f", {len(parts) - 3} more" if parts[3:] else "")
        rows.append([label, names, *(entry[key] for key in ("num_transitions", "num_episodes", "score", "w1_expert"))])
    show(f"{task.name}: what was written", columns, rows)
