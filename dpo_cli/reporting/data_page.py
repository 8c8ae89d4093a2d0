"""The check of the data as one HTML page: no script, nothing from elsewhere, every text of the data made harmless."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from dpo_cli import __version__
from dpo_cli.data.checkup.report import EXAMPLES, Boundary, Example, Finding, LengthBias, Lengths, Margins, Report
from dpo_cli.reporting.plots import bars, histogram, plane
from dpo_cli.reporting.tables import percent, visible

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #ffffff; --ink: #1f2328; --soft: #66707b; --line: #e3e1da;
  --prompt: #4c78a8; --chosen: #3a8f5c; --rejected: #c2554d; --longest: #7d6aa8; --accent: #4c78a8;
  --error: #b3261e; --warning: #9a6700; --info: #57606a; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --card: #1c2024; --ink: #e6e8ea; --soft: #98a2ad;
  --line: #30363d; --prompt: #7aa6d6; --chosen: #62b784; --rejected: #e28780; --longest: #a896d4; --accent: #7aa6d6;
  --error: #ff8a80; --warning: #e3b341; --info: #98a2ad; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.25rem;
  margin: 0 0 .9rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: .9rem; }
.grid .card { margin: 0; }
.finding { border-left: 5px solid var(--info); } .finding.error { border-left-color: var(--error); }
.finding.warning { border-left-color: var(--warning); }
.badge { font-size: .75rem; font-weight: 600; letter-spacing: .04em; text-transform: uppercase; margin-right: .6rem; }
.badge.error { color: var(--error); } .badge.warning { color: var(--warning); } .badge.info { color: var(--info); }
.count { float: right; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; font-weight: normal; }
th { color: var(--soft); } td.number, th.number { text-align: right; }
code, .text { font: .85rem/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
.text { unicode-bidi: isolate; display: block; padding: .1rem 0 .1rem .6rem; border-left: 3px solid var(--line); }
.text.prompt { border-color: var(--prompt); } .text.chosen { border-color: var(--chosen); }
.text.rejected { border-color: var(--rejected); }
details { margin-top: .5rem; } summary { cursor: pointer; color: var(--soft); } .example { margin: .6rem 0; }
svg { width: 100%; height: auto; display: block; max-width: 26rem; } svg text { fill: var(--soft); font-size: 11px; }
svg .axis { stroke: var(--soft); } svg .dashed { stroke-dasharray: 3 3; } svg .cell { fill: var(--accent); }
svg .prompt { fill: var(--prompt); } svg .chosen { fill: var(--chosen); } svg .rejected { fill: var(--rejected); }
svg .longest { fill: var(--longest); } svg .dropped { fill: var(--warning); } svg .gone { opacity: .4; }
.scale { display: flex; height: 1.1rem; border-radius: 4px; overflow: hidden; margin: .6rem 0; }
.scale .longer { background: var(--chosen); } .scale .equal { background: var(--line); }
.scale .shorter { background: var(--rejected); }
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Should a text get past all the rest, a browser still neither runs nor fetches anything."""

_PART_NAMES = {
    "prompt": "Prompt",
    "chosen": "Chosen response",
    "rejected": "Rejected response",
    "longest": "Prompt and longer response",
}


def data_page(report: Report) -> str:
    """Return the page."""
    sections = [
        _summary(report),
        "<h2>What was found</h2>",
        *map(_finding, report.findings),
        _not_found(report.not_found),
        "<h2>What was read</h2>",
        *(_read(name, statistics) for name, statistics in report.read.items()),
        "<h2>Length</h2>",
        _length_bias(report.length_bias),
        _lengths(report.lengths),
        *([] if report.margins is None else ["<h2>Margins</h2>", _margins(report.margins)]),
        *([] if report.boundary is None else ["<h2>Where prompts and responses end</h2>", _boundary(report.boundary)]),
        f'<p class="soft">Written by dpo {escape(__version__)}.</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Preference data</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _shown(text: str) -> str:
    """Write a text of the data so that it is seen and does nothing."""
    return escape(visible(text))


def _summary(report: Report) -> str:
    severities: list[str] = [finding.severity for finding in report.findings]
    counts = [
        f'<span class="badge {severity}">{_several(severities.count(severity), name)}</span>'
        for severity, name in (("error", "error"), ("warning", "warning"), ("info", "note"))
    ]
    copies = f" ({report.num_copies:,} of them repeated by a weight, and counted once)" if report.num_copies else ""
    pairs = f"{report.num_train:,} pairs to train on{copies}, {report.num_held_out:,} held out"
    left_out = ", ".join(f"{count:,} {escape(name)}" for name, count in report.left_out.items())
    gone = f"<p>Left out by <code>data.drop</code>: {left_out}.</p>" if left_out else ""
    return f"<header><h1>Preference data</h1><p>{pairs}.</p>{gone}<p>{''.join(counts)}</p></header>"


def _several(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"


def _finding(finding: Finding) -> str:
    doubt = ' <span class="soft">(by a rule of thumb)</span>' if finding.heuristic else ""
    examples = "".join(map(_example, finding.examples))
    shown = f"<details><summary>Examples</summary>{examples}</details>" if examples else ""
    return (
        f'<section class="card finding {finding.severity}">'
        f'<h3><span class="count">{finding.count:,} <span class="soft">{escape(percent(finding.share))}</span></span>'
        f'<span class="badge {finding.severity}">{finding.severity}</span>{escape(finding.name)}{doubt}</h3>'
        f'<p>{_code(finding.meaning)}</p><p class="soft">{_code(finding.advice)}</p>{shown}</section>'
    )


def _example(example: Example) -> str:
    beside = f" beside <code>{_shown(example.other)}</code>" if example.other else ""
    texts = "".join(
        f'<span class="text {name}" dir="auto">{_shown(text)}</span>' for name, text in example.texts.items()
    )
    return f'<div class="example"><code>{_shown(example.origin)}</code>{beside}{texts}</div>'


def _not_found(names: Sequence[str]) -> str:
    listed = ", ".join(map(escape, names))
    return f'<p class="soft">Looked for and not found: {listed}.</p>' if listed else ""


def _read(name: str, statistics: Mapping[str, Any]) -> str:
    counts = {
        "rows read": statistics["rows_read"],
        "pairs kept": statistics["pairs_kept"],
        "prompts truncated": statistics["truncated"],
        "with a weight other than 1": statistics["weighted"],
        "with a margin other than 0": statistics["with_margin"],
    }
    rows = [[label, f"{count:,}"] for label, count in counts.items()]
    quantiles = list(statistics["tokens"]["prompt"])
    tokens = [[part, *(f"{found[q]:g}" for q in quantiles)] for part, found in statistics["tokens"].items()]
    return (
        f'<section class="card"><h3><code>{_shown(name)}</code></h3><div class="grid">{_table([], rows)}'
        f"{_dropped(statistics)}</div>{_sources(statistics['sources'])}"
        f"{_table(['tokens', *quantiles], tokens)}</section>"
    )


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    """Write what was read of each source, and how its rows were understood."""
    rows = [
        [
            f"<code>{_shown(source['source'])}</code>",
            _shown(source["shape"]),
            f"{source['rows']:,}",
            f"{source['pairs']:,}",
        ]
        for source in sources
    ]
    return _table(["source", "shape", "rows", "pairs"], rows)


def _dropped(statistics: Mapping[str, Any]) -> str:
    dropped = statistics["dropped"]
    if not dropped:
        return '<p class="soft">No row was dropped.</p>'
    examples = "".join(
        f"<p>{_shown(reason)}</p>" + "".join(f'<span class="text">{_shown(line)}</span>' for line in lines[:EXAMPLES])
        for reason, lines in statistics["examples"].items()
    )
    drawn = bars({visible(reason): count for reason, count in dropped.items()}, max(dropped.values()))
    return f"<div><p>Dropped rows</p>{drawn}<details><summary>Examples</summary>{examples}</details></div>"


def _length_bias(bias: LengthBias) -> str:
    total = bias.longer + bias.equal + bias.shorter
    parts = {"longer": bias.longer, "equal": bias.equal, "shorter": bias.shorter}
    scale = "".join(
        f'<div class="{name}" style="width:{100 * count / total:.2f}%" title="{name}: {count:,}"></div>'
        for name, count in parts.items()
    )
    low, high = (100 * bound for bound in bias.interval)
    return (
        '<section class="card"><h3>“The longer one is better”</h3>'
        f"<p>A judge who goes by length alone is right about {100 * bias.accuracy:.1f} % of the pairs "
        f'<span class="soft">(ties half; 95 % interval {low:.1f} to {high:.1f} %)</span>.</p>'
        f'<div class="scale">{scale}</div><p class="soft">The chosen response is longer in {bias.longer:,} pairs, '
        f"as long in {bias.equal:,}, shorter in {bias.shorter:,}.</p></section>"
    )


def _lengths(lengths: Lengths) -> str:
    dropped = sum(lengths.too_long.get("longest", ()))
    shades = f'<p class="soft">In a lighter shade: {dropped:,} dropped as too long.</p>' if dropped else ""
    drawn = []
    for name, counts in lengths.histograms.items():
        more = lengths.too_long.get(name, ())
        bins = histogram(name, counts, lengths.bin_tokens, more, open_ended=lengths.open_ended)
        drawn.append(f'<section class="card"><h3>{_PART_NAMES[name]}</h3>{bins}{shades}</section>')
    responses = plane(lengths.plane, lengths.plane_tokens)
    drawn.append(
        f'<section class="card"><h3>Chosen against rejected</h3>{responses}'
        f"{'<p class=soft>Of the pairs that are kept.</p>' if dropped else ''}</section>"
    )
    cuts = [[f"{cut.max_length:,}", f"{cut.num_longer:,}"] for cut in lengths.cuts]
    table = _table(["data.max_length", "longer pairs"], cuts)
    drawn.append(f'<section class="card"><h3>What a length rule would cut</h3>{table}</section>')
    return f'<div class="grid">{"".join(drawn)}</div>'


def _margins(margins: Margins) -> str:
    rows = {
        "pairs with a margin": f"{margins.pairs:,}",
        "smallest": f"{margins.smallest:g}",
        "median": f"{margins.median:g}",
        "largest": f"{margins.largest:g}",
        "used by the loss": "yes, times <code>margin_scale</code>" if margins.used else "no",
    }
    return f'<section class="card">{_table([], [[name, value] for name, value in rows.items()])}</section>'


def _boundary(boundary: Boundary) -> str:
    facts = []
    if boundary.bos:
        facts.append(
            [f"prompts that begin with <code>{_shown(boundary.bos)}</code>", f"{boundary.starting_with_bos:,}"]
        )
        facts.append(["… and with a second one", f"{boundary.starting_with_two:,}"])
    for name, count in boundary.without_eos.items():
        facts.append([f"{name} responses that do not end with <code>{_shown(boundary.eos)}</code>", f"{count:,}"])
    for part, endings in boundary.endings.items():
        for text, count in endings:
            facts.append([f"{part} ends with <code>{_shown(text)}</code>", f"{count:,}"])
    return f'<section class="card">{_table([], facts)}</section>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table whose cells are HTML already; all columns but the first hold numbers."""
    top = "".join(_cell("th", place, escape(name)) for place, name in enumerate(head))
    body = "".join(f"<tr>{''.join(_cell('td', place, value) for place, value in enumerate(row))}</tr>" for row in rows)
    return f"<table>{f'<tr>{top}</tr>' if head else ''}{body}</table>"


def _cell(tag: str, place: int, content: str) -> str:
    return f"<{tag}{' class=number' if place else ''}>{content}</{tag}>"


def _code(text: str) -> str:
    """Write a sentence of the program, what stands between backticks as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts))
