// Labels of latents by a language model, with their scores.

/** The labels of an SAE: {latent: entry}. */
async function labelsOf(sae) {
  if (!sae.labeled) return new Map();
  const columns = await block(`labels${sae.number}`);
  columns.entries ??= new Map(
    JSON.parse(new TextDecoder().decode(columns.json)).map((entry) => [entry.latent, entry]),
  );
  return columns.entries;
}

/** A balanced accuracy with its interval, as text. */
function accuracy(score) {
  if (score?.accuracy == null) return "-";
  const [middle, low, high] = [score.accuracy, score.low, score.high].map((x) => x.toFixed(2));
  return `${middle} [${low}, ${high}]`;
}

/** The label of one latent, and what a judge made of it. */
function labelCard(entry, sae) {
  if (!entry) return "";
  if (!entry.label) return make("p", { class: "note" }, `No label: ${entry.model} gave none (${entry.why}).`);
  const tests = [
    ["detection", "Which contexts does it fire in? Judged by the label alone"],
    ["fuzzing", "Which tokens does it fire on? Judged by the label alone"],
  ].filter(([test]) => entry.scores[test]);
  return make(
    "section",
    { class: "label" },
    make("p", {}, make("bdi", {}, visible(entry.label))),
    make(
      "p",
      { class: "note" },
      `By ${entry.model}. `,
      tests.map(([test, about], i) => {
        const other = entry.scores[`${test}_other`];
        return make(
          "span",
          { title: about },
          `${i ? "; " : "Balanced accuracy, .5 for guesses: "}${test} ${accuracy(entry.scores[test])}`,
          other
            ? [
                ", by the label of ",
                entry.other == null
                  ? "another latent"
                  : link(address(sae, entry.other), `latent ${entry.other}`),
                ` ${accuracy(other)}`,
              ]
            : "",
        );
      }),
    ),
  );
}
