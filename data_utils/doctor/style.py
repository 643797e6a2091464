"""The page's style sheet: light and dark, from a phone to a desk."""

TOKENS = """
:root { color-scheme: light dark; --plane: #f9f9f7; --surface: #fcfcfb; --ink: #0b0b0b; --soft: #52514e;
  --grid: #e1e0d9; --hue: #2a78d6; --tint: #cde2fb; --track: #eceae4; --bad: #b42525; --warn: #8a5a00;
  --good: #006300; }
@media (prefers-color-scheme: dark) {
  :root { --plane: #0d0d0d; --surface: #1a1a19; --ink: #fff; --soft: #c3c2b7; --grid: #33332f; --hue: #3987e5;
    --tint: #184f95; --track: #2c2c2a; --bad: #f07070; --warn: #fab219; --good: #4cc24c; } }
"""
"""Colours, which the trainer's report shares."""

STYLE = (
    TOKENS
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--plane); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
header, section { background: var(--surface); border: 1px solid var(--grid); border-radius: .6rem;
  padding: 1rem 1.25rem; margin-bottom: 1rem; }
header { border-left-width: .5rem; }
header.refused { border-left-color: var(--bad); } header.refused .icon { color: var(--bad); }
header.look { border-left-color: var(--warn); } header.look .icon { color: var(--warn); }
header.sound { border-left-color: var(--good); } header.sound .icon { color: var(--good); }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.2; }
h2 { margin: 0 0 .5rem; font-size: 1.2rem; }
h3 { margin: 1.2rem 0 .4rem; font-size: 1rem; }
h4 { margin: .6rem 0 .2rem; font-size: .85rem; color: var(--soft); }
p { margin: .3rem 0 .8rem; max-width: 46rem; }
section > p { color: var(--soft); }
.quiet, footer, .places, dt { color: var(--soft); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .5rem 0 0; }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .88em ui-monospace, monospace; overflow-wrap: anywhere; }

.wide { overflow-x: auto; margin-bottom: .8rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid); }
th { font-size: .85rem; font-weight: 600; color: var(--soft); vertical-align: bottom; }
td:first-child { overflow-wrap: anywhere; min-width: 7rem; }
.n { text-align: right; white-space: nowrap; padding: .3rem 0 .3rem .9rem; width: 6.5rem; }
th.n { white-space: normal; }
.b { width: 10rem; }
.bar { display: block; min-width: 6rem; height: .7rem; margin-top: .4rem; background: var(--track);
  border-radius: 2px; }
.bar i { display: block; height: 100%; background: var(--hue); border-radius: 2px; }

.findings { list-style: none; margin: 0 0 .8rem; padding: 0; }
.findings li { display: grid; grid-template-columns: 5.5rem minmax(0, 1fr); gap: .75rem; padding: .4rem 0;
  border-top: 1px solid var(--grid); }
.findings li:first-child { border-top: 0; }
.badge { font-size: .8rem; font-weight: 600; white-space: nowrap; color: var(--soft); padding-top: .15rem; }
.badge.refused { color: var(--bad); } .badge.look { color: var(--warn); } .badge.fine { color: var(--good); }
.badge > span { display: inline-block; width: 1.2rem; border: 1px solid; border-radius: 50%; text-align: center;
  line-height: 1.1rem; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption { font-weight: 600; font-size: .9rem; }
svg { width: 100%; height: auto; max-width: 28rem; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg line { stroke: var(--grid); }
svg rect { fill: var(--hue); } svg rect:hover { fill: var(--ink); }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; margin-bottom: 1rem; }
.tiles div { color: var(--soft); font-size: .85rem; line-height: 1.3; }
.tiles b { display: block; font-size: 1.5rem; color: var(--ink); font-weight: 600; }

details { border-top: 1px solid var(--grid); padding: .5rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
details ul { margin: .3rem 0; padding-left: 1.2rem; }
blockquote { margin: 0; padding: .4rem .7rem; background: var(--plane); border-left: 3px solid var(--grid);
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; }

.tokens { max-width: none; font: .85rem/2 ui-monospace, monospace; overflow-wrap: anywhere; }
.tokens span { position: relative; padding: .15rem 1px; margin-right: 1px; border-radius: 3px; }
.tokens .p { color: var(--soft); background: var(--track); }
.tokens .s { color: var(--ink); background: var(--tint); border-bottom: 2px solid var(--hue); }
.tokens .u { color: var(--soft); border-bottom: 2px dotted var(--soft); }
.tokens i { opacity: .35; font-style: normal; }
.tokens [data-id]:hover { outline: 1px solid var(--ink); }
.tokens [data-id]:hover::after { content: "id " attr(data-id); position: absolute; left: 0; bottom: 100%; z-index: 1;
  padding: 0 .4rem; background: var(--ink); color: var(--surface); border-radius: 3px; white-space: nowrap;
  line-height: 1.5; }
footer { padding: 0 .25rem 1rem; }

@media (max-width: 40rem) {
  body { padding: .5rem; }
  header, section { padding: .75rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .4rem; }
  .findings li { grid-template-columns: 1fr; gap: .1rem; }
  table { font-size: .9rem; }
  .n { padding-left: .5rem; width: auto; }
  .b { display: none; }
}
"""
)
