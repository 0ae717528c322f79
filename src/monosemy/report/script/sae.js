// The page of one SAE: its numbers, its charts and the list of its latents.

const REASONS = ["random", "interesting", "dense", "rare", "twin", "misaligned", "frequent"];
const lists = new Map(); // of each SAE: what its list showed last

/** The columns of an SAE with what the page needs of them. */
async function open(sae) {
  const columns = await block(`sae${sae.number}`);
  if (!columns.page) columns.page = new Map(Array.from(columns.page_latent, (latent, p) => [latent, p]));
  return columns;
}
const text = async (sae) => {
  const columns = await block(`text${sae.run}`);
  columns.table ??= new Text(columns);
  return columns.table;
};

function tiles(pairs) {
  return make(
    "div",
    { class: "tiles" },
    pairs
      .filter(Boolean)
      .map(([label, value, title]) => make("div", { title }, make("b", {}, value), make("span", {}, label))),
  );
}

const signed = (x) => (Number.isFinite(x) ? x.toFixed(2) : "-");
const diffNote = () =>
  make(
    "p",
    { class: "note" },
    "The share of a latent's decoder norms at the second of the two sources (models, or layers): at the left latents of the first alone, in the middle shared ones, at the right those of the second. Pale: latents that are exclusive by their norms and found in the other source all the same, by latent scaling (nu of the error over 0.2, or of the reconstruction over 0.5). The list sorts by it: “second source”; search takes second:<0.1.",
  );

async function saePage(view, sae) {
  const same = DATA.saes,
    i = sae.number;
  view.replaceChildren(
    make(
      "div",
      { class: "title" },
      mark(sae.architecture),
      make("h1", {}, `${sae.architecture}, ${sae.site}`),
      make("span", { class: "grow" }),
      same[i - 1] ? link(address(same[i - 1]), "← previous") : "",
      same[i + 1] ? link(address(same[i + 1]), "next →") : "",
    ),
    make("p", { class: "muted" }, `${sae.path} · ${about(sae)}${sae.status ? ` · ${sae.status}` : ""}`),
    tiles(shownColumns().map((c) => [c.label, sae.text[c.key], c.about])),
  );
  const latents = make("section", { id: "latents" }),
    firingBox = make("div", { class: "chart" }),
    curveBox = make("div", { class: "panels" });
  view.append(
    latents,
    make("section", {}, make("h2", {}, "Firing frequencies"), firingBox),
    make("section", {}, make("h2", {}, "Training"), curveBox),
  );
  if (!sae.gathered)
    latents.append(
      make("h2", {}, "Latents"),
      make(
        "p",
        { class: "banner" },
        "Nothing was gathered about single latents. ",
        make("code", {}, "monosemy eval RUN"),
        " gathers it.",
      ),
    );
  else await latentList(latents, sae, await open(sae), await text(sae));
  if (sae.gathered && (await open(sae)).relative_norm) {
    const diffBox = make("div", { class: "chart" });
    latents.after(
      make("section", {}, make("h2", {}, "Which source a latent belongs to"), diffBox, diffNote()),
    );
    panel(diffBox, async () => sharedNorms(diffBox, await open(sae)));
  }
  panel(firingBox, () => firing(firingBox, [sae]));
  panel(curveBox, () => curves(curveBox, [sae]));
}

/** What a search asks: a test of latents. Words are tokens, `freq:>0.01` and the like statistics, a bare number a latent. */
function query(words, columns, table, tokens, labels) {
  const tests = [],
    fields = {
      freq: (l) => columns.count[l] / tokens,
      max: (l) => columns.max[l],
      mean: (l) => columns.mean[l],
      cos: (l) => (columns.enc_dec[l] < -100 ? NaN : columns.enc_dec[l] / 100),
      near: (l) => columns.near_cosine[l] / 100,
      contexts: (l) => columns.contexts[l],
      ...(columns.relative_norm ? { second: (l) => columns.relative_norm[l] } : {}),
    };
  const named = (part) => new Set([...table.place.keys()].filter((id) => table.string(id).includes(part)));
  for (const [, field, quoted, bare] of words.matchAll(/(?:(\w+):)?(?:"([^"]*)"|(\S+))/g)) {
    const value = quoted ?? bare,
      compared = value.match(/^([<>])=?(.+)$/);
    if (field in fields && compared && Number.isFinite(Number(compared[2])))
      tests.push((l) =>
        compared[1] === ">" ? fields[field](l) >= compared[2] : fields[field](l) <= compared[2],
      );
    else if (!field && /^\d+$/.test(value) && quoted == null) tests.push((l) => l === Number(value));
    else {
      const ids = named(value);
      const at = (l) => Boolean(columns.peak_token) && ids.has(columns.peak_token[l]);
      const among = (column) => (l) =>
        column &&
        columns.page.has(l) &&
        Array.from(column.subarray(10 * columns.page.get(l), 10 * columns.page.get(l) + 10)).some((id) =>
          ids.has(id),
        );
      const of = new Map([
        ["token", at],
        ["promotes", among(columns.page_promotes)],
        ["reads", among(columns.page_reads)],
      ]);
      of.set("label", (l) => labels.get(l)?.label?.toLowerCase().includes(value.toLowerCase()));
      tests.push(of.get(field) ?? ((l) => [...of.values()].some((test) => test(l))));
    }
  }
  return (l) => tests.every((test) => test(l));
}

async function latentList(box, sae, columns, table) {
  const F = columns.count.length,
    tokens = sae.facts.tokens,
    pages = columns.page_latent.length,
    labels = await labelsOf(sae);
  const kept = lists.get(sae.number) ?? {
    tab: pages ? "interesting" : "all",
    words: "",
    sort: "",
    down: true,
    first: 0,
  };
  lists.set(sae.number, kept);
  const everyone = Array.from({ length: F }, (_, l) => l),
    reason = (l) => (columns.page.has(l) ? REASONS[columns.page_reason[columns.page.get(l)]] : "");
  const tabs = {
    ...Object.fromEntries(REASONS.map((name) => [name, everyone.filter((l) => reason(l) === name)])),
    labeled: everyone.filter((l) => labels.get(l)?.label),
    all: everyone,
    "never fired": everyone.filter((l) => !columns.count[l]),
  };
  if (!tabs[kept.tab]?.length) kept.tab = "all";
  const place = (l) => columns.page.get(l) ?? Infinity;
  const fields = [
    ["latent", "", (l) => l],
    ["fires on", "number", (l) => columns.count[l]],
    sae.unit === "tokens" ? ["contexts", "number", (l) => columns.contexts[l]] : null,
    ["max", "number", (l) => columns.max[l]],
    ["mean", "number", (l) => columns.mean[l]],
    columns.peak_token ? ["peak token", "", null] : null,
    columns.page_promotes ? ["promotes", "", null] : null,
    labels.size ? ["label", "label", null] : null,
    labels.size ? ["detection", "number", (l) => labels.get(l)?.scores.detection?.accuracy ?? -1] : null,
    ["enc-dec", "number", (l) => columns.enc_dec[l]],
    ["nearest", "number", (l) => columns.near_cosine[l]],
    ...(columns.relative_norm
      ? [
          ["second source", "number", (l) => columns.relative_norm[l]],
          ["decoders' cosine", "number", (l) => columns.decoder_cosine[l]],
          ["nu error", "number", (l) => columns.nu_error[l]],
          ["nu reconstruction", "number", (l) => columns.nu_reconstruction[l]],
        ]
      : []),
    ["page", "", null],
  ].filter(Boolean);
  const head = make("thead"),
    body = make("tbody"),
    foot = make("div", { class: "controls" }),
    note = make("p", { class: "note" });
  const tabRow = make("div", { class: "controls", role: "group", "aria-label": "Lists of latents" });
  const search = make("input", {
    type: "search",
    id: "search",
    size: 34,
    placeholder: sae.unit === "tokens" ? "word, number, freq:>0.01" : "number, freq:>0.01",
    value: kept.words,
    "aria-label": "Search latents",
    oninput: (e) => {
      kept.words = e.target.value;
      kept.first = 0;
      if (kept.words) kept.tab = "all";
      show();
    },
  });
  const show = () => {
    tabRow.replaceChildren(
      ...Object.entries(tabs)
        .filter(([, list]) => list.length)
        .map(([name, list]) =>
          button(
            `${name} ${whole(list.length)}`,
            () => {
              Object.assign(kept, { tab: name, first: 0, sort: "" });
              show();
            },
            kept.tab === name,
          ),
        ),
    );
    const test = kept.words.trim() ? query(kept.words, columns, table, tokens, labels) : () => true;
    const list = tabs[kept.tab].filter(test),
      by = fields.find(([name]) => name === kept.sort)?.[2];
    list.sort((a, b) => (by ? (by(a) - by(b)) * (kept.down ? -1 : 1) : place(a) - place(b)) || a - b);
    kept.list = list;
    head.replaceChildren(
      make(
        "tr",
        {},
        fields.map(([name, kind, value]) =>
          make(
            "th",
            {
              scope: "col",
              class: kind,
              "aria-sort": kept.sort === name ? (kept.down ? "descending" : "ascending") : null,
            },
            value
              ? button(name, () => {
                  Object.assign(kept, { down: kept.sort === name ? !kept.down : true, sort: name, first: 0 });
                  show();
                })
              : name,
          ),
        ),
      ),
    );
    body.replaceChildren(
      ...list.slice(kept.first, kept.first + ROWS).map((l) => {
        const p = columns.page.get(l),
          cells = {
            latent: link(address(sae, l), String(l)),
            "fires on": percent(columns.count[l] / tokens),
            contexts: whole(columns.contexts[l]),
            max: digits(columns.max[l]),
            mean: digits(columns.mean[l]),
            "peak token":
              columns.count[l] && columns.peak_token?.[l] >= 0 ? table.shown(columns.peak_token[l]) : "",
            promotes: p != null && columns.page_promotes ? table.shown(columns.page_promotes[10 * p]) : "",
            label: labels.get(l)?.label ? make("bdi", {}, visible(labels.get(l).label)) : "",
            detection: labels.get(l)?.scores.detection?.accuracy?.toFixed(2) ?? "",
            "enc-dec": cosine(columns.enc_dec[l]),
            nearest: `${columns.near[l]} (${(columns.near_cosine[l] / 100).toFixed(2)})`,
            page: reason(l),
            ...(columns.relative_norm
              ? {
                  "second source": columns.relative_norm[l].toFixed(2),
                  "decoders' cosine": columns.decoder_cosine[l].toFixed(2),
                  "nu error": signed(columns.nu_error[l]),
                  "nu reconstruction": signed(columns.nu_reconstruction[l]),
                }
              : {}),
          };
        return make(
          "tr",
          {},
          fields.map(([name, kind]) => make("td", { class: kind }, cells[name])),
        );
      }),
    );
    const last = Math.min(kept.first + ROWS, list.length),
      turn = (by_, label, off) => {
        const b = button(label, () => {
          kept.first += by_;
          show();
          box.scrollIntoView();
        });
        b.disabled = off;
        return b;
      };
    foot.replaceChildren(
      turn(-ROWS, "←", kept.first === 0),
      list.length ? `${whole(kept.first + 1)} to ${whole(last)} of ${whole(list.length)}` : "no latent",
      turn(ROWS, "→", last >= list.length),
    );
  };
  note.textContent = `All ${whole(F)} latents are listed; ${whole(pages)} have a page, a third of them drawn at random among those that fire in at least 4 ${sae.unit === "tokens" ? "contexts" : sae.unit} (About says how the others were chosen). Measured on ${whole(tokens)} held-out ${sae.unit}. Search also takes ${sae.unit === "tokens" ? `token:"…" promotes:"…" ${columns.page_reads ? 'reads:"…" ' : ""}${labels.size ? 'label:"…" ' : ""}and ` : ""}freq: max: mean: cos: near: contexts: with < or >.`;
  box.replaceChildren(
    make("h2", {}, "Latents ", make("span", { class: "muted" }, whole(F))),
    tabRow,
    make("div", { class: "controls" }, search),
    make(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of latents" },
      make("table", {}, head, body),
    ),
    foot,
    note,
  );
  show();
}
