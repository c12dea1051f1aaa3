"use strict";
// What the page knows, and how it is written down. Text of a trace only ever goes into text nodes.

const data = JSON.parse(document.getElementById("data").textContent);
const traces = data.traces.map((trace, index) => ({
  ...trace,
  index,
  scored: trace.error === null && trace.reward !== null,
}));
const COLUMNS = ["logprobs", "incoming", "importance"];

const byId = (id) => document.getElementById(id);

// An element; attributes that are null are left out, functions are listeners, children are nodes or text.
function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// A number as shown. Beyond what the decimals are for: four digits and an exponent.
function fixed(value, decimals) {
  if (Number.isNaN(value)) return "not a number";
  if (!Number.isFinite(value)) return value > 0 ? "+\u221e" : "\u2212\u221e";
  const text = Math.abs(value) < 1e7 ? value.toFixed(decimals) : value.toExponential(3);
  return text.replace("-", "\u2212");
}

const whole = (value) => Math.round(value).toLocaleString("en-US");
const share = (value) => `${(100 * value).toFixed(1)}\u202f%`;
const plural = (count, noun) => `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

// Characters without a shape that reorder what stands around them, or hide: bidirectional controls and zero width.
const SHAPELESS = /[\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]/g;
const signOf = (character) => `<U+${character.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}>`;

// White space and what has no shape in a token or a run, so that it can be seen.
function visible(text) {
  if (text === "") return "(part of a character)";
  return text.replace(SHAPELESS, signOf).replace(/\r/g, "\u240d").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5").replace(/^ +| +$/g, (s) => "\u2423".repeat(s.length));
}

// The shade of an importance, 0 to 6; the classes that there are spread over all of them.
function shadeOf(importance) {
  if (!Number.isFinite(importance)) return importance > 0 ? 6 : 0;
  let above = 0;
  while (above < data.edges.length && importance >= data.edges[above]) above++;
  return shadeOfClass(above);
}

const shadeOfClass = (number) => (data.edges.length ? Math.round((6 * number) / data.edges.length) : 3);

// The tokens stand behind this script in the file: the list is there before they are.
const complete = new Promise((resolve) => {
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", resolve);
  else resolve();
});

async function inflated(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new DecompressionStream("deflate");
  const writer = stream.writable.getWriter();
  const written = Promise.all([writer.write(bytes), writer.close()]);
  const [buffer] = await Promise.all([new Response(stream.readable).arrayBuffer(), written]);
  return new Uint8Array(buffer);
}

// Numbers whose lowest bytes all come first, then the second ones, ...
function unpacked(bytes, start, count, size) {
  const mixed = new Uint8Array(count * size);
  for (let plane = 0; plane < size; plane++) {
    for (let i = 0; i < count; i++) mixed[i * size + plane] = bytes[start + plane * count + i];
  }
  return size === 4 ? new Int32Array(mixed.buffer) : new Float64Array(mixed.buffer);
}

// The tokens of a trace: words (into data.ids and data.texts), marks (0: not protected), logprobs, incoming, importance.
async function readTokens(trace) {
  const n = trace.tokens;
  await complete;
  const bytes = await inflated(byId(`tokens-${trace.index}`).textContent);
  const tokens = { words: unpacked(bytes, 0, n, 4), marks: bytes.subarray(4 * n, 5 * n) };
  let start = 5 * n;
  COLUMNS.forEach((name, column) => {
    const exact = trace.kinds[column] === "f";
    const numbers = unpacked(bytes, start, n, exact ? 8 : 4);
    const unit = 10 ** data.decimals[name];
    tokens[name] = exact ? numbers : Float64Array.from(numbers, (number) => number / unit);
    start += n * (exact ? 8 : 4);
  });
  tokens.counts = new Map();
  for (let i = 0; i < n; i++) {
    const id = data.ids[tokens.words[i]];
    if (!tokens.marks[i]) tokens.counts.set(id, (tokens.counts.get(id) || 0) + 1);
  }
  return tokens;
}

// The text that a filter looks into; kept, as it is asked for again with each key.
const completions = new Map();

async function completionOf(trace) {
  if (!completions.has(trace.index)) {
    const { words } = await readTokens(trace);
    let text = "";
    for (const word of words) text += data.texts[word];
    completions.set(trace.index, text.toLowerCase());
  }
  return completions.get(trace.index);
}

// The address of a view: traces are named by their place in the file. An address may also name a token of the first, from 1.
function address(first, second = null) {
  return first === null ? "#" : `#trace=${first + 1}${second === null ? "" : `&beside=${second + 1}`}`;
}

function place() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const index = (name) => {
    const number = Number(parameters.get(name)) - 1;
    return Number.isInteger(number) && traces[number] ? number : null;
  };
  const first = index("trace");
  const token = Number(parameters.get("token"));
  return { first, second: first === null ? null : index("beside"), token: Number.isInteger(token) ? token : 0 };
}
