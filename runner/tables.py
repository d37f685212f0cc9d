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
