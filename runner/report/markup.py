"""Elements of the page: everything is escaped but what is html already."""

import base64
import html
import itertools
import json
import math

MAX_PICTURE = 12_000_000  # bytes of an embedded file


class Html(str):
    """Text that is html already. Everything else is escaped by `tag`."""


def printable(text):
    """Control, direction and surrogate characters become a replacement character."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(text))


def tag(name, /, *parts, **attributes):
    """<name attributes>parts</name>; strings are escaped, Html is not; `class_` is the attribute class."""
    pairs = "".join(f' {k.rstrip("_").replace("_", "-")}="{html.escape(printable(v))}"' for k, v in attributes.items())
    if name in ("img", "meta"):
        return Html(f"<{name}{pairs}>")
    return Html(f"<{name}{pairs}>{join(*parts)}</{name}>")


def join(*parts):
    """Parts one after the other; lists are joined too."""
    flat = itertools.chain.from_iterable(p if isinstance(p, list | tuple) else [p] for p in parts)
    return Html("".join(p if isinstance(p, Html) else html.escape(printable(p)) for p in flat))


def text_of(value):
    """A flag's value as short text."""
    return value if isinstance(value, str) else json.dumps(value)


def number(value):
    """Four digits, and no exponent where none is needed."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "-" if value is None else text_of(value)
    if isinstance(value, int):
        return f"{value:,}"
    if 1e4 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:#.4g}".rstrip(".") if math.isfinite(value) else "not finite"


def table(head, rows, class_="numbers"):
    """A table that scrolls sideways where the page is narrow; a row of one cell is a heading over all columns."""
    cells = lambda name, row: tag("tr", [tag(name, cell) for cell in row])
    title = lambda row: tag("tr", tag("th", *row, colspan=len(head)))
    body = [cells("td", row) if len(row) > 1 else title(row) for row in rows]
    inner = tag("table", tag("thead", cells("th", head)), tag("tbody", body))
    return tag("div", inner, class_=f"wide {class_}", tabindex=0)


def alike(notices):
    """[(path, text)] -> {text: its paths}, each once, in the order in which they came up."""
    found = {}
    for path, text in dict.fromkeys(notices):
        found.setdefault(text, []).append(path)
    return found


def folded(title, *parts):
    return tag("details", tag("summary", title), *parts)


def picture(path, caption, notices):
    """A png or gif as part of the page, or nothing and a notice."""
    kinds = {b"\x89PNG\r\n\x1a\n": "png", b"GIF87a": "gif", b"GIF89a": "gif"}
    try:
        data = path.read_bytes() if path.stat().st_size <= MAX_PICTURE else b""
        reason = "is empty, or larger than 12 MB. Remedy: draw it smaller"
    except OSError as error:
        data, reason = b"", f"cannot be read ({error.strerror}). Remedy: check its permissions"
    kind = next((name for magic, name in kinds.items() if data.startswith(magic)), "")
    if not kind:
        reason = "is neither png nor gif. Remedy: make it again" if data else reason
        notices.append((path, f"{reason}; left out"))
        return Html("")
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return tag("figure", tag("img", src=source, alt=caption), tag("figcaption", caption))
