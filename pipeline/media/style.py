"""The report's style sheet: one column, system fonts, colours for light and dark."""

CSS = """
:root{--ink:#1c2430;--soft:#5b6675;--line:#dfe4ea;--page:#f6f7f9;--card:#fff;--accent:#2f6fde;--second:#c2571a;
--good:#1f8a4c;--bad:#c8372d;--third:#7a4fc0} @media
(prefers-color-scheme:dark){:root{--ink:#e4e8ee;--soft:#98a3b3;--line:#2c333d;--page:#12161b;--card:#1a2027;
--accent:#79a8ff;--second:#f0975c;--good:#56c488;--bad:#f07a70;--third:#b498f0}} *{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,
"Segoe UI",sans-serif} main{max-width:68rem;margin:0 auto;padding:2rem 1rem 4rem} h1{font-size:1.6rem;margin:0 0
1rem;letter-spacing:-.01em;overflow-wrap:anywhere} h2{font-size:1.05rem;margin:0 0 .8rem}
h3{font-size:.85rem;margin:1rem 0 .2rem;color:var(--soft);text-transform:uppercase;letter-spacing:.05em}
section,.tile{background:var(--card);border:1px solid var(--line);border-radius:.6rem} section{padding:1.1rem
1.2rem;margin-top:1rem} section p{margin:.2rem 0 .8rem;color:var(--soft);max-width:60rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:.8rem} .tile{padding:.8rem
1rem;display:flex;flex-direction:column} .tile
b{font-size:1.6rem;font-variant-numeric:tabular-nums;line-height:1.2} .tile
small,.how,figcaption{color:var(--soft)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(5.6rem,1fr));gap:.6rem;margin:.2rem 0 .6rem}
.pairs{grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr))} figure{margin:0;min-width:0} figure
img{display:block;width:100%;aspect-ratio:1;object-fit:contain;image-rendering:pixelated;border-radius:.3rem;
background:var(--line)} .pair{display:grid;grid-template-columns:1fr 1fr;gap:2px} .right img{outline:2px solid
var(--good);outline-offset:1px} .wrong img{outline:2px solid var(--bad);outline-offset:1px} .right
figcaption{color:var(--good)}.wrong figcaption{color:var(--bad)}
figcaption{font-size:.7rem;line-height:1.3;margin-top:.3rem;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:minmax(8rem,max-content) 1fr;gap:.15rem 1.2rem;margin:.2rem 0 .8rem;
font-size:.85rem} dt{color:var(--soft)} dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.4rem .9rem .4rem 0;border-top:1px solid var(--line)} thead
th{border-top:0;color:var(--soft);font-weight:500} tbody th{font-weight:600;white-space:nowrap}
td{white-space:nowrap} td.how{white-space:normal;min-width:16rem} .absent td,.absent th{color:var(--soft)}
svg{width:100%;height:auto;display:block;font:11px system-ui,sans-serif} svg text{fill:var(--soft)} svg
.axis{stroke:var(--line);stroke-width:1} svg .track{fill:var(--line)} svg
polyline{fill:none;stroke-width:1.6;stroke-linejoin:round} svg .c0{stroke:var(--accent)} svg
.c1{stroke:var(--second)} svg .c2{stroke:var(--third)} svg .c3{stroke:var(--good)} svg text.c0,svg text.c1,svg
text.c2,svg text.c3{stroke:none} svg text.c0{fill:var(--accent)} svg text.c1{fill:var(--second)} svg
text.c2{fill:var(--third)} svg text.c3{fill:var(--good)} svg .bar{fill:var(--accent)} @media
print{body{background:#fff}section,.tile{break-inside:avoid}}
"""
