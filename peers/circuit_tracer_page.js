// circuit-tracer's own script of its page, without a browser: loads latents as the page does, and prints them.
//
//     node circuit_tracer_page.js ASSETS URL SCAN HUB NUMBER ...
//
// ASSETS are its files, URL its server; what it asks of the Hugging Face hub is looked for in the folder HUB.

const fs = require("node:fs");
const path = require("node:path");
const vm = require("node:vm");
const zlib = require("node:zlib");

const [assets, url, scan, hub, ...numbers] = process.argv.slice(2);

// d3 and its selections: whatever is called returns the same, and draws nothing
const drawing = new Proxy(() => {}, {
  get: (_, key) => (key === "then" ? undefined : drawing),
  apply: () => drawing,
});

function fromHub(address, { method = "GET", headers = {} }) {
  const file = path.join(hub, new URL(address).pathname.split("/resolve/main/")[1]);
  if (!fs.existsSync(file)) return { ok: false, status: 404 };
  const whole = fs.readFileSync(file);
  const [, first, last] = headers.Range?.match(/^bytes=(\d+)-(\d+)$/) ?? [];
  const bytes = headers.Range ? whole.subarray(Number(first), Number(last) + 1) : whole;
  return { ok: true, status: headers.Range ? 206 : 200, method, arrayBuffer: async () => bytes };
}

const page = {
  isLocalServing: true, // as index.html says
  location: new URL(url),
  console,
  d3: drawing,
  pako: { inflate: (bytes, { to }) => zlib.unzipSync(bytes).toString(to && "utf8") },
  fetch: async (address, options) =>
    address.startsWith("https://huggingface.co/")
      ? fromHub(address, options)
      : fetch(new URL(address, url), { headers: options.headers }),
};
page.window = page;
vm.createContext(page);
for (const name of [
  "util",
  ...["-list", "-logits", ""].map((part) => `feature_examples/init-feature-examples${part}`),
])
  vm.runInContext(fs.readFileSync(path.join(assets, `${name}.js`), "utf8"), page);

(async () => {
  const { loadFeature } = page.initFeatureExamples({ containerSel: drawing });
  const found = [];
  for (const number of numbers) {
    const { colorScale: _, ...feature } = await loadFeature(scan, Number(number));
    found.push(feature);
  }
  process.stdout.write(JSON.stringify(found));
})();
