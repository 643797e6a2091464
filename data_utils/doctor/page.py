"""The report as one HTML page that needs nothing else: no network, no script. What rows hold is escaped."""

from __future__ import annotations

from collections.abc import Sequence

from data_utils.doctor.charts import bar, histogram, number, percent, table, text
from data_utils.doctor.report import Cue, Finding, Reason, Refused, Report, SetCounts, Suspect, Token, TokenRow
from data_utils.doctor.style import STYLE

VERDICTS = {
    "sound": ("✓", "Sound", "Nothing to worry about was found."),
    "look": ("!", "Look at these", "The trainer would run, but these findings deserve a look first."),
    "refused": ("✕", "Refused", "The trainer would not run on this data as it is."),
}
LEVELS = {"refused": ("✕", "refused"), "look": ("!", "look"), "note": ("i", "note"), "fine": ("✓", "fine")}
MAX_NAMES = 20  # sources that are listed one by one
BIAS_MEANING = (
    "A rule that always picks the longer response is right for this share of the pairs: at 50 % length says nothing, "
    "far from it the model may learn length in place of quality."
)


def page(report: Report) -> str:
    """The whole page."""
    icon, title, meaning = VERDICTS[report.verdict]
    sections = (
        _findings(report),
        _counts(report),
        _lengths(report),
        _cuts(report),
        _layouts(report),
        _repeats(report),
        _bias(report),
        _leakage(report),
        _template(report),
        _suspects(report.suspects),
        "" if report.token_row is None else _tokens(report.token_row),
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>Data doctor: {title}</title>
<style>{STYLE}</style>
</head>
<body>
<header class="{report.verdict}">
<h1><span class="icon" aria-hidden="true">{icon}</span> {title}</h1>
<p>{meaning} <span class="quiet">Exit code {report.exit_code}.</span></p>
{_facts(report)}
</header>
<main>
{"".join(sections)}
</main>
<footer>Made by <code>python -m data_utils.doctor</code> in {report.cpu_seconds:.1f} s of CPU time.
<code>--json FILE</code> writes the same for programs.</footer>
</body>
</html>
"""


def _section(title: str, body: str, lead: str = "") -> str:
    return f"<section><h2>{title}</h2>{f'<p>{lead}</p>' if lead else ''}{body}</section>\n"


def _facts(report: Report) -> str:
    """What was examined, and as if trained how."""
    setting = report.setting
    facts = {"training data": _paths(setting.train)}
    if setting.eval:
        facts["evaluation data"] = _paths(setting.eval)
    facts["model"] = text(setting.model) if setting.model else "none given: lengths are in characters"
    if setting.max_length is not None:
        facts["max_length"] = f"{number(setting.max_length)} tokens"
    facts["on_bad_row"] = setting.on_bad_row
    if setting.on_bad_row == "skip":
        facts["on_bad_row"] += f", at most {setting.max_bad_fraction:g} of the rows"
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items()) + "</dl>"


def _paths(paths: Sequence[str]) -> str:
    shown = ", ".join(f"<code>{text(path)}</code>" for path in paths[:MAX_NAMES])
    return shown + (f" and {len(paths) - MAX_NAMES} more" if len(paths) > MAX_NAMES else "")


def _findings(report: Report) -> str:
    clean = [text(flag.what) for flag in report.flags if not flag.count]
    after = f'<p class="quiet">Looked for in the rows and not found: {"; ".join(clean)}.</p>' if clean else ""
    return _section("Findings", f'<ul class="findings">{"".join(map(_finding, report.findings))}</ul>{after}')


def _finding(finding: Finding) -> str:
    count = f"<b>{number(finding.count)}</b> " if finding.count else ""
    places = _places(finding.places, finding.count)
    return f"<li>{_badge(finding.level)}<div>{count}{text(finding.what)}{places}</div></li>"


def _badge(level: str) -> str:
    icon, name = LEVELS[level]
    return f'<span class="badge {level}"><span aria-hidden="true">{icon}</span> {name}</span>'


def _places(places: Sequence[str], count: int) -> str:
    """The first rows; a file is named where it changes."""
    shown, last = [], ""
    for place in places:
        file, _, line = place.rpartition(":")
        shown.append(f"<code>{text(line if file == last else place)}</code>")
        last = file
    more = ", …" if count > len(places) else ""
    return f'<div class="places">{", ".join(shown)}{more}</div>' if shown else ""


def _counts(report: Report) -> str:
    body = _set(report.train, "Training")
    if report.eval is not None:
        body += _set(report.eval, "Evaluation")
    return _section("Rows", body)


def _set(counts: SetCounts, name: str) -> str:
    refused = "".join(_refused(item, counts.rows) for item in counts.refused)
    sources = [(text(source.name), source.pairs) for source in counts.sources]
    if len(sources) > MAX_NAMES:
        rest = sum(pairs for _, pairs in sources[MAX_NAMES:])
        sources = [*sources[:MAX_NAMES], (f"{len(sources) - MAX_NAMES} more", rest)]
    families = [(text(family.name) or "prompt / chosen / rejected", family.pairs) for family in counts.families]
    return (
        f"<h3>{name}: {number(counts.rows)} rows, {number(counts.pairs)} usable pairs</h3>"
        + (f'<ul class="findings">{refused}</ul>' if refused else "")
        + _shares("source of the rows that could be read", sources)
        + _shares("kind of row", families)
    )


def _shares(heading: str, names: Sequence[tuple[str, int]]) -> str:
    total = sum(pairs for _, pairs in names)
    rows = [(name, bar(pairs / total), number(pairs), percent(pairs / total)) for name, pairs in names]
    return table((heading, "", "pairs", "share"), rows) if rows else ""


def _refused(item: Refused, rows: int) -> str:
    what = f"<b>{number(item.count)}</b> ({percent(item.count / rows)}) <code>{text(item.cause)}</code>"
    message = f'<div class="quiet">first: {text(item.message)}</div>'
    return f"<li>{_badge('refused')}<div>{what}{message}{_places(item.places, item.count)}</div></li>"


def _lengths(report: Report) -> str:
    if report.lengths is None:
        return ""
    unit = report.setting.unit
    rows = []
    for part, lengths in report.lengths.items():
        p = lengths.percentiles
        rows.append((part, *map(number, (lengths.mean, p.p5, p.p50, p.p95, p.p99, p.max))))
    charts = "".join(histogram(lengths.histogram, part, unit) for part, lengths in report.lengths.items())
    lead = f"In {unit}, before anything is cut."
    if unit == "characters":
        lead += " Give <code>--model</code> to count tokens and to see what <code>max_length</code> cuts."
    headings = ("", "mean", "p5", "p50", "p95", "p99", "max")
    return _section("Lengths", f'{table(headings, rows)}<div class="charts">{charts}</div>', lead)


def _cuts(report: Report) -> str:
    if report.cuts is None:
        return ""
    total = report.train.rows
    rows = []
    for cut in report.cuts:
        name = number(cut.max_length) + (" <b>(yours)</b>" if cut.max_length == report.setting.max_length else "")
        counts = (cut.pairs_cut, cut.responses_cut, cut.prompts_too_long, cut.identical, cut.tokens_lost)
        rows.append((name, bar(cut.pairs_cut / total), *map(number, counts), percent(cut.lost_fraction)))
    lead = (
        "Responses are cut at the end, prompts never: a pair whose prompt is too long, or whose responses are "
        "identical in what is left, is refused. The bar shows the share of pairs that are cut."
    )
    headings = (
        "max_length",
        "",
        "pairs cut",
        "responses cut",
        "prompts too long",
        "identical",
        "tokens lost",
        "of all",
    )
    return _section("What max_length cuts", table(headings, rows), lead)


def _layouts(report: Report) -> str:
    if report.layouts is None:
        return ""
    saved, unit = report.layouts, report.setting.unit
    factors = (1.0, saved.padded_over_packed, saved.padded_over_shared)
    names = ("padded", "packed", "shared")
    what = (
        "two rows per pair, random batches of 8 pairs",
        "no padding: 2 × prompt + chosen + rejected",
        "each prompt once: prompt + chosen + rejected",
    )
    positions = (saved.padded, saved.packed, saved.shared)
    rows = [
        (f"<b>{name}</b> {text(words)}", bar(value / saved.padded), number(value), f"{factor:.2f}×")
        for name, words, value, factor in zip(names, what, positions, factors, strict=True)
    ]
    lead = (
        f"What one epoch computes, in {unit}. {percent(saved.padding_fraction)} of the padded batches is padding; "
        f"computing each prompt once saves another factor of {saved.packed_over_shared:.2f}."
    )
    return _section("What the layouts save", table(("layout", "", unit, "fewer"), rows), lead)


def _repeats(report: Report) -> str:
    found = report.repeats
    rows = [
        ("the same pair came before", number(found.duplicates)),
        ("the same pair with chosen and rejected swapped", number(found.contradictory)),
        ("nearly the same pair came before", number(found.near_duplicates)),
        ("prompts that are distinct", number(found.distinct_prompts)),
        ("rows that share their prompt with another", number(found.rows_with_a_shared_prompt)),
        ("most rows of one prompt", number(found.most_rows_of_a_prompt)),
    ]
    body = table(("", "rows"), rows)
    if found.nearest:
        nearest = [
            (f"<code>{text(pair.where)}</code>", f"<code>{text(pair.earlier)}</code>", f"{pair.similarity:.2f}")
            for pair in found.nearest
        ]
        body += table(("row", "is nearly", "similarity"), nearest, words=2)
    lead = (
        "Nearly the same: prompts and responses both share at least 80 % of their runs of six bytes, letter case and "
        "white space aside (estimated from 64 hashes, ± 0.05)."
    )
    return _section("Repeated rows", body, lead)


def _bias(report: Report) -> str:
    bias = report.length_bias
    if bias is None:
        return ""
    tiles = (
        (percent(bias.accuracy), "accuracy of “pick the longer”"),
        (number(bias.chosen_longer), "chosen is longer"),
        (number(bias.rejected_longer), "rejected is longer"),
        (number(bias.equal), "equally long"),
    )
    longer = "".join(f"<div><b>{value}</b>{name}</div>" for value, name in tiles)
    headings = ("a response that", "chosen", "rejected", "decides", "accuracy")
    body = f'<div class="tiles">{longer}</div>' + table(headings, map(_cue, report.cues))
    lead = f"{BIAS_MEANING} Lengths are in {report.setting.unit}; ties count half."
    after = (
        '<p class="quiet">Decides: pairs in which exactly one response has it. Accuracy: how often that one is the '
        "chosen one.</p>"
    )
    return _section("Length bias and other shallow cues", body + after, lead)


def _cue(cue: Cue) -> tuple[str, ...]:
    accuracy = "–" if cue.accuracy is None else percent(cue.accuracy)
    return text(cue.what), percent(cue.chosen), percent(cue.rejected), percent(cue.decides), accuracy


def _leakage(report: Report) -> str:
    leak = report.leakage
    if leak is None:
        return ""
    counts = (
        ("the same pair", leak.same_pair),
        ("the same prompt, another pair", leak.same_prompt),
        ("nearly the same prompt", leak.near_prompt),
    )
    total = max(1, leak.eval_pairs)
    rows = [(name, number(count), percent(count / total)) for name, count in counts]
    body = table(("training also holds", "evaluation pairs", "share"), rows)
    if leak.examples:
        pairs = [(f"<code>{text(one.eval)}</code>", f"<code>{text(one.train)}</code>") for one in leak.examples]
        body += table(("evaluation row", "training row"), pairs, words=2)
    return _section("Leakage into the evaluation data", body, f"Of {number(leak.eval_pairs)} evaluation pairs.")


def _template(report: Report) -> str:
    if report.template is None:
        return ""
    items = "".join(f"<li>{_badge(habit.level)}<div>{text(habit.what)}</div></li>" for habit in report.template)
    return _section("Tokenizer and chat template", f'<ul class="findings">{items}</ul>')


def _suspects(suspects: Sequence[Suspect]) -> str:
    if not suspects:
        return ""
    lead = (
        "A row's score is the sum of the weights of what is suspicious about it; rows that the trainer refuses are "
        "listed further up. Texts are shortened."
    )
    shown = "".join(_suspect(suspect, is_first=place == 0) for place, suspect in enumerate(suspects))
    return _section("The most suspicious rows", shown, lead)


def _suspect(suspect: Suspect, is_first: bool) -> str:
    reasons = "".join(map(_reason, suspect.reasons))
    parts = (("prompt", suspect.prompt), ("chosen", suspect.chosen), ("rejected", suspect.rejected))
    shown = "".join(f"<h4>{name}</h4><blockquote>{text(value)}</blockquote>" for name, value in parts)
    title = f"<code>{text(suspect.where)}</code> <b>score {suspect.score}</b>"
    opened = " open" if is_first else ""
    return f"<details{opened}><summary>{title}</summary><ul>{reasons}</ul>{shown}</details>"


def _reason(reason: Reason) -> str:
    evidence = f": <code>…{text(reason.evidence)}…</code>" if reason.evidence else ""
    return f"<li><b>+{reason.weight}</b> {text(reason.what)}{evidence}</li>"


def _tokens(row: TokenRow) -> str:
    legend = (
        '<p class="tokens"><span class="p">prompt, not scored</span> <span class="s">scored</span> '
        '<span class="u">other turns of a response, not scored</span></p>'
    )
    parts = zip(("prompt", "chosen", "rejected"), (row.prompt, row.chosen, row.rejected), row.hidden, strict=True)
    body = "".join(_token_part(name, tokens, hidden) for name, tokens, hidden in parts)
    lead = f"<code>{text(row.where)}</code>, as the trainer sees it. A token's id shows when you point at it."
    return _section("One row, token by token", legend + body, lead)


def _token_part(name: str, tokens: Sequence[Token], hidden: int) -> str:
    kind = "p" if name == "prompt" else "u"
    spans = "".join(
        f'<span class="{"s" if token.scored else kind}" data-id="{token.id}">{_visible(token.text)}</span>'
        for token in tokens
    )
    note = f' <span class="quiet">({number(hidden)} more are not shown)</span>' if hidden else ""
    scored = sum(token.scored for token in tokens)
    title = f"{name}: {number(len(tokens) + hidden)} tokens"
    if scored:
        title += ", all scored" if scored == len(tokens) else f", {number(scored)} of those shown are scored"
    return f'<h3>{title}{note}</h3><p class="tokens">{spans}</p>'


def _visible(token: str) -> str:
    """White space made visible, and lines kept."""
    return text(token).replace("\n", "↵<br>").replace(" ", "<i>·</i>")
