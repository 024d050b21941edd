/* A board's table: sorted by its headers, filtered by words (-word: without it) and by verdict. */

/** Makes the table of a section live. `open(row, opener)`: a row was chosen; `changed(rows)`: what it shows now. */
function liveTable(section, open, changed) {
  const table = section.querySelector("table.standings");
  const body = table.tBodies[0];
  const rows = [...body.rows].map((line, index) => ({ line, index, words: line.textContent.toLowerCase() }));
  let order = rows;

  for (const row of rows) {
    const label = row.line.querySelector("span.label");
    const opener = element("button", { type: "button", class: "open", "aria-haspopup": "dialog" }, label.textContent);
    label.replaceChildren(opener);
    row.line.addEventListener("click", () => {
      if (window.getSelection().isCollapsed) open(row.index, opener); // who selects text wants to copy it
    });
  }

  function sortBy(column, header) {
    const down = header.getAttribute("aria-sort") === "ascending";
    for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keys = new Map(rows.map((row) => [row, sortKey(row.line.cells[column].dataset.order)]));
    order = [...rows].sort((one, other) => compare(keys.get(one), keys.get(other), down) || one.index - other.index);
    body.append(...order.map((row) => row.line));
    update();
  }

  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = element("button", { type: "button", click: () => sortBy(column, header) }, header.textContent);
    header.replaceChildren(button);
  });

  const words = element("input", { type: "search", placeholder: "control -frozen", input: update });
  const verdicts = [...new Set([...body.querySelectorAll(".verdict")].map((each) => each.textContent))].sort();
  const choice = element("select", { change: update },
    ["any", ...verdicts].map((each) => element("option", { value: each }, each)));
  const count = element("output", { class: "count", role: "status" });
  const tools = element("div", { class: "tools" },
    element("label", { title: "-word leaves out the rows that have it" }, "Filter ", words), verdicts.length ? element("label", {}, "Verdict ", choice) : null, count);
  table.parentElement.before(tools);

  function update() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const visible = order.filter(({ line, words: text }) => {
      const verdict = choice.value === "any" ||
        [...line.querySelectorAll(".verdict")].some((each) => each.textContent === choice.value);
      line.hidden = !(verdict && wanted.every((word) => says(text, word)));
      return !line.hidden;
    });
    count.textContent = `${visible.length} of ${rows.length} rows`;
    changed(visible.map((row) => row.index));
  }

  update();
}

/** Whether the text has the word; of `-word`, whether it does not. */
function says(text, word) {
  return word.startsWith("-") && word.length > 1 ? !text.includes(word.slice(1)) : text.includes(word);
}

/** A number where the text is one, null where there is none. */
function sortKey(text) {
  if (text === "") return null;
  return Number.isNaN(Number(text)) ? text : Number(text);
}

/** The order of two keys; rows without one stand last, both ways. */
function compare(one, other, down) {
  if (one === null || other === null) return (one === null) - (other === null);
  const ahead = typeof one === "number" && typeof other === "number"
    ? one - other : String(one).localeCompare(String(other), "en");
  return down ? -ahead : ahead;
}
