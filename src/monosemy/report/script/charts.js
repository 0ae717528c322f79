// The charts of the overview and of an SAE.

function pareto() {
  remember();
  const x = DATA.columns.find((c) => c.key === state.x),
    y = DATA.columns.find((c) => c.key === state.y);
  const perfect = state.perfect && y.key === "loss_recovered_zero";
  const at = (v) => (perfect ? 1 - v : v),
    xLog = x.scale === "log",
    yLog = perfect || y.scale === "log";
  const wanted = DATA.saes.filter(inside);
  const values = wanted
    .filter(
      (s) =>
        [x, y].every((c) => Number.isFinite(s.row[c.key])) &&
        (!xLog || s.row[x.key] > 0) &&
        (!yLog || at(s.row[y.key]) > 0),
    )
    .map((s) => {
      const low = s.row[`${y.key}_low`],
        high = s.row[`${y.key}_high`],
        ends = Number.isFinite(low) && Number.isFinite(high) && (!yLog || Math.min(at(low), at(high)) > 0);
      return {
        sae: s.number,
        architecture: s.architecture,
        width: s.width ?? 0,
        line: `${s.architecture} ${s.width} ${s.run}`,
        run: s.run,
        x: s.row[x.key],
        y: at(s.row[y.key]),
        low: ends ? at(low) : null,
        high: ends ? at(high) : null,
        panel: String(state.by === "width" ? `${whole(s.width ?? 0)} latents` : s[state.by]),
        label: `${s.architecture}, ${about(s)}: ${x.label} ${s.text[x.key]}, ${y.label} ${s.text[y.key]}`,
      };
    });
  const left = wanted.length - values.length;
  byId("pareto-note").textContent = [
    state.y === "loss_recovered_zero"
      ? "Bars: where 95 of 100 re-draws of the held-out text would fall."
      : "",
    DATA.runs.length > 1 ? `Filled: ${DATA.runs[0].name}; hollow: the other runs.` : "",
    left ? `${left} of ${wanted.length} SAEs have no such numbers and are not shown.` : "",
    "A click on a point opens its SAE.",
  ]
    .filter(Boolean)
    .join(" ");
  const container = byId("pareto");
  if (!values.length) return container.replaceChildren(make("p", { class: "note" }, "No SAE to show."));
  const order = { site: (a, b) => (a.layer ?? 0) - (b.layer ?? 0), width: (a, b) => a.width - b.width };
  const panels = [
    ...new Set(
      [...wanted]
        .sort(order[state.by] ?? (() => 0))
        .map((s) => String(state.by === "width" ? `${whole(s.width ?? 0)} latents` : s[state.by])),
    ),
  ].filter((p) => values.some((v) => v.panel === p));
  const room = container.clientWidth,
    columns = room < 560 ? 1 : Math.min(panels.length, room > 900 && panels.length > 4 ? 3 : 2);
  const width = Math.floor((room - 70 - (columns - 1) * 76) / columns) - 4,
    names = looks(DATA.saes),
    widths = [...new Set(values.map((v) => v.width))].sort((a, b) => a - b);
  const ys = values.flatMap((v) => [v.y, v.low, v.high]).filter((v) => v != null);
  const X = {
    field: "x",
    type: "quantitative",
    ...axis(
      values.map((v) => v.x),
      x.scale,
      xLog ? `${x.label} (log scale)` : x.label,
    ),
  };
  const yTitle = perfect ? "1 - loss recovered (log scale)" : yLog ? `${y.label} (log scale)` : y.label;
  const Y = { field: "y", type: "quantitative", ...axis(ys, yLog ? "log" : "linear", yTitle) };
  const fill = { field: "architecture", type: "nominal", scale: colors(names) };
  return draw(
    container,
    {
      data: { values },
      facet: { field: "panel", type: "nominal", sort: panels },
      columns,
      resolve: { axis: { x: "independent", y: "independent" } },
      spec: {
        width,
        height: room < 560 ? 250 : 320,
        layer: [
          {
            mark: { type: "line", strokeWidth: 1, opacity: 0.5, aria: false },
            encoding: { x: X, y: Y, color: fill, detail: { field: "line" } },
          },
          {
            transform: [{ filter: "isValid(datum.low)" }],
            mark: { type: "rule", strokeWidth: 1.5, aria: false },
            encoding: { x: X, y: { ...Y, field: "low" }, y2: { field: "high" }, color: fill },
          },
          {
            mark: { type: "point", strokeWidth: 1.2, opacity: 1, cursor: "pointer" },
            encoding: {
              x: X,
              y: Y,
              stroke: fill,
              shape: { field: "architecture", scale: shapes(names) },
              description: { field: "label" },
              fill: { condition: { test: "datum.run > 0", value: css("--paper") }, ...fill },
              size:
                widths.length > 1
                  ? {
                      field: "width",
                      type: "ordinal",
                      scale: {
                        domain: widths,
                        range: widths.map((_, i) => 60 + (110 * i) / (widths.length - 1)),
                      },
                    }
                  : { value: 90 },
            },
          },
        ],
      },
    },
    `${y.label} against ${x.label}, ${values.length} SAEs`,
  );
}

/** Lines of each site in dashes of their own. */
function dashes(sites) {
  const patterns = [
    [1, 0],
    [6, 3],
    [2, 2],
    [8, 3, 2, 3],
  ];
  const range = sites.map((_, i) => patterns[i % patterns.length]);
  return { field: "site", type: "nominal", scale: { domain: sites, range } };
}

/** Training curves of some SAEs: a small plot for each measure. */
function curves(container, saes) {
  const measures = [
    ["loss", "Training loss", "log"],
    ["fvu", "FVU", "log"],
    ["l0", "L0", "log"],
    ["dead", "Dead latents", "linear"],
  ];
  const sites = [...new Set(saes.map((s) => s.site))],
    names = looks(saes);
  container.replaceChildren();
  const drawn = [];
  for (const [key, label, scale] of measures) {
    const values = saes
      .flatMap((s) =>
        s.curves.tokens.map((t, i) => ({
          t,
          v: s.curves[key][i],
          sae: s.number,
          architecture: s.architecture,
          site: s.site,
        })),
      )
      .filter((p) => Number.isFinite(p.v) && (scale === "linear" || p.v > 0));
    if (!values.length) continue;
    const box = make("div", { class: "panel-chart" });
    container.append(make("div", {}, make("h3", {}, label), box));
    drawn.push({ key, label, scale, values, box });
  }
  for (const { label, scale, values, box } of drawn) {
    // all boxes are in their places now
    const Y = axis(
      values.map((p) => p.v),
      scale,
      scale === "log" ? "log scale" : "",
      { title: null },
    );
    if (scale === "linear") Y.scale = { zero: true };
    panel(box, () =>
      draw(
        box,
        {
          data: { values },
          width: box.clientWidth - 50,
          height: 150,
          mark: { type: "line", strokeWidth: 1.3, opacity: 0.85, aria: false },
          encoding: {
            x: {
              field: "t",
              type: "quantitative",
              axis: {
                title: `training ${saes[0].unit}`,
                labelExpr: "datum.value ? format(datum.value, '~s') : '0'",
                tickCount: 4,
                grid: false,
              },
            },
            y: {
              field: "v",
              type: "quantitative",
              ...Y,
              axis: { ...Y.axis, title: null, ...(scale === "log" ? {} : { format: "~s", tickCount: 4 }) },
            },
            color: { field: "architecture", type: "nominal", scale: colors(names) },
            detail: { field: "sae" },
            strokeDash: dashes(sites),
          },
        },
        `${label} against training ${saes[0].unit}, ${saes.length} SAEs`,
      ),
    );
  }
  if (!container.children.length)
    container.append(make("p", { class: "note" }, "The run kept no records of its training."));
  else if (sites.length > 1)
    container.after(
      siteNote(
        container,
        `Solid: ${sites[0]}; dashed: ${sites.slice(1).join(", ")}. Losses have log scales and are comparable within an architecture only.`,
      ),
    );
}
function siteNote(container, text) {
  if (container.nextElementSibling?.classList.contains("note")) container.nextElementSibling.remove();
  return make("p", { class: "note" }, text);
}

/** How many latents fire how often: a panel for each architecture, a line for each SAE. */
function firing(container, saes) {
  const shown = saes.filter((s) => s.row.firing_counts?.some((n) => n > 0)),
    names = looks(shown),
    sites = [...new Set(shown.map((s) => s.site))];
  if (!shown.length) return container.replaceChildren(make("p", { class: "note" }, "No latent fired."));
  const first = Math.min(...shown.map((s) => s.row.firing_counts.findIndex((n) => n > 0)));
  const values = shown.flatMap((s) =>
    [...s.row.firing_counts, 0]
      .map((n, i, all) => ({
        f: s.row.firing_log10_edges[i],
        n: i === all.length - 1 ? all[i - 1] : n,
        sae: s.number,
        architecture: s.architecture,
        site: s.site,
      }))
      .slice(first),
  );
  const room = container.clientWidth,
    columns = Math.min(names.length, room < 560 ? 2 : 4),
    width = Math.floor((room - 46 - (columns - 1) * 34) / columns) - 8;
  return draw(
    container,
    {
      data: { values },
      facet: { field: "architecture", type: "nominal", sort: names },
      columns,
      spacing: { column: 30, row: 24 },
      resolve: { axis: { x: "independent" } },
      spec: {
        width: Math.max(width, 90),
        height: 110,
        layer: [
          {
            mark: { type: "area", interpolate: "step-after", opacity: 0.14, line: false, aria: false },
            encoding: {
              x: { field: "f", type: "quantitative" },
              y: { field: "n", type: "quantitative", stack: null },
              color: { field: "architecture", type: "nominal", scale: colors(names) },
              detail: { field: "sae" },
            },
          },
          {
            mark: { type: "line", interpolate: "step-after", strokeWidth: 1.3, aria: false },
            encoding: {
              x: {
                field: "f",
                type: "quantitative",
                scale: { domain: [shown[0].row.firing_log10_edges[first], 0], nice: false },
                axis: {
                  title: null,
                  values: [-6, -5, -4, -3, -2, -1, 0],
                  labelExpr: "datum.value % 2 ? format(pow(10, datum.value), '~%') : ''",
                  grid: false,
                  labelOverlap: true,
                },
              },
              y: {
                field: "n",
                type: "quantitative",
                stack: null,
                axis: { title: null, tickCount: 3, format: "~s" },
              },
              color: { field: "architecture", type: "nominal", scale: colors(names) },
              detail: { field: "sae" },
              strokeDash: dashes(sites),
            },
          },
          {
            mark: { type: "rule", strokeDash: [3, 3], color: css("--muted"), aria: false },
            encoding: { x: { datum: -1 } },
          },
        ],
      },
    },
    `How many latents fire on which share of the ${shown[0].unit}, ${shown.length} SAEs`,
  );
}

/** How many latents that fired have which share of their decoder's norms at the second source, from the first one's own to the second's. */
function sharedNorms(container, columns) {
  const bins = 40,
    counts = { held: new Array(bins).fill(0), doubtful: new Array(bins).fill(0) };
  columns.relative_norm.forEach((share, l) => {
    if (!columns.count[l]) return;
    const bin = Math.min(Math.floor(share * bins), bins - 1),
      alone = share < 0.1 || share > 0.9,
      doubtful = alone && (columns.nu_error[l] > 0.2 || columns.nu_reconstruction[l] > 0.5);
    counts[doubtful ? "doubtful" : "held"][bin]++;
  });
  const values = counts.held.flatMap((held, i) => {
    const bin = { from: i / bins, to: (i + 1) / bins },
      top = held + counts.doubtful[i];
    return [
      { ...bin, low: 0, high: held, kind: "held" },
      { ...bin, low: held, high: top, kind: "doubtful" },
    ].filter((bar) => bar.high > bar.low);
  });
  if (!values.length) return container.replaceChildren(make("p", { class: "note" }, "No latent fired."));
  return draw(
    container,
    {
      data: { values },
      width: container.clientWidth - 70,
      height: 180,
      mark: { type: "rect", aria: false },
      encoding: {
        x: {
          field: "from",
          type: "quantitative",
          scale: { domain: [0, 1] },
          axis: {
            title: "share of the decoder's norms at the second source",
            values: [0, 0.25, 0.5, 0.75, 1],
            format: ".2f",
            grid: false,
          },
        },
        x2: { field: "to" },
        y: { field: "low", type: "quantitative", axis: { title: "latents", tickCount: 4 } },
        y2: { field: "high" },
        fillOpacity: {
          field: "kind",
          type: "nominal",
          scale: { domain: ["held", "doubtful"], range: [0.9, 0.35] },
        },
        color: { value: css("--link") },
      },
    },
    "How many latents belong to the first source, to both, and to the second",
  );
}

/** One bar for each SAE: never, usual, dense, always on. */
function bars(container, saes) {
  const shown = saes.filter((s) => Number.isFinite(s.row.never_fired) && s.width);
  const legend = [
    ["never", "never fired"],
    ["usual", "fires"],
    ["dense", "on over 10 % of the held-out data"],
    ["always", "on over half"],
  ];
  container.replaceChildren(
    make(
      "p",
      { class: "note" },
      legend.flatMap(([name, text]) => [make("i", { class: `key ${name}` }), text]),
    ),
    make(
      "div",
      { class: "bars" },
      shown.flatMap((s) => {
        const { never_fired: never, dense = 0, always_on: always = 0 } = s.row,
          parts = { never, usual: s.width - never - dense, dense: dense - always, always };
        return [
          make(
            "span",
            { class: "name" },
            mark(s.architecture),
            link(address(s), `${s.architecture}, ${s.site}`),
          ),
          make(
            "span",
            { class: "bar", "aria-hidden": "true" },
            Object.entries(parts).map(([name, n]) =>
              make("i", { class: name, style: { width: `${(100 * n) / s.width}%` } }),
            ),
          ),
          make("span", { class: "muted" }, `${whole(never)} never, ${whole(dense)} dense`),
        ];
      }),
    ),
  );
}
