"""A report as one HTML page that needs no other file and fetches nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from typing import Any

from .. import __version__
from . import tables
from .charts import AXES, SMOOTHED, groups, numbers, title_of
from .strips import SHOWN, distinct
from .tables import Run, text

MARK = '<meta name="generator" content="fastnce report">'
"""Near the beginning of every report, so that no other file is taken for one and replaced."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
ROLES = {"A": "A, input", "fake_B": "B, output", "B": "B, input", "fake_A": "A, output"}
PAIRS = (("A", "fake_B"), ("B", "fake_A"))


def page(runs: Sequence[Run]) -> str:
    """The page of one run, or the comparison of several."""
    alone = len(runs) == 1
    now = tables.minute(datetime.now().astimezone())
    title = runs[0].name if alone else f"{len(runs)} runs"
    script, style = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    data = json.dumps(numbers_of(runs), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return "".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f"{MARK}\n",
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n',
            f"<title>{text(title, 100)} · fastnce</title>\n<style>\n{style}</style>\n</head>\n<body>\n",
            head(runs, title),
            '<main>\n<noscript><p class="note">The curves and the pictures need JavaScript.</p></noscript>\n',
            *(section(name, body) for name, body in sections(runs) if body),
            f"</main>\n<footer>Written {now} by fastnce {text(__version__)}</footer>\n",
            f'<script type="application/json" id="data">{data}</script>\n',
            f"<script>\n{script}</script>\n</body>\n</html>\n",
        ]
    )


def head(runs: Sequence[Run], title: str) -> str:
    """The top of the page: what runs these are, and how far they are."""
    if len(runs) > 1:
        return f"<header><h1>{text(title)}</h1>{legend(runs)}</header>\n"
    (run,) = runs
    done, total = tables.steps_done(run), run.facts.total
    bar = f'<progress max="{total}" value="{min(done, total)}" aria-label="steps done"></progress>' if total else ""
    start = run.facts.events[0] if run.facts.events else {}
    about = [
        run.facts.method,
        run.facts.start.get("device", ""),
        f"begun {begun}" if (begun := tables.when(start)) else "",
    ]
    reason = f'<p class="reason">{text(run.facts.reason)}</p>' if run.facts.reason else ""
    return (
        f"<header><h1>{text(title, 100)} {tables.badge(run)}</h1>"
        f'<p class="about">{" · ".join(text(one) for one in about if one)}</p>{reason}{bar}'
        f"{tables.tiles(run)}</header>\n"
    )


def legend(runs: Sequence[Run]) -> str:
    """The runs with their colours; a run can be hidden."""
    items = "".join(
        f'<li><label><input type="checkbox" checked data-run="{i}"><i class="c{i % 10}"></i> '
        f"<b>{text(run.name, 100)}</b></label> {tables.badge(run)} "
        f"<small>{text(run.facts.method)}, {tables.progress(run)}</small></li>"
        for i, run in enumerate(runs)
    )
    return f'<ul class="legend">{items}</ul>'


def section(name: str, body: str) -> str:
    """A section with its heading; the controls have none."""
    if not name:
        return f"{body}\n"
    key = name.split()[0].lower()
    return f'<section id="{key}" aria-labelledby="h-{key}"><h2 id="h-{key}">{name}</h2>\n{body}\n</section>\n'


def sections(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The sections by their headings; empty ones are left out of the page."""
    (first, *others), alone = runs, len(runs) == 1
    found = groups([run.metrics for run in runs])
    charts = {name: f'<div class="charts" data-group="{name}"></div>' if names else "" for name, names in found.items()}
    samples = '<div class="samples"></div>' if any(run.samples for run in runs) else ""
    measured = tables.validation(runs)
    body = [
        ("Warnings", tables.warnings(first) if alone else ""),
        ("Samples", samples),
        ("", controls(runs) if any(charts.values()) else ""),
        ("Validation on held-out pictures", measured + charts["validation"] + (lines(runs) if measured else "")),
        ("Losses", charts["losses"]),
        ("Speed and health", charts["speed"]),
    ]
    if alone:
        body += [
            ("Configuration", tables.configuration(first)),
            ("History", tables.events(first)),
            ("Machine and versions", tables.machine(first)),
        ]
    else:
        warned = [(run.name, tables.warnings(run)) for run in (first, *others)]
        listed = "".join(f"<h3>{text(name)}</h3>{warnings}" for name, warnings in warned if warnings)
        body += [("Keys that differ", tables.differing(runs)), ("Warnings", listed)]
    return body


def lines(runs: Sequence[Run]) -> str:
    """What the straight lines of the charts stand for."""
    found = ["dashed: the untranslated inputs"] if any(run.metrics.inputs for run in runs) else []
    if len(runs) == 1 and runs[0].facts.best:
        found.append("dotted green: the best checkpoint")
    if any(event.get("event") == "change" for run in runs for event in run.facts.events):
        found.append("dotted orange, in all charts: the configuration changes")
    return f'<p class="lines">{"; ".join(found).capitalize()}.</p>' if found else ""


def controls(runs: Sequence[Run]) -> str:
    """The controls of all charts."""
    axes = numbers([run.metrics for run in runs], [])
    known = [axis for axis in AXES if axis == "step" or all(one["axes"][axis] for one in axes)]
    options = "".join(f"<option>{axis}</option>" for axis in known)
    keys = "".join(
        f'<span class="key"><i class="c{i % 10}"></i>{text(run.name, 24)}</span>' for i, run in enumerate(runs)
    )
    return (
        '<div class="controls"><label>Smoothing <input type="range" id="smooth" min="0" max="0.98" step="0.01" '
        f'value="0.7"> <output for="smooth">0.70</output></label><label>Against <select id="axis">{options}</select>'
        '</label><label><input type="checkbox" id="log"> Logarithmic</label>'
        f"{keys if len(runs) > 1 else ''}</div>"
    )


def numbers_of(runs: Sequence[Run]) -> dict[str, Any]:
    """What the script of the page draws: curves and pictures."""
    found = groups([run.metrics for run in runs])
    names = [name for part in found.values() for name in part]
    images, places = distinct([sample for run in runs for sample in run.samples])
    shown = [_shown(one) for one in numbers([run.metrics for run in runs], names)]
    for run, one in zip(runs, shown, strict=True):
        changes = [event["step"] for event in run.facts.events if event.get("event") == "change" and _whole(event)]
        one |= {
            "name": run.name[:100],
            "inputs": {name: value for name, value in run.metrics.inputs.items() if abs(value) < float("inf")},
            "best": run.facts.best.step if run.facts.best else None,
            "changes": changes[-50:],
            "samples": [
                {"step": s.step, "rows": [{name: places[uri] for name, uri in row.items()} for row in s.pictures]}
                for s in run.samples
            ],
        }
    return {
        "runs": shown,
        "groups": found,
        "titles": {name: title_of(name) for name in names},
        "smooth": SMOOTHED,
        "images": images,
        "roles": ROLES,
        "pairs": PAIRS,
        "order": SHOWN,
    }


def _shown(one: dict[str, Any]) -> dict[str, Any]:
    return {"curves": one["curves"], "axes": {axis: knots for axis, knots in one["axes"].items() if knots}}


def _whole(event: dict[str, Any]) -> bool:
    return type(event.get("step")) is int and 0 <= event["step"] < 2**53
