// Marks, scales and Vega-Lite specifications: what all charts share.

const dark = () =>
  (document.documentElement.dataset.theme ||
    (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const color = (look) => look[dark() ? "dark" : "light"];
let DATA = null;

function mark(architecture) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"),
    path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  svg.setAttribute("class", "mark");
  svg.setAttribute("viewBox", "-1.5 -1.5 3 3");
  svg.setAttribute("aria-hidden", "true");
  svg.dataset.architecture = architecture;
  path.setAttribute("d", DATA.markers[DATA.looks[architecture].marker]);
  svg.append(path);
  svg.style.fill = color(DATA.looks[architecture]);
  return svg;
}
const paint = () =>
  document.querySelectorAll(".mark").forEach((svg) => {
    svg.style.fill = color(DATA.looks[svg.dataset.architecture]);
  });

const looks = (saes) => DATA.architectures.filter((name) => saes.some((sae) => sae.architecture === name));
const colors = (names) => ({ domain: names, range: names.map((name) => color(DATA.looks[name])) });
const shapes = (names) => ({
  domain: names,
  range: names.map((name) => DATA.markers[DATA.looks[name].marker]),
});

/** Round numbers in a range for a log axis: 10 20 40 .. where doubling, else 1 2 5 10 .. */
function ticks(low, high, doubling) {
  const steps = [];
  for (let d = -9; d < 10; d++) for (const s of [1, 2, 5]) steps.push(Number(`${s}e${d}`));
  const twos = Array.from({ length: 30 }, (_, i) => 10 * 2 ** (i - 12));
  const tens = steps.filter((s) => String(s.toExponential()).startsWith("1e"));
  const fine = [];
  for (let d = -9; d < 10; d++)
    for (const s of [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9]) fine.push(Number(`${s}e${d}`));
  const unit = 10 ** Math.floor(Math.log10((high - low) / 2.5)),
    even = Array.from({ length: 30 }, (_, i) => Number(((Math.ceil(low / unit) + i) * unit).toPrecision(6)));
  for (const all of doubling ? [twos, steps, fine, even] : [tens, steps, fine, even]) {
    const inside = all.filter((t) => t >= low && t <= high);
    if (inside.length >= 3 || all === even)
      return inside.filter((_, i) => i % Math.ceil(inside.length / 8) === 0);
  }
}
function axis(values, type, title, extra = {}) {
  if (type !== "log") return { scale: { zero: false, nice: true }, axis: { title, tickCount: 6, ...extra } };
  const low = Math.min(...values) / 1.18,
    high = Math.max(...values) * 1.18;
  const at = ticks(low, high, title.startsWith("L0"));
  return {
    scale: { type: "log", domain: [low, high], nice: false },
    axis: { title, format: "~g", values: at, ...extra },
  };
}

/** Fill one panel; where that fails the panel says so, and the others are drawn all the same. */
async function panel(box, fill) {
  try {
    await fill();
  } catch (error) {
    box.replaceChildren(make("p", { class: "note" }, `This panel cannot be drawn (${error.message}).`));
  }
}

/** Draw a specification into a container; points with a `sae` open it, by click or Enter, and tell about themselves on hover and focus. */
async function draw(container, spec, title) {
  const ink = css("--ink"),
    line = css("--line"),
    font = "system-ui, Noto Sans, sans-serif";
  const config = {
    background: null,
    font,
    view: { stroke: null },
    title: { color: ink, fontSize: 13, anchor: "start", fontWeight: 600 },
    axis: {
      labelColor: css("--muted"),
      titleColor: ink,
      gridColor: line,
      domainColor: line,
      tickColor: line,
      labelFontSize: 12,
      titleFontSize: 12,
      titleFontWeight: 400,
      titlePadding: 8,
    },
    header: { labelColor: ink, labelFontSize: 13, labelFontWeight: 600, labelAnchor: "start", title: null },
    legend: { disable: true },
    facet: { spacing: 28 },
  };
  const { view } = await vegaEmbed(
    container,
    { $schema: "https://vega.github.io/schema/vega-lite/v6.json", description: title, ...spec, config },
    { mode: "vega-lite", renderer: "svg", actions: false, ast: true, tooltip: false },
  );
  const of = (item) => (item?.datum?.sae != null ? DATA.saes[item.datum.sae] : null);
  view.addEventListener("click", (_, item) => {
    const sae = of(item);
    if (sae) location.hash = address(sae);
  });
  view.addEventListener("mouseover", (_, item) => {
    const sae = of(item);
    if (sae) tell(sae, item.datum.note);
  });
  view.addEventListener("mouseout", hush);
  container.querySelectorAll('path[role="graphics-symbol"]').forEach((path) => {
    const sae = of(path.__data__);
    if (!sae || path.__data__.mark.marktype !== "symbol") {
      path.setAttribute("aria-hidden", "true");
      return;
    }
    path.setAttribute("tabindex", "0");
    path.setAttribute("role", "link");
    path.dataset.sae = sae.number;
    path.addEventListener("focus", () => tell(sae));
    path.addEventListener("blur", hush);
    path.addEventListener("keydown", (e) => {
      if (e.key === "Enter") location.hash = address(sae);
    });
  });
  return view;
}
const address = (sae, latent) =>
  `#/sae/${sae.path.split("/").map(encodeURIComponent).join("/")}${latent == null ? "" : `/latent/${latent}`}`;
const about = (sae) =>
  [sae.site, sae.width ? `${whole(sae.width)} latents` : "", sae.setting].filter(Boolean).join(", ");
const shownColumns = () =>
  DATA.columns.filter((column) => DATA.saes.some((sae) => Number.isFinite(sae.row[column.key])));

function tell(sae, note) {
  const card = byId("card");
  card.replaceChildren(
    make("b", {}, sae.architecture),
    about(sae),
    note ? make("div", {}, note) : "",
    make(
      "dl",
      {},
      shownColumns()
        .slice(0, 7)
        .map((c) => make("div", {}, make("dt", {}, c.label), make("dd", {}, sae.text[c.key]))),
    ),
  );
  card.hidden = false;
}
const hush = () => {
  byId("card").hidden = true;
};
