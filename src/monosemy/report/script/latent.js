// The page of one latent: its numbers, the tokens it reads and promotes, and the contexts in which it fires.

async function latentPage(view, sae, latent) {
  if (!sae.gathered) return saePage(view, sae);
  const columns = await open(sae),
    table = await text(sae),
    F = columns.count.length,
    tokens = sae.facts.tokens,
    p = columns.page.get(latent);
  if (!(latent >= 0 && latent < F))
    return view.replaceChildren(
      make("h1", {}, `Latent ${latent}`),
      make("p", { class: "banner" }, `This SAE has latents 0 to ${F - 1}.`),
    );
  const n = columns.count[latent],
    list = (lists.get(sae.number)?.list ?? Array.from(columns.page_latent)).filter(
      (l) => columns.page.has(l) || l === latent,
    ),
    at = list.indexOf(latent);
  const beside = [list[at - 1], list[at + 1]].map((l) => (at >= 0 && l != null ? address(sae, l) : null));
  latentPage.beside = beside;
  view.replaceChildren(
    make(
      "div",
      { class: "title" },
      mark(sae.architecture),
      make("h1", {}, `Latent ${latent}`),
      make("span", { class: "muted" }, `${sae.architecture}, ${sae.site}`),
      make("span", { class: "grow" }),
      beside[0] ? link(beside[0], "← previous") : "",
      at >= 0
        ? make("span", { class: "muted" }, `${whole(at + 1)} of ${whole(list.length)} in the list`)
        : "",
      beside[1] ? link(beside[1], "next →") : "",
    ),
    tiles([
      [`of ${sae.unit}`, percent(n / tokens), `${whole(n)} of ${whole(tokens)}`],
      ["firings", whole(n)],
      sae.unit === "tokens"
        ? [
            "of contexts",
            percent(columns.contexts[latent] / sae.facts.contexts),
            whole(columns.contexts[latent]),
          ]
        : null,
      ["largest activation", digits(columns.max[latent])],
      ["mean where active", digits(columns.mean[latent])],
      [
        "encoder-decoder cosine",
        cosine(columns.enc_dec[latent]),
        "Does it read the direction that it writes?",
      ],
      ["cosine of the nearest decoder", (columns.near_cosine[latent] / 100).toFixed(2)],
      p != null ? ["chosen as", REASONS[columns.page_reason[p]]] : null,
    ]),
  );
  view.append(labelCard((await labelsOf(sae)).get(latent), sae));
  if (!n)
    view.append(
      make(
        "p",
        { class: "banner" },
        `Never fired on ${whole(tokens)} held-out ${sae.unit}: with 95 % confidence it fires on fewer than ${digits(3e6 / tokens)} in a million.`,
      ),
    );
  if (p == null)
    return view.append(
      make(
        "p",
        { class: "banner" },
        `Latent ${latent} has no page in this report; pages are for ${whole(columns.page_latent.length)} of ${whole(F)}. Its nearest decoder is `,
        link(address(sae, columns.near[latent]), String(columns.near[latent])),
        ".",
      ),
    );
  const tokensOf = (name, about = "") => {
    if (!columns[`page_${name}`]) return null;
    const width = columns.shape[`page_${name}`][1],
      ids = columns[`page_${name}`].subarray(width * p, width * p + width),
      z = columns[`page_${name}_z`].subarray(width * p, width * p + width),
      most = Math.abs(z[0]);
    return make(
      "div",
      {},
      make("h2", {}, name[0].toUpperCase() + name.slice(1)),
      make(
        "ol",
        {},
        Array.from(ids, (id, i) =>
          make(
            "li",
            { style: { "--w": Math.abs(z[i]) / most } },
            table.shown(id),
            `${z[i] > 0 ? "+" : ""}${z[i].toFixed(1)}`,
          ),
        ),
      ),
      about ? make("p", { class: "note" }, about) : "",
    );
  };
  const width = columns.shape.page_near[1];
  view.append(
    make(
      "section",
      { class: "cards" },
      make(
        "div",
        {},
        make("h2", {}, "Activations"),
        histogram(columns, p, sae.unit),
        make(
          "p",
          { class: "note" },
          `${sae.unit[0].toUpperCase() + sae.unit.slice(1)} by activation, quarter octaves`,
        ),
      ),
      tokensOf("reads", "Tokens whose embeddings excite it most, before any layer"),
      tokensOf("promotes"),
      tokensOf("suppresses"),
      make(
        "div",
        {},
        make("h2", {}, "Nearest decoders"),
        make(
          "ol",
          {},
          Array.from(columns.page_near.subarray(width * p, width * p + width), (l, i) => {
            const c = columns.page_near_cosine[width * p + i] / 100;
            return make(
              "li",
              { style: { "--w": Math.max(c, 0) } },
              link(address(sae, l), String(l)),
              c.toFixed(2),
            );
          }),
        ),
      ),
    ),
  );
  if (columns.page_rows) view.append(strongestRows(columns, p));
  if (sae.unit === "rows") return;
  if (!sae.logits)
    view.append(
      make(
        "p",
        { class: "note" },
        "No tokens are promoted or suppressed directly: this site does not write into the residual stream.",
      ),
    );
  if (columns.page_at) view.append(contexts(sae, columns, table, p, latent));
  else view.append(make("p", { class: "note" }, "The report was made without text."));
}

/** The rows on which a latent of activations without text is strongest. */
function strongestRows(columns, p) {
  const R = columns.shape.page_rows[1],
    at = Array.from(columns.page_rows.subarray(R * p, R * p + R)),
    values = columns.page_row_values.subarray(R * p, R * p + R);
  return make(
    "section",
    {},
    make("h2", {}, "Strongest rows"),
    make(
      "div",
      { class: "scroll" },
      make(
        "table",
        {},
        make(
          "thead",
          {},
          make(
            "tr",
            {},
            make("th", { scope: "col", class: "number" }, "row"),
            make("th", { scope: "col", class: "number" }, "activation"),
          ),
        ),
        make(
          "tbody",
          {},
          at
            .map((row, r) =>
              row < 0
                ? null
                : make(
                    "tr",
                    {},
                    make("td", { class: "number" }, whole(row)),
                    make("td", { class: "number" }, digits(values[r])),
                  ),
            )
            .filter(Boolean),
        ),
      ),
    ),
    make("p", { class: "note" }, "Rows are counted from 0, in the order in which the batches came."),
  );
}

function histogram(columns, p, unit) {
  const bins = columns.shape.page_bins[1],
    n = columns.page_bins.subarray(bins * p, bins * p + bins),
    first = n.findIndex((v) => v > 0);
  let last = bins - 1;
  while (last > first && !n[last]) last--;
  const low = Math.max(first - 1, 0),
    high = Math.min(Math.max(last + 2, low + 12), bins),
    most = Math.max(...n),
    W = 260,
    H = 120,
    w = W / (high - low),
    value = (bin) => 2 ** (LOWEST + Math.floor(bin / 4)) * (1 + (bin % 4) / 4);
  const svg = (tag, props, ...children) => {
    const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [k, v] of Object.entries(props)) e.setAttribute(k, v);
    e.append(...children);
    return e;
  };
  const parts = [];
  for (let b = low; b < high; b++)
    if (n[b]) {
      const h = Math.max(1.5, ((H - 32) * n[b]) / most);
      parts.push(
        svg(
          "rect",
          { x: (b - low) * w + 0.5, y: H - 18 - h, width: Math.max(w - 1, 1), height: h },
          svg("title", {}, `${digits(value(b))} to ${digits(value(b + 1))}: ${whole(n[b])} ${unit}`),
        ),
      );
    }
  for (const bin of [low, Math.round((low + high) / 2), high])
    parts.push(
      svg(
        "text",
        {
          x: (bin - low) * w,
          y: H - 3,
          "text-anchor": bin === low ? "start" : bin === high ? "end" : "middle",
        },
        digits(value(bin)),
      ),
    );
  parts.push(svg("text", { x: 0, y: 10 }, `${whole(most)} ${unit}`));
  return svg(
    "svg",
    {
      viewBox: `0 0 ${W} ${H}`,
      class: "histogram",
      role: "img",
      "aria-label": `Activations from ${digits(value(first))} to ${digits(value(last + 1))}`,
    },
    ...parts,
  );
}

const reading = { aligned: innerWidth > 720 };

/** The strongest contexts, then those drawn from each octave. */
function contexts(sae, columns, table, p, latent) {
  const slots = columns.shape.page_at[1],
    at = columns.page_at.subarray(slots * p, slots * p + slots),
    peaks = columns.page_peak.subarray(slots * p, slots * p + slots),
    max = columns.max[latent],
    n = columns.count[latent];
  const bins = columns.shape.page_bins[1],
    counts = columns.page_bins.subarray(bins * p, bins * p + bins),
    box = make("section");
  const item = (slot) =>
    make(
      "li",
      {},
      make("span", { class: "value" }, digits(peaks[slot])),
      windowOf(columns, table, p, slot, max),
    );
  const list = (wanted) =>
    make("ul", { class: "contexts" }, wanted.filter((slot) => at[slot] >= 0).map(item));
  const octaves = Array.from({ length: OCTAVES }, (_, o) => ({
    exponent: columns.page_octave[OCTAVES * p + o],
    candidates: columns.page_candidates[OCTAVES * p + o],
    slots: Array.from({ length: SAMPLED }, (_, r) => STRONGEST + SAMPLED * o + r),
  }))
    .filter((o) => o.candidates && o.slots.some((slot) => at[slot] >= 0))
    .sort((a, b) => b.exponent - a.exponent);
  const choose = (aligned, label) =>
    button(
      label,
      () => {
        reading.aligned = aligned;
        box.replaceWith(contexts(sae, columns, table, p, latent));
      },
      reading.aligned === aligned,
    );
  const fired = Array.from({ length: STRONGEST }, (_, i) => i).filter((slot) => at[slot] >= 0).length;
  box.append(
    make(
      "div",
      { class: "controls" },
      make("h2", {}, "Strongest contexts"),
      make("span", { class: "grow" }),
      choose(true, "in one column"),
      choose(false, "wrapped"),
      make(
        "span",
        { class: "muted" },
        "0",
        make(
          "span",
          { class: "scale" },
          [0, 0.25, 0.5, 0.75, 1].map((w) => make("i", { style: { "--w": w } })),
        ),
        `${digits(max)} (by square root)`,
      ),
    ),
    list(Array.from({ length: STRONGEST }, (_, i) => i)),
  );
  if (fired < STRONGEST)
    box.append(
      make("p", { class: "note" }, `Fired in ${fired} context${fired === 1 ? "" : "s"}; all are shown.`),
    );
  if (octaves.length) box.append(make("h2", { style: { "margin-top": "28px" } }, "Drawn by strength"));
  for (const { exponent, candidates, slots: drawn } of octaves) {
    const firings = counts
      .subarray(4 * (exponent - LOWEST), 4 * (exponent - LOWEST) + 4)
      .reduce((a, b) => a + b, 0);
    box.append(
      make(
        "h3",
        {},
        `${power(exponent)} to ${power(exponent + 1)} `,
        make(
          "span",
          { class: "muted" },
          `${percent(firings / n)} of its firings; ${drawn.filter((slot) => at[slot] >= 0).length} drawn of ${whole(candidates)} context${candidates === 1 ? "" : "s"} with their peak here`,
        ),
      ),
      list(drawn),
    );
  }
  box.classList.toggle("aligned", reading.aligned);
  return box;
}

/** The tokens around a peak; consecutive ones whose bytes make one character are one segment. */
function windowOf(columns, table, p, slot, max) {
  const slots = columns.shape.page_at[1],
    peakAt = columns.page_at[slots * p + slot],
    peak = columns.page_peak[slots * p + slot],
    L = columns.shape.ids?.[1] ?? table.shape.ids[1],
    start = Math.floor(peakAt / L) * L;
  const first = Math.max(start, peakAt - BEFORE),
    last = Math.min(start + L - 1, peakAt + WINDOW - 1 - BEFORE),
    parts = { before: [], after: [] };
  for (let i = first; i <= last; ) {
    let bytes = table.bytes(table.ids[i]),
      j = i,
      string = Text.decode(bytes);
    for (let k = i + 1; string == null && k <= Math.min(last, i + 5); k++) {
      const longer = Uint8Array.from([...bytes, ...table.bytes(table.ids[k])]);
      bytes = longer;
      string = Text.decode(longer);
      if (string != null) j = k;
    }
    const places = Array.from({ length: j - i + 1 }, (_, k) => i + k),
      special = table.token_special[table.ids[i]];
    const values = places.map(
        (place) => (columns.page_shade[WINDOW * (slots * p + slot) + place - peakAt + BEFORE] / 32) * peak,
      ),
      value = Math.max(...values),
      isPeak = i <= peakAt && peakAt <= j;
    const segment = make(
      "bdi",
      {
        class: [isPeak ? "peak" : "", special ? "special" : ""].join(" ").trim() || null,
        style: value > 0 ? { "--w": Math.sqrt(Math.min(value / max, 1)).toFixed(3) } : {},
        tabindex: isPeak ? "0" : "-1",
      },
      visible(string ?? Text.numbers(table.bytes(table.ids[i]))),
    );
    segment.about = {
      string: string ?? "",
      ids: places.map((place) => table.token_ids[table.ids[place]]),
      value: isPeak ? peak : value,
      exact: isPeak,
      place: places[0] - start,
    };
    parts[i < peakAt && !isPeak ? "before" : "after"].push(segment);
    i = j + 1;
  }
  return make(
    "div",
    {
      class: "tokens",
      dir: "auto",
      onfocusin: tokenCard,
      onmouseover: tokenCard,
      onmouseleave: hush,
      onfocusout: hush,
      onkeydown: step,
      oncopy: copied,
    },
    reading.aligned
      ? [
          make("span", { class: "before" }, make("span", {}, parts.before)),
          make("span", { class: "after" }, parts.after),
        ]
      : [...parts.before, ...parts.after],
  );
}
function tokenCard(event) {
  const it = event.target.closest("bdi")?.about;
  if (!it) return;
  byId("card").replaceChildren(
    make("b", {}, visible(it.string, true)),
    make(
      "dl",
      {},
      [
        ["activation", it.value ? `${it.exact ? "" : "about "}${digits(it.value)}` : "0"],
        [it.ids.length > 1 ? "tokens" : "token", it.ids.join(", ")],
        ["position", it.place],
      ].map(([k, v]) => make("div", {}, make("dt", {}, k), make("dd", {}, String(v)))),
    ),
  );
  byId("card").hidden = false;
}
function step(event) {
  const all = [...event.currentTarget.querySelectorAll("bdi")],
    to = all[all.indexOf(document.activeElement) + { ArrowRight: 1, ArrowLeft: -1 }[event.key]];
  if (to) {
    for (const b of all) b.setAttribute("tabindex", b === to ? "0" : "-1");
    to.focus();
    event.preventDefault();
  }
}
function copied(event) {
  const chosen = getSelection(),
    strings = [...event.currentTarget.querySelectorAll("bdi")]
      .filter((b) => chosen.containsNode(b, true))
      .map((b) => b.about.string);
  if (strings.length) {
    event.clipboardData.setData("text/plain", strings.join(""));
    event.preventDefault();
  }
}
