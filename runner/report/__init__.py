"""One html page for any set of runs: curves, final tables, WURL's policies, UDG's choices, flags and versions.

    python -m runner.report runs                                            everything below a folder
    python -m runner.report runs/mopo/ant-angle-60/* results/wurl_sac/point --out ant.html

Reads folders of runs and of udg_select.py, and the committed results/**/*.jsonl; docs/report.md has the rest. The
page is one file that loads nothing, and its own policy forbids it to. Nothing is trained, drawn anew or changed here.
"""
