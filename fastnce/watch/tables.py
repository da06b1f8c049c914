"""The tables of a report as HTML: key figures, validation, events, configuration, machine. All text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from html import escape
from typing import Any

from ..common.toml import format_value
from ..engine.log import clock
from ..evaluate.quality import KEYS
from .charts import NO_MEASURE, title_of
from .reading import Facts, Key, time_of
from .series import HELD_OUT, Metrics
from .strips import Sample

LONGEST = 400
"""Characters of one text from a file."""
NONE = "\N{EN DASH}"
EVENTS = 100
"""The newest so many events, and warnings, are shown."""
STATES = ("running", "finished", "stopped", "failed", "killed")


@dataclass
class Run:
    """All that a report shows of one run."""

    name: str
    facts: Facts
    metrics: Metrics
    samples: list[Sample]


def text(value: Any, most: int = LONGEST) -> str:
    """Any value as escaped text of limited length."""
    shown = str(value)
    return escape(shown if len(shown) <= most else f"{shown[:most]}…")


def figure(value: float | None) -> str:
    """A number with about four digits; a dash if there is none."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already; the first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    top = f"<thead><tr>{top}</tr></thead>" if head else ""
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def badge(run: Run) -> str:
    """The state of a run."""
    state = run.facts.state if run.facts.state in STATES else "unknown"
    return f'<span class="state {state}">{"state not recorded" if state == "unknown" else state}</span>'


def progress(run: Run) -> str:
    """The steps done, of how many."""
    done = steps_done(run)
    if run.facts.total is None:
        return f"step {done:,}"
    return f"step {done:,} of {run.facts.total:,}"


def steps_done(run: Run) -> int:
    saved = run.facts.latest.step if run.facts.latest else 0
    return max(run.metrics.step, saved, 0)


def tiles(run: Run) -> str:
    """The key figures of one run."""
    newest, facts = run.metrics.newest, run.facts
    found = [("Steps", f"{steps_done(run):,}", f"of {facts.total:,}" if facts.total else "")]
    if "pictures" in newest:
        found.append(("Pictures seen", figure(newest["pictures"]), "per domain"))
    if facts.seconds is not None:
        found.append(("Trained for", clock(facts.seconds), "" if facts.seconds >= 3600 else "minutes"))
    if "images_per_second" in newest:
        found.append(("Images per second", figure(newest["images_per_second"]), "newest"))
    if facts.best is not None:
        measure = deciding(run)
        value = facts.best.measures.get(measure)
        shown = title_of(f"{HELD_OUT}{measure}")
        found.append((f"Best {shown}", figure(value), f"at step {facts.best.step:,}"))
    if facts.latest is not None:
        found.append(("Last checkpoint", f"step {facts.latest.step:,}", ""))
    return '<dl class="tiles">{}</dl>'.format(
        "".join(
            f"<div><dt>{text(name)}</dt><dd>{text(value)} <small>{text(note)}</small></dd></div>"
            for name, value, note in found
        )
    )


def deciding(run: Run) -> str:
    """The measure that decides which checkpoint is the best."""
    measures = run.facts.best.measures if run.facts.best else {}
    stored = {key.name: key.value for key in run.facts.config if key.section == "run"}
    for key in ("best", "metric"):
        name = str(stored.get(key, "")).rpartition(":")[2]
        if name in measures:
            return name
    return next(iter(measures), KEYS[0])


def measures_of(run: Run) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """The held-out measures of the inputs, of the best checkpoint and of the last validation."""
    last = run.metrics.validated.values if run.metrics.validated else {}
    best = {f"{HELD_OUT}{k}": v for k, v in run.facts.best.measures.items()} if run.facts.best else {}
    return run.metrics.inputs, best, last


def validation(runs: Sequence[Run]) -> str:
    """The held-out measures of inputs, best and last; empty if no run has any."""
    found = [(run, *measures_of(run)) for run in runs]
    names = list(dict.fromkeys(name for _, *parts in found for part in parts for name in part))
    names = [name for name in names if name not in NO_MEASURE]
    if not names:
        return ""
    if len(runs) == 1:
        ((run, inputs, best, last),) = found
        head = ["Measure", "Inputs"]
        columns = [inputs]
        if run.facts.best:
            head.append(f"Best, step {run.facts.best.step:,}")
            columns.append(best)
        if run.metrics.validated:
            head.append(f"Last, step {run.metrics.validated.step:,}")
            columns.append(last)
        rows = [[text(title_of(name)), *(figure(column.get(name)) for column in columns)] for name in names]
        return table(head, rows, "numbers")
    head = ["Run", *(f"{text(title_of(name))}, {what}" for name in names for what in ("best", "last"))]
    rows = [
        [text(run.name), *(figure(column.get(name)) for name in names for column in (best, last))]
        for run, _, best, last in found
    ]
    inputs = found[0][1]
    if inputs and all(part == inputs for _, part, *_ in found):
        rows.append(["Inputs", *(figure(inputs.get(name)) for name in names for _ in range(2))])
    return table(head, rows, "numbers")


def when(event: dict[str, Any]) -> str:
    """The time of an event, to the minute, such as 2026-11-27 18:00 UTC+01:00."""
    at = time_of(event)
    return minute(at) if at else ""


def minute(at: datetime) -> str:
    """A time with its zone, to the minute."""
    return f"{at:%Y-%m-%d %H:%M} {timezone(at.utcoffset() or timedelta())}"


def step_cell(event: dict[str, Any]) -> str:
    step = event.get("step")
    return f"{step:,}" if type(step) is int else ""


def warnings(run: Run) -> str:
    """The warnings of a run, newest first; empty if there are none."""
    found = run.facts.warnings
    if not found:
        return ""
    items = "".join(
        f"<li><b>{f'Step {step}' if (step := step_cell(one)) else 'Warning'}</b> "
        f"{text(str(one.get('text', '')).removeprefix('warning: '))} <small>{when(one)}</small></li>"
        for one in found[: -EVENTS - 1 : -1]
    )
    more = f"<p>{len(found) - EVENTS:,} older ones are in history.jsonl.</p>" if len(found) > EVENTS else ""
    return f'<ul class="warnings">{items}</ul>{more}'


def events(run: Run) -> str:
    """The starts, changes and ends of a run, newest first."""
    rows = [[when(one), step_cell(one), told(one)] for one in run.facts.events[: -EVENTS - 1 : -1]]
    return table(["Time", "Step", "What happened"], rows, "events") if rows else ""


def told(event: dict[str, Any]) -> str:
    """What happened, as escaped HTML."""
    name = str(event.get("event", ""))
    if name == "start":
        ranks = event.get("ranks", 1)
        on = f" on {event.get('device')}" if event.get("device") else ""
        verb = "continues" if event.get("step") else "starts"
        return text(f"The run {verb}{on}" + (f", {ranks} processes" if ranks != 1 else ""))
    if name == "from":
        return text(f"Starts from {event.get('source', '')}") + _list(event.get("lines"))
    if name == "change":
        return "Continues with another configuration" + _list(event.get("changes"))
    if name == "end":
        reason = event.get("reason")
        return text(f"The run {_ended(event.get('state'))}{f': {reason}' if reason else ''}")
    return text(name)


def _ended(state: Any) -> str:
    return {"finished": "is finished", "stopped": "stops", "failed": "fails"}.get(str(state), f"ends ({state})")


def _list(lines: Any) -> str:
    items = lines[:50] if isinstance(lines, list) else []
    return f"<ul>{''.join(f'<li>{text(one)}</li>' for one in items)}</ul>" if items else ""


def configuration(run: Run) -> str:
    """The configuration, with what differs from the preset marked."""
    rows = []
    for key in run.facts.config[:500]:
        mark = "changed" if key.changed else "same"
        default = f"<code>{_value(key.default)}</code>" if key.changed else ""
        rows.append(
            f'<tr class="{mark}"><th scope="row"><code>{_name(key)}</code></th>'
            f"<td><code>{_value(key.value)}</code></td><td>{default}</td><td>{text(key.help)}</td></tr>"
        )
    if not rows:
        return "<p>The run has no configuration that can be read.</p>"
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Key", "Value", "Preset", "What it does"))
    return (
        '<label class="only"><input type="checkbox" id="only" checked> Only what differs from the preset</label>'
        f'<div class="scroll"><table class="config"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def differing(runs: Sequence[Run]) -> str:
    """The keys whose values differ between the runs."""
    tables = [{_name(key): _value(key.value) for key in run.facts.config} for run in runs]
    names = list(dict.fromkeys(name for one in tables for name in one))
    rows = [
        [f"<code>{name}</code>", *(f"<code>{one.get(name, NONE)}</code>" for one in tables)]
        for name in names[:1000]
        if len({one.get(name) for one in tables}) > 1
    ]
    if not rows:
        return "<p>All keys have the same values.</p>"
    return table(["Key", *(text(run.name) for run in runs)], rows)


def _name(key: Key) -> str:
    return text(f"{key.section}.{key.name}" if key.section else key.name, 80)


def _value(value: Any) -> str:
    return text(format_value(value) if isinstance(value, str | bool | int | float | list | tuple) else value, 200)


def machine(run: Run) -> str:
    """The machine and the versions of the last start; empty for runs without history."""
    start = run.facts.start
    rows = []
    if start.get("device"):
        rows.append(["Device", text(start["device"])])
    for part in ("machine", "versions"):
        values = start.get(part)
        rows += [[text(k), text(v)] for k, v in list(values.items())[:50]] if isinstance(values, dict) else []
    command = start.get("command")
    if isinstance(command, list):
        rows.append(["Command", f"<code>{text(' '.join(map(str, command)), 1000)}</code>"])
    return table([], rows) if rows else ""
