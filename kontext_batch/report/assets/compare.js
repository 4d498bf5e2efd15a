"use strict";
// Two pictures over one another: with a slider, blinking, or side by side.

kontext.compare = (() => {
  const { el } = kontext;
  const BLINK = 700; // ms; slow enough to harm nobody
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const MODES = [["slider", "Slider"], ["blink", "Blink"], ["beside", "Side by side"], ["result", "Result"]];

  class Compare {
    constructor() {
      this.mode = "slider";
      this.before = el("img", { class: "before", alt: "", decoding: "async", draggable: "false" });
      this.after = el("img", { class: "after", alt: "", decoding: "async", draggable: "false" });
      this.line = el("div", { class: "line", "aria-hidden": "true" });
      this.slider = el("input", {
        type: "range", min: 0, max: 100, step: 1, value: 50, class: "slider", oninput: () => this.slide(),
      });
      this.beforeName = el("figcaption", { class: "tag left" });
      this.afterName = el("figcaption", { class: "tag right" });
      this.nothing = el("p", { class: "nothing" });
      this.stage = el("figure", { class: "stage" },
        this.before, this.after, this.line, this.slider, this.beforeName, this.afterName, this.nothing);
      this.buttons = MODES.map(([mode, label]) =>
        el("button", { type: "button", "data-mode": mode, onclick: () => this.choose(mode) }, label));
      this.modes = el("div", { class: "modes", role: "group", "aria-label": "How to compare" }, this.buttons);
      new ResizeObserver(() => this.slide()).observe(this.stage);
      for (const image of [this.before, this.after]) {
        image.addEventListener("load", () => this.slide());
        image.addEventListener("error", () => this.tell("A picture of this report is not beside the page. Was the folder copied whole?", true));
      }
    }

    // Words instead of pictures; none where they are empty.
    tell(words, bad) {
      this.nothing.textContent = words;
      this.nothing.hidden = !words;
      this.nothing.classList.toggle("bad", bad);
    }

    // `before` and `after`: {name, sha256, alt where that says more} or null; `why`: what is said instead of a picture,
    // `bad`: because something went wrong.
    show(before, after, why, bad) {
      this.both = Boolean(before && after);
      this.any = Boolean(after);
      for (const [image, picture] of [[this.before, before], [this.after, after]]) {
        image.hidden = !picture;
        if (picture) {
          image.src = kontext.preview(picture.sha256);
          image.alt = picture.alt ?? picture.name;
        } else image.removeAttribute("src");
      }
      this.beforeName.textContent = before ? before.name : "";
      this.afterName.textContent = after ? after.name : "";
      this.tell(after ? "" : why, bad);
      if (before) this.slider.setAttribute("aria-label", `How much of ${before.name} is seen`);
      this.settle();
    }

    choose(mode) {
      this.mode = mode;
      this.settle();
    }

    // The b key: starts and stops it; where motion is not wanted each press changes the picture.
    blink() {
      if (!this.both) return;
      if (this.mode !== "blink") this.choose("blink");
      else if (still.matches) this.flip();
      else this.choose("slider");
    }

    settle() {
      const mode = this.both ? this.mode : "result";
      this.stage.dataset.mode = mode;
      for (const button of this.buttons) {
        button.setAttribute("aria-pressed", button.dataset.mode === mode);
        button.disabled = !this.both;
      }
      this.stop();
      this.stage.classList.remove("flipped");
      if (mode === "blink") {
        this.flip();
        if (!still.matches) this.timer = setInterval(() => this.flip(), BLINK);
      }
      this.slide();
    }

    flip() {
      this.stage.classList.toggle("flipped");
    }

    stop() {
      clearInterval(this.timer);
    }

    // The slider's line lies where the pictures do, whatever is left free around them.
    slide() {
      const part = Number(this.slider.value);
      this.slider.setAttribute("aria-valuetext", `${part} %`);
      const [left, width] = this.extent();
      this.stage.style.setProperty("--left", `${left}px`);
      this.stage.style.setProperty("--wide", `${width}px`);
      this.stage.style.setProperty("--cut", `${left + (width * part) / 100}px`);
    }

    // Where the wider of both pictures lies in the stage: [left, width].
    extent() {
      const { clientWidth, clientHeight } = this.stage;
      const widths = [this.before, this.after]
        .filter((image) => !image.hidden && image.naturalWidth)
        .map((image) => image.naturalWidth * Math.min(clientWidth / image.naturalWidth, clientHeight / image.naturalHeight));
      const width = widths.length ? Math.max(...widths) : clientWidth;
      return [(clientWidth - width) / 2, width];
    }
  }

  return { Compare };
})();
