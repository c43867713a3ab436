"""The pages' only style sheet: plain, readable in light and in dark, wide tables scroll."""

LEVELS = 10  # shades of correction, .m1 … .m10


def _shades(colour: str) -> str:
    return "".join(f".m{n}{{background:rgba({colour},{0.12 + 0.07 * n:.2f})}}" for n in range(1, LEVELS + 1))


CSS = (
    """
:root{color-scheme:light dark;--line:#c8c8c8;--box:#f5f5f3;--faint:#666;--yes:#17702b;--no:#b3261e}
body{margin:0;font:16px/1.5 system-ui,sans-serif;background:#fff;color:#1b1b1b}
main{max-width:90rem;margin:auto;padding:1rem 1.5rem}
h1,h2,h4{overflow-wrap:anywhere}
h2{margin-top:3rem;border-top:2px solid var(--line);padding-top:1rem}
h4{margin:.5rem 0 .25rem}
h1,h2,h4,td,th,li,summary,p{unicode-bidi:isolate}
pre,.answer,code{font-family:ui-monospace,monospace;font-size:.875rem;white-space:pre-wrap;overflow-wrap:anywhere}
pre{background:var(--box);padding:.75rem;margin:.25rem 0;max-height:30rem;overflow:auto;border-radius:4px}
.wide{overflow-x:auto}
.arms{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(20rem,1fr);gap:.75rem;align-items:start}
article{border:1px solid var(--line);border-radius:4px;padding:.25rem .75rem .75rem;min-width:0}
article p{margin:.25rem 0 .5rem}
div.answer{line-height:1.7}
table{border-collapse:collapse;font-size:.875rem}
th,td{border:1px solid var(--line);padding:.25rem .5rem;text-align:left;vertical-align:top}
td code{white-space:pre}
.places td{white-space:nowrap}
.sign{text-align:center}
summary{cursor:pointer;color:var(--faint);margin:.5rem 0}
.faint{color:var(--faint)}
.yes{color:var(--yes)}
.no{color:var(--no)}
.c{border-bottom:3px solid var(--no);font-weight:bold}
"""
    + _shades("240,140,20")
    + """
@media(prefers-color-scheme:dark){
:root{--line:#4a4a4a;--box:#242424;--faint:#a5a5a5;--yes:#6fcf85;--no:#ff8a80}
body{background:#171717;color:#e8e8e8}a{color:#8ab4f8}
"""
    + _shades("200,90,0")
    + "}\n"
)
