"use strict";
/* A small charting library: line charts with a shared crosshair, and histograms, in SVG. No data ever becomes markup:
   everything is made of nodes, text is set as text. */

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes (on...: listeners) and children; strings become text nodes, null is left out. */
function make(namespace, tag, attributes, children) {
  const node = namespace ? document.createElementNS(namespace, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}
const h = (tag, attributes, ...children) => make(null, tag, attributes, children);
const s = (tag, attributes, ...children) => make(SVG, tag, attributes, children);

/** A number with four significant digits, as people write it. */
function format(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value < 0) return "−" + format(-value);
  const size = value;
  if (size === 0) return "0";
  if (size >= 1e9 || size < 1e-4) return value.toExponential(2).replace("e+", "e");
  if (size >= 1e4) return Math.round(value).toLocaleString("en-US");
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  return String(Number(value.toPrecision(4)));
}
/** A number short enough for an axis. */
function short(value, digits = 3) {
  const size = Math.abs(value);
  for (const [unit, suffix] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit) return Number((value / unit).toPrecision(digits)) + suffix;
  }
  return size !== 0 && size < 1e-3 ? String(Number(value.toExponential(digits - 1))) : String(Number(value.toPrecision(6)));
}
/** Numbers of an axis, with as many digits as tell them apart. */
function labels(values) {
  const found = [3, 4, 5, 6, 7].map((digits) => values.map((value) => short(value, digits)));
  return found.find((names) => new Set(names).size === values.length) || found[4];
}
const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(1) + " %");

/** Round values that divide a range into about `count` parts. */
function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(n * step);
  return found;
}
/** Powers of ten inside a range; between few of them also 2 and 5 times these. */
function logTicks(low, high) {
  const found = [];
  const factors = Math.log10(high / low) > 3 ? [1] : [1, 2, 5];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of factors) {
      const value = factor * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  if (found.length < 3) return ticks(low, high, 4).filter((value) => value > 0);
  const every = Math.ceil(found.length / 6);
  return found.filter((_, place) => place % every === 0);
}

/** Every chart; the page draws them when it is built, later ones and new widths draw themselves. */
const everyChart = [];
function keep(chart) {
  everyChart.push(chart);
  new ResizeObserver(() => chart.draw()).observe(chart.figure);
}

const MARGIN = { left: 46, right: 10, top: 8, bottom: 22 };
const HEIGHT = 190;

/** All charts of a group show their crosshair at the same place. */
class Group {
  constructor() { this.charts = []; }
  show(x) { for (const chart of this.charts) chart.cross(x); }
}

/** Lines over steps. spec: {title, series: [{name, x, y, low, high, kind}], log, logs, percent}; logs: it can be
    switched to a logarithmic scale; kind is a class of the style
    sheet: "s0", "s1", "dots", "r0", ... Nulls interrupt a line. */
class LineChart {
  constructor(spec, group) {
    this.spec = spec;
    this.log = Boolean(spec.log);
    this.figure = h("figure", { tabindex: "0", role: "group", "aria-label": spec.title });
    this.group = group;
    group.charts.push(this);
    this.steps = [...new Set(spec.series.flatMap((one) => one.x))].sort((a, b) => a - b);
    this.figure.addEventListener("keydown", (event) => this.key(event));
    this.figure.addEventListener("blur", () => group.show(null));
    keep(this);
  }

  extent() {
    let [low, high] = [Infinity, -Infinity];
    for (const one of this.spec.series) {
      for (const values of [one.y, one.low || [], one.high || []]) {
        for (const value of values) {
          if (value === null || (this.log && value <= 0)) continue;
          if (value < low) low = value;
          if (value > high) high = value;
        }
      }
    }
    if (low > high) [low, high] = this.log ? [0.1, 1] : [0, 1];
    if (low === high) {
      const pad = (Math.abs(low) || 1) * 0.1;
      [low, high] = this.log ? [low / 2, high * 2] : [low - pad, high + pad];
    }
    if (this.log) return [low, high];
    const pad = (high - low) * 0.06;
    return [low >= 0 && low - pad < 0 ? 0 : low - pad, high + pad];
  }

  draw() {
    const width = this.figure.clientWidth;
    if (!width || width === this.width && this.drawnLog === this.log) return;
    [this.width, this.drawnLog] = [width, this.log];
    const [low, high] = this.extent();
    const [first, last] = [this.steps[0], this.steps[this.steps.length - 1]];
    const across = width - MARGIN.left - MARGIN.right;
    const down = HEIGHT - MARGIN.top - MARGIN.bottom;
    this.x = (value) => MARGIN.left + (last > first ? (value - first) / (last - first) : 0.5) * across;
    const scale = this.log ? Math.log : (value) => value;
    this.y = (value) => MARGIN.top + (1 - (scale(value) - scale(low)) / (scale(high) - scale(low))) * down;
    const svg = s("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": this.spec.title });
    this.axes(svg, low, high, first, last, width);
    for (const one of [...this.spec.series].reverse()) this.series(svg, one);
    this.marker = s("g", {});
    svg.append(this.marker);
    const find = (event) => {
      const place = (event.clientX - svg.getBoundingClientRect().left - MARGIN.left) / across;
      this.group.show(this.nearest(first + place * (last - first)));
    };
    svg.addEventListener("pointermove", find);
    svg.addEventListener("pointerdown", find);
    svg.addEventListener("pointerleave", () => this.group.show(null));
    this.tip = null;
    this.figure.replaceChildren(this.caption(), this.legend(), svg);
  }

  caption() {
    const positive = this.spec.logs && this.spec.series.every((one) => one.y.every((value) => value === null || value > 0));
    const toggle = () => { this.log = !this.log; this.draw(); };
    const button = positive ? h("button", { type: "button", "aria-pressed": String(this.log), onclick: toggle }, "log") : null;
    return h("figcaption", {}, h("span", {}, this.spec.title), button);
  }

  legend() {
    const named = this.spec.series.filter((one) => one.name && !one.kind.startsWith("r"));
    return h("div", { class: "legend" }, named.length > 1 ? named.map((one) => h("span", { class: one.kind }, one.name)) : null);
  }

  axes(svg, low, high, first, last, width) {
    const marks = this.log ? logTicks(low, high) : ticks(low, high, 4);
    const names = labels(marks.map((value) => (this.spec.percent ? 100 * value : value)));
    for (const [place, value] of marks.entries()) {
      const y = this.y(value);
      svg.append(s("line", { class: value === 0 ? "zero" : "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }));
      svg.append(s("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, names[place] + (this.spec.percent ? "%" : "")));
    }
    for (const value of ticks(first, last, Math.max(2, Math.floor(width / 90)))) {
      if (!Number.isInteger(value)) continue;
      svg.append(s("text", { x: this.x(value), y: HEIGHT - 5, "text-anchor": "middle" }, short(value)));
    }
  }

  series(svg, one) {
    const usable = (value) => value !== null && value !== undefined && (!this.log || value > 0);
    if (one.low) {
      const places = one.x.map((_, place) => place).filter((place) => usable(one.low[place]) && usable(one.high[place]));
      const up = places.map((place) => `${this.x(one.x[place]).toFixed(1)},${this.y(one.high[place]).toFixed(1)}`);
      const back = places.reverse().map((place) => `${this.x(one.x[place]).toFixed(1)},${this.y(one.low[place]).toFixed(1)}`);
      svg.append(s("polygon", { class: "band " + one.kind, points: [...up, ...back].join(" ") }));
    }
    let path = "";
    let pen = "M";
    one.x.forEach((x, place) => {
      if (!usable(one.y[place])) { pen = "M"; return; }
      path += `${pen}${this.x(x).toFixed(1)},${this.y(one.y[place]).toFixed(1)}`;
      pen = "L";
    });
    svg.append(s("path", { class: "line " + one.kind, d: path }));
    if (one.kind === "dots" || one.x.length === 1) {
      one.x.forEach((x, place) => {
        if (usable(one.y[place])) svg.append(s("circle", { class: one.kind === "dots" ? "dots" : "bar", cx: this.x(x), cy: this.y(one.y[place]), r: 3.5 }));
      });
    }
  }

  nearest(x) {
    let [from, to] = [0, this.steps.length - 1];
    while (to - from > 1) {
      const middle = (from + to) >> 1;
      if (this.steps[middle] < x) from = middle; else to = middle;
    }
    return x - this.steps[from] < this.steps[to] - x ? this.steps[from] : this.steps[to];
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const place = this.at === undefined || this.at === null ? (move > 0 ? -1 : this.steps.length) : this.steps.indexOf(this.at);
    this.group.show(this.steps[Math.min(this.steps.length - 1, Math.max(0, place + move))]);
  }

  /** Crosshair and values at a step; null takes them away. */
  cross(x) {
    this.at = x;
    if (!this.marker) return;
    this.marker.replaceChildren();
    if (this.tip) { this.tip.remove(); this.tip = null; }
    if (x === null) return;
    const lines = [];
    for (const one of this.spec.series) {
      let place = one.x.findIndex((step) => step >= x);
      if (place < 0 || (one.kind === "dots" && one.x[place] !== x)) continue;
      const value = one.y[place];
      if (value === null || (this.log && value <= 0)) continue;
      const show = this.spec.percent ? percent : format;
      const range = one.low ? ` (${show(one.low[place])} to ${show(one.high[place])})` : "";
      lines.push(h("div", {}, h("span", { class: "isolate" }, one.name || this.spec.title), `: ${show(value)}${range}`));
      this.marker.append(s("circle", { class: "bar", cx: this.x(one.x[place]), cy: this.y(value), r: 3 }));
    }
    if (!lines.length) return;
    this.marker.prepend(s("line", { class: "cross", x1: this.x(x), x2: this.x(x), y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
    this.tip = h("div", { class: "tip" }, h("div", {}, `step ${x.toLocaleString("en-US")}`), lines);
    this.figure.append(this.tip);
    const left = this.x(x) + 10;
    this.tip.style.left = Math.max(0, left + this.tip.offsetWidth > this.width ? this.x(x) - this.tip.offsetWidth - 10 : left) + "px";
  }
}

/** Counts over bins; the last list is filled, one before it is an outline. spec: {title, edges, names, counts, unit}. */
class Histogram {
  constructor(spec) {
    this.spec = spec;
    this.figure = h("figure", {});
    keep(this);
  }

  draw() {
    const width = this.figure.clientWidth;
    if (!width || width === this.width) return;
    this.width = width;
    const { edges, counts, names, title } = this.spec;
    const [low, high] = [edges[0], edges[edges.length - 1]];
    const most = Math.max(1, ...counts.flat());
    const x = (value) => MARGIN.left + ((value - low) / (high - low)) * (width - MARGIN.left - MARGIN.right);
    const y = (count) => MARGIN.top + (1 - count / most) * (HEIGHT - MARGIN.top - MARGIN.bottom);
    const svg = s("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": title });
    for (const value of ticks(0, most, 3).filter(Number.isInteger)) {
      svg.append(s("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }));
      svg.append(s("text", { x: MARGIN.left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
    }
    for (const value of ticks(low, high, Math.max(3, Math.floor(width / 80)))) {
      svg.append(s("text", { x: x(value), y: HEIGHT - 5, "text-anchor": "middle" }, short(value)));
    }
    const filled = counts[counts.length - 1];
    filled.forEach((count, place) => {
      const text = `${format(edges[place])} to ${format(edges[place + 1])}: ` +
        counts.map((list, which) => `${list[place]} pairs${names.length > 1 ? " " + names[which] : ""}`).join(", ");
      const [left, right] = [x(edges[place]), x(edges[place + 1])];
      svg.append(s("rect", { class: "bar", x: left + 0.5, y: y(count), width: Math.max(0.5, right - left - 1), height: y(0) - y(count) }, s("title", {}, text)));
    });
    for (const list of counts.slice(0, -1)) {
      const path = list.map((count, place) => `L${x(edges[place])},${y(count)}L${x(edges[place + 1])},${y(count)}`).join("");
      svg.append(s("path", { class: "outline", d: `M${x(low)},${y(0)}${path}L${x(high)},${y(0)}` }));
    }
    if (low < 0 && high > 0) svg.append(s("line", { class: "zero", x1: x(0), x2: x(0), y1: MARGIN.top, y2: y(0) }));
    const legend = names.map((name, place) => h("span", { class: place === names.length - 1 ? "box" : "outline" }, name));
    this.figure.replaceChildren(h("figcaption", {}, title), h("div", { class: "legend" }, names.length > 1 ? legend : null), svg);
  }
}
