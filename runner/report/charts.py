"""Curves as drawings of the page itself (svg): seeds, mean, spread, and dots that tell their numbers."""

import math

import numpy as np

from runner.report.markup import Html, join, number, tag
from runner.report.numbers import spread

METRICS = {
    "eval/score": "normalised return",
    "eval/return": "return, whole evaluation episodes",
    "eval/return_data_length": "return, as long as the data's episodes",
    "eval/task_return": "return under the task's reward, mean over policies",
    "eval/w1_nearest": "W1 to the nearest other policy",
    "eval/w1_closest": "W1 of the closest pair of policies",
    "eval/min_w": "upper bound of W1 to the nearest other policy, by projections",
    "eval/disc_success": "success of a discriminator of the policies",
}
MAX_POINTS = 300  # of a drawn line


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 290, 60, 22, 12, 34  # room for the longest number on either side


def ticks(low, high, count=5):
    """About `count` round numbers (1, 2 or 5 times a power of ten) from low to high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def tick_text(value):
    """20000 -> 20k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def limits(values, margin=0.0):
    """Lowest and highest finite value with a margin; never equal."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values) & (np.abs(values) < 1e300)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    pad = (high - low) * margin if high - low > 1e-9 * max(abs(low), abs(high), 1e-290) else max(abs(high), 1.0) * 0.5
    return float(low - pad), float(high + pad)


class Frame:
    """Data to places in a drawing."""

    def __init__(self, x, y):
        (self.x0, self.x1), (self.y0, self.y1) = limits(x), limits(y, 0.05)

    def point(self, x, y):
        across = LEFT + (x - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def path(self, x, y, **attributes):
        """A line with gaps where y is not finite."""
        d, pen = [], "M"
        for a, b in zip(x, y, strict=True):
            if not (math.isfinite(b) and abs(b) < 1e300):
                pen = "M"
                continue
            across, down = self.point(a, b)
            d.append(f"{pen}{across:.1f} {down:.1f}")
            pen = "L"
        return tag("path", d=" ".join(d), **attributes) if d else Html("")

    def grid(self):
        """Lines and numbers of both axes."""
        lines, marks = [], []
        for value in ticks(self.y0, self.y1):
            down = self.point(self.x0, value)[1]
            lines.append(f"M{LEFT} {down:.1f}H{WIDTH - RIGHT}")
            marks.append(tag("text", tick_text(value), x=LEFT - 6, y=f"{down + 4:.1f}", text_anchor="end"))
        for value in ticks(self.x0, self.x1, 4):
            across = self.point(value, self.y0)[0]
            lines.append(f"M{across:.1f} {TOP}V{HEIGHT - BOTTOM}")
            place = dict(x=f"{across:.1f}", y=HEIGHT - BOTTOM + 18, text_anchor="middle")
            marks.append(tag("text", tick_text(value), **place))
        return tag("path", d=" ".join(lines), class_="grid"), *marks


def thin(count):
    """Indices of at most 300 points of a line, the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(int))


def draw_curve(frame, style, label, seeds):
    """One setting: a thin line per seed, the mean, +- std shaded, and dots that tell their numbers."""
    parts = []
    for steps in seeds.values() if len(seeds) > 1 else ():
        x = np.array(sorted(steps))[thin(len(steps))]
        parts.append(frame.path(x, [steps[s] for s in x.tolist()], class_=f"{style} seed"))
    steps, mean, std = (values[thin(len(values))] if len(values) else values for values in spread(seeds))
    if len(seeds) > 1 and len(steps) and np.isfinite([mean - std, mean + std]).all():
        x, y = np.concatenate([steps, steps[::-1]]), np.concatenate([mean - std, (mean + std)[::-1]])
        parts.append(frame.path(x, y, class_=f"{style} band"))
    parts.append(frame.path(steps, mean, class_=f"{style} mean"))
    for s, m, d in zip(steps, mean, std, strict=True):
        if math.isfinite(m) and abs(m) < 1e300:
            across, down = frame.point(s, m)
            told = f"{label}, {s}: {number(float(m))}" + (f" \u00b1 {number(float(d))}" if len(seeds) > 1 else "")
            at = dict(cx=f"{across:.1f}", cy=f"{down:.1f}", r=2.5)
            parts.append(tag("circle", class_=f"{style} dot", data_text=told, **at))
    return parts


def titled(key, same):
    """A key's name in words; same: the keys that have the same numbers."""
    name = join(tag("b", METRICS[key]), " ", tag("code", key)) if key in METRICS else tag("b", key)
    return join(name, *(join("; the same: ", tag("code", other)) for other in same))


def distinct(keys, groups):
    """Keys -> {key: those after it with the same numbers in all settings}: what is equal is shown once."""
    found = {}
    for key in keys:
        series = [group.series(key) for group in groups]
        first = next((k for k in found if series == [group.series(k) for group in groups]), key)
        found.setdefault(first, []).extend([key] if first != key else [])
    return found


def chart(key, groups, same=()):
    """Curves of one key, all settings of a task; same: the keys that have the same curves."""
    found = [(f"c{i % 8} d{i // 8 % 3}", group, group.series(key)) for i, group in enumerate(groups)]
    found = [(style, group, seeds) for style, group, seeds in found if seeds]
    everything = [(s, v) for _, _, seeds in found for steps in seeds.values() for s, v in steps.items()]
    edges = [(s, e) for _, _, seeds in found for s, m, d in zip(*spread(seeds), strict=True) for e in (m - d, m + d)]
    frame = Frame([s for s, _ in everything], [v for _, v in everything + edges])
    drawn = [draw_curve(frame, style, group.label, seeds) for style, group, seeds in found]
    unit = "updates" if key.startswith(("eval/", "train/", "time/")) else "step as logged"
    name = tag("text", unit, x=WIDTH - RIGHT, y=HEIGHT - 4, text_anchor="end")
    view = dict(viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="plot", role="img", aria_label=key)
    svg = tag("svg", *frame.grid(), name, *drawn, **view)
    counts = ((style, group, len(seeds)) for style, group, seeds in found)
    legend = [
        tag("span", tag("i", class_=f"{style} key"), f"{group.label} ({n} seed{'s' * (n > 1)})")
        for style, group, n in counts
    ]
    return tag("figure", titled(key, same), svg, tag("output", " "), tag("figcaption", legend), class_="curve")
