"use strict";
/* The page, made of the data that it carries: one run in detail, or several beside each other. */

const data = JSON.parse(document.getElementById("data").textContent);

/** Characters that cannot be seen, or that turn the text around them, by name. */
const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g;
const visible = (text) =>
  text.replace(INVISIBLE, (letter) => `⟨U+${letter.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
const text = (value) => h("span", { class: "isolate", dir: "auto" }, visible(String(value)));

const section = (title, lead, ...body) =>
  h("section", {}, h("h2", {}, title), lead ? h("p", { class: "lead" }, lead) : null, body);

/** A plain table: headings, rows of nodes or strings; columns beyond `words` hold numbers. A phone leaves out the columns
    from `extra` on. */
function table(headings, rows, { words = 1, extra = headings.length } = {}) {
  const kind = (place) => (place < words ? "text" : "n") + (place < extra ? "" : " extra");
  const cells = (tag, row) => row.map((cell, place) => h(tag, { class: kind(place) }, cell));
  return h("div", { class: "wide" },
    h("table", {}, h("thead", {}, h("tr", {}, cells("th", headings))),
      h("tbody", {}, rows.map((row) => h("tr", {}, cells("td", row))))));
}

const isShare = (key) => key.includes("accuracies") || key.includes("fell");
const show = (key) => (isShare(key) ? percent : format);

/* ---- one run */

function head(run) {
  const state = run.status.state || "unknown";
  return h("header", {},
    h("div", { class: "state " + state }, `${state}${run.status.step ? ` at step ${run.status.step.toLocaleString("en-US")}` : ""}`),
    h("h1", {}, text(run.name)),
    h("dl", {}, run.facts.map(([name, value]) => [h("dt", {}, name), h("dd", {}, text(value))])));
}

function tiles(run) {
  const rows = run.before_after.sets ? run.before_after.sets[""].rows : [];
  const wanted = ["rewards/accuracies", "loss", "rewards/margins", "drift/chosen"];
  const found = wanted.map((key) => rows.find((row) => row[0] === key)).filter(Boolean);
  const names = { "rewards/accuracies": "Held-out accuracy", loss: "Held-out loss", "rewards/margins": "Margin of rewards", "drift/chosen": "Drift of chosen, nats per token" };
  const cards = found.map(([key, , before, after]) => [names[key], show(key)(after), before === null ? "" : `${show(key)(before)} before training`]);
  for (const one of run.generations ? run.generations.scores : []) {
    cards.push([one.name, percent(one.after), one.before === null ? "50.0 % would be a draw" : `${percent(one.before)} before training`]);
  }
  return h("div", { class: "tiles" }, cards.map(([name, value, was]) =>
    h("div", { class: "tile" }, h("div", { class: "name" }, name), h("div", { class: "value" }, value), h("div", { class: "was" }, was))));
}

function beforeAfter(run) {
  const { sets, step } = run.before_after;
  if (!sets) return section("Held-out pairs", "No evaluation was made: data.eval is empty, or the run has not come to it.");
  const block = ([name, one]) => h("div", {}, name ? h("h3", {}, text(name)) : null,
    table([`${one.pairs.toLocaleString("en-US")} pairs`, "before", "after", "change"],
      one.rows.map(([key, label, before, after]) => [label, show(key)(before), show(key)(after), change(key, before, after)]), { extra: 3 }));
  const [whole, ...others] = Object.entries(sets).map(block);
  const groups = Object.entries(run.groups).filter(([, rows]) => rows.length).map(([kind, rows]) => h("div", {},
    h("h3", {}, kind === "source" ? "By source" : "By length of the longer response, in tokens"),
    table(["", "pairs", "accuracy", "loss", "margin"], rows.map((row) =>
      [text(row.name), format(row.pairs), percent(row["rewards/accuracies"]), format(row.loss), format(row["rewards/margins"])]), { extra: 4 })));
  const lead = `Exact means over every held-out pair, after step ${step.toLocaleString("en-US")}. Length controlled: the mean of the accuracies ` +
    "where the chosen response is the longer and where it is the shorter one. Drift: log pi − log ref of the given responses." +
    (sets[""].rows.some(([key]) => key.startsWith("kl")) ? " KL: exact over the vocabulary, averaged over the positions of the given responses, not over answers of the policy's own." : "");
  return section("Before and after", lead, whole, h("div", { class: "half" }, others, groups));
}

function change(key, before, after) {
  if (before === null || after === null) return "–";
  const gap = after - before;
  const sign = gap > 0 ? "+" : gap < 0 ? "−" : "±";
  return sign + (isShare(key) ? (100 * Math.abs(gap)).toFixed(1) + " points" : format(Math.abs(Number(gap.toPrecision(4)))));
}

const CHARTS = [
  { title: "Loss", training: ["loss"], evaluation: ["eval_loss"], logs: true },
  { title: "Accuracy", training: ["rewards/accuracies"], evaluation: ["eval_rewards/accuracies"], percent: true },
  { title: "Margin of rewards", training: ["rewards/margins"], evaluation: ["eval_rewards/margins"] },
  { title: "Rewards", training: ["rewards/chosen", "rewards/rejected"] },
  { title: "Log-probs of the responses", training: ["logps/chosen", "logps/rejected"] },
  { title: "Held-out drift, nats per token", evaluation: ["eval_drift/chosen", "eval_drift/rejected"] },
  { title: "KL to the reference on held-out responses, nats per token", evaluation: ["eval_kl_per_token/chosen", "eval_kl_per_token/rejected"] },
  { title: "Gradient norm", training: ["grad_norm"], log: true, logs: true },
  { title: "Learning rate", training: ["learning_rate"], logs: true },
  { title: "Pairs per second", training: ["pairs_per_second"] },
  { title: "Tokens per second", training: ["tokens_per_second"] },
  { title: "Model FLOPs utilization", training: ["mfu"], percent: true },
  { title: "Peak memory, GiB", training: ["peak_memory_gib"] },
  { title: "Share of time waiting for data", training: ["data_wait_fraction"], percent: true },
  { title: "Padding", training: ["padding_fraction"], percent: true },
];
const SERIES_NAMES = { chosen: "chosen", rejected: "rejected" };

function chartOf(run, spec) {
  const last = (key) => SERIES_NAMES[key.split("/").pop()];
  const both = spec.training && spec.evaluation;
  const series = (spec.training || []).map((key, place) => [run.training[key], last(key) || "training", "s" + place]);
  (spec.evaluation || []).forEach((key, place) => series.push([run.evaluation[key], last(key) || "held-out", both ? "dots" : "s" + place]));
  const known = series.filter(([one]) => one && one.y.some((value) => value !== null));
  if (!known.length || known.every(([one]) => one.y.every((value) => !value))) return null;
  return { title: spec.title, percent: spec.percent, logs: spec.logs, log: spec.log && known.every(([one]) => one.y.every((value) => value === null || value > 0)),
    series: known.map(([one, name, kind]) => ({ ...one, name, kind })) };
}

function curves(run) {
  const specs = CHARTS.map((spec) => chartOf(run, spec)).filter(Boolean);
  if (!specs.length) return null;
  const group = new Group();
  const thinned = run.logged > run.max_points
    ? ` Of ${run.logged.toLocaleString("en-US")} logged steps each point stands for about ${Math.round(run.logged / run.max_points)}: the line is their mean, the band reaches from the least to the greatest.`
    : "";
  return section("Curves", `Over training steps. Point at a chart to read its values; arrow keys move step by step.${thinned}`,
    h("div", { class: "charts" }, specs.map((spec) => new LineChart(spec, group).figure)));
}

/* ---- pairs */

const PAGE_ROWS = 20;
const PRESETS = [
  ["Most wrong", "margin", 1, "the rejected response has the higher reward"],
  ["Most changed", "changed", -1, "training has moved the log-probs of both responses farthest, in nats"],
  ["Most surprising", "surprising", -1, "the trained model finds the chosen response least likely, in nats per token"],
];
const COLUMNS = [
  ["margin", "margin", ""], ["before", "before", "extra"], ["chosen", "chosen", "extra"], ["rejected", "rejected", "extra"], ["loss", "loss", "extra"],
  ["changed", "change", "extra"], ["surprising", "surprise", ""], ["chosen_tokens", "chosen", "extra"], ["rejected_tokens", "rejected", "extra"],
];
/** The headings above the headings: how many columns each spans. */
const ABOVE = [["margin", 2], ["reward of", 2], ["", 3], ["tokens", 2]];

class PairTable {
  constructor(pairs) {
    this.pairs = pairs;
    this.all = pairs.columns.where.map((_, place) => place);
    [this.key, this.direction, this.query, this.count] = ["margin", 1, "", PAGE_ROWS];
    this.lower = null;
    this.presets = h("div", { class: "controls" });
    this.why = h("p", { class: "quiet" });
    this.head = h("tr", {});
    this.body = h("tbody", {});
    this.more = h("button", { type: "button", onclick: () => { this.count += 5 * PAGE_ROWS; this.draw(); } });
    const search = (event) => { [this.query, this.count] = [event.target.value.toLowerCase(), PAGE_ROWS]; this.draw(); };
    this.search = h("input", { type: "search", placeholder: "Find in texts and places", "aria-label": "Find in texts and places", oninput: search });
    const above = h("tr", { class: "extra" }, h("th", {}), ABOVE.map(([name, span]) => h("th", { class: "n", colspan: span }, name)));
    this.node = h("div", {}, this.presets, this.why, h("div", { class: "wide" }, h("table", { class: "pairs" }, h("thead", {}, above, this.head), this.body)),
      h("div", { class: "controls" }, this.more));
    this.draw();
  }

  sort(key, direction) {
    [this.key, this.direction, this.count] = [key, direction, PAGE_ROWS];
    this.draw();
  }

  found() {
    const values = this.pairs.columns[this.key];
    const kept = this.query ? this.all.filter((place) => this.haystack(place).includes(this.query)) : [...this.all];
    return kept.sort((a, b) => (values[a] === null) - (values[b] === null) || this.direction * (values[a] - values[b]) || a - b);
  }

  haystack(place) {
    const { where, source } = this.pairs.columns;
    this.lower = this.lower || this.all.map((n) => [where[n], source[n], ...(this.pairs.texts[n] || [])].join("\n").toLowerCase());
    return this.lower[place];
  }

  draw() {
    const found = this.found();
    const isOn = ([, key, direction]) => key === this.key && direction === this.direction;
    this.presets.replaceChildren(
      ...PRESETS.map((preset) => h("button", { type: "button", "aria-pressed": String(isOn(preset)), onclick: () => this.sort(preset[1], preset[2]) }, preset[0])), this.search);
    const preset = PRESETS.find(isOn);
    this.why.textContent = preset ? `First those where ${preset[3]}.` : "";
    this.head.replaceChildren(h("th", { class: "text" }, "pair"), ...COLUMNS.map(([key, name, kind]) => this.heading(key, name, kind)));
    this.body.replaceChildren(...found.slice(0, this.count).map((place) => this.row(place)));
    const left = found.length - this.count;
    this.more.hidden = left <= 0;
    this.more.textContent = `Show more of ${left.toLocaleString("en-US")}`;
    if (!found.length) this.body.replaceChildren(h("tr", {}, h("td", { colspan: COLUMNS.length + 1 }, "Nothing found.")));
  }

  heading(key, name, kind) {
    const on = key === this.key;
    const turn = () => this.sort(key, on ? -this.direction : -1);
    return h("th", { class: `n ${kind}`, "aria-sort": on ? (this.direction > 0 ? "ascending" : "descending") : null },
      h("button", { type: "button", onclick: turn }, name + (on ? (this.direction > 0 ? " ↑" : " ↓") : "")));
  }

  row(place) {
    const { columns, texts } = this.pairs;
    const start = texts[place] ? texts[place][0].slice(0, 110) : "";
    const open = () => this.toggle(node, place);
    const first = h("td", { class: "text" }, start ? text(start + (texts[place][0].length > 110 ? "…" : "")) : null,
      h("div", { class: "quiet" }, h("code", { title: columns.where[place] }, text(columns.where[place].split("/").pop())), columns.source[place] ? [" ", text(columns.source[place])] : null));
    const cells = COLUMNS.map(([key, , kind]) =>
      h("td", { class: `n ${kind} ${key === "margin" && columns.margin[place] < 0 ? "wrong" : ""}` }, format(columns[key][place])));
    const node = h("tr", { class: "row", tabindex: "0", "aria-expanded": "false", onclick: open,
      onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(); } } }, first, cells);
    return node;
  }

  toggle(node, place) {
    const isOpen = node.classList.toggle("open");
    node.setAttribute("aria-expanded", String(isOpen));
    if (isOpen) node.after(h("tr", {}, h("td", { colspan: COLUMNS.length + 1 }, this.detail(place))));
    else node.nextSibling.remove();
  }

  detail(place) {
    const { columns, texts } = this.pairs;
    const say = (name) => `${name}: ${columns[name + "_tokens"][place]} tokens` + (name === "prompt" ? "" : `, reward ${format(columns[name][place])}`);
    const part = (name, which) => h("div", { class: name === "prompt" ? "whole" : "" }, h("h4", {}, say(name)), quote(texts[place] ? texts[place][which] : "not readable any more", name));
    return h("div", { class: "texts" }, part("prompt", 0), part("chosen", 1), part("rejected", 2));
  }
}

const quote = (value, kind) => h("blockquote", { class: kind, dir: "auto" }, visible(value));

function pairs(run) {
  const found = run.pairs;
  if (!found) return null;
  const shown = found.columns.where.length;
  const notes = [];
  if (shown < found.total) notes.push(`${shown.toLocaleString("en-US")} of ${found.total.toLocaleString("en-US")} pairs are listed: the most wrong, most changed and most surprising ones, and others at even distances. The histogram counts all.`);
  if (found.not_finite) notes.push(`${found.not_finite} pairs have values that are no numbers and are left out.`);
  if (found.limit) notes.push(`Texts are cut after ${found.limit.toLocaleString("en-US")} characters.`);
  if (found.missing) notes.push(`Texts cannot be shown: ${found.missing}.`);
  const plot = new Histogram({ title: "Margins of the rewards (right of 0: chosen is ahead)", ...found.margins });
  return section("Pair by pair", "Open a row to read it. " + notes.join(" "), plot.figure, new PairTable(found).node);
}

/* ---- generations */

function generations(run) {
  const found = run.generations;
  if (!found) return null;
  const scores = found.groups.length ? table(["", "answers", "before", "after"], found.groups.map((one) =>
    [text(one.name), format(one.count), percent(one.before), percent(one.after)])) : null;
  const verdict = (value) => (value === null || value === undefined ? "" : value === 1 ? " · passes" : value === 0 ? " · fails" : ` · ${format(value)}`);
  const one = (row) => h("details", {}, h("summary", {}, text(row.prompt.slice(0, 140))),
    h("div", { class: "texts" }, h("div", { class: "whole" }, h("h4", {}, "prompt"), quote(row.prompt, "prompt")),
      h("div", {}, h("h4", {}, "before" + verdict(row.before_score)), quote(row.before, "")),
      h("div", {}, h("h4", {}, "after" + verdict(row.after_score)), quote(row.after, "chosen"))));
  const first = found.rows.map(one);
  if (first.length) first[0].open = true;
  const shown = found.rows.length < found.count ? ` ${found.rows.length} of ${found.count} are listed.` : "";
  const how = found.temperature ? `Answers to held-out prompts, sampled at temperature ${format(found.temperature)} with one seed,` : "The likeliest answer to held-out prompts,";
  const kl = found.kl.length ? ` KL of the answers after training to the reference: ${format(found.kl[0])} nats per answer, ${format(found.kl[1])} per token.` : "";
  return section("Answers side by side", how + " before and after training." + shown + kl, scores, h("div", { class: "answers" }, first));
}

/* ---- the rest */

function time(run) {
  const phases = Object.entries(run.phases);
  if (!phases.length) return null;
  const total = phases.reduce((sum, [, seconds]) => sum + seconds, 0);
  const attempt = run.status.attempt > 1 ? ` The run was resumed; this is its last process (${run.status.attempt} in all).` : "";
  const rows = phases.sort((a, b) => b[1] - a[1]).map(([name, seconds]) => {
    const bar = h("i", {});
    bar.style.width = (100 * seconds) / total + "%";
    return [name === "start" ? "start: data, model, engine" : name, h("span", { class: "meter", "aria-hidden": "true" }, bar), clock(seconds), percent(seconds / total)];
  });
  return section("Where the time went", `Wall clock of rank 0, ${clock(total)} in all, without the start of Python.${attempt}`, table(["phase", "", "time", "share"], rows, { words: 2, extra: 3 }));
}

function clock(seconds) {
  if (seconds < 60) return `${format(Number(seconds.toFixed(seconds < 10 ? 2 : 1)))} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min ${Math.round(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function statistics(run) {
  const found = run.data;
  if (found.missing) return section("Training data", null, h("p", {}, "Cannot be read any more: ", text(found.missing)));
  const read = found.read < found.pairs ? `${found.read.toLocaleString("en-US")} of them, at even distances, were read for this.` : "All of them were read for this.";
  const [longer, equal, shorter] = found.chosen_longer;
  const rows = Object.entries(found.lengths).map(([name, values]) => [name, ...values.map(format)]);
  const tokens = run.pairs ? table(["held-out pairs, tokens", "5 %", "median", "95 %", "longest"], Object.entries(run.pairs.tokens).map(([name, values]) => [name, ...values.map(format)])) : null;
  const facts = [
    ["prompts that are distinct", found.distinct_prompts], ["chosen response is longer", longer], ["equally long", equal], ["rejected response is longer", shorter],
    ...(found.unreadable ? [["rows that cannot be used", found.unreadable]] : []),
  ];
  const sources = found.sources.length > 1 ? table(["source", "pairs", "share"], found.sources.map(([name, count]) => [text(name), format(count), percent(count / found.read)])) : null;
  return section("Training data", `${found.pairs.toLocaleString("en-US")} pairs in ${found.files} ${found.files === 1 ? "file" : "files"}. ${read} python -m data_utils.doctor says more.`,
    h("div", { class: "half" }, h("div", {}, table(["training pairs, characters", "5 %", "median", "95 %", "longest"], rows), tokens),
      h("div", {}, table(["", "pairs", "share"], facts.map(([name, count]) => [name, format(count), percent(count / Math.max(1, found.read))])), sources)));
}

function reproduce(run) {
  const how = run.reproduce;
  const facts = [["commit", how.commit], ["seed", how.seed], ["ranks", how.ranks], ["engine", how.engine], ["device", how.device], ...Object.entries(run.versions)];
  return section("Run it again", "From the root of the repository; on the same hardware and versions the numbers repeat.",
    h("pre", {}, visible(how.command)),
    h("div", { class: "half" },
      h("div", {}, h("h3", {}, "Settings that are not the default"), table(["key", "value"], Object.entries(run.changed).map(([key, value]) => [h("code", {}, key), text(value)]), { words: 2 })),
      h("div", {}, h("h3", {}, "Ran with"), table(["", ""], facts.filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => [name, h("code", {}, text(value))]), { words: 2 }))),
    h("details", {}, h("summary", {}, "Whole config"), h("pre", {}, visible(run.config))));
}

/* ---- several runs */

const COMPARED = [
  ["eval_loss", "Held-out loss"], ["eval_rewards/accuracies", "Held-out accuracy"], ["eval_rewards/margins", "Held-out margin"],
  ["eval_drift/chosen", "Held-out drift of chosen, nats per token"], ["eval_kl_per_token/chosen", "KL to the reference on chosen, nats per token"], ["loss", "Training loss"], ["rewards/margins", "Training margin"], ["grad_norm", "Gradient norm"],
  ["learning_rate", "Learning rate"], ["tokens_per_second", "Tokens per second"], ["peak_memory_gib", "Peak memory, GiB"],
];
const lastOf = (one) => (one && one.y.length ? one.y[one.y.length - 1] : null);

function comparison(runs) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.changed)))];
  const differing = keys.filter((key) => new Set(runs.map((run) => run.changed[key])).size > 1);
  const measures = COMPARED.slice(0, 5).filter(([key]) => runs.some((run) => run.evaluation[key]));
  const node = h("div", { class: "wide" });
  let [by, direction] = [0, 1];
  const value = (run, place) => (place < 0 ? run.changed[differing[-place - 1]] || "" : lastOf(run.evaluation[measures[place][0]]));
  const draw = () => {
    const order = runs.map((_, place) => place).sort((a, b) => {
      const [one, two] = [value(runs[a], by), value(runs[b], by)];
      if (one === null || two === null) return (one === null) - (two === null);
      return direction * (by < 0 ? String(one).localeCompare(String(two), "en", { numeric: true }) : one - two);
    });
    const heading = (name, place, kind) => h("th", { class: kind, "aria-sort": by === place ? (direction > 0 ? "ascending" : "descending") : null },
      h("button", { type: "button", onclick: () => { [by, direction] = [place, by === place ? -direction : 1]; draw(); } }, name + (by === place ? (direction > 0 ? " ↑" : " ↓") : "")));
    node.replaceChildren(h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "run"), measures.map(([, name], place) => heading(name, place, "n")),
      h("th", { class: "n" }, "steps"), h("th", { class: "n" }, "time"), differing.map((key, place) => heading(key, -place - 1, "")))),
    h("tbody", {}, order.map((place) => {
      const run = runs[place];
      const cells = measures.map(([key]) => h("td", { class: "n" }, show(key)(lastOf(run.evaluation[key]))));
      return h("tr", { onpointerenter: () => focus(place), onpointerleave: () => focus(null) },
        h("td", { class: "text" }, h("span", { class: `swatch r${place % 8}` }), text(run.name), run.status.state === "finished" ? null : h("span", { class: "quiet" }, ` ${run.status.state || "unknown"}`)),
        cells, h("td", { class: "n" }, format(run.status.step)), h("td", { class: "n" }, run.seconds === null ? "–" : clock(run.seconds)),
        differing.map((key) => h("td", {}, run.changed[key] === undefined ? h("span", { class: "quiet" }, "default") : text(run.changed[key]))));
    }))));
  };
  const focus = (place) => {
    for (const line of document.querySelectorAll("svg .line")) line.classList.toggle("faded", place !== null && !line.classList.contains(`n${place}`));
  };
  draw();
  return section(`${runs.length} runs`, "The latest evaluation of each, and the settings that differ. Point at a run to see its curves alone.", node);
}

function comparedCurves(runs) {
  const group = new Group();
  const kind = (place) => `r${place % 8} n${place}${place > 7 ? " later" : ""}`;
  const charts = COMPARED.map(([key, title]) => {
    const series = runs.map((run, place) => ({ one: run.training[key] || run.evaluation[key], name: visible(run.name), kind: kind(place) })).filter(({ one }) => one && one.y.some((value) => value !== null));
    if (!series.length) return null;
    return new LineChart({ title, percent: isShare(key), logs: true, series: series.map(({ one, name, kind: style }) => ({ x: one.x, y: one.y, name, kind: style })) }, group).figure;
  }).filter(Boolean);
  return section("Curves", "Colours are those of the table.", h("div", { class: "charts" }, charts));
}

/* ---- all of it */

function build() {
  const footer = h("footer", {}, `Made ${data.made} by `, h("code", {}, "python -m dpo.report"), ". This page needs no network and sends nothing.");
  if (data.runs.length > 1) {
    return [h("header", {}, h("h1", {}, "Comparison"), h("p", { class: "quiet" }, text(data.runs.map((run) => run.directory).join("   ")))),
      comparison(data.runs), comparedCurves(data.runs), footer];
  }
  const [run] = data.runs;
  return [head(run), run.warnings.map((warning) => h("div", { class: "warning" }, visible(warning))), tiles(run), curves(run), beforeAfter(run),
    generations(run), pairs(run), time(run), statistics(run), reproduce(run), footer];
}

document.getElementById("page").replaceChildren(...build().flat(Infinity).filter(Boolean));
for (const chart of everyChart) chart.draw();
