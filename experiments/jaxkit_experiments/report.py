"""One HTML page of any number of run folders: tables, claims, plots, environment.

The page carries everything it shows (styles inline, images as data) and runs no script, so it can
be mailed or attached. It needs only the run folders, not the experiments that wrote them.
"""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from jaxkit_experiments.runfolder import RunError, disk_errors, read_json

__all__ = ["find_runs", "render", "write_report"]


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders among `paths` and below them, in order, each once.

    Example:
      >>> find_runs([Path("/nowhere")])
      []
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        configs = [path] if (path / "config.json").is_file() else []
        configs = configs or sorted(file.parent for file in path.glob("**/config.json"))
        for folder in configs:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def write_report(folders: Sequence[Path], out: str | Path) -> Path:
    """Write the page of `folders` to `out`.

    Raises:
      RunError: `out` is a folder, or cannot be written.
    """
    out = Path(out)
    page = render(folders)
    try:
        with disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror}.") from error
    return out


def render(folders: Sequence[Path]) -> str:
    """The page of `folders` as text."""
    runs = [_load(folder) for folder in folders]
    names = [run["name"] for run in runs]
    for run in runs:
        if names.count(run["name"]) > 1:
            run["name"] += f" in {run['folder'].name}"
    links = "".join(
        f'<li><a href="#run-{number}">{escape(run["name"])}</a> {_tally(run)}</li>'
        for number, run in enumerate(runs)
    )
    sections = "".join(_section(number, run) for number, run in enumerate(runs))
    return _PAGE.format(
        style=_STYLE,
        links=links,
        sections=sections,
        count=f"{len(runs)} run{'' if len(runs) == 1 else 's'}",
    )


def _load(folder: Path) -> dict[str, Any]:
    """What is in a run folder; files that are missing or broken are said to be so."""
    run: dict[str, Any] = {"folder": folder, "faults": []}
    for name in ("config", "environment", "summary"):
        path = folder / f"{name}.json"
        run[name] = {}
        if not path.exists():
            continue
        try:
            value = read_json(path)
            run[name] = value if isinstance(value, dict) else {}
        except RunError:
            run["faults"].append(f"{path.name} is not valid JSON.")
    run["finished"] = bool(run["summary"])
    if not run["finished"]:
        run["summary"] = {"arms": {}, "seconds": {}}
        for path in sorted((folder / "arms").glob("*/result.json")):
            try:
                stored = read_json(path)
                run["summary"]["arms"][path.parent.name] = stored["metrics"]
                run["summary"]["seconds"][path.parent.name] = stored["seconds"]
            except (RunError, KeyError, TypeError):
                run["faults"].append(f"arms/{path.parent.name}/result.json is corrupt.")
    name = run["summary"].get("experiment") or run["config"].get("experiment") or folder.name
    preset = run["config"].get("preset")
    run["name"] = f"{name} ({preset})" if preset else str(name)
    return run


def _tally(run: Mapping[str, Any]) -> str:
    if not run["finished"]:
        return '<span class="tally">unfinished</span>'
    claims = run["summary"].get("claims", [])
    counts = [
        f"{sum(claim['status'] == status for claim in claims)} {status}"
        for status in ("held", "not held", "not testable")
        if any(claim["status"] == status for claim in claims)
    ]
    return f'<span class="tally">{escape(", ".join(counts) or "no claims")}</span>'


def _section(number: int, run: Mapping[str, Any]) -> str:
    summary = run["summary"]
    title = summary.get("title") or run["name"]
    parts = [f"<h2>{escape(title)}</h2>", f'<p class="meta">{escape(_meta(run))}</p>']
    if summary.get("description"):
        parts.append(f"<p>{escape(summary['description'])}</p>")
    if not run["finished"]:
        arms = run["config"].get("config", {}).get("arms", [])
        parts.append(
            f'<p class="notice">Unfinished: {len(summary["arms"])} of {len(arms)} arms are done. '
            "The same command goes on with it.</p>"
        )
    parts += [f'<p class="notice">{escape(fault)}</p>' for fault in run["faults"]]
    parts.append(_claims(summary.get("claims", [])))
    parts.append(_table(f"Results of {run['name']}", summary))
    if plots := summary.get("plots"):
        figures = "".join(_figure(run["folder"], plot) for plot in plots)
        parts.append(f'<h3>Plots</h3><div class="figures">{figures}</div>')
    if summary.get("epilogue"):
        parts.append(f"<pre tabindex=0>{escape(summary['epilogue'])}</pre>")
    if summary.get("sources"):
        items = "".join(f"<li>{escape(source)}</li>" for source in summary["sources"])
        parts.append(f"<h3>Sources</h3><ul>{items}</ul>")
    parts.append(_details("Config", run["config"]))
    parts.append(_details("Environment", run["environment"]))
    return f'<section id="run-{number}">{"".join(parts)}</section>'


def _meta(run: Mapping[str, Any]) -> str:
    here = run["environment"]
    seconds = sum(run["summary"].get("seconds", {}).values())
    device = here.get("device", {})
    commit = here.get("commit")
    pieces = [
        run["name"],
        f"{device['count']} × {device['kind']}" if device else "",
        f"{seconds:.0f} s" if seconds else "",
        here.get("time", "").replace("T", " ").replace("+00:00", " UTC"),
        f"commit {commit[:10]}{'+changes' if '+' in commit else ''}" if commit else "",
    ]
    return " · ".join(piece for piece in pieces if piece)


def _claims(claims: Sequence[Mapping[str, str]]) -> str:
    if not claims:
        return ""
    items = "".join(
        f'<li><span class="badge {escape(claim["status"].replace(" ", "-"))}">'
        f"{escape(claim['status'])}</span><div>{escape(claim['text'])} "
        f'<span class="source">{escape(claim["source"])}</span>'
        + (f'<p class="detail">{escape(claim["detail"])}</p>' if claim["detail"] else "")
        + "</div></li>"
        for claim in claims
    )
    return f'<h3>Claims</h3><ul class="claims">{items}</ul>'


def _table(caption: str, summary: Mapping[str, Any]) -> str:
    arms = {
        arm: {name: np.asarray(values, np.float64) for name, values in metrics.items()}
        for arm, metrics in summary["arms"].items()
    }
    if not arms:
        return ""
    paper = summary.get("paper", {})
    names = summary.get("columns") or list(dict.fromkeys(n for of in arms.values() for n in of))
    cited = [name for name in names if any(name in paper.get(arm, {}) for arm in arms)]
    head, rows = '<th scope="col">arm</th>', ""
    for name in names:
        head += f'<th scope="col">{escape(name)}</th>'
        head += '<th scope="col">paper</th>' if name in cited else ""
    for arm, metrics in arms.items():
        row = f'<th scope="row">{escape(arm)}</th>'
        for name in names:
            row += f"<td>{_number(metrics.get(name))}</td>"
            if name in cited:
                value = paper.get(arm, {}).get(name)
                row += f'<td class="paper">{"–" if value is None else f"{float(value):.4g}"}</td>'
        rows += f"<tr>{row}</tr>"
    seeds = len(summary.get("seeds", []))
    notes = [f"Mean ± standard deviation over {seeds} seeds."] if seeds > 1 else []
    notes += [escape(summary["paper_note"])] if cited and summary.get("paper_note") else []
    note = f'<p class="note">{" ".join(notes)}</p>' if notes else ""
    return (
        f'<h3>Results</h3><div class="scroll" role="region" aria-label="{escape(caption)}" '
        f'tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}'
    )


def _number(values: np.ndarray | None) -> str:
    values = np.empty(0) if values is None else values[~np.isnan(values)]
    if not values.size:
        return "–"
    if np.all(values == values[0]):
        return f"{values[0]:.4g}"
    # Infinite values have no spread worth a warning.
    with np.errstate(invalid="ignore"):
        return f"{values.mean():.4g} <small>± {values.std(ddof=1):.2g}</small>"


def _figure(folder: Path, plot: str) -> str:
    path = folder / plot
    label = path.stem.replace("-", " ").replace("_", " ")
    kind = mimetypes.guess_type(path.name)[0] or ""
    if not path.is_file() or not kind.startswith("image/"):
        return f'<p class="notice">{escape(plot)} is missing or no image.</p>'
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img src="data:{kind};base64,{data}" alt="Plot: {escape(label)}">'
        f"<figcaption>{escape(label)}</figcaption></figure>"
    )


def _details(title: str, value: Any) -> str:
    if not value:
        return ""
    return f"<details><summary>{title}</summary>{_definitions(value)}</details>"


def _definitions(value: Any) -> str:
    if isinstance(value, Mapping):
        rows = "".join(
            f"<dt>{escape(str(key))}</dt><dd>{_definitions(item)}</dd>"
            for key, item in value.items()
        )
        return f"<dl>{rows}</dl>" if rows else "–"
    if isinstance(value, list):
        if any(isinstance(item, Mapping) for item in value):
            return "".join(_definitions(item) for item in value)
        return escape(", ".join(map(str, value))) or "–"
    return "–" if value is None else escape(str(value))


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #59636e; --line: #d5dae0;
  --page: #fff; --panel: #f5f7f9; --link: #0b57a4;
  --good: #12633a; --bad: #a11b22; --open: #6b5000; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a3adb8; --line: #3a424b;
  --page: #14181c; --panel: #1d2329; --link: #7ab8ff;
  --good: #6fd39b; --bad: #ff9a9a; --open: #e5c25a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header, main { max-width: 60rem; margin: 0 auto; padding: 1.25rem; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.3rem; line-height: 1.3; margin: 0; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p, li, dd, figcaption { overflow-wrap: anywhere; }
a { color: var(--link); }
nav ul { padding-left: 1.2rem; } .tally { color: var(--soft); margin-left: .4rem; }
section { border-top: 1px solid var(--line); padding: 1.75rem 0; }
.meta, .note, .source, .detail, figcaption { color: var(--soft); font-size: .875rem; }
.meta { margin: .25rem 0 1rem; } .detail { margin: .1rem 0 0; }
.notice { border-left: 4px solid var(--open); background: var(--panel); padding: .5rem .75rem; }
.claims { list-style: none; padding: 0; display: grid; gap: .75rem; }
.claims li { display: grid; grid-template-columns: 7rem 1fr; gap: .75rem; align-items: start; }
.badge { border: 1.5px solid; border-radius: 1rem; padding: .05rem .6rem; font-size: .8rem;
  font-weight: 600; text-align: center; white-space: nowrap; }
.held { color: var(--good); } .not-held { color: var(--bad); } .not-testable { color: var(--open); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .75rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
thead th, thead th:first-child { background: var(--panel); }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 500; } .paper, small { color: var(--soft); }
.figures { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; } img { max-width: 100%; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: .4rem; }
pre { background: var(--panel); padding: .75rem; overflow-x: auto; border-radius: .4rem;
  font-size: .85rem; }
details { margin-top: .75rem; } summary { cursor: pointer; padding: .3rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .25rem 0;
  font-size: .875rem; } dt { color: var(--soft); } dd { margin: 0; min-width: 0; }
@media (max-width: 30rem) { header, main { padding: 1rem; }
  .claims li { grid-template-columns: 1fr; gap: .25rem; } .badge { justify-self: start; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin: 0 0 .3rem .75rem; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>jaxkit: {count}</title>
<style>{style}</style>
</head>
<body>
<header><h1>jaxkit: {count}</h1><nav aria-label="Runs"><ul>{links}</ul></nav></header>
<main>{sections}</main>
</body>
</html>
"""
