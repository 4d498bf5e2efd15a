"use strict";
// The pictures in rows and columns. Only what is in view is in the page, whatever the number of pictures.

kontext.grid = (() => {
  const { el, fill } = kontext;
  const GAP = 6;
  const HEAD = 34; // height of the line of column names, and room for the mark around a picture below it
  const CAPTION = 22; // below a picture where no row and column say what it is
  const AUTO = [96, 224]; // least and most pixels of a picture where nobody has chosen
  const BEYOND = 1; // rows and columns that are kept ready around what is in view

  class Grid {
    // `open` is told the picture that somebody chose.
    constructor(element, model, open) {
      this.element = element;
      this.model = model;
      this.open = open;
      this.sheet = el("div", { class: "cells", role: "presentation" });
      this.element.append(this.sheet);
      this.at = [0, 0];
      this.drawn = new Map(); // row -> {element, cells: Map of column -> element}
      this.wanted = false;
      element.addEventListener("scroll", () => this.later(), { passive: true });
      element.addEventListener("keydown", (event) => this.key(event));
      element.addEventListener("click", (event) => this.click(event));
      new ResizeObserver(() => this.fit()).observe(element);
    }

    // `size`: of a picture, in pixels; null: as many as lets all columns be seen, within reason.
    show(layout, view, size) {
      Object.assign(this, { layout, view, chosen: size });
      this.element.scrollTop = this.element.scrollLeft = 0;
      this.at = [0, 0];
      this.fit();
      if (layout.pictures.length && !this.picture()) this.goTo(layout.pictures[0]); // nothing is in the first row and column
    }

    // Measures anew, and draws everything anew.
    fit() {
      if (!this.layout) return;
      const { layout } = this;
      const width = this.element.clientWidth;
      this.side = layout.matrix ? Math.min(152, Math.max(84, Math.round(width * 0.16))) : 0;
      this.top = layout.matrix ? HEAD : GAP;
      const room = layout.matrix ? Math.floor((width - this.side) / layout.columns.length) - GAP : width < 500 ? 104 : 160;
      const size = this.chosen ?? Math.min(AUTO[1], Math.max(AUTO[0], room));
      this.size = size;
      this.cell = [size + GAP, size + GAP + (layout.matrix ? 0 : CAPTION)];
      const before = this.picture();
      this.across = layout.matrix ? layout.columns.length : Math.max(1, Math.floor((width - GAP) / this.cell[0]));
      this.down = layout.matrix ? layout.rows.length : Math.ceil(layout.pictures.length / this.across);
      if (before && !layout.matrix) this.goTo(before, false);
      this.sheet.style.width = `${this.side + this.across * this.cell[0]}px`;
      this.sheet.style.height = `${this.top + this.down * this.cell[1] + GAP}px`;
      this.element.setAttribute("aria-rowcount", this.down + (layout.matrix ? 1 : 0));
      this.element.setAttribute("aria-colcount", this.across + (layout.matrix ? 1 : 0));
      this.sheet.replaceChildren();
      this.drawn.clear();
      this.heads = layout.matrix ? this.headLine() : null;
      this.draw();
    }

    headLine() {
      const { model, view } = this;
      const corner = `${model.axisName(view.row)} \\ ${model.axisName(view.column)}`;
      const line = el("div", { class: "heads", role: "row", "aria-rowindex": 1 },
        el("div", { class: "corner", role: "columnheader", "aria-colindex": 1, title: corner }, model.axisName(view.row)));
      line.firstChild.style.width = `${this.side}px`;
      this.sheet.append(line);
      return { line, cells: new Map() };
    }

    later() {
      if (this.wanted) return;
      this.wanted = true;
      requestAnimationFrame(() => {
        this.wanted = false;
        this.draw();
      });
    }

    // [first, behind the last] of the rows or columns in view.
    inView(start, extent, cell, count) {
      const first = Math.max(0, Math.floor(start / cell) - BEYOND);
      return [first, Math.min(count, Math.ceil((start + extent) / cell) + BEYOND)];
    }

    draw() {
      if (!this.layout) return;
      const { element } = this;
      const [top, bottom] = this.inView(element.scrollTop, element.clientHeight - this.top, this.cell[1], this.down);
      const [left, right] = this.inView(element.scrollLeft, element.clientWidth - this.side, this.cell[0], this.across);
      const rows = new Set([this.at[0]]);
      for (let row = top; row < bottom; row++) rows.add(row);
      const columns = new Set([this.at[1]]);
      for (let column = left; column < right; column++) columns.add(column);
      for (const [row, drawn] of this.drawn) {
        if (!rows.has(row)) {
          drawn.element.remove();
          this.drawn.delete(row);
        }
      }
      for (const row of [...rows].sort((a, b) => a - b)) if (row < this.down) this.drawRow(row, columns);
      if (this.heads) this.drawCells(this.heads.line, this.heads.cells, columns, (column) => this.columnName(column));
      this.mark();
    }

    drawRow(row, columns) {
      let drawn = this.drawn.get(row);
      if (!drawn) {
        const index = row + (this.layout.matrix ? 2 : 1);
        const line = el("div", { class: "row", role: "row", "aria-rowindex": index });
        line.style.top = `${this.top + row * this.cell[1]}px`;
        line.style.height = `${this.cell[1]}px`;
        if (this.layout.matrix) {
          const name = this.model.valueName(this.view.row, this.layout.rows[row]);
          const head = el("div", { class: "name", role: "rowheader", "aria-colindex": 1, title: name }, el("span", {}, name));
          head.style.width = `${this.side}px`;
          line.append(head);
        }
        const next = [...this.drawn.entries()].filter(([other]) => other > row).sort(([a], [b]) => a - b)[0];
        this.sheet.insertBefore(line, next ? next[1].element : null);
        drawn = { element: line, cells: new Map() };
        this.drawn.set(row, drawn);
      }
      this.drawCells(drawn.element, drawn.cells, columns, (column) => this.drawCell(row, column));
    }

    drawCells(line, cells, columns, make) {
      for (const [column, cell] of cells) {
        if (!columns.has(column)) {
          cell.remove();
          cells.delete(column);
        }
      }
      for (const column of columns) {
        if (cells.has(column) || column >= this.across) continue;
        const cell = make(column);
        if (!cell) continue;
        cell.style.left = `${this.side + column * this.cell[0]}px`;
        cell.style.width = `${this.size}px`;
        cell.setAttribute("aria-colindex", column + (this.layout.matrix ? 2 : 1));
        const behind = [...cells.entries()].filter(([other]) => other > column).sort(([a], [b]) => a - b)[0];
        line.insertBefore(cell, behind ? behind[1] : null);
        cells.set(column, cell);
      }
    }

    columnName(column) {
      const name = this.model.valueName(this.view.column, this.layout.columns[column]);
      return el("div", { class: "column", role: "columnheader", title: name }, name);
    }

    pictureAt(row, column) {
      const { layout } = this;
      if (column >= this.across || row >= this.down || row < 0 || column < 0) return undefined;
      return layout.matrix ? layout.cells.get(row * this.across + column) : layout.pictures[row * this.across + column];
    }

    picture() {
      return this.layout && this.across ? this.pictureAt(...this.at) : undefined;
    }

    drawCell(row, column) {
      const picture = this.pictureAt(row, column);
      const id = `cell-${row}-${column}`;
      if (!picture) {
        if (!this.layout.matrix) return null;
        const none = el("div", { class: "cell none", role: "gridcell", id, "aria-label": "nothing here" });
        none.style.height = `${this.size}px`;
        return none;
      }
      const { model } = this;
      const name = model.name(picture);
      const shown = model.shown(picture);
      const state = picture.state === "done" && picture.error ? "Not delivered" : shown;
      const cell = el("div", {
        class: `cell ${shown.toLowerCase()}`, role: "gridcell", id, title: name,
        "aria-label": `${name}: ${state.toLowerCase()}${picture.error ? `, ${picture.error}` : ""}`,
      });
      const box = el("div", { class: "box" });
      box.style.height = `${this.size}px`;
      if (picture.sha256) {
        const image = el("img", { loading: "lazy", decoding: "async", alt: "", width: this.size, height: this.size, draggable: "false" });
        image.addEventListener("error", () => image.replaceWith(el("span", { class: "state" }, "Picture not found")), { once: true });
        image.src = kontext.thumbnail(picture.sha256);
        box.append(image);
        if (state === "Not delivered") box.append(el("span", { class: "badge" }, state));
      } else {
        const what = picture.state === "done" ? "Picture not kept" : shown;
        fill(box, el("span", { class: "state" }, what), picture.error && el("span", { class: "why" }, picture.error));
      }
      cell.append(box);
      if (!this.layout.matrix) cell.append(el("div", { class: "caption" }, name));
      return cell;
    }

    mark() {
      for (const each of this.sheet.querySelectorAll(".active")) each.classList.remove("active");
      const cell = document.getElementById(`cell-${this.at[0]}-${this.at[1]}`);
      if (cell) {
        cell.classList.add("active");
        this.element.setAttribute("aria-activedescendant", cell.id);
      } else this.element.removeAttribute("aria-activedescendant");
    }

    // Makes a picture the current one, and brings it into view.
    goTo(picture, scroll = true) {
      const { layout } = this;
      if (layout.matrix) {
        for (const [key, each] of layout.cells) {
          if (each === picture) this.at = [Math.floor(key / this.across), key % this.across];
        }
      } else {
        const found = layout.pictures.indexOf(picture);
        if (found >= 0) this.at = [Math.floor(found / this.across), found % this.across];
      }
      if (scroll) this.reveal();
    }

    reveal() {
      const { element } = this;
      const [row, column] = this.at;
      const [width, height] = this.cell;
      const y = row * height;
      const x = column * width;
      const roomY = element.clientHeight - this.top - height;
      const roomX = element.clientWidth - this.side - width;
      element.scrollTop = Math.min(y, Math.max(element.scrollTop, y - roomY));
      element.scrollLeft = Math.min(x, Math.max(element.scrollLeft, x - roomX));
      element.scrollIntoView({ block: "nearest" }); // of a low window, whose page scrolls too
      this.draw();
    }

    move(rows, columns) {
      const row = Math.min(this.down - 1, Math.max(0, this.at[0] + rows));
      let column = Math.min(this.across - 1, Math.max(0, this.at[1] + columns));
      if (!this.layout.matrix) column = Math.min(column, this.layout.pictures.length - 1 - row * this.across);
      this.at = [Math.max(0, row), Math.max(0, column)];
      this.reveal();
    }

    key(event) {
      if (event.ctrlKey && !["Home", "End"].includes(event.key)) return;
      if (event.altKey || event.metaKey) return;
      const page = Math.max(1, Math.floor((this.element.clientHeight - this.top) / this.cell[1]) - 1);
      const far = this.down + this.across;
      const moves = {
        ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
        PageUp: [-page, 0], PageDown: [page, 0],
        Home: event.ctrlKey ? [-far, -far] : [0, -far], End: event.ctrlKey ? [far, far] : [0, far],
      };
      if (event.key === "Enter" || event.key === " ") {
        if (this.picture()) this.open(this.picture());
      } else if (Object.hasOwn(moves, event.key)) this.move(...moves[event.key]);
      else return;
      event.preventDefault();
    }

    click(event) {
      const cell = event.target.closest(".cell");
      if (!cell) return;
      this.at = cell.id.split("-").slice(1).map(Number);
      this.mark();
      if (this.picture()) this.open(this.picture());
    }
  }

  return { Grid };
})();
