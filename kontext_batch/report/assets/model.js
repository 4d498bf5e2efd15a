"use strict";
// The pictures of the run, and which of them lie where: nothing here touches the page.

kontext.model = (() => {
  const NONE = -1; // no axis: pictures follow one another
  const ALL = -1; // any value of an axis

  class Model {
    constructor(run) {
      this.run = run;
      this.candidateAxis = run.axes.length;
      this.rows = []; // by place in the plan
      this.byNode = run.nodes.map(() => []);
    }

    add({ texts, rows }) {
      for (const [place, node, state, candidate, cached, sha256, prompts, error, ...values] of rows) {
        const picture = {
          place, node, state: this.run.states[state], candidate, cached: cached === 1, sha256, values,
          prompts: prompts.map((each) => texts[each]), error: error < 0 ? "" : texts[error],
        };
        this.rows[place] = picture;
        this.byNode[node].push(picture);
      }
    }

    axisName(axis) {
      return axis === this.candidateAxis ? "candidate" : this.run.axes[axis].name;
    }

    valueName(axis, value) {
      return axis === this.candidateAxis ? `${value + 1}` : this.run.axes[axis].values[value];
    }

    value(picture, axis) {
      if (axis === this.candidateAxis) return picture.candidate - 1;
      return axis < picture.values.length ? picture.values[axis] : -1;
    }

    // Axes that pictures of a step of the recipe differ by.
    axesOf(node) {
      const { axes, candidates } = this.run.nodes[node];
      return candidates > 1 ? [...axes, this.candidateAxis] : [...axes];
    }

    valuesOf(node, axis) {
      return [...new Set(this.byNode[node].map((each) => this.value(each, axis)))]
        .filter((value) => value >= 0)
        .sort((a, b) => a - b);
    }

    // What a picture is called: the values of its axes.
    name(picture) {
      const parts = this.axesOf(picture.node)
        .filter((axis) => this.value(picture, axis) >= 0)
        .map((axis) => (axis === this.candidateAxis ? `candidate ${picture.candidate}` : this.valueName(axis, this.value(picture, axis))));
      return parts.join(" · ") || this.run.nodes[picture.node].name;
    }

    shown(picture) {
      return kontext.states[picture.state];
    }

    matches(picture, words, state) {
      if (state && this.shown(picture) !== state) return false;
      if (!words.length) return true;
      picture.text ??= [this.name(picture), ...picture.prompts, picture.error, this.shown(picture)].join("\n").toLowerCase();
      return words.every((word) => picture.text.includes(word));
    }

    // A view that can be shown: what it says where that is possible, else what comes nearest.
    settled(wanted) {
      const { run } = this;
      const node = run.nodes[wanted.node] ? wanted.node : run.first;
      const axes = this.axesOf(node);
      const known = (axis) => axis === NONE || axes.includes(axis);
      let { row, column } = wanted;
      if (row === undefined || column === undefined || !known(row) || !known(column)) {
        [row, column] = axes.length > 1 ? [axes[0], axes[1]] : [NONE, NONE];
      }
      if (row === column) column = axes.find((axis) => axis !== row) ?? NONE;
      if (row === NONE || column === NONE) [row, column] = [NONE, NONE];
      const matrix = row !== NONE;
      const pick = {};
      for (const axis of axes) {
        if (axis === row || axis === column) continue;
        const values = this.valuesOf(node, axis);
        const value = wanted.pick?.[axis];
        pick[axis] = values.includes(value) ? value : matrix ? values[0] : ALL;
      }
      return { ...wanted, node, row, column, pick };
    }

    // Rows, columns and cells of a view: {matrix, rows, columns, cells: Map of "row column" | list, pictures, total}.
    layout(view) {
      const words = view.q.toLowerCase().split(/\s+/).filter(Boolean);
      const picked = this.byNode[view.node].filter((each) =>
        Object.entries(view.pick).every(([axis, value]) => value === ALL || this.value(each, Number(axis)) === value),
      );
      const pictures = picked.filter((each) => this.matches(each, words, view.state));
      if (view.row === NONE) return { matrix: false, pictures, total: picked.length };
      const order = (axis) => [...new Set(pictures.map((each) => this.value(each, axis)))].sort((a, b) => a - b);
      const rows = order(view.row);
      const columns = order(view.column);
      const rowAt = new Map(rows.map((value, at) => [value, at]));
      const columnAt = new Map(columns.map((value, at) => [value, at]));
      const cells = new Map();
      for (const each of pictures) {
        cells.set(rowAt.get(this.value(each, view.row)) * columns.length + columnAt.get(this.value(each, view.column)), each);
      }
      const inOrder = [...cells.keys()].sort((a, b) => a - b).map((key) => cells.get(key));
      return { matrix: true, rows, columns, cells, pictures: inOrder, total: picked.length };
    }

    // All that went wrong, in the order of the plan.
    failures() {
      return this.rows.filter((each) => each && (this.shown(each) === "Failed" || (each.state === "done" && each.error)));
    }
  }

  return { Model, NONE, ALL };
})();
