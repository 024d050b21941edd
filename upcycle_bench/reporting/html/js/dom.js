/* Elements from data. Text becomes text nodes and never markup, so a name may hold anything. */

/** An element with attributes (a function listens to the event of that name) and children: elements or text. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null));
  return made;
}

/** A number with five digits, for people. */
function shown(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return value.toLocaleString("en");
  return Math.abs(value) >= 1e7 ? value.toExponential(2) : String(Number(value.toPrecision(5)));
}

/** The beginning of a long name. */
function shortened(text, characters) {
  return text.length <= characters ? text : `${text.slice(0, characters - 1)}…`;
}

/** Nested values as [dotted name, text] pairs. */
function flattened(value, name = "") {
  if (value === null || typeof value !== "object") return [[name, shown(value)]];
  if (Array.isArray(value) && value.every((each) => each === null || typeof each !== "object"))
    return [[name, value.map(shown).join(", ")]];
  return Object.entries(value).flatMap(([key, each]) => flattened(each, name ? `${name}.${key}` : key));
}

/** Pairs of names and values as a list of definitions; pairs without a value are left out. */
function definitions(pairs) {
  const known = pairs.filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return element("dl", {}, known.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

/** A table of text; the first cell of each row is its header. */
function plainTable(caption, header, rows) {
  const head = element("tr", {}, header.map((text) => element("th", { scope: "col" }, text)));
  const body = rows.map(([first, ...rest]) =>
    element("tr", {}, element("th", { scope: "row" }, first), rest.map((text) => element("td", {}, text))));
  return element("div", { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" },
    element("table", {}, element("caption", {}, caption), element("thead", {}, head), element("tbody", {}, body)));
}
