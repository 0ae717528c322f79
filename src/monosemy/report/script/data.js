// The blocks of the page, and how their numbers and texts are shown.

const LAYOUTS = JSON.parse(byId("layouts").textContent);
const ARRAYS = {
  u1: Uint8Array,
  i1: Int8Array,
  u2: Uint16Array,
  u4: Uint32Array,
  i4: Int32Array,
  f4: Float32Array,
};
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
  const raw = new Uint8Array(
    await new Response(
      new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip")),
    ).arrayBuffer(),
  );
  const columns = { shape: {} };
  for (const [key, type, shape, first] of LAYOUTS[name]) {
    const size = Number(type[1]),
      count = shape.reduce((a, b) => a * b, 1),
      bytes = new Uint8Array(count * size);
    for (let b = 0; b < size; b++)
      for (let i = 0, from = first + b * count; i < count; i++) bytes[i * size + b] = raw[from + i];
    columns[key] = new ARRAYS[type](bytes.buffer);
    columns.shape[key] = shape;
  }
  return columns;
}

function digits(x) {
  if (!Number.isFinite(x)) return "-";
  if (x === 0) return "0";
  return Math.abs(x) >= 1e6 || Math.abs(x) < 1e-3
    ? x.toExponential(2)
    : Math.abs(x) >= 1000
      ? whole(Math.round(x))
      : x.toPrecision(3);
}
const whole = (n) => n.toLocaleString("en");
const power = (exponent) => (exponent < 0 ? digits(2 ** exponent) : whole(2 ** exponent));
/** A cosine in hundredths; -128 where there is none. */
const cosine = (hundredths) => (hundredths < -100 ? "-" : (hundredths / 100).toFixed(2));
const percent = (share) => `${digits(100 * share)} %`;
const CONTROLS = {
  0xa0: "⍽",
  0xad: "SHY",
  0x61c: "ALM",
  0x200b: "ZWSP",
  0x200c: "ZWNJ",
  0x200d: "ZWJ",
  0x200e: "LRM",
  0x200f: "RLM",
  0x202a: "LRE",
  0x202b: "RLE",
  0x202c: "PDF",
  0x202d: "LRO",
  0x202e: "RLO",
  0x2060: "WJ",
  0x2066: "LRI",
  0x2067: "RLI",
  0x2068: "FSI",
  0x2069: "PDI",
  0xfeff: "BOM",
  0x2028: "LS",
  0x2029: "PS",
  0xfffd: "�",
};

/** Text as nodes in which everything shows: controls as pictures, what has no width by its name. `bare` also marks the first space. */
function visible(text, bare = false) {
  const nodes = [];
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(plain);
    plain = "";
  };
  [...text].forEach((c, i) => {
    const code = c.codePointAt(0);
    if (code === 10) plain += "↵";
    else if (code === 9) plain += "⇥";
    else if (code < 32) plain += String.fromCodePoint(0x2400 + code);
    else if (code === 127) plain += "␡";
    else if (code === 32 && bare && i === 0) plain += "·";
    else if (
      CONTROLS[code] ||
      /\p{Co}|\p{Cn}|\p{Cs}/u.test(c) ||
      (code >= 0x80 && code < 0xa0) ||
      code >= 0xe0000
    ) {
      flush();
      nodes.push(
        make(
          "span",
          { class: "control" },
          CONTROLS[code] ?? `U+${code.toString(16).toUpperCase().padStart(4, "0")}`,
        ),
      );
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
    const ends = new Uint32Array(this.token_lengths.length + 1);
    this.ends = ends;
    this.token_lengths.forEach((n, i) => {
      ends[i + 1] = ends[i] + n;
    });
    this.place = new Map(Array.from(this.token_ids, (id, i) => [id, i]));
  }
  bytes(place) {
    return this.token_bytes.subarray(this.ends[place], this.ends[place + 1]);
  }
  static decode(bytes) {
    try {
      return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    } catch {
      return null;
    }
  }
  static numbers(bytes) {
    return `⟨${Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join(" ")}⟩`;
  }
  string(id) {
    const bytes = this.place.has(id) ? this.bytes(this.place.get(id)) : new Uint8Array();
    return Text.decode(bytes) ?? Text.numbers(bytes);
  }
  shown(id) {
    return make("bdi", { class: "token" }, visible(this.string(id), true));
  }
}
