"""How the parity report looks: light and dark, on a phone and on paper. No script, no font, nothing from outside."""

from __future__ import annotations

_LIGHT = """--paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --card: #f4f6f8; --good: #17692f;
  --good-paper: #e3f4e8; --bad: #b3261e; --bad-paper: #fdebe9; --warn: #7a5200; --warn-paper: #fff4d6; --own: #0b57a4;
  --limit: #7a5200; --noise: #6a4fb0;"""
_DARK = """--paper: #14171a; --ink: #e6e8ea; --soft: #a9b1b9; --line: #39414a; --card: #1e2327; --good: #74d492;
  --good-paper: #173021; --bad: #ff9d94; --bad-paper: #3a1c1a; --warn: #eac464; --warn-paper: #352b12; --own: #8ab8ff;
  --limit: #eac464; --noise: #c0abff;"""

STYLE = (
    """
:root { color-scheme: light dark; """
    + _LIGHT
    + """ }
@media (prefers-color-scheme: dark) { :root { """
    + _DARK
    + """ } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; max-width: 72rem; margin: 0 auto;
  padding: 1.25rem 1.25rem 4rem; background: var(--paper); color: var(--ink); }
h1 { font-size: 1.1rem; font-weight: 600; color: var(--soft); margin: 0 0 0.75rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.75rem 0 0.5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 0.25rem; }
p { margin: 0.5rem 0; max-width: 46rem; }
a { color: var(--own); }
:focus-visible { outline: 3px solid var(--own); outline-offset: 2px; }
.skip { position: absolute; left: -100rem; } .skip:focus { left: 1rem; top: 0.5rem; background: var(--paper);
  padding: 0.5rem; }
.verdict { border-left: 0.4rem solid; border-radius: 0.4rem; padding: 0.9rem 1.1rem; }
.verdict p { font-size: 1.2rem; line-height: 1.4; font-weight: 600; margin: 0.25rem 0; max-width: none;
  overflow-wrap: anywhere; color: var(--ink); }
.verdict .badge { font-size: 0.85rem; letter-spacing: 0.06em; }
.verdict.good { border-color: var(--good); background: var(--good-paper); }
.verdict.bad { border-color: var(--bad); background: var(--bad-paper); }
.verdict.good .badge { color: var(--good); } .verdict.bad .badge { color: var(--bad); }
.notice { border-left: 0.4rem solid var(--warn); background: var(--warn-paper); border-radius: 0.4rem;
  padding: 0.6rem 1.1rem; margin: 0.75rem 0; }
.notice strong { color: var(--warn); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 0.4rem; padding: 0.6rem 0.8rem;
  margin: 0.5rem 0; overflow-x: auto; font-size: 0.9rem; }
code, .mono { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 0.875em;
  overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); } .soft { color: var(--soft); }
.whole { white-space: nowrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: 0.75rem; margin: 1rem 0;
  padding: 0; list-style: none; }
.cards li { background: var(--card); border: 1px solid var(--line); border-radius: 0.5rem; padding: 0.7rem 0.9rem; }
.cards b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.cards li > span { display: block; font-size: 0.85rem; color: var(--soft); }
nav { border-bottom: 1px solid var(--line); padding: 0.75rem 0; font-size: 0.9rem; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; margin: 0; padding: 0; list-style: none; }
nav a { display: inline-block; padding: 0.15rem 0; }
.scroll { overflow-x: auto; margin: 0.75rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; }
caption { text-align: left; color: var(--soft); padding-bottom: 0.35rem; }
th, td { text-align: left; padding: 0.35rem 1rem 0.35rem 0; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
tbody th { color: var(--ink); }
tbody th { vertical-align: top; white-space: nowrap; }
td.number, th.number { font-variant-numeric: tabular-nums; white-space: nowrap; text-align: right; }
thead th { max-width: 9rem; } thead th.number { white-space: normal; }
td.long { min-width: 14rem; max-width: 30rem; overflow-wrap: anywhere; }
td.hash { max-width: 34rem; }
td img { max-width: 100%; height: auto; background: var(--card); }
details { margin: 0.75rem 0; } summary { cursor: pointer; padding: 0.25rem 0; }
svg { display: block; width: 100%; height: auto; } svg text { fill: currentColor; font-size: 13px; }
.wide svg { min-width: 54rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; padding: 0; margin: 0.5rem 0; list-style: none;
  font-size: 0.9rem; }
.legend svg { display: inline-block; width: 1.8rem; height: 0.9rem; vertical-align: -0.1rem; margin-right: 0.35rem; }
footer { margin-top: 3rem; padding-top: 0.75rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: 0.85rem; }
@media (max-width: 44rem) {
  body { padding: 0.9rem 0.9rem 3rem; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); } .cards b { font-size: 1.1rem; }
  table.stack, table.stack tbody, table.stack tr, table.stack td, table.stack tbody th { display: block; }
  table.stack thead { position: absolute; left: -100rem; }
  table.stack tr { border-bottom: 1px solid var(--line); padding: 0.5rem 0; }
  table.stack td, table.stack tbody th { border: 0; padding: 0.1rem 0; text-align: left; white-space: normal;
    min-width: 0; max-width: none; overflow-wrap: anywhere; }
  table.stack td[data-label]::before { content: attr(data-label) ": "; color: var(--soft); }
  table.stack td:empty { display: none; }
  table.stack td[data-label=""]::before { content: none; }
  nav a { padding: 0.35rem 0; }
}
@media print {
  :root { color-scheme: light; """
    + _LIGHT
    + """ }
  body { max-width: none; padding: 0; font-size: 10pt; } nav, .skip { display: none; }
  h2 { break-after: avoid; } tr, svg, .cards li, .verdict { break-inside: avoid; }
  .scroll { overflow: visible; } .wide svg { min-width: 0; } table { font-size: 8.5pt; }
  td.long { min-width: 0; } tbody th { white-space: normal; } thead { display: table-header-group; }
  details::details-content { content-visibility: visible; block-size: auto; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""
)
