"use strict";
// Puts the page together: the head, what can be chosen, the keys, and the address that keeps the place.

kontext.start = (run) => {
  const { el, fill, say } = kontext;
  const { Model, NONE, ALL } = kontext.model;
  const element = (id) => document.getElementById(id);
  const model = new Model(run);
  const SIZES = { least: 80, most: 320, step: 16 };
  let view, layout;
  let size = null; // of a picture; null: as it fits

  const grid = new kontext.grid.Grid(element("grid"), model, (picture) => open(picture, true));
  const detail = new kontext.detail.Detail(element("detail"), model, {
    step(by) {
      const next = layout.pictures[layout.pictures.indexOf(detail.picture) + by];
      if (next) open(next, false);
    },
    closed() {
      remember(false);
      element("grid").focus();
    },
  });

  // ---------------------------------------------------------------------------------------------------- the address

  // A place that can be kept, sent and gone back to: names rather than numbers, so that it outlives a new report.
  function address() {
    const parts = new URLSearchParams();
    parts.set("step", run.nodes[view.node].name);
    if (view.row !== NONE) {
      parts.set("rows", model.axisName(view.row));
      parts.set("columns", model.axisName(view.column));
    } else parts.set("rows", "");
    for (const [axis, value] of Object.entries(view.pick)) {
      if (value !== ALL) parts.set(`.${model.axisName(Number(axis))}`, model.valueName(Number(axis), value));
    }
    if (view.q) parts.set("find", view.q);
    if (view.state) parts.set("state", view.state);
    if (size !== null) parts.set("size", size);
    if (detail.picture) parts.set("open", detail.picture.place);
    return `#${parts}`;
  }

  function remember(push) {
    if (address() === location.hash) return;
    history[push ? "pushState" : "replaceState"](null, "", address());
  }

  function readAddress() {
    const parts = new URLSearchParams(location.hash.slice(1));
    const node = run.nodes.findIndex((each) => each.name === parts.get("step"));
    const axes = [...run.axes.keys(), model.candidateAxis];
    const axis = (name) => axes.find((each) => name && model.axisName(each) === name);
    const pick = {};
    for (const each of axes) {
      const name = parts.get(`.${model.axisName(each)}`);
      if (name === null) continue;
      pick[each] = each === model.candidateAxis ? Number(name) - 1 : run.axes[each].values.indexOf(name);
    }
    const none = parts.get("rows") === "";
    const asked = Number(parts.get("size"));
    size = asked ? Math.min(SIZES.most, Math.max(SIZES.least, asked)) : null;
    view = model.settled({
      node, pick, q: parts.get("find") ?? "", state: parts.get("state") ?? "",
      row: none ? NONE : axis(parts.get("rows")), column: none ? NONE : axis(parts.get("columns")),
    });
    draw();
    const picture = parts.has("open") ? model.rows[Number(parts.get("open"))] : undefined;
    if (picture) open(picture, false);
    else if (element("detail").open) element("detail").close();
  }

  // ------------------------------------------------------------------------------------------------------- the head

  function head() {
    const failures = model.failures();
    const left = (run.steps.failed ?? 0) + (run.steps.quarantined ?? 0);
    const figures = [
      ["done", run.steps.done ?? 0],
      ["failed", left],
      ["skipped", run.steps.skipped ?? 0],
      ["waiting or running", (run.steps.blocked ?? 0) + (run.steps.ready ?? 0) + (run.steps.leased ?? 0)],
      ["cancelled", run.steps.cancelled ?? 0],
      ["cached", run.cached],
    ].filter(([name, number]) => number || name === "done" || name === "failed");
    const facts = [
      ["Steps", figures.map(([name, number]) => `${say.count(number)} ${name}`).join(", ")],
      ["Files", `${say.count(run.delivered)} of ${say.count(run.outputs)} delivered${run.left_out ? `, ${say.count(run.left_out)} left out` : ""}${run.not_delivered ? `, ${say.count(run.not_delivered)} not delivered` : ""}`],
      ["GPU", `${say.seconds(run.gpu_seconds)}${run.budget.gpu_minutes !== undefined ? ` of ${say.seconds(run.budget.gpu_minutes * 60)}` : ""}`],
      [run.finished ? "Took" : "So far", say.seconds(run.seconds)],
    ];
    document.title = `${run.recipe}, run ${run.id}: ${kontext.runStates[run.state] ?? run.state}`;
    fill(element("head"),
      el("div", { class: "title" },
        el("h1", {}, run.recipe),
        el("span", { class: `run-state ${run.state}` }, kontext.runStates[run.state] ?? run.state),
        el("span", { class: "spacer" }),
        failures.length ? el("button", { type: "button", class: "failures", onclick: () => showProblems(failures) }, say.plural(failures.length, "failure")) : null,
        el("button", { type: "button", class: "round", "aria-label": "Keys and explanations", title: "Keys and explanations (?)", onclick: showHelp }, "?")),
      el("p", { class: "who" }, `Run ${run.id} for ${run.owner || "nobody in particular"}, ${say.time(run.created)}${run.finished ? "" : `, as it stood ${say.time(run.written)}`}`, run.reason ? el("span", { class: "reason" }, ` · ${run.reason}`) : null),
      el("dl", { class: "totals" }, facts.map(([label, text]) => el("div", {}, el("dt", {}, label), el("dd", {}, text)))));
  }

  // --------------------------------------------------------------------------------------------- what can be chosen

  function select(label, options, chosen, change) {
    const made = el("select", { onchange: () => change(made.value) },
      options.map(([value, text]) => el("option", { value, selected: String(value) === String(chosen) }, text)));
    return el("label", {}, el("span", {}, label), made);
  }

  const find = el("input", { type: "search", id: "find", placeholder: "Name, prompt or error", autocomplete: "off", spellcheck: "false" });
  find.addEventListener("input", () => change({ q: find.value }));
  const zoom = el("input", { type: "range", min: SIZES.least, max: SIZES.most, step: SIZES.step });
  zoom.addEventListener("input", () => resize(Number(zoom.value)));

  function controls() {
    const axes = model.axesOf(view.node);
    const named = (each) => [each, model.axisName(each)];
    const focused = document.activeElement?.closest("label")?.firstChild.textContent;
    const states = [...new Set(Object.values(kontext.states))];
    const parts = [];
    if (run.nodes.length > 1) {
      parts.push(select("Step", run.nodes.map((each, at) => [at, each.name]), view.node, (value) => change({ node: Number(value), row: undefined })));
    }
    if (axes.length > 1) {
      parts.push(select("Rows", [...axes.map(named), [NONE, "none"]], view.row, (value) => change({ row: Number(value), column: Number(value) === NONE ? NONE : view.column === NONE ? axes.find((each) => each !== Number(value)) : view.column })));
      if (view.row !== NONE) {
        parts.push(select("Columns", axes.filter((each) => each !== view.row).map(named), view.column, (value) => change({ column: Number(value) })));
      }
    }
    for (const axis of axes.filter((each) => each !== view.row && each !== view.column)) {
      const values = model.valuesOf(view.node, axis).map((value) => [value, model.valueName(axis, value)]);
      const all = view.row === NONE ? [[ALL, "all"]] : [];
      parts.push(select(model.axisName(axis), [...all, ...values], view.pick[axis], (value) => change({ pick: { ...view.pick, [axis]: Number(value) } })));
    }
    parts.push(
      select("State", [["", "any"], ...states.map((each) => [each, each])], view.state, (value) => change({ state: value })),
      el("label", { class: "find" }, el("span", {}, "Find"), find),
      el("label", { class: "zoom" }, el("span", {}, "Size"), zoom));
    element("controls").replaceChildren(...parts);
    if (find.value !== view.q) find.value = view.q;
    const again = [...element("controls").querySelectorAll("label")].find((each) => each.firstChild.textContent === focused);
    if (focused && again) again.lastChild.focus();
  }

  function change(what) {
    view = model.settled({ ...view, ...what });
    draw();
    remember(false);
  }

  function resize(to) {
    size = Math.min(SIZES.most, Math.max(SIZES.least, to));
    zoom.value = size;
    const { at } = grid;
    grid.show(layout, view, size);
    grid.at = at;
    grid.reveal();
    remember(false);
  }

  function draw() {
    layout = model.layout(view);
    if (document.activeElement !== find || view.q === find.value) controls();
    const nothing = layout.pictures.length === 0;
    element("grid").hidden = nothing;
    element("empty").hidden = !nothing;
    element("empty").textContent = layout.total ? "Nothing here is like that. Esc in “Find” empties it." : "This step has no pictures.";
    grid.show(layout, view, size);
    zoom.value = grid.size;
    const part = layout.pictures.length === layout.total ? "" : `${say.count(layout.pictures.length)} of `;
    element("told").textContent = `${part}${say.plural(layout.total, "picture")} of ${run.nodes[view.node].name}`;
  }

  // -------------------------------------------------------------------------------------------------------- dialogs

  function open(picture, push) {
    const at = layout.pictures.indexOf(picture);
    detail.show(picture, at < 0 ? "" : `${say.count(at + 1)} of ${say.count(layout.pictures.length)}`);
    grid.goTo(picture);
    remember(push);
  }

  function sheet(id, title, ...content) {
    const dialog = element(id);
    fill(dialog,
      el("header", { class: "bar" }, el("h2", { id: `${id}-title` }, title),
        el("button", { type: "button", class: "close", "aria-label": "Close", onclick: () => dialog.close() }, "✕")),
      ...content);
    if (!dialog.open) dialog.showModal();
    return dialog;
  }

  function showProblems(failures) {
    const shown = failures.slice(0, 500).map((each) => el("li", {}, el("button", {
      type: "button", class: "problem",
      onclick: () => {
        element("problems").close();
        view = model.settled({ node: each.node, pick: Object.fromEntries(model.axesOf(each.node).map((axis) => [axis, model.value(each, axis)])), q: "", state: "" });
        draw();
        open(each, true);
      },
    }, el("strong", {}, `${run.nodes[each.node].name} `, model.name(each)), el("span", {}, each.error || "no reason was recorded"))));
    const more = failures.length > shown.length ? el("p", { class: "soft" }, `and ${say.count(failures.length - shown.length)} more: choose the state “Failed”`) : null;
    sheet("problems", say.plural(failures.length, "failure"), el("ul", { class: "list" }, shown), more);
  }

  function showHelp() {
    const keys = [
      ["← ↑ → ↓", "move among the pictures; Page Up, Page Down, Home and End too"],
      ["Enter", "open the picture"], ["← →", "opened: the picture before, the next one"],
      ["b", "opened: blink between photo and result"], ["Esc", "close; in “Find”: empty it"],
      ["/ or f", "find"], ["+ and −", "larger and smaller pictures"], ["?", "this help"],
    ];
    sheet("help", "Keys",
      el("dl", { class: "keys" }, keys.map(([key, text]) => el("div", {}, el("dt", {}, key), el("dd", {}, text)))),
      el("p", { class: "soft" }, `Recipe ${say.uri(run.source)}, revision ${run.revision.slice(0, 12)}, started by ${run.trigger}. Written ${say.time(run.written)}; the page shows what was known then.`));
  }

  // ------------------------------------------------------------------------------------------------------- the keys

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const typing = event.target.matches("input[type=search]");
    if (typing && event.key === "Escape") {
      find.value = "";
      change({ q: "" });
      element("grid").focus();
    } else if (typing && (event.key === "Enter" || event.key === "ArrowDown")) element("grid").focus();
    else if (typing || document.querySelector("dialog[open]")) return;
    else if (event.key === "/" || event.key === "f") find.focus();
    else if (event.key === "?") showHelp();
    else if (event.key === "+" || event.key === "=") resize(grid.size + 2 * SIZES.step);
    else if (event.key === "-") resize(grid.size - 2 * SIZES.step);
    else return;
    event.preventDefault();
  });
  element("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  }
  addEventListener("popstate", readAddress);
  addEventListener("hashchange", readAddress);

  Promise.all(run.files.rows.map((file, number) => kontext.load("rows", number, file))).then(
    (chunks) => {
      chunks.forEach((each) => model.add(each));
      head();
      readAddress();
      if (!element("detail").open) element("grid").focus({ preventScroll: true });
      document.documentElement.dataset.ready = "true";
    },
    (error) => {
      element("empty").hidden = false;
      element("empty").textContent = error.message;
    },
  );
};
