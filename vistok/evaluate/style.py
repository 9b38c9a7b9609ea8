"""The style sheet of the report: light, narrow enough to read, one column on a phone."""

from __future__ import annotations

STYLE = """
:root { --ink: #181d27; --soft: #535862; --line: #e5e7eb; --paper: #ffffff; --wash: #f8fafc; --accent: #2563eb; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 40px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 10px; }
h3 { font-size: 0.8rem; margin: 0 0 8px; color: var(--soft); text-transform: uppercase; letter-spacing: 0.06em; }
header p, .lead, footer { color: var(--soft); margin: 0; }
.lead { font-size: 0.87rem; margin-bottom: 12px; }
section { margin-top: 34px; }
code, .file, .facts td { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.command { margin: 14px 0 0; padding: 10px 14px; border-radius: 8px; background: #111827; color: #e5e7eb;
  overflow-x: auto; font-size: 0.84rem; }
.command code::before { content: "$ "; color: #6b7280; }
.notes { margin-top: 18px; padding: 10px 14px; border-left: 3px solid #ca8a04; background: #fefce8;
  border-radius: 0 8px 8px 0; font-size: 0.9rem; }
.notes p { margin: 2px 0; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); margin-top: 22px; }
.tile, .pair, .chart, .scroll, .brief { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 14px; }
.name { font-size: 0.82rem; color: var(--soft); font-weight: 600; }
.name span { color: var(--accent); }
.value { font-size: 1.65rem; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.value small { font-size: 0.9rem; font-weight: 500; color: var(--soft); margin-left: 4px; }
.interval { font-size: 0.76rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.definition { font-size: 0.72rem; line-height: 1.35; color: #717680; margin-top: 6px; }
.groups { display: grid; gap: 18px; grid-template-columns: repeat(3, minmax(0, 1fr)); }
.gallery { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); margin-top: 14px; }
.group .pair + .pair { margin-top: 12px; }
.pair { margin: 0; overflow: hidden; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; background: var(--paper); }
.sides img { display: block; width: 100%; height: auto; image-rendering: auto; }
figcaption { padding: 7px 10px 9px; font-size: 0.8rem; }
.file { font-size: 0.74rem; color: var(--soft); overflow-wrap: anywhere; }
.values { font-variant-numeric: tabular-nums; }
.charts { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.chart { display: block; width: 100%; height: auto; padding: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.87rem; }
th, td { text-align: left; padding: 7px 12px; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > th, tr:last-child > td { border-bottom: 0; }
thead th { font-size: 0.78rem; color: var(--soft); background: var(--wash); white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
thead th.number { text-align: right; }
.tables { display: grid; gap: 0 24px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.tables section { min-width: 0; }
.below { margin-top: 8px; }
.facts th { font-weight: 500; color: var(--soft); white-space: nowrap; width: 1%; }
.facts td { font-size: 0.8rem; overflow-wrap: anywhere; }
.brief { border-collapse: separate; border-spacing: 0; overflow: hidden; }
.sheet th { font-size: 0.8rem; overflow-wrap: anywhere; }
.sheet td { padding: 5px 6px; font-size: 0.74rem; color: var(--soft); min-width: 104px; }
.sheet img { display: block; width: 100%; max-width: 180px; height: auto; border-radius: 6px; margin-bottom: 2px; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--accent); font-size: 0.9rem; }
details .scroll { margin-top: 10px; }
footer { margin-top: 40px; font-size: 0.78rem; }
@media (max-width: 760px) {
  main { padding: 18px 12px 28px; }
  .groups { grid-template-columns: 1fr; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; }
  .value { font-size: 1.35rem; }
  .facts th { white-space: normal; }
}
@media print { body { background: #fff; } .pair, .chart, .tile { break-inside: avoid; } }
"""
