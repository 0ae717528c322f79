// Draws what report.html holds. Data reach the page as text nodes and attributes only, never as markup.
"use strict";

const ROWS = 50, BEFORE = 28, WINDOW = 40, STRONGEST = 8, OCTAVES = 8, SAMPLED = 2, LOWEST = -20;
const byId = (id) => document.getElementById(id);

/** An element with properties and children; text stays text. */
function make(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [name, v] of Object.entries(value)) element.style.setProperty(name, v);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}
const link = (href, text) => make("a", { href }, text);
const button = (text, onclick, pressed) => make("button", { type: "button", onclick, "aria-pressed": pressed == null ? null : String(pressed) }, text);
const pick = (label, options, value, onchange) => make("label", {}, label, " ",
  make("select", { onchange: (e) => onchange(e.target.value) }, options.map(([v, text]) => make("option", { value: v, selected: String(v) === String(value) }, text))));
const say = (text) => { byId("said").textContent = text; };

// --- blocks ---------------------------------------------------------------------------------------------------------

const LAYOUTS = JSON.parse(byId("layouts").textContent);
const ARRAYS = { u1: Uint8Array, i1: Int8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array };
const opened = new Map();

/** The columns of a block: {name: typed array, and its shape in shape[name]}. */
async function block(name) {
  if (!opened.has(name)) {
    if (opened.size > 12) opened.delete([...opened.keys()].find((key) => key.startsWith("sae")));
    opened.set(name, unpack(name));
  }
  return opened.get(name);
}
async function unpack(name) {
  const text = byId(`block-${name}`).textContent;
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const raw = new Uint8Array(await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer());
  const columns = { shape: {} };
  for (const [key, type, shape, first] of LAYOUTS[name]) {
    const size = Number(type[1]), count = shape.reduce((a, b) => a * b, 1), bytes = new Uint8Array(count * size);
    for (let b = 0; b < size; b++) for (let i = 0, from = first + b * count; i < count; i++) bytes[i * size + b] = raw[from + i];
    columns[key] = new ARRAYS[type](bytes.buffer);
    columns.shape[key] = shape;
  }
  return columns;
}

// --- numbers and text -------------------------------------------------------------------------------------------------

function digits(x) {
  if (!Number.isFinite(x)) return "-";
  if (x === 0) return "0";
  return Math.abs(x) >= 1e6 || Math.abs(x) < 1e-3 ? x.toExponential(2) : Math.abs(x) >= 1000 ? whole(Math.round(x)) : x.toPrecision(3);
}
const whole = (n) => n.toLocaleString("en");
const power = (exponent) => (exponent < 0 ? digits(2 ** exponent) : whole(2 ** exponent));
const percent = (share) => `${digits(100 * share)} %`;
const CONTROLS = { 0xa0: "⍽", 0xad: "SHY", 0x61c: "ALM", 0x200b: "ZWSP", 0x200c: "ZWNJ", 0x200d: "ZWJ", 0x200e: "LRM", 0x200f: "RLM", 0x202a: "LRE", 0x202b: "RLE",
  0x202c: "PDF", 0x202d: "LRO", 0x202e: "RLO", 0x2060: "WJ", 0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI", 0xfeff: "BOM", 0x2028: "LS", 0x2029: "PS", 0xfffd: "�" };

/** Text as nodes in which everything shows: controls as pictures, what has no width by its name. `bare` also marks the first space. */
function visible(text, bare = false) {
  const nodes = [];
  let plain = "";
  const flush = () => { if (plain) nodes.push(plain); plain = ""; };
  [...text].forEach((c, i) => {
    const code = c.codePointAt(0);
    if (code === 10) plain += "↵";
    else if (code === 9) plain += "⇥";
    else if (code < 32) plain += String.fromCodePoint(0x2400 + code);
    else if (code === 127) plain += "␡";
    else if (code === 32 && bare && i === 0) plain += "·";
    else if (CONTROLS[code] || /\p{Co}|\p{Cn}|\p{Cs}/u.test(c) || (code >= 0x80 && code < 0xa0) || code >= 0xe0000) {
      flush();
      nodes.push(make("span", { class: "control" }, CONTROLS[code] ?? `U+${code.toString(16).toUpperCase().padStart(4, "0")}`));
    } else if (i === 0 && /\p{M}/u.test(c)) plain += `◌${c}`;
    else plain += c;
  });
  flush();
  return nodes;
}

/** The vocabulary and the text of a run. */
class Text {
  constructor(columns) {
    Object.assign(this, columns);
    const ends = this.ends = new Uint32Array(this.token_lengths.length + 1);
    this.token_lengths.forEach((n, i) => { ends[i + 1] = ends[i] + n; });
    this.place = new Map(Array.from(this.token_ids, (id, i) => [id, i]));
  }
  bytes(place) { return this.token_bytes.subarray(this.ends[place], this.ends[place + 1]); }
  static decode(bytes) {
    try { return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes); } catch { return null; }
  }
  static numbers(bytes) { return `⟨${Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join(" ")}⟩`; }
  string(id) {
    const bytes = this.place.has(id) ? this.bytes(this.place.get(id)) : new Uint8Array();
    return Text.decode(bytes) ?? Text.numbers(bytes);
  }
  shown(id) { return make("bdi", { class: "token" }, visible(this.string(id), true)); }
}

// --- plots ------------------------------------------------------------------------------------------------------------

const dark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const color = (look) => look[dark() ? "dark" : "light"];
let DATA = null;

function mark(architecture) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  svg.setAttribute("class", "mark");
  svg.setAttribute("viewBox", "-1.5 -1.5 3 3");
  svg.setAttribute("aria-hidden", "true");
  svg.dataset.architecture = architecture;
  path.setAttribute("d", DATA.markers[DATA.looks[architecture].marker]);
  svg.append(path);
  svg.style.fill = color(DATA.looks[architecture]);
  return svg;
}
const paint = () => document.querySelectorAll(".mark").forEach((svg) => { svg.style.fill = color(DATA.looks[svg.dataset.architecture]); });

const looks = (saes) => DATA.architectures.filter((name) => saes.some((sae) => sae.architecture === name));
const colors = (names) => ({ domain: names, range: names.map((name) => color(DATA.looks[name])) });
const shapes = (names) => ({ domain: names, range: names.map((name) => DATA.markers[DATA.looks[name].marker]) });

/** Round numbers in a range for a log axis: 10 20 40 .. where doubling, else 1 2 5 10 .. */
function ticks(low, high, doubling) {
  const steps = [];
  for (let d = -9; d < 10; d++) for (const s of [1, 2, 5]) steps.push(Number(`${s}e${d}`));
  const twos = Array.from({ length: 30 }, (_, i) => 10 * 2 ** (i - 12));
  const tens = steps.filter((s) => String(s.toExponential()).startsWith("1e"));
  const fine = [];
  for (let d = -9; d < 10; d++) for (const s of [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9]) fine.push(Number(`${s}e${d}`));
  const unit = 10 ** Math.floor(Math.log10((high - low) / 2.5)), even = Array.from({ length: 30 }, (_, i) => Number(((Math.ceil(low / unit) + i) * unit).toPrecision(6)));
  for (const all of doubling ? [twos, steps, fine, even] : [tens, steps, fine, even]) {
    const inside = all.filter((t) => t >= low && t <= high);
    if (inside.length >= 3 || all === even) return inside.filter((_, i) => i % Math.ceil(inside.length / 8) === 0);
  }
}
function axis(values, type, title, extra = {}) {
  if (type !== "log") return { scale: { zero: false, nice: true }, axis: { title, tickCount: 6, ...extra } };
  const low = Math.min(...values) / 1.18, high = Math.max(...values) * 1.18;
  const at = ticks(low, high, title.startsWith("L0"));
  return { scale: { type: "log", domain: [low, high], nice: false }, axis: { title, format: "~g", values: at, ...extra } };
}

/** Fill one panel; where that fails the panel says so, and the others are drawn all the same. */
async function panel(box, fill) {
  try { await fill(); } catch (error) { box.replaceChildren(make("p", { class: "note" }, `This panel cannot be drawn (${error.message}).`)); }
}

/** Draw a specification into a container; points with a `sae` open it, by click or Enter, and tell about themselves on hover and focus. */
async function draw(container, spec, title) {
  const ink = css("--ink"), line = css("--line"), font = "system-ui, Noto Sans, sans-serif";
  const config = {
    background: null, font, view: { stroke: null }, title: { color: ink, fontSize: 13, anchor: "start", fontWeight: 600 },
    axis: { labelColor: css("--muted"), titleColor: ink, gridColor: line, domainColor: line, tickColor: line, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 400, titlePadding: 8 },
    header: { labelColor: ink, labelFontSize: 13, labelFontWeight: 600, labelAnchor: "start", title: null }, legend: { disable: true }, facet: { spacing: 28 },
  };
  const { view } = await vegaEmbed(container, { $schema: "https://vega.github.io/schema/vega-lite/v6.json", description: title, ...spec, config },
    { mode: "vega-lite", renderer: "svg", actions: false, ast: true, tooltip: false });
  const of = (item) => (item?.datum?.sae != null ? DATA.saes[item.datum.sae] : null);
  view.addEventListener("click", (_, item) => { const sae = of(item); if (sae) location.hash = address(sae); });
  view.addEventListener("mouseover", (_, item) => { const sae = of(item); if (sae) tell(sae, item.datum.note); });
  view.addEventListener("mouseout", hush);
  container.querySelectorAll('path[role="graphics-symbol"]').forEach((path) => {
    const sae = of(path.__data__);
    if (!sae || path.__data__.mark.marktype !== "symbol") return path.setAttribute("aria-hidden", "true");
    path.setAttribute("tabindex", "0");
    path.setAttribute("role", "link");
    path.dataset.sae = sae.number;
    path.addEventListener("focus", () => tell(sae));
    path.addEventListener("blur", hush);
    path.addEventListener("keydown", (e) => { if (e.key === "Enter") location.hash = address(sae); });
  });
  return view;
}
const address = (sae, latent) => `#/sae/${sae.path.split("/").map(encodeURIComponent).join("/")}${latent == null ? "" : `/latent/${latent}`}`;
const about = (sae) => [sae.site, sae.width ? `${whole(sae.width)} latents` : "", sae.setting].filter(Boolean).join(", ");
const shownColumns = () => DATA.columns.filter((column) => DATA.saes.some((sae) => Number.isFinite(sae.row[column.key])));

function tell(sae, note) {
  const card = byId("card");
  card.replaceChildren(make("b", {}, sae.architecture), about(sae), note ? make("div", {}, note) : "",
    make("dl", {}, shownColumns().slice(0, 7).map((c) => make("div", {}, make("dt", {}, c.label), make("dd", {}, sae.text[c.key])))));
  card.hidden = false;
}
const hush = () => { byId("card").hidden = true; };

const state = { x: "l0", y: "loss_recovered_zero", perfect: false, by: "site", off: new Set(), site: "", width: "", run: "", text: "", sort: null, down: false };
const PLAIN = { ...state, off: "" };

/** The overview's address, which holds what was chosen there: it can be sent as a link, and Back finds it again. */
function home() {
  const chosen = Object.entries({ ...state, off: [...state.off].join(" ") }).filter(([key, value]) => value !== PLAIN[key]);
  return `#/${chosen.length ? `?${new URLSearchParams(chosen)}` : ""}`;
}
const atHome = () => /^(#\/?(\?.*)?)?$/.test(location.hash);
const remember = () => { if (atHome() && (location.hash || "#/") !== home()) history.replaceState(null, "", home()); };

/** Choose what an address says; what this report does not offer is left out. */
function recall() {
  const offered = { by: ["site", "architecture", "width"], sort: ["", ...DATA.columns.map((c) => c.key)], text: null };
  offered.x = offered.y = shownColumns().filter((c) => c.scale).map((c) => c.key);
  for (const key of ["site", "width", "run"]) offered[key] = DATA.saes.map((s) => String(s[key]));
  for (const [key, value] of new URLSearchParams(location.hash.split("?")[1])) {
    if (key === "off") state.off = new Set(value.split(" ").filter((name) => name in DATA.looks));
    else if (key === "perfect" || key === "down") state[key] = value === "true";
    else if (key in offered && (!offered[key] || offered[key].includes(value))) state[key] = value;
  }
}
const inside = (sae) => !state.off.has(sae.architecture) && (!state.site || sae.site === state.site) && (!state.width || String(sae.width) === state.width)
  && (!state.run || String(sae.run) === state.run) && (!state.text || `${sae.path} ${sae.architecture} ${sae.setting} ${sae.site}`.toLowerCase().includes(state.text.toLowerCase()));

function pareto() {
  remember();
  const x = DATA.columns.find((c) => c.key === state.x), y = DATA.columns.find((c) => c.key === state.y);
  const perfect = state.perfect && y.key === "loss_recovered_zero";
  const at = (v) => (perfect ? 1 - v : v), xLog = x.scale === "log", yLog = perfect || y.scale === "log";
  const wanted = DATA.saes.filter(inside);
  const values = wanted.filter((s) => [x, y].every((c) => Number.isFinite(s.row[c.key])) && (!xLog || s.row[x.key] > 0) && (!yLog || at(s.row[y.key]) > 0)).map((s) => {
    const low = s.row[`${y.key}_low`], high = s.row[`${y.key}_high`], ends = Number.isFinite(low) && Number.isFinite(high) && (!yLog || Math.min(at(low), at(high)) > 0);
    return { sae: s.number, architecture: s.architecture, width: s.width ?? 0, line: `${s.architecture} ${s.width} ${s.run}`, run: s.run, x: s.row[x.key], y: at(s.row[y.key]),
      low: ends ? at(low) : null, high: ends ? at(high) : null, panel: String(state.by === "width" ? `${whole(s.width ?? 0)} latents` : s[state.by]),
      label: `${s.architecture}, ${about(s)}: ${x.label} ${s.text[x.key]}, ${y.label} ${s.text[y.key]}` };
  });
  const left = wanted.length - values.length;
  byId("pareto-note").textContent = [state.y === "loss_recovered_zero" ? "Bars: where 95 of 100 re-draws of the held-out text would fall." : "", DATA.runs.length > 1 ? `Filled: ${DATA.runs[0].name}; hollow: the other runs.` : "",
    left ? `${left} of ${wanted.length} SAEs have no such numbers and are not shown.` : "", "A click on a point opens its SAE."].filter(Boolean).join(" ");
  const container = byId("pareto");
  if (!values.length) return container.replaceChildren(make("p", { class: "note" }, "No SAE to show."));
  const order = { site: (a, b) => (a.layer ?? 0) - (b.layer ?? 0), width: (a, b) => a.width - b.width };
  const panels = [...new Set([...wanted].sort(order[state.by] ?? (() => 0)).map((s) => String(state.by === "width" ? `${whole(s.width ?? 0)} latents` : s[state.by])))].filter((p) => values.some((v) => v.panel === p));
  const room = container.clientWidth, columns = room < 560 ? 1 : Math.min(panels.length, room > 900 && panels.length > 4 ? 3 : 2);
  const width = Math.floor((room - 70 - (columns - 1) * 76) / columns) - 4, names = looks(DATA.saes), widths = [...new Set(values.map((v) => v.width))].sort((a, b) => a - b);
  const ys = values.flatMap((v) => [v.y, v.low, v.high]).filter((v) => v != null);
  const X = { field: "x", type: "quantitative", ...axis(values.map((v) => v.x), x.scale, xLog ? `${x.label} (log scale)` : x.label) };
  const yTitle = perfect ? "1 - loss recovered (log scale)" : yLog ? `${y.label} (log scale)` : y.label;
  const Y = { field: "y", type: "quantitative", ...axis(ys, yLog ? "log" : "linear", yTitle) };
  const fill = { field: "architecture", type: "nominal", scale: colors(names) };
  return draw(container, {
    data: { values },
    facet: { field: "panel", type: "nominal", sort: panels }, columns,
    resolve: { axis: { x: "independent", y: "independent" } },
    spec: {
      width, height: room < 560 ? 250 : 320,
      layer: [
        { mark: { type: "line", strokeWidth: 1, opacity: 0.5, aria: false }, encoding: { x: X, y: Y, color: fill, detail: { field: "line" } } },
        { transform: [{ filter: "isValid(datum.low)" }], mark: { type: "rule", strokeWidth: 1.5, aria: false }, encoding: { x: X, y: { ...Y, field: "low" }, y2: { field: "high" }, color: fill } },
        { mark: { type: "point", strokeWidth: 1.2, opacity: 1, cursor: "pointer" },
          encoding: { x: X, y: Y, stroke: fill, shape: { field: "architecture", scale: shapes(names) }, description: { field: "label" },
            fill: { condition: { test: "datum.run > 0", value: css("--paper") }, ...fill },
            size: widths.length > 1 ? { field: "width", type: "ordinal", scale: { domain: widths, range: widths.map((_, i) => 60 + 110 * i / (widths.length - 1)) } } : { value: 90 } } },
      ],
    },
  }, `${y.label} against ${x.label}, ${values.length} SAEs`);
}

/** Training curves of some SAEs: a small plot for each measure. */
function curves(container, saes) {
  const measures = [["loss", "Training loss", "log"], ["fvu", "FVU", "log"], ["l0", "L0", "log"], ["dead", "Dead latents", "linear"]];
  const sites = [...new Set(saes.map((s) => s.site))], names = looks(saes);
  container.replaceChildren();
  const drawn = [];
  for (const [key, label, scale] of measures) {
    const values = saes.flatMap((s) => s.curves.tokens.map((t, i) => ({ t, v: s.curves[key][i], sae: s.number, architecture: s.architecture, site: s.site })))
      .filter((p) => Number.isFinite(p.v) && (scale === "linear" || p.v > 0));
    if (!values.length) continue;
    const box = make("div", { class: "panel-chart" });
    container.append(make("div", {}, make("h3", {}, label), box));
    drawn.push({ key, label, scale, values, box });
  }
  for (const { label, scale, values, box } of drawn) { // all boxes are in their places now
    const Y = axis(values.map((p) => p.v), scale, scale === "log" ? "log scale" : "", { title: null });
    if (scale === "linear") Y.scale = { zero: true };
    panel(box, () => draw(box, {
      data: { values }, width: box.clientWidth - 50, height: 150,
      mark: { type: "line", strokeWidth: 1.3, opacity: 0.85, aria: false },
      encoding: { x: { field: "t", type: "quantitative", axis: { title: `training ${saes[0].unit}`, labelExpr: "datum.value ? format(datum.value, '~s') : '0'", tickCount: 4, grid: false } }, y: { field: "v", type: "quantitative", ...Y, axis: { ...Y.axis, title: null, ...(scale === "log" ? {} : { format: "~s", tickCount: 4 }) } },
        color: { field: "architecture", type: "nominal", scale: colors(names) }, detail: { field: "sae" },
        strokeDash: { field: "site", type: "nominal", scale: { domain: sites, range: sites.map((_, i) => [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]][i % 4]) } } },
    }, `${label} against training ${saes[0].unit}, ${saes.length} SAEs`));
  }
  if (!container.children.length) container.append(make("p", { class: "note" }, "The run kept no records of its training."));
  else if (sites.length > 1) container.after(siteNote(container, `Solid: ${sites[0]}; dashed: ${sites.slice(1).join(", ")}. Losses have log scales and are comparable within an architecture only.`));
}
function siteNote(container, text) {
  if (container.nextElementSibling?.classList.contains("note")) container.nextElementSibling.remove();
  return make("p", { class: "note" }, text);
}

/** How many latents fire how often: a panel for each architecture, a line for each SAE. */
function firing(container, saes) {
  const shown = saes.filter((s) => s.row.firing_counts?.some((n) => n > 0)), names = looks(shown), sites = [...new Set(shown.map((s) => s.site))];
  if (!shown.length) return container.replaceChildren(make("p", { class: "note" }, "No latent fired."));
  const first = Math.min(...shown.map((s) => s.row.firing_counts.findIndex((n) => n > 0)));
  const values = shown.flatMap((s) => [...s.row.firing_counts, 0].map((n, i, all) => ({ f: s.row.firing_log10_edges[i], n: i === all.length - 1 ? all[i - 1] : n, sae: s.number, architecture: s.architecture, site: s.site })).slice(first));
  const room = container.clientWidth, columns = Math.min(names.length, room < 560 ? 2 : 4), width = Math.floor((room - 46 - (columns - 1) * 34) / columns) - 8;
  return draw(container, {
    data: { values }, facet: { field: "architecture", type: "nominal", sort: names }, columns, spacing: { column: 30, row: 24 }, resolve: { axis: { x: "independent" } },
    spec: { width: Math.max(width, 90), height: 110, layer: [
      { mark: { type: "area", interpolate: "step-after", opacity: 0.14, line: false, aria: false }, encoding: { x: { field: "f", type: "quantitative" }, y: { field: "n", type: "quantitative", stack: null }, color: { field: "architecture", type: "nominal", scale: colors(names) }, detail: { field: "sae" } } },
      { mark: { type: "line", interpolate: "step-after", strokeWidth: 1.3, aria: false }, encoding: {
        x: { field: "f", type: "quantitative", scale: { domain: [shown[0].row.firing_log10_edges[first], 0], nice: false }, axis: { title: null, values: [-6, -5, -4, -3, -2, -1, 0], labelExpr: "datum.value % 2 ? format(pow(10, datum.value), '~%') : ''", grid: false, labelOverlap: true } },
        y: { field: "n", type: "quantitative", stack: null, axis: { title: null, tickCount: 3, format: "~s" } },
        color: { field: "architecture", type: "nominal", scale: colors(names) }, detail: { field: "sae" },
        strokeDash: { field: "site", type: "nominal", scale: { domain: sites, range: sites.map((_, i) => [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]][i % 4]) } } } },
      { mark: { type: "rule", strokeDash: [3, 3], color: css("--muted"), aria: false }, encoding: { x: { datum: -1 } } },
    ] },
  }, `How many latents fire on which share of the ${shown[0].unit}, ${shown.length} SAEs`);
}

/** One bar for each SAE: never, usual, dense, always on. */
function bars(container, saes) {
  const shown = saes.filter((s) => Number.isFinite(s.row.never_fired) && s.width);
  const legend = [["never", "never fired"], ["usual", "fires"], ["dense", "on over 10 % of the held-out data"], ["always", "on over half"]];
  container.replaceChildren(make("p", { class: "note" }, legend.map(([name, text]) => [make("i", { class: `key ${name}` }), text]).flat()),
    make("div", { class: "bars" }, shown.map((s) => {
      const { never_fired: never, dense = 0, always_on: always = 0 } = s.row, parts = { never, usual: s.width - never - dense, dense: dense - always, always };
      return [make("span", { class: "name" }, mark(s.architecture), link(address(s), `${s.architecture}, ${s.site}`)),
        make("span", { class: "bar", "aria-hidden": "true" }, Object.entries(parts).map(([name, n]) => make("i", { class: name, style: { width: `${100 * n / s.width}%` } }))),
        make("span", { class: "muted" }, `${whole(never)} never, ${whole(dense)} dense`)];
    }).flat()));
}

// --- the overview -----------------------------------------------------------------------------------------------------

function overview() {
  const again = () => { filterTable(); points(); charts(); };
  const points = () => panel(byId("pareto"), pareto);
  const charts = () => {
    const saes = DATA.saes.filter(inside);
    for (const [id, fill] of [["curves", curves], ["alive", bars], ["firing", firing]]) panel(byId(id), () => fill(byId(id), saes));
  };
  if (!byId("saes")) return;
  const plotted = shownColumns().filter((c) => c.scale), values = (key) => [...new Set(DATA.saes.map((s) => s[key]))];
  const axes = () => byId("axes").replaceChildren(
    pick("y", plotted.filter((c) => c.key !== "l0").map((c) => [c.key, c.label]), state.y, (v) => { state.y = v; axes(); points(); }),
    pick("x", plotted.map((c) => [c.key, c.label]), state.x, (v) => { state.x = v; points(); }),
    pick("panels by", [["site", "site"], ["architecture", "architecture"], ["width", "width"]], state.by, (v) => { state.by = v; points(); }),
    state.y === "loss_recovered_zero" ? make("label", {}, make("input", { type: "checkbox", checked: state.perfect, onchange: (e) => { state.perfect = e.target.checked; points(); } }), " distance from perfect (log)") : "");
  if (!plotted.some((c) => c.key === state.y)) state.y = "fvu";
  axes();
  const choose = (key, label, name) => (values(key).length < 2 ? "" : pick(label, [["", "all"], ...values(key).sort((a, b) => (a > b ? 1 : -1)).map((v) => [v, name ? name(v) : v])], state[key], (v) => { state[key] = v; again(); }));
  byId("filters").replaceChildren(
    ...looks(DATA.saes).map((name) => {
      const b = button("", () => { const off = !state.off.delete(name); if (off) state.off.add(name); b.setAttribute("aria-pressed", String(!off)); again(); }, !state.off.has(name));
      b.append(mark(name), name);
      return b;
    }),
    choose("site", "site"), choose("width", "width", whole), choose("run", "run", (r) => DATA.runs[r].name),
    make("label", {}, "name ", make("input", { type: "search", size: 14, value: state.text, oninput: (e) => { state.text = e.target.value; again(); } })));
  const heads = [...document.querySelectorAll("#saes thead th")];
  heads.forEach((head) => { const text = head.textContent; head.replaceChildren(button(text, () => sort(head.dataset.key, state.sort === head.dataset.key ? !state.down : false))); });
  byId("sort-by").replaceChildren(...heads.map((head) => make("option", { value: head.dataset.key }, head.textContent)));
  byId("sort-by").addEventListener("change", (e) => sort(e.target.value, state.down));
  byId("sort-way").addEventListener("click", () => sort(state.sort ?? "", !state.down));
  if (state.sort != null || state.down) sort(state.sort ?? "", state.down);
  again();
  let wide = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== wide && !byId("overview").hidden) { wide = innerWidth; points(); charts(); } });
  overview.again = again;
}

function sort(key, down) {
  Object.assign(state, { sort: key, down });
  const value = (s) => (key ? s.row[key] ?? NaN : s.number), body = document.querySelector("#saes tbody");
  const order = [...DATA.saes].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    return !Number.isFinite(x) - !Number.isFinite(y) || (x - y || 0) * (down ? -1 : 1) || a.number - b.number;
  });
  order.forEach((s) => body.append(body.querySelector(`tr[data-number="${s.number}"]`)));
  document.querySelectorAll("#saes thead th").forEach((head) => (head.dataset.key === key ? head.setAttribute("aria-sort", down ? "descending" : "ascending") : head.removeAttribute("aria-sort")));
  byId("sort-by").value = key;
  byId("sort-way").textContent = down ? "descending" : "ascending";
  remember();
  say(`sorted by ${DATA.columns.find((c) => c.key === key)?.label ?? "SAE"}, ${down ? "descending" : "ascending"}`);
}
function filterTable() {
  let count = 0;
  for (const row of document.querySelectorAll("#saes tbody tr")) { row.hidden = !inside(DATA.saes[row.dataset.number]); count += !row.hidden; }
  byId("count").textContent = count === DATA.saes.length ? count : `${count} of ${DATA.saes.length}`;
  say(`${count} SAEs`);
}

// --- one SAE ------------------------------------------------------------------------------------------------------------

const REASONS = ["random", "interesting", "dense", "rare", "twin", "misaligned", "frequent"];
const lists = new Map(); // of each SAE: what its list showed last

/** The columns of an SAE with what the page needs of them. */
async function open(sae) {
  const columns = await block(`sae${sae.number}`);
  if (!columns.page) columns.page = new Map(Array.from(columns.page_latent, (latent, p) => [latent, p]));
  return columns;
}
const text = async (sae) => { const columns = await block(`text${sae.run}`); return columns.table ??= new Text(columns); };

function tiles(pairs) {
  return make("div", { class: "tiles" }, pairs.filter(Boolean).map(([label, value, title]) => make("div", { title }, make("b", {}, value), make("span", {}, label))));
}

async function saePage(view, sae) {
  const same = DATA.saes, i = sae.number;
  view.replaceChildren(
    make("div", { class: "title" }, mark(sae.architecture), make("h1", {}, `${sae.architecture}, ${sae.site}`), make("span", { class: "grow" }),
      same[i - 1] ? link(address(same[i - 1]), "← previous") : "", same[i + 1] ? link(address(same[i + 1]), "next →") : ""),
    make("p", { class: "muted" }, `${sae.path} · ${about(sae)}${sae.status ? ` · ${sae.status}` : ""}`),
    tiles(shownColumns().map((c) => [c.label, sae.text[c.key], c.about])));
  const latents = make("section", { id: "latents" }), firingBox = make("div", { class: "chart" }), curveBox = make("div", { class: "panels" });
  view.append(latents, make("section", {}, make("h2", {}, "Firing frequencies"), firingBox), make("section", {}, make("h2", {}, "Training"), curveBox));
  if (!sae.gathered) latents.append(make("h2", {}, "Latents"), make("p", { class: "banner" }, "Nothing was gathered about single latents. ", make("code", {}, "monosemy eval RUN"), " gathers it."));
  else await latentList(latents, sae, await open(sae), await text(sae));
  panel(firingBox, () => firing(firingBox, [sae]));
  panel(curveBox, () => curves(curveBox, [sae]));
}

/** What a search asks: a test of latents. Words are tokens, `freq:>0.01` and the like statistics, a bare number a latent. */
function query(words, columns, table, tokens) {
  const tests = [], fields = { freq: (l) => columns.count[l] / tokens, max: (l) => columns.max[l], mean: (l) => columns.mean[l], cos: (l) => columns.enc_dec[l] / 100, near: (l) => columns.near_cosine[l] / 100, contexts: (l) => columns.contexts[l] };
  const named = (part) => new Set([...table.place.keys()].filter((id) => table.string(id).includes(part)));
  for (const [, field, quoted, bare] of words.matchAll(/(?:(\w+):)?(?:"([^"]*)"|(\S+))/g)) {
    const value = quoted ?? bare, compared = value.match(/^([<>])=?(.+)$/);
    if (field in fields && compared && Number.isFinite(Number(compared[2]))) tests.push((l) => (compared[1] === ">" ? fields[field](l) >= compared[2] : fields[field](l) <= compared[2]));
    else if (!field && /^\d+$/.test(value) && quoted == null) tests.push((l) => l === Number(value));
    else {
      const ids = named(value);
      const at = (l) => Boolean(columns.peak_token) && ids.has(columns.peak_token[l]);
      const up = (l) => columns.page_promotes && columns.page.has(l) && Array.from(columns.page_promotes.subarray(10 * columns.page.get(l), 10 * columns.page.get(l) + 10)).some((id) => ids.has(id));
      tests.push(field === "token" ? at : field === "promotes" ? up : (l) => at(l) || up(l));
    }
  }
  return (l) => tests.every((test) => test(l));
}

async function latentList(box, sae, columns, table) {
  const F = columns.count.length, tokens = sae.facts.tokens, pages = columns.page_latent.length;
  const kept = lists.get(sae.number) ?? { tab: pages ? "interesting" : "all", words: "", sort: "", down: true, first: 0 };
  lists.set(sae.number, kept);
  const everyone = Array.from({ length: F }, (_, l) => l), reason = (l) => (columns.page.has(l) ? REASONS[columns.page_reason[columns.page.get(l)]] : "");
  const tabs = { ...Object.fromEntries(REASONS.map((name) => [name, everyone.filter((l) => reason(l) === name)])), all: everyone, "never fired": everyone.filter((l) => !columns.count[l]) };
  if (!tabs[kept.tab]?.length) kept.tab = "all";
  const place = (l) => columns.page.get(l) ?? Infinity;
  const fields = [["latent", "", (l) => l], ["fires on", "number", (l) => columns.count[l]], sae.unit === "tokens" ? ["contexts", "number", (l) => columns.contexts[l]] : null, ["max", "number", (l) => columns.max[l]], ["mean", "number", (l) => columns.mean[l]],
    columns.peak_token ? ["peak token", "", null] : null, columns.page_promotes ? ["promotes", "", null] : null, ["enc-dec", "number", (l) => columns.enc_dec[l]], ["nearest", "number", (l) => columns.near_cosine[l]], ["page", "", null]].filter(Boolean);
  const head = make("thead"), body = make("tbody"), foot = make("div", { class: "controls" }), note = make("p", { class: "note" });
  const tabRow = make("div", { class: "controls", role: "group", "aria-label": "Lists of latents" });
  const search = make("input", { type: "search", id: "search", size: 34, placeholder: sae.unit === "tokens" ? "word, number, freq:>0.01" : "number, freq:>0.01", value: kept.words, "aria-label": "Search latents", oninput: (e) => { kept.words = e.target.value; kept.first = 0; if (kept.words) kept.tab = "all"; show(); } });
  const show = () => {
    tabRow.replaceChildren(...Object.entries(tabs).filter(([, list]) => list.length).map(([name, list]) => button(`${name} ${whole(list.length)}`, () => { Object.assign(kept, { tab: name, first: 0, sort: "" }); show(); }, kept.tab === name)));
    const test = kept.words.trim() ? query(kept.words, columns, table, tokens) : () => true;
    const list = tabs[kept.tab].filter(test), by = fields.find(([name]) => name === kept.sort)?.[2];
    list.sort((a, b) => (by ? (by(a) - by(b)) * (kept.down ? -1 : 1) : place(a) - place(b)) || a - b);
    kept.list = list;
    head.replaceChildren(make("tr", {}, fields.map(([name, kind, value]) => make("th", { scope: "col", class: kind, "aria-sort": kept.sort === name ? (kept.down ? "descending" : "ascending") : null },
      value ? button(name, () => { Object.assign(kept, { down: kept.sort === name ? !kept.down : true, sort: name, first: 0 }); show(); }) : name))));
    body.replaceChildren(...list.slice(kept.first, kept.first + ROWS).map((l) => {
      const p = columns.page.get(l), cells = { latent: link(address(sae, l), String(l)), "fires on": percent(columns.count[l] / tokens), contexts: whole(columns.contexts[l]), max: digits(columns.max[l]), mean: digits(columns.mean[l]),
        "peak token": columns.count[l] && columns.peak_token?.[l] >= 0 ? table.shown(columns.peak_token[l]) : "", promotes: p != null && columns.page_promotes ? table.shown(columns.page_promotes[10 * p]) : "",
        "enc-dec": (columns.enc_dec[l] / 100).toFixed(2), nearest: `${columns.near[l]} (${(columns.near_cosine[l] / 100).toFixed(2)})`, page: reason(l) };
      return make("tr", {}, fields.map(([name, kind]) => make("td", { class: kind }, cells[name])));
    }));
    const last = Math.min(kept.first + ROWS, list.length), turn = (by_, label, off) => { const b = button(label, () => { kept.first += by_; show(); box.scrollIntoView(); }); b.disabled = off; return b; };
    foot.replaceChildren(turn(-ROWS, "←", kept.first === 0), list.length ? `${whole(kept.first + 1)} to ${whole(last)} of ${whole(list.length)}` : "no latent", turn(ROWS, "→", last >= list.length));
  };
  note.textContent = `All ${whole(F)} latents are listed; ${whole(pages)} have a page, a third of them drawn at random among those that fire in at least 4 ${sae.unit === "tokens" ? "contexts" : sae.unit} (About says how the others were chosen). Measured on ${whole(tokens)} held-out ${sae.unit}. Search also takes ${sae.unit === "tokens" ? 'token:"…" promotes:"…" and ' : ""}freq: max: mean: cos: near: contexts: with < or >.`;
  box.replaceChildren(make("h2", {}, "Latents ", make("span", { class: "muted" }, whole(F))), tabRow, make("div", { class: "controls" }, search), make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of latents" }, make("table", {}, head, body)), foot, note);
  show();
}

// --- one latent -----------------------------------------------------------------------------------------------------------

async function latentPage(view, sae, latent) {
  if (!sae.gathered) return saePage(view, sae);
  const columns = await open(sae), table = await text(sae), F = columns.count.length, tokens = sae.facts.tokens, p = columns.page.get(latent);
  if (!(latent >= 0 && latent < F)) return view.replaceChildren(make("h1", {}, `Latent ${latent}`), make("p", { class: "banner" }, `This SAE has latents 0 to ${F - 1}.`));
  const n = columns.count[latent], list = (lists.get(sae.number)?.list ?? Array.from(columns.page_latent)).filter((l) => columns.page.has(l) || l === latent), at = list.indexOf(latent);
  const beside = [list[at - 1], list[at + 1]].map((l) => (at >= 0 && l != null ? address(sae, l) : null));
  latentPage.beside = beside;
  view.replaceChildren(
    make("div", { class: "title" }, mark(sae.architecture), make("h1", {}, `Latent ${latent}`), make("span", { class: "muted" }, `${sae.architecture}, ${sae.site}`), make("span", { class: "grow" }),
      beside[0] ? link(beside[0], "← previous") : "", at >= 0 ? make("span", { class: "muted" }, `${whole(at + 1)} of ${whole(list.length)} in the list`) : "", beside[1] ? link(beside[1], "next →") : ""),
    tiles([[`of ${sae.unit}`, percent(n / tokens), `${whole(n)} of ${whole(tokens)}`], ["firings", whole(n)], sae.unit === "tokens" ? ["of contexts", percent(columns.contexts[latent] / sae.facts.contexts), whole(columns.contexts[latent])] : null, ["largest activation", digits(columns.max[latent])], ["mean where active", digits(columns.mean[latent])],
      ["encoder-decoder cosine", (columns.enc_dec[latent] / 100).toFixed(2), "Does it read the direction that it writes?"], ["cosine of the nearest decoder", (columns.near_cosine[latent] / 100).toFixed(2)], p != null ? ["chosen as", REASONS[columns.page_reason[p]]] : null]));
  if (!n) view.append(make("p", { class: "banner" }, `Never fired on ${whole(tokens)} held-out ${sae.unit}: with 95 % confidence it fires on fewer than ${digits(3e6 / tokens)} in a million.`));
  if (p == null) return view.append(make("p", { class: "banner" }, `Latent ${latent} has no page in this report; pages are for ${whole(columns.page_latent.length)} of ${whole(F)}. Its nearest decoder is `, link(address(sae, columns.near[latent]), String(columns.near[latent])), "."));
  const tokensOf = (name) => {
    if (!columns[`page_${name}`]) return null;
    const width = columns.shape[`page_${name}`][1], ids = columns[`page_${name}`].subarray(width * p, width * p + width), z = columns[`page_${name}_z`].subarray(width * p, width * p + width), most = Math.abs(z[0]);
    return make("div", {}, make("h2", {}, name[0].toUpperCase() + name.slice(1)), make("ol", {}, Array.from(ids, (id, i) => make("li", { style: { "--w": Math.abs(z[i]) / most } }, table.shown(id), `${z[i] > 0 ? "+" : ""}${z[i].toFixed(1)}`))));
  };
  const width = columns.shape.page_near[1];
  view.append(make("section", { class: "cards" },
    make("div", {}, make("h2", {}, "Activations"), histogram(columns, p, sae.unit), make("p", { class: "note" }, `${sae.unit[0].toUpperCase() + sae.unit.slice(1)} by activation, quarter octaves`)),
    tokensOf("promotes"), tokensOf("suppresses"),
    make("div", {}, make("h2", {}, "Nearest decoders"), make("ol", {}, Array.from(columns.page_near.subarray(width * p, width * p + width), (l, i) => { const c = columns.page_near_cosine[width * p + i] / 100; return make("li", { style: { "--w": Math.max(c, 0) } }, link(address(sae, l), String(l)), c.toFixed(2)); })))));
  if (columns.page_rows) view.append(strongestRows(columns, p));
  if (sae.unit === "rows") return;
  if (!sae.logits) view.append(make("p", { class: "note" }, "No tokens are promoted or suppressed directly: this site does not write into the residual stream."));
  if (columns.page_at) view.append(contexts(sae, columns, table, p, latent));
  else view.append(make("p", { class: "note" }, "The report was made without text."));
}

/** The rows on which a latent of activations without text is strongest. */
function strongestRows(columns, p) {
  const R = columns.shape.page_rows[1], at = Array.from(columns.page_rows.subarray(R * p, R * p + R)), values = columns.page_row_values.subarray(R * p, R * p + R);
  return make("section", {}, make("h2", {}, "Strongest rows"), make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, make("th", { scope: "col", class: "number" }, "row"), make("th", { scope: "col", class: "number" }, "activation"))),
    make("tbody", {}, at.map((row, r) => (row < 0 ? null : make("tr", {}, make("td", { class: "number" }, whole(row)), make("td", { class: "number" }, digits(values[r]))))).filter(Boolean)))),
    make("p", { class: "note" }, "Rows are counted from 0, in the order in which the batches came."));
}

function histogram(columns, p, unit) {
  const bins = columns.shape.page_bins[1], n = columns.page_bins.subarray(bins * p, bins * p + bins), first = n.findIndex((v) => v > 0);
  let last = bins - 1;
  while (last > first && !n[last]) last--;
  const low = Math.max(first - 1, 0), high = Math.min(Math.max(last + 2, low + 12), bins), most = Math.max(...n), W = 260, H = 120, w = W / (high - low), value = (bin) => 2 ** (LOWEST + Math.floor(bin / 4)) * (1 + (bin % 4) / 4);
  const svg = (tag, props, ...children) => { const e = document.createElementNS("http://www.w3.org/2000/svg", tag); for (const [k, v] of Object.entries(props)) e.setAttribute(k, v); e.append(...children); return e; };
  const parts = [];
  for (let b = low; b < high; b++) if (n[b]) { const h = Math.max(1.5, (H - 32) * n[b] / most); parts.push(svg("rect", { x: (b - low) * w + 0.5, y: H - 18 - h, width: Math.max(w - 1, 1), height: h }, svg("title", {}, `${digits(value(b))} to ${digits(value(b + 1))}: ${whole(n[b])} ${unit}`))); }
  for (const bin of [low, Math.round((low + high) / 2), high]) parts.push(svg("text", { x: (bin - low) * w, y: H - 3, "text-anchor": bin === low ? "start" : bin === high ? "end" : "middle" }, digits(value(bin))));
  parts.push(svg("text", { x: 0, y: 10 }, `${whole(most)} ${unit}`));
  return svg("svg", { viewBox: `0 0 ${W} ${H}`, class: "histogram", role: "img", "aria-label": `Activations from ${digits(value(first))} to ${digits(value(last + 1))}` }, ...parts);
}

const reading = { aligned: innerWidth > 720 };

/** The strongest contexts, then those drawn from each octave. */
function contexts(sae, columns, table, p, latent) {
  const slots = columns.shape.page_at[1], at = columns.page_at.subarray(slots * p, slots * p + slots), peaks = columns.page_peak.subarray(slots * p, slots * p + slots), max = columns.max[latent], n = columns.count[latent];
  const bins = columns.shape.page_bins[1], counts = columns.page_bins.subarray(bins * p, bins * p + bins), box = make("section");
  const item = (slot) => make("li", {}, make("span", { class: "value" }, digits(peaks[slot])), windowOf(sae, columns, table, p, slot, max));
  const list = (wanted) => make("ul", { class: "contexts" }, wanted.filter((slot) => at[slot] >= 0).map(item));
  const octaves = Array.from({ length: OCTAVES }, (_, o) => ({ exponent: columns.page_octave[OCTAVES * p + o], candidates: columns.page_candidates[OCTAVES * p + o], slots: Array.from({ length: SAMPLED }, (_, r) => STRONGEST + SAMPLED * o + r) }))
    .filter((o) => o.candidates && o.slots.some((slot) => at[slot] >= 0)).sort((a, b) => b.exponent - a.exponent);
  const choose = (aligned, label) => button(label, () => { reading.aligned = aligned; box.replaceWith(contexts(sae, columns, table, p, latent)); }, reading.aligned === aligned);
  const fired = Array.from({ length: STRONGEST }, (_, i) => i).filter((slot) => at[slot] >= 0).length;
  box.append(make("div", { class: "controls" }, make("h2", {}, "Strongest contexts"), make("span", { class: "grow" }), choose(true, "in one column"), choose(false, "wrapped"),
    make("span", { class: "muted" }, "0", make("span", { class: "scale" }, [0, 0.25, 0.5, 0.75, 1].map((w) => make("i", { style: { "--w": w } }))), `${digits(max)} (by square root)`)), list(Array.from({ length: STRONGEST }, (_, i) => i)));
  if (fired < STRONGEST) box.append(make("p", { class: "note" }, `Fired in ${fired} context${fired === 1 ? "" : "s"}; all are shown.`));
  if (octaves.length) box.append(make("h2", { style: { "margin-top": "28px" } }, "Drawn by strength"));
  for (const { exponent, candidates, slots: drawn } of octaves) {
    const firings = counts.subarray(4 * (exponent - LOWEST), 4 * (exponent - LOWEST) + 4).reduce((a, b) => a + b, 0);
    box.append(make("h3", {}, `${power(exponent)} to ${power(exponent + 1)} `, make("span", { class: "muted" }, `${percent(firings / n)} of its firings; ${drawn.filter((slot) => at[slot] >= 0).length} drawn of ${whole(candidates)} context${candidates === 1 ? "" : "s"} with their peak here`)), list(drawn));
  }
  box.classList.toggle("aligned", reading.aligned);
  return box;
}

/** The tokens around a peak; consecutive ones whose bytes make one character are one segment. */
function windowOf(sae, columns, table, p, slot, max) {
  const slots = columns.shape.page_at[1], peakAt = columns.page_at[slots * p + slot], peak = columns.page_peak[slots * p + slot], L = columns.shape.ids?.[1] ?? table.shape.ids[1], start = Math.floor(peakAt / L) * L;
  const first = Math.max(start, peakAt - BEFORE), last = Math.min(start + L - 1, peakAt + WINDOW - 1 - BEFORE), parts = { before: [], after: [] };
  for (let i = first; i <= last;) {
    let bytes = table.bytes(table.ids[i]), j = i, string = Text.decode(bytes);
    for (let k = i + 1; string == null && k <= Math.min(last, i + 5); k++) {
      const longer = Uint8Array.from([...bytes, ...table.bytes(table.ids[k])]);
      bytes = longer;
      string = Text.decode(longer);
      if (string != null) j = k;
    }
    const places = Array.from({ length: j - i + 1 }, (_, k) => i + k), special = table.token_special[table.ids[i]];
    const values = places.map((place) => columns.page_shade[WINDOW * (slots * p + slot) + place - peakAt + BEFORE] / 32 * peak), value = Math.max(...values), isPeak = i <= peakAt && peakAt <= j;
    const segment = make("bdi", { class: [isPeak ? "peak" : "", special ? "special" : ""].join(" ").trim() || null, style: value > 0 ? { "--w": Math.sqrt(Math.min(value / max, 1)).toFixed(3) } : {}, tabindex: isPeak ? "0" : "-1" }, visible(string ?? Text.numbers(table.bytes(table.ids[i]))));
    segment.about = { string: string ?? "", ids: places.map((place) => table.token_ids[table.ids[place]]), value: isPeak ? peak : value, exact: isPeak, place: places[0] - start };
    parts[i < peakAt && !isPeak ? "before" : "after"].push(segment);
    i = j + 1;
  }
  return make("div", { class: "tokens", dir: "auto", onfocusin: tokenCard, onmouseover: tokenCard, onmouseleave: hush, onfocusout: hush, onkeydown: step, oncopy: copied },
    reading.aligned ? [make("span", { class: "before" }, make("span", {}, parts.before)), make("span", { class: "after" }, parts.after)] : [...parts.before, ...parts.after]);
}
function tokenCard(event) {
  const it = event.target.closest("bdi")?.about;
  if (!it) return;
  byId("card").replaceChildren(make("b", {}, visible(it.string, true)), make("dl", {}, [["activation", it.value ? `${it.exact ? "" : "about "}${digits(it.value)}` : "0"], [it.ids.length > 1 ? "tokens" : "token", it.ids.join(", ")], ["position", it.place]].map(([k, v]) => make("div", {}, make("dt", {}, k), make("dd", {}, String(v))))));
  byId("card").hidden = false;
}
function step(event) {
  const all = [...event.currentTarget.querySelectorAll("bdi")], to = all[all.indexOf(document.activeElement) + { ArrowRight: 1, ArrowLeft: -1 }[event.key]];
  if (to) { all.forEach((b) => b.setAttribute("tabindex", b === to ? "0" : "-1")); to.focus(); event.preventDefault(); }
}
function copied(event) {
  const chosen = getSelection(), strings = [...event.currentTarget.querySelectorAll("bdi")].filter((b) => chosen.containsNode(b, true)).map((b) => b.about.string);
  if (strings.length) { event.clipboardData.setData("text/plain", strings.join("")); event.preventDefault(); }
}

// --- routes ---------------------------------------------------------------------------------------------------------------

async function route() {
  hush();
  const hash = location.hash.slice(1) || "/", [, path, number] = hash.match(/^\/sae\/(.+?)(?:\/latent\/(\d+))?$/) ?? [], pages = { overview: byId("overview"), view: byId("view"), about: byId("about") };
  const show = (name) => Object.entries(pages).forEach(([key, page]) => { page.hidden = key !== name; });
  const trail = [link(home(), "Overview")];
  latentPage.beside = null;
  if (hash === "/about") show("about");
  else if (path) {
    const name = path.split("/").map(decodeURIComponent).join("/"), sae = DATA.saes.find((s) => s.path === name);
    show("view");
    if (!sae) pages.view.replaceChildren(make("h1", {}, "No such SAE"), make("p", { class: "banner" }, `This report has no SAE ${name}.`));
    else {
      trail.push(" › ", link(address(sae), `${sae.architecture}, ${sae.site}`));
      if (number != null) trail.push(" › ", make("span", {}, `latent ${number}`));
      try { await (number == null ? saePage(pages.view, sae) : latentPage(pages.view, sae, Number(number))); } catch (error) {
        pages.view.append(make("p", { class: "banner" }, `The data of this SAE cannot be read (${error.message}). The file may be cut.`));
      }
    }
    scrollTo(0, 0);
  } else show("overview");
  byId("trail").replaceChildren(...trail);
}

addEventListener("keydown", (event) => {
  if (event.key === "Escape") hush();
  if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/" && byId("search")) { byId("search").focus(); event.preventDefault(); }
  const to = latentPage.beside?.["[]".indexOf(event.key)];
  if (to) location.hash = to;
});

async function start() {
  const packed = await block("overview");
  DATA = JSON.parse(new TextDecoder().decode(packed.json));
  DATA.architectures = Object.keys(DATA.looks);
  document.querySelectorAll(".script").forEach((element) => { element.hidden = false; });
  paint();
  const again = () => { paint(); if (byId("overview").hidden) route(); overview.again?.(); };
  byId("theme").addEventListener("change", (event) => { document.documentElement.dataset.theme = event.target.value; again(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  addEventListener("hashchange", route);
  if (atHome()) recall();
  overview();
  await route();
  document.documentElement.dataset.ready = "";
}
start();
