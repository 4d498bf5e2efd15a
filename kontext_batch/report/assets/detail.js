"use strict";
// One picture: compared with what it came from, and every step that led to it.

kontext.detail = (() => {
  const { el, fill, say } = kontext;
  const MOST = 40; // steps of a chain that are shown

  class Detail {
    // `step` is asked for the picture before or behind the one that is shown; `closed` is told when it is closed.
    constructor(element, model, { step, closed }) {
      Object.assign(this, { element, model });
      this.compare = new kontext.compare.Compare();
      this.title = el("h2", { id: "detail-title", tabindex: -1 });
      this.position = el("span", { class: "position" });
      this.facts = el("div", { class: "facts", tabindex: 0, role: "region", "aria-label": "How it was made" });
      element.append(
        el("header", { class: "bar" },
          el("button", { type: "button", "aria-label": "Previous picture", title: "Previous picture (←)", onclick: () => step(-1) }, "←"),
          el("button", { type: "button", "aria-label": "Next picture", title: "Next picture (→)", onclick: () => step(1) }, "→"),
          this.title, this.position, this.compare.modes,
          el("button", { type: "button", class: "close", "aria-label": "Close", title: "Close (Esc)", onclick: () => element.close() }, "✕")),
        el("div", { class: "both" }, this.compare.stage, this.facts));
      element.addEventListener("keydown", (event) => {
        if (event.altKey || event.ctrlKey || event.metaKey || event.target === this.compare.slider) return;
        if (event.key === "ArrowLeft") step(-1);
        else if (event.key === "ArrowRight") step(1);
        else if (event.key === "b" || event.key === "B") this.compare.blink();
        else return;
        event.preventDefault();
      });
      element.addEventListener("close", () => {
        this.compare.stop();
        this.picture = null;
        closed();
      });
    }

    async show(picture, position) {
      this.picture = picture;
      const { model, element } = this;
      this.title.textContent = model.name(picture);
      this.position.textContent = position;
      if (!element.open) {
        element.showModal();
        this.title.focus();
      }
      this.facts.setAttribute("aria-busy", "true");
      try {
        const chain = await this.chain(picture.place);
        if (this.picture === picture) this.draw(chain);
      } catch (error) {
        if (this.picture === picture) this.facts.replaceChildren(el("p", { class: "error" }, error.message));
      }
      this.facts.removeAttribute("aria-busy");
    }

    async load(place) {
      const { files, details_each: each } = this.model.run;
      const number = Math.floor(place / each);
      const details = await kontext.load("details", number, files.details[number]);
      return details[place % each];
    }

    // The steps above a picture in the order of the plan, itself the last: parents come before what reads them.
    async chain(place) {
      const found = new Map();
      let todo = [place];
      let cut = false;
      while (todo.length && found.size < MOST) {
        cut ||= todo.length > MOST - found.size;
        const details = await Promise.all(todo.slice(0, MOST - found.size).map((each) => this.load(each)));
        for (const each of details) found.set(each.place, each);
        const parents = details.flatMap((each) => each.reads.map((read) => read.parent));
        todo = [...new Set(parents)].filter((each) => each !== undefined && each !== null && !found.has(each));
      }
      return { steps: [...found.values()].sort((a, b) => a.place - b.place), cut: cut || todo.length > 0 };
    }

    draw({ steps, cut }) {
      const last = steps[steps.length - 1];
      const byPlace = new Map(steps.map((each) => [each.place, each]));
      this.pictures = []; // what can be compared with: [{name, sha256, button}]
      const photos = this.photos(steps);
      const list = el("ol", { class: "chain" });
      for (const photo of photos) list.append(this.photo(photo));
      if (cut) list.append(el("li", {}, el("p", { class: "soft" }, `Only the ${MOST} nearest steps are shown.`)));
      for (const step of steps) list.append(this.step(step, step === last));
      fill(this.facts, this.outputs(last), el("h3", {}, "Steps"), list, this.record(last));
      this.facts.scrollTop = 0;
      this.result = last.picture && !last.picture.missing ? { name: this.nodeName(last), alt: `${this.nodeName(last)}: ${this.title.textContent}`, sha256: last.picture.sha256 } : null;
      this.why = this.reason(last);
      this.bad = !["Waiting", "Running", "Cancelled"].includes(this.model.shown(this.model.rows[last.place]));
      this.compareWith(this.origin(last, byPlace));
    }

    // The photo that a picture began with, up by what each step changes; none of a sheet, or of what has no canvas.
    origin(step, byPlace) {
      for (let at = step; at; ) {
        const read = at.reads.find((each) => each.role === "image");
        if (!read) break;
        if (read.sha256) return this.pictures.find((each) => each.sha256 === read.sha256);
        at = byPlace.get(read.parent);
      }
      return undefined;
    }

    photos(steps) {
      const found = new Map();
      for (const read of steps.flatMap((each) => each.reads)) if (read.sha256 && !found.has(read.sha256)) found.set(read.sha256, read);
      return [...found.values()].slice(0, MOST);
    }

    nodeName(step) {
      return this.model.run.nodes[this.model.rows[step.place].node].name;
    }

    reason(step) {
      if (step.error) return step.error;
      if (step.picture?.missing) return `The picture cannot be shown: ${step.picture.missing}.`;
      return { skipped: "Skipped: a step before it failed.", cancelled: "Cancelled: no run wants it." }[step.state] ?? "Not made yet.";
    }

    compareWith(chosen) {
      const usable = chosen && this.result && chosen.sha256 !== this.result.sha256 ? chosen : null;
      for (const each of this.pictures) each.button.setAttribute("aria-pressed", each === usable);
      this.compare.show(usable, this.result, this.why, this.bad);
    }

    // A thumbnail to compare the result with.
    thumbnail(sha256, name, missing) {
      if (!sha256 || missing) return el("span", { class: "thumb none", title: missing || null }, "–");
      const image = el("img", { src: kontext.thumbnail(sha256), alt: "", width: 72, height: 72, loading: "lazy", draggable: "false" });
      const button = el("button", { type: "button", class: "thumb", "aria-label": `Compare with ${name}`, title: `Compare with ${name}` }, image);
      const picture = { name, sha256, button };
      button.addEventListener("click", () => this.compareWith(picture));
      this.pictures.push(picture);
      return button;
    }

    photo(read) {
      const name = say.file(read.uri);
      const note = read.missing ? el("p", { class: "error" }, `Not shown: ${read.missing}.`) : null;
      const role = { image: "Photo", logo: "Logo", reference: "Reference", cell: "Photo" }[read.role] ?? read.role;
      return el("li", { class: "step" }, this.thumbnail(read.sha256, name, read.missing),
        el("div", {}, el("h4", {}, role), el("p", { class: "soft" }, this.linked(read, name)), note));
    }

    step(step, isLast) {
      const row = this.model.rows[step.place];
      const name = this.nodeName(step);
      const own = step.picture;
      const shown = this.model.shown(row);
      const details = [
        step.state === "done" && !row.cached ? null : el("p", { class: `state-line ${shown.toLowerCase()}` }, row.cached && step.state === "done" ? "Was there before this run" : shown),
        step.error ? el("p", { class: "error" }, step.error) : null,
        step.prompt ? el("blockquote", { class: "prompt" }, step.prompt) : null,
        this.list([...step.facts, ...this.times(step)]),
        own ? el("p", { class: "soft" }, this.linked(own, `${own.width} × ${own.height}, ${own.type.replace("image/", "").toUpperCase()}, ${say.bytes(own.bytes)}`)) : null,
        own?.missing ? el("p", { class: "error" }, `Not shown: ${own.missing}.`) : null,
        this.attempts(step),
      ];
      const thumb = isLast && own && !own.missing
        ? el("span", { class: "thumb" }, el("img", { src: kontext.thumbnail(own.sha256), alt: "", width: 72, height: 72, draggable: "false" }))
        : this.thumbnail(own?.sha256, name, own?.missing);
      return el("li", { class: "step" }, thumb, el("div", {}, el("h4", {}, name, " ", el("span", { class: "soft" }, step.operation === name ? "" : step.operation.replace("_", " "))), ...details));
    }

    times(step) {
      const good = [...step.attempts].reverse().find((each) => each.outcome === "ok") ?? step.attempts[step.attempts.length - 1];
      if (!good) return [];
      const sampled = good.timings.find(([name]) => name === "sample");
      const facts = good.seconds === null ? [] : [["Took", say.seconds(good.seconds)]];
      return sampled ? [...facts, ["GPU time", say.seconds(sampled[1])]] : facts;
    }

    attempts(step) {
      if (!step.attempts.length) return null;
      const bad = step.attempts.some((each) => each.error);
      const rows = step.attempts.map((each) => el("li", {},
        `${each.number}. ${each.outcome}, ${say.time(each.started)}${each.seconds === null ? "" : `, ${say.seconds(each.seconds)}`}`,
        el("br", {}), el("span", { class: "soft" }, `${each.worker}${each.batch === null ? "" : `, batch ${each.batch}`}`),
        each.timings.length ? [el("br", {}), el("span", { class: "soft" }, each.timings.map(([name, seconds]) => `${name} ${say.seconds(seconds)}`).join(", "))] : null,
        each.error ? el("p", { class: "error" }, each.error) : null));
      return el("details", { open: bad }, el("summary", {}, say.plural(step.attempts.length, "attempt")), el("ul", { class: "attempts" }, rows));
    }

    list(facts) {
      if (!facts.length) return null;
      return el("dl", {}, facts.map(([label, text]) => el("div", {}, el("dt", {}, label), el("dd", {}, text))));
    }

    // A link to the file where there is a way to it, else where it lies.
    linked({ href, uri }, text) {
      const way = kontext.outside(href);
      if (way) return el("a", { href: way, target: "_blank", rel: "noopener noreferrer", title: say.uri(uri) }, text);
      return el("span", {}, text, el("br", {}), el("span", { class: "soft" }, say.uri(uri)));
    }

    outputs(step) {
      if (!step.outputs.length) return null;
      const due = this.model.run.finished === null ? "To be delivered" : "Not delivered"; // a run that has ended brings nothing more
      const rows = step.outputs.map((each) => {
        const state = { delivered: "", withdrawn: "Taken down", failed: "Not delivered", skipped: "Left out", waiting: due, pending: due }[each.state] ?? each.state;
        return el("li", {}, state ? el("span", { class: each.state === "failed" ? "error" : "soft" }, `${state}: `) : null,
          this.linked(each, say.file(each.uri)), each.error ? el("p", { class: each.state === "failed" ? "error" : "soft" }, each.error) : null);
      });
      return el("section", {}, el("h3", {}, "File"), el("ul", { class: "outputs" }, rows));
    }

    record(step) {
      const facts = [["Step", `${step.step}`], ["Key", step.key]];
      if (step.picture) facts.push(["sha256", step.picture.sha256]);
      return el("section", { class: "record" }, el("h3", {}, "Record"), this.list(facts));
    }
  }

  return { Detail };
})();
