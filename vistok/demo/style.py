"""How the page looks, light and dark; system fonts only."""

from __future__ import annotations

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "DejaVu Sans Mono", "monospace")

CSS = """
:root { --vt-ours: #2563eb; --vt-1: #d97706; --vt-2: #9333ea; --vt-3: #059669; --vt-wash: #eff6ff; --vt-bad: #b91c1c;
  --vt-bad-wash: #fef2f2; --vt-soft: #5b6472; }
.dark { --vt-ours: #60a5fa; --vt-1: #fbbf24; --vt-2: #c084fc; --vt-3: #34d399; --vt-wash: #172554; --vt-bad: #fca5a5;
  --vt-bad-wash: #450a0a; --vt-soft: #a1a9b7; }
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
footer { display: none !important; }
#vt-head { padding: 10px 2px 2px; }
#vt-head h1 { font-size: 1.55rem; font-weight: 700; letter-spacing: -0.02em; margin: 0; line-height: 1.25; }
#vt-head h1 span { color: var(--vt-ours); }
#vt-head p { margin: 4px 0 0; color: var(--vt-soft); font-size: 0.92rem; }
#vt-head code { font-size: 0.86em; }
.vt-figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(102px, 1fr)); gap: 10px;
  margin: 2px 0 14px; }
.vt-figure, .vt-card, .vt-curve, .vt-said { background: var(--block-background-fill); border-radius: 12px;
  border: 1px solid var(--border-color-primary); }
.vt-figure { padding: 9px 12px 10px; }
.vt-name { font-size: 0.74rem; font-weight: 600; color: var(--vt-soft); text-transform: uppercase;
  letter-spacing: 0.05em; }
.vt-value small { font-size: 0.85rem; font-weight: 600; color: var(--vt-soft); }
.vt-value { font-size: 1.4rem; line-height: 1.3; font-weight: 680; font-variant-numeric: tabular-nums;
  display: flex; flex-wrap: wrap; align-items: baseline; column-gap: 4px; }
.vt-small { font-size: 0.76rem; line-height: 1.4; color: var(--vt-soft); }
.vt-cards { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 14px; }
.vt-card { margin: 0; overflow: hidden; }
.vt-card img { display: block; width: 100%; height: auto; margin: 0; border-radius: 0; }
.vt-card figcaption { padding: 9px 13px 11px; }
.vt-ours { border: 2px solid var(--vt-ours); }
.vt-title { font-weight: 650; font-size: 0.93rem; overflow-wrap: anywhere; }
.vt-ours .vt-title { color: var(--vt-ours); }
.vt-values { display: flex; flex-wrap: wrap; gap: 2px 14px; margin-top: 5px; font-size: 0.8rem; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.vt-values i, .vt-said i { font-style: normal; font-weight: 500; color: var(--vt-soft); }
.vt-heading { font-size: 0.98rem !important; font-weight: 650; margin: 20px 0 10px !important; }
.vt-empty { display: flex; flex-direction: column; align-items: center; justify-content: center; gap: 6px;
  padding: 0 14%; text-align: center; color: var(--vt-soft); font-size: 0.86rem; line-height: 1.45;
  background: repeating-linear-gradient(45deg, transparent 0 11px, var(--border-color-primary) 11px 12px); }
.vt-empty b { font-size: 1.05rem; color: var(--body-text-color); }
.vt-empty b, .vt-empty span { background: var(--block-background-fill); padding: 1px 8px; border-radius: 6px; }
.vt-curve { padding: 14px 16px 8px; margin: 0; }
.vt-curve svg { display: block; width: 100%; height: auto; }
.vt-curve polyline { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
.vt-curve text { font-size: 12.5px; fill: var(--vt-soft); font-family: inherit; }
.vt-grid { stroke: var(--border-color-primary); stroke-width: 1; }
.vt-at { stroke: var(--vt-ours); stroke-width: 1.5; stroke-dasharray: 4 4; }
.vt-note { margin: 0; padding: 9px 13px; border-radius: 10px; background: var(--vt-wash); font-size: 0.86rem;
  line-height: 1.5; }
.vt-error { margin: 0; padding: 10px 14px; border-radius: 10px; font-weight: 600; color: var(--vt-bad);
  background: var(--vt-bad-wash); border: 1px solid var(--vt-bad); overflow-wrap: anywhere; }
.vt-painted { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; align-items: start; }
.vt-said { padding: 14px 16px; margin-top: 14px; }
.vt-said p { margin: 0 0 10px; line-height: 1.45; }
.vt-said p:last-child { margin: 0; }
.vt-said i { display: block; font-size: 0.76rem; }
.vt-question { font-weight: 650; }
#vt-tokens input[type=number] { font-weight: 650; }
.vt-photos { border: none !important; background: none !important; height: auto !important; min-height: 0 !important;
  overflow: visible !important; }
.vt-photos .grid-wrap { padding: 0; height: auto !important; max-height: none !important; min-height: 0 !important;
  overflow: visible !important; }
.vt-photos .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; gap: 8px;
  padding: 0; grid-auto-rows: auto !important; grid-template-rows: none !important; height: auto !important;
  align-content: start; }
.vt-photos .thumbnail-item { border-radius: 9px; width: 100% !important; height: auto !important; aspect-ratio: 1; }
.vt-plain, .vt-plain > .html-container { padding: 0 !important; }
@media (max-width: 760px) { .vt-cards { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .vt-painted { grid-template-columns: 1fr; } }
"""
