"""The report's style sheet. Okabe and Ito's colours, safe for colour-blind readers;
tones differ in text too."""

STYLE = """
:root{--bg:#fff;--panel:#f5f6f8;--ink:#1b1f24;--soft:#59636e;--line:#d5dae0;--link:#0b5cad;
--good:#00694c;--bad:#a83a00;--warn:#7a5200;--mark:#0072b2;--passed:#009e73;--failed:#d55e00;
--other:#8a6d00;
--winner:#cc79a7;--winner-edge:#7d2f5a;--del:#fbdccb;--ins:#cdeee2}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--panel:#1e2329;--ink:#e6e9ed;--soft:#a3adb8;
--line:#39424c;
--link:#7cc0ff;--good:#4fd0a5;--bad:#ff9a66;--warn:#f0c35a;--mark:#56b4e9;--passed:#3fc59d;--failed:#ff8a4d;
--other:#d9b84a;--winner:#e79fc5;--winner-edge:#f7d3e6;
--del:#5c2f18;--ins:#12483a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
header,main{max-width:1180px;margin:0 auto;padding:0 24px}
header{padding-top:28px}
.brand{margin:0;color:var(--soft);letter-spacing:.04em;text-transform:uppercase;font-size:12px}
h1{margin:4px 0 12px;font-size:25px;line-height:1.25;overflow-wrap:anywhere}
h2{margin:36px 0 12px;font-size:19px;border-bottom:1px solid var(--line);padding-bottom:6px}
nav ul{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:0;padding:0;font-size:14px}
a{color:var(--link)}
a:focus-visible,summary:focus-visible,.scroll:focus-visible,.drawing:focus-visible{
outline:2px solid var(--link);outline-offset:2px}
p{max-width:78ch;overflow-wrap:anywhere}
li{overflow-wrap:anywhere}
.good{color:var(--good);font-weight:600}.bad{color:var(--bad);font-weight:600}
.warn{color:var(--warn);font-weight:600}.muted{color:var(--soft);font-style:italic;font-weight:400}
p.bad,p.warn,p.good{font-weight:400;color:var(--ink);border-left:4px solid var(--line);
padding:4px 0 4px 12px}
p.bad{border-color:var(--bad)}p.warn{border-color:var(--warn)}p.good{border-color:var(--good);
font-size:17px}
dl{margin:12px 0}
dd{margin:0;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:12px}
.cards div{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.cards dt{color:var(--soft);font-size:13px}
.cards dd{font-size:18px;line-height:1.35;margin-top:3px;font-variant-numeric:tabular-nums}
.cards .note{color:var(--soft);font-size:13px;font-weight:400;line-height:1.4;margin-top:2px}
.cards dd:first-of-type{font-weight:600}
.inline{display:flex;flex-wrap:wrap;gap:2px 20px;margin:2px 0 8px;font-size:14px}
.inline div{display:flex;gap:6px}.inline dt{color:var(--soft)}
.pair{border:1px solid var(--line);border-radius:8px;padding:12px 14px;margin:16px 0}
.pair h3{margin:0 0 4px;font-size:15px;overflow-wrap:anywhere}
.sides{display:grid;grid-template-columns:1fr 1fr;gap:14px}
.sides.one{grid-template-columns:1fr}.sides div{min-width:0}
.sides h4{margin:0 0 4px;color:var(--soft);font-size:13px;font-weight:600}
.sides p{margin:0;background:var(--panel);border-radius:6px;padding:8px 10px;white-space:pre-wrap;
font:13px/1.55 ui-monospace,"DejaVu Sans Mono",monospace;max-width:none}
del,ins{text-decoration-thickness:2px;border-radius:3px;padding:0 1px}
del{background:var(--del);text-decoration:line-through}ins{background:var(--ins);text-decoration:underline}
.facts div{display:grid;grid-template-columns:minmax(150px,260px) 1fr;gap:2px 18px;padding:5px 0;
border-bottom:1px solid var(--line)}
.facts dt{color:var(--soft);overflow-wrap:anywhere;min-width:0}
.scroll{overflow-x:auto;margin:14px 0}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
.caption{color:var(--soft);margin:18px 0 -8px;font-size:13px;max-width:none}
th,td{text-align:left;vertical-align:top;padding:6px 14px 6px 0;border-bottom:1px solid var(--line)}
thead th{color:var(--soft);font-weight:600;white-space:nowrap}
tbody th{font-weight:600;white-space:nowrap}
td{min-width:84px;max-width:420px;overflow-wrap:break-word}
pre{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:12px 14px;
overflow-x:auto;font:13px/1.5 ui-monospace,"DejaVu Sans Mono",monospace}
details{margin:12px 0}summary{cursor:pointer;color:var(--link)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,470px),1fr));gap:20px;
margin:16px 0}
figure{margin:0;background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
figcaption{font-weight:600;margin-bottom:6px}
.drawing{overflow-x:auto}
.drawing>svg{width:100%;min-width:440px;max-width:640px;height:auto;display:block;margin:0 auto}
svg text{fill:var(--ink);font-size:12px;font-family:inherit}
svg .tick{fill:var(--soft);font-size:12px}svg .label{font-size:13px}
svg .point,svg .row{font-size:12px}svg .limit-text{fill:var(--bad)}
.wide{grid-column:1/-1}
.drawing>svg.wide{max-width:none;min-width:900px}
.strand{fill:none;stroke-width:1.6;stroke-linejoin:round}
.s-failed{stroke:var(--failed);opacity:.5}.s-other{stroke:var(--other);opacity:.6;stroke-dasharray:4 3}
.s-passed{stroke:var(--passed);stroke-width:2}
.s-baseline{stroke:var(--ink);stroke-width:2.4;stroke-dasharray:8 3}
.s-winner{stroke:var(--winner-edge);stroke-width:3.4}
svg .halo{paint-order:stroke;stroke:var(--panel);stroke-width:4px;stroke-linejoin:round}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.limit{stroke:var(--bad);stroke-width:1.6;stroke-dasharray:6 4}
.front{fill:none;stroke:var(--mark);stroke-width:1.5;opacity:.75}
.m-baseline{fill:var(--bg);stroke:var(--ink);stroke-width:2.4}
.m-winner{fill:var(--winner);stroke:var(--winner-edge);stroke-width:1.6}
.m-passed{fill:var(--passed);stroke:var(--bg);stroke-width:1}
.m-failed{fill:none;stroke:var(--failed);stroke-width:2.6}
.m-other{fill:none;stroke:var(--other);stroke-width:2}
.series{fill:none;stroke-width:2.2;stroke-linejoin:round}
.series-0{stroke:var(--mark)}.series-1{stroke:var(--failed);stroke-dasharray:7 4}
.series-2{stroke:var(--passed);stroke-dasharray:2 3}
.series-3{stroke:var(--winner-edge);stroke-dasharray:10 3 2 3}
.series-4{stroke:var(--other);stroke-dasharray:4 3}.series-5{stroke:var(--soft);stroke-dasharray:1 3}
.dot-0{fill:var(--mark)}.dot-1{fill:var(--failed)}.dot-2{fill:var(--passed)}.dot-3{fill:var(--winner-edge)}
.dot-4{fill:var(--other)}.dot-5{fill:var(--soft)}
.area{stroke:none;opacity:.18}
.column{fill:var(--mark)}
.guide{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3}
.place{fill:var(--bg);stroke:var(--ink);stroke-width:2}
.bar{stroke-width:3}.cap{stroke-width:2}
.t-plain{stroke:var(--mark);fill:var(--mark)}.t-good{stroke:var(--passed);fill:var(--passed)}
.t-bad{stroke:var(--failed);fill:var(--failed)}.t-warn,.t-muted{stroke:var(--other);fill:var(--other)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;list-style:none;margin:8px 0 0;padding:0;font-size:13px}
.legend li{display:flex;align-items:center;gap:5px}
@media (max-width:520px){.drawing>svg.shrinks{min-width:0}svg.shrinks text{font-size:17px}
svg.shrinks .row{font-size:15px}svg.shrinks .minor{display:none}
tbody th{white-space:normal;min-width:104px}pre{white-space:pre-wrap;overflow-wrap:anywhere}}
@media (max-width:720px){table{width:max-content;min-width:100%}td{max-width:310px}
tbody th{position:sticky;left:0;background:var(--bg);max-width:46vw}}
@media (max-width:720px){.sides{grid-template-columns:1fr}}
@media (max-width:720px){header,main{padding:0 14px}.facts div{grid-template-columns:1fr}h1{font-size:21px}}
@media print{body{font-size:12px}.scroll,.drawing{overflow:visible}nav{display:none}}
""".strip()
