/* The drawer: what stands behind a row. A dialog of the browser keeps the focus, hears Escape, and gives focus back. */

/** Returns `open(board, row, opener)`. */
function makeDrawer(shared) {
  const content = element("div", { class: "content" });
  const close = element("button", { type: "button", class: "close", click: () => drawer.close() }, "Close");
  const drawer = element("dialog", {
    "aria-labelledby": "drawer-title",
    click: (event) => { if (event.target === drawer) drawer.close(); }, // the click was beside it
  }, close, content);
  document.body.append(drawer);
  return (board, row, opener) => {
    opener.focus(); // so the browser gives the focus back to it
    content.replaceChildren(...rowDetails(board, row, shared));
    drawer.showModal();
    drawer.scrollTop = 0;
  };
}

function rowDetails(board, row, shared) {
  return [
    element("h2", { id: "drawer-title" }, row.title),
    ...board.headlines.filter(({ name }) => row.headlines[name]).map(({ name, higher }) => {
      const found = row.headlines[name];
      return element("section", {}, element("h3", {}, `${name} (${higher ? "higher" : "lower"} is better)`), definitions([
        ["mean", shown(found.mean) + (found.half === null ? "" : ` ± ${shown(found.half)} (95 %)`)],
        ["training seeds", shown(found.n)],
        [`minus ${row.peer}`, found.difference],
        ["p, by Holm", shown(found.p)],
        ["verdict", found.verdict],
        ["cannot be told from rows with", found.tied],
        ["standard deviation over initialisations", shown(found.ofInit)],
        ["standard deviation over trainings", shown(found.ofTrain)],
      ]));
    }),
    row.published.length ? published(row.published) : null,
    element("h3", {}, `Records (${row.records.length})`),
    ...row.records.map((record, place) => recordDetails(record, shared, place === 0)),
  ].filter(Boolean);
}

function published(numbers) {
  return plainTable("In the paper, under its own protocol: not to be compared digit by digit",
    ["what", "value", "source", "caveat"],
    numbers.map(({ what, value, citation, caveat }) => [what, value, citation, caveat]));
}

function recordDetails(record, shared, open) {
  const [init, train] = record.seeds;
  const seeds = `seeds: initialisation ${init}, training ${train}`;
  const own = shared[record.strategy];
  return element("details", { class: "record", open },
    element("summary", {}, `${seeds}; ${record.counts}`),
    record.reason ? element("p", { class: "reason" }, record.reason) : null,
    element("p", {}, element("code", { class: "command", title: "one click selects it" }, record.command)),
    definitions([
      ["record", record.path], ["run", record.run], ["made", record.created],
      ...Object.entries(record.headlines ?? {}).map(([name, [value, error]]) =>
        [name, shown(value) + (error === null ? "" : ` (standard error over samples ${shown(error)})`)]),
      ["certificate", record.certificate ?? "none"],
      ...Object.entries(record.hashes).map(([name, hash]) => [`hash of ${name}`, hash]),
      ["paper", own.paper], ["code", own.code], ["from", `${own.distribution} ${own.version}`],
      ["reconstructed", own.reconstructed.join("; ")],
      ...Object.entries(record.skipped ?? {}).map(([name, why]) => [`${name} was skipped`, why]),
    ]),
    record.phases ? plainTable("Cost by phase", ["phase", "seconds", "FLOPs", "memory, bytes", "pairs", "steps", "joules"],
      Object.entries(record.phases).map(([name, numbers]) => [name, ...numbers.map(shown)])) : null,
    layerTable(record),
    folded("Options", own.config), folded("Tuning", own.tuned), folded("MoE settings", own.moe),
    folded("Cost, in all", shared[record.cost]), folded("Receipt, at step 0", without(record.receipt, "layers")),
    folded("Diagnostics, after training", without(record.diagnostics, "layers")),
    (record.sessions ?? []).map((place, number) => folded(`Session ${number + 1}`, shared[place])),
    folded("Environment", shared[record.environment]));
}

/** The layers' numbers at step 0 and after training. */
function layerTable({ receipt, diagnostics }) {
  const before = receipt?.layers ?? {};
  const after = diagnostics?.layers ?? {};
  const layers = [...new Set([...Object.keys(before), ...Object.keys(after)])];
  if (!layers.length) return null;
  const every = layers.flatMap((layer) => [...Object.keys(before[layer] ?? {}), ...Object.keys(after[layer] ?? {})]);
  const names = [...new Set(every)];
  const cell = (layer, name) => [before[layer]?.[name], after[layer]?.[name]]
    .map((value) => (Array.isArray(value) ? value.map(shown).join(" ") : shown(value)))
    .join(" → ").replace(/^ → $/, "");
  return plainTable("Layers, at step 0 → after training", ["layer", ...names.map((name) => name.replaceAll("_", " "))],
    layers.map((layer) => [layer, ...names.map((name) => cell(layer, name))]));
}

function folded(title, value) {
  if (!value || !Object.keys(value).length) return null;
  return element("details", {}, element("summary", {}, title), definitions(flattened(value)));
}

function without(value, key) {
  return value && Object.fromEntries(Object.entries(value).filter(([name]) => name !== key));
}
