# SPDX-License-Identifier: Apache-2.0
"""How a report looks: one stylesheet, light and dark, on a screen and on paper."""

STYLE = """
:root{--ink:#1b1f24;--soft:#5b6570;--line:#dfe3e8;--paper:#fff;--panel:#f6f8fa;--a:#8fb3d9;
--b:#c2410c;--good:#15803d}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#9aa5b1;--line:#333a43;
--paper:#14171b;--panel:#1c2127;--a:#5b87b5;--b:#fb923c;--good:#4ade80}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main{max-width:60rem;margin:0 auto;padding:0 1.5rem}
header{padding-top:2.5rem;border-bottom:1px solid var(--line)}
header p{margin:0;color:var(--soft)}
h1{margin:.1rem 0;font-size:2rem;letter-spacing:-.01em;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;padding:1rem 0}
nav a{color:var(--soft);text-decoration:none;font-size:.9rem}
nav a:hover{color:var(--b)}
section{padding:1.25rem 0}
h2{font-size:1.2rem;margin:.5rem 0 1rem}
h3{font-size:1rem;margin:1.25rem 0 .5rem}
.card{display:inline-block;min-width:11rem;margin:0 .75rem .75rem 0;padding:.75rem 1rem;
background:var(--panel);border:1px solid var(--line);border-radius:8px;vertical-align:top}
.card p{margin:0;color:var(--soft);font-size:.85rem;min-height:1.2em}
.card strong{font-size:1.6rem;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto;margin:0 0 1rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.35rem .75rem .35rem 0;border-bottom:1px solid var(--line);
vertical-align:top;overflow-wrap:anywhere}
thead th{color:var(--soft);font-weight:600}
tbody th{font-weight:500;width:15rem}
.figures td,.figures thead th+th{text-align:right;font-variant-numeric:tabular-nums}
.hashes td{font-family:ui-monospace,SFMono-Regular,Menlo,monospace;font-size:.8rem}
.hashes td:not(:last-child),.hashes thead th{white-space:nowrap;overflow-wrap:normal}
.hashes tbody th{width:auto;padding-right:1.5rem}
figure{margin:0 0 1.25rem}
figcaption{font-weight:600;font-size:.95rem}
svg{width:100%;height:auto;max-height:22rem}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.tick,.legend{fill:var(--soft);font-size:11px}
polyline{fill:none;stroke-width:1.6;stroke-linejoin:round}
polyline.s0{stroke:var(--a)}polyline.s1{stroke:var(--b);stroke-width:2.2}
circle.s0,rect.s0{fill:var(--a)}circle.s1,rect.s1{fill:var(--b)}
.bar{fill:var(--a)}
.sample{border:1px solid var(--line);border-radius:8px;margin:0 0 1rem;overflow:hidden}
.sample>p{margin:0;padding:.6rem 1rem;background:var(--panel);white-space:pre-wrap;
font-weight:500;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:8rem 1fr;gap:.35rem 1rem;margin:.75rem 1rem}
dt{color:var(--soft);font-size:.9rem}
dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
pre{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:.75rem 1rem;
white-space:pre-wrap;overflow-wrap:anywhere}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,monospace;font-size:.85rem}
@media print{nav{display:none}section{break-inside:avoid}}
"""
