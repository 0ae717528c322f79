// The overview: what is chosen there, its charts and its table.

const state = {
  x: "l0",
  y: "loss_recovered_zero",
  perfect: false,
  by: "site",
  off: new Set(),
  site: "",
  width: "",
  run: "",
  text: "",
  sort: null,
  down: false,
};
const PLAIN = { ...state, off: "" };

/** The overview's address, which holds what was chosen there: it can be sent as a link, and Back finds it again. */
function home() {
  const chosen = Object.entries({ ...state, off: [...state.off].join(" ") }).filter(
    ([key, value]) => value !== PLAIN[key],
  );
  return `#/${chosen.length ? `?${new URLSearchParams(chosen)}` : ""}`;
}
const atHome = () => /^(#\/?(\?.*)?)?$/.test(location.hash);
const remember = () => {
  if (atHome() && (location.hash || "#/") !== home()) history.replaceState(null, "", home());
};

/** Choose what an address says; what this report does not offer is left out. */
function recall() {
  const offered = {
    by: ["site", "architecture", "width"],
    sort: ["", ...DATA.columns.map((c) => c.key)],
    text: null,
  };
  offered.x = offered.y = shownColumns()
    .filter((c) => c.scale)
    .map((c) => c.key);
  for (const key of ["site", "width", "run"]) offered[key] = DATA.saes.map((s) => String(s[key]));
  for (const [key, value] of new URLSearchParams(location.hash.split("?")[1])) {
    if (key === "off") state.off = new Set(value.split(" ").filter((name) => name in DATA.looks));
    else if (key === "perfect" || key === "down") state[key] = value === "true";
    else if (key in offered && (!offered[key] || offered[key].includes(value))) state[key] = value;
  }
}
const inside = (sae) =>
  !state.off.has(sae.architecture) &&
  (!state.site || sae.site === state.site) &&
  (!state.width || String(sae.width) === state.width) &&
  (!state.run || String(sae.run) === state.run) &&
  (!state.text ||
    `${sae.path} ${sae.architecture} ${sae.setting} ${sae.site}`
      .toLowerCase()
      .includes(state.text.toLowerCase()));

function overview() {
  const again = () => {
    filterTable();
    points();
    charts();
  };
  const points = () => panel(byId("pareto"), pareto);
  const charts = () => {
    const saes = DATA.saes.filter(inside);
    for (const [id, fill] of [
      ["curves", curves],
      ["alive", bars],
      ["firing", firing],
    ])
      panel(byId(id), () => fill(byId(id), saes));
  };
  if (!byId("saes")) return;
  const plotted = shownColumns().filter((c) => c.scale),
    values = (key) => [...new Set(DATA.saes.map((s) => s[key]))];
  const axes = () =>
    byId("axes").replaceChildren(
      pick(
        "y",
        plotted.filter((c) => c.key !== "l0").map((c) => [c.key, c.label]),
        state.y,
        (v) => {
          state.y = v;
          axes();
          points();
        },
      ),
      pick(
        "x",
        plotted.map((c) => [c.key, c.label]),
        state.x,
        (v) => {
          state.x = v;
          points();
        },
      ),
      pick(
        "panels by",
        [
          ["site", "site"],
          ["architecture", "architecture"],
          ["width", "width"],
        ],
        state.by,
        (v) => {
          state.by = v;
          points();
        },
      ),
      state.y === "loss_recovered_zero"
        ? make(
            "label",
            {},
            make("input", {
              type: "checkbox",
              checked: state.perfect,
              onchange: (e) => {
                state.perfect = e.target.checked;
                points();
              },
            }),
            " distance from perfect (log)",
          )
        : "",
    );
  if (!plotted.some((c) => c.key === state.y)) state.y = "fvu";
  axes();
  const choose = (key, label, name) =>
    values(key).length < 2
      ? ""
      : pick(
          label,
          [
            ["", "all"],
            ...values(key)
              .sort((a, b) => (a > b ? 1 : -1))
              .map((v) => [v, name ? name(v) : v]),
          ],
          state[key],
          (v) => {
            state[key] = v;
            again();
          },
        );
  byId("filters").replaceChildren(
    ...looks(DATA.saes).map((name) => {
      const b = button(
        "",
        () => {
          const off = !state.off.delete(name);
          if (off) state.off.add(name);
          b.setAttribute("aria-pressed", String(!off));
          again();
        },
        !state.off.has(name),
      );
      b.append(mark(name), name);
      return b;
    }),
    choose("site", "site"),
    choose("width", "width", whole),
    choose("run", "run", (r) => DATA.runs[r].name),
    make(
      "label",
      {},
      "name ",
      make("input", {
        type: "search",
        size: 14,
        value: state.text,
        oninput: (e) => {
          state.text = e.target.value;
          again();
        },
      }),
    ),
  );
  const heads = [...document.querySelectorAll("#saes thead th")];
  heads.forEach((head) => {
    const text = head.textContent;
    head.replaceChildren(
      button(text, () => sort(head.dataset.key, state.sort === head.dataset.key ? !state.down : false)),
    );
  });
  byId("sort-by").replaceChildren(
    ...heads.map((head) => make("option", { value: head.dataset.key }, head.textContent)),
  );
  byId("sort-by").addEventListener("change", (e) => sort(e.target.value, state.down));
  byId("sort-way").addEventListener("click", () => sort(state.sort ?? "", !state.down));
  if (state.sort != null || state.down) sort(state.sort ?? "", state.down);
  again();
  let wide = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== wide && !byId("overview").hidden) {
      wide = innerWidth;
      points();
      charts();
    }
  });
  overview.again = again;
}

function sort(key, down) {
  Object.assign(state, { sort: key, down });
  const value = (s) => (key ? (s.row[key] ?? NaN) : s.number),
    body = document.querySelector("#saes tbody");
  const order = [...DATA.saes].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    return !Number.isFinite(x) - !Number.isFinite(y) || (x - y || 0) * (down ? -1 : 1) || a.number - b.number;
  });
  for (const s of order) body.append(body.querySelector(`tr[data-number="${s.number}"]`));
  for (const head of document.querySelectorAll("#saes thead th")) {
    if (head.dataset.key === key) head.setAttribute("aria-sort", down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
  byId("sort-by").value = key;
  byId("sort-way").textContent = down ? "descending" : "ascending";
  remember();
  say(
    `sorted by ${DATA.columns.find((c) => c.key === key)?.label ?? "SAE"}, ${down ? "descending" : "ascending"}`,
  );
}
function filterTable() {
  let count = 0;
  for (const row of document.querySelectorAll("#saes tbody tr")) {
    row.hidden = !inside(DATA.saes[row.dataset.number]);
    count += !row.hidden;
  }
  byId("count").textContent = count === DATA.saes.length ? count : `${count} of ${DATA.saes.length}`;
  say(`${count} SAEs`);
}
