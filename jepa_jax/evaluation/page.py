"""The report's frame and style; `string.Template` fills the frame."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
$body
</body>
</html>
"""

STYLE = """
:root {
  --page: #fff; --card: #f7f7f5; --ink: #1c1d1f; --faint: #6b6e73;
  --rule: #e2e2de; --good: #1a7f4b; --bad: #c0392b;
  --c0: #2f6fd0; --c1: #d97706; --c2: #12916f; --c3: #c13584; --c4: #7656c9;
  --c5: #7a8a00;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --card: #1d2024; --ink: #e8e9ea; --faint: #9a9ea5;
    --rule: #33373d; --good: #54c98a; --bad: #ff7b6b;
    --c0: #6ea3f5; --c1: #f5a742; --c2: #3cc9a0; --c3: #f07cb8; --c4: #ab92f2;
    --c5: #c3d13c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 28px 20px 60px; max-width: 1160px; color: var(--ink);
  background: var(--page); font: 16px/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums;
}
h1 { margin: 0; font-size: 1rem; font-weight: 600; color: var(--faint); }
h2 { margin: 48px 0 12px; font-size: 1.35rem; }
h3 { margin: 24px 0 8px; font-size: 1rem; color: var(--faint); }
p { margin: 8px 0; max-width: 85ch; }
.verdict { margin: 4px 0 20px; text-wrap: pretty; }
.verdict b { display: block; margin-bottom: 6px; font-size: 1.6rem;
  line-height: 1.25; }
.alarm { padding: 12px 16px; border-left: 4px solid var(--bad);
  color: var(--bad); background: var(--card); font-weight: 600; }
.note, .missing { color: var(--faint); font-size: .875rem; }
.missing { font-style: italic; }
.faint { color: var(--faint); } .good { color: var(--good); }
.bad { color: var(--bad); } .good, .bad { font-weight: 600; }
.facts { display: flex; flex-wrap: wrap; gap: 12px 36px; margin: 0; }
.facts dt { color: var(--faint); font-size: .8125rem; }
.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9375rem; }
th, td { padding: 7px 14px 7px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
thead th { color: var(--faint); font-size: .8125rem; font-weight: 500;
  vertical-align: bottom; }
.probes { width: 100%; white-space: nowrap; }
.probes :is(th, td):nth-child(n+3) { padding: 7px 0 7px 14px;
  text-align: right; }
.probes .main { font-weight: 700; }
.leaves { table-layout: fixed; width: 100%; max-width: 760px; }
.leaves th { width: 40%; font-weight: 400; color: var(--faint); }
.leaves :is(th, td) { overflow-wrap: anywhere; padding: 4px 14px 4px 0; }
details { margin: 6px 0; padding-left: 14px;
  border-left: 2px solid var(--rule); }
summary { cursor: pointer; font-weight: 600; margin-left: -6px; }
summary small { color: var(--faint); font-weight: 400; }
figure { margin: 0; }
.charts { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); }
.chart { padding: 12px 12px 6px; border-radius: 8px; background: var(--card); }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 0 12px;
  justify-content: space-between; font-size: .875rem; font-weight: 500; }
.chart figcaption > span { margin-left: auto; }
.key { margin-left: 12px; font-weight: 400; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px;
  margin: 0 5px 4px 0; background: var(--c); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--faint); }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke: var(--c); stroke-width: 1.8;
  stroke-linejoin: round; }
.pale { opacity: .35; stroke-width: 1; }
circle { fill: var(--c); }
.strips { display: grid; gap: 20px 28px;
  grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); }
.strip { display: grid; gap: 8px; grid-auto-columns: 1fr;
  grid-auto-flow: column; }
.strip figcaption { margin-top: 3px; font-size: .75rem; line-height: 1.3;
  color: var(--faint); }
.strip img { display: block; width: 100%; }
.strip svg, .strip img { border-radius: 4px; }
.squares { image-rendering: pixelated; }
.hidden { fill: var(--page); shape-rendering: crispEdges; }
.frame { --c: var(--faint); }
.block { fill: var(--c); opacity: .5; shape-rendering: crispEdges; }
.edge { fill: none; stroke: var(--c); stroke-width: 2;
  vector-effect: non-scaling-stroke; stroke-linecap: square; }
@media screen and (max-width: 640px) {
  .probes, .probes :is(thead, tbody) { display: block; }
  .probes tr { display: grid; grid-template-columns: repeat(5, 1fr);
    padding: 6px 0; border-bottom: 1px solid var(--rule); }
  .probes :is(th, td):nth-child(n) { padding: 1px 0; border: 0;
    white-space: normal; }
  .probes :is(th, td):nth-child(1) { grid-column: 1 / 3; }
  .probes :is(th, td):nth-child(2) { grid-column: 3 / 6; text-align: right; }
  .probes :is(th, td):nth-child(3) { text-align: left; }
  .probes :is(small, thead th:nth-child(-n+2), :nth-child(8)) { display: none; }
}
@media print {
  html { font-size: 12px; }
  body { padding: 0; max-width: none; font-size: 1rem; }
  .wide { overflow: visible; }
  * { print-color-adjust: exact; }
  .chart, .strip, tr, header { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .charts { grid-template-columns: repeat(3, 1fr); }
  .strips { grid-template-columns: repeat(2, 1fr); }
  details::details-content { content-visibility: visible; display: block;
    block-size: auto; }
}
"""
