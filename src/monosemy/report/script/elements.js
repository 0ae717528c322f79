// Draws what report.html holds. Data reach the page as text nodes and attributes only, never as markup.
"use strict";

const ROWS = 50,
  BEFORE = 28,
  WINDOW = 40,
  STRONGEST = 8,
  OCTAVES = 8,
  SAMPLED = 2,
  LOWEST = -20;
const byId = (id) => document.getElementById(id);

/** An element with properties and children; text stays text. */
function make(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "style")
      for (const [name, v] of Object.entries(value)) element.style.setProperty(name, v);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}
const link = (href, text) => make("a", { href }, text);
const button = (text, onclick, pressed) =>
  make("button", { type: "button", onclick, "aria-pressed": pressed == null ? null : String(pressed) }, text);
const pick = (label, options, value, onchange) =>
  make(
    "label",
    {},
    label,
    " ",
    make(
      "select",
      { onchange: (e) => onchange(e.target.value) },
      options.map(([v, text]) => make("option", { value: v, selected: String(v) === String(value) }, text)),
    ),
  );
const say = (text) => {
  byId("said").textContent = text;
};
