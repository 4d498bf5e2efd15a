"use strict";
// What the other scripts share: data that arrive as scripts, elements made without markup, and how things are said.

const kontext = (() => {
  const arrived = new Map(); // "details 3" -> value
  const asked = new Map(); // the same -> [promise, resolve]

  // Called by the data files.
  function take(kind, number, text) {
    const name = `${kind} ${number}`;
    arrived.set(name, JSON.parse(text));
    if (asked.has(name)) asked.get(name)[1](arrived.get(name));
    if (kind === "run" && kontext.start) kontext.start(arrived.get(name));
  }

  // The value of a data file, which is loaded unless it is there.
  function load(kind, number, file) {
    const name = `${kind} ${number}`;
    if (arrived.has(name)) return Promise.resolve(arrived.get(name));
    if (asked.has(name)) return asked.get(name)[0];
    let resolve, reject;
    const promise = new Promise((yes, no) => { [resolve, reject] = [yes, no]; });
    asked.set(name, [promise, resolve]);
    const script = document.createElement("script");
    script.src = place(file);
    script.onerror = () => {
      asked.delete(name);
      reject(new Error(`${file} cannot be loaded; is it still beside this page?`));
    };
    script.onload = () => script.remove();
    document.head.append(script);
    return promise;
  }

  // Where a file of the report is loaded from: beside the page, or behind a link.
  function place(file) {
    const links = arrived.get("links 0");
    return links && Object.hasOwn(links, file) ? links[file] : file;
  }

  // Where a file outside of the report can be opened; null where it cannot.
  function outside(href) {
    const links = arrived.get("links 0");
    if (!href) return null;
    if (links) return Object.hasOwn(links, href) ? links[href] : null;
    return /^\.{1,2}\//.test(href) ? href : null;
  }

  // An element; texts are texts, never markup. `on...` are listeners, true and false set and leave out an attribute.
  function el(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else made.setAttribute(name, value === true ? "" : String(value));
    }
    return fill(made, ...children);
  }

  // Gives an element these children, without those that are nothing.
  function fill(parent, ...children) {
    parent.replaceChildren(...children.flat(2).filter((each) => each !== null && each !== undefined && each !== false));
    return parent;
  }

  const decimal = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
  const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const moment = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short" });

  const say = {
    count: (number) => whole.format(number),
    plural: (number, one, many) => `${whole.format(number)} ${number === 1 ? one : many || one + "s"}`,
    time: (iso) => moment.format(new Date(iso)),
    seconds(seconds) {
      if (seconds === 0) return "0 s";
      if (seconds < 1) return `${whole.format(seconds * 1000)} ms`;
      if (seconds < 60) return `${decimal.format(seconds)} s`;
      const rounded = Math.round(seconds);
      const parts = rounded < 3600
        ? [[Math.floor(rounded / 60), "min"], [rounded % 60, "s"]]
        : [[Math.floor(rounded / 3600), "h"], [Math.floor((rounded % 3600) / 60), "min"]];
      return parts.filter(([number]) => number).map(([number, unit]) => `${number} ${unit}`).join(" ");
    },
    bytes(bytes) {
      if (bytes < 1000) return `${bytes} bytes`;
      return bytes < 1e6 ? `${decimal.format(bytes / 1000)} kB` : `${decimal.format(bytes / 1e6)} MB`;
    },
    file: (uri) => decodeURIComponentSafely(uri.slice(uri.lastIndexOf("/") + 1)),
    // A URI as people write it: a file's as its path.
    uri: (uri) => (uri.startsWith("file://") ? decodeURIComponentSafely(uri.slice(7)) : uri),
  };

  function decodeURIComponentSafely(text) {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  }

  // How each state is called where a picture would be.
  const states = {
    blocked: "Waiting",
    ready: "Waiting",
    leased: "Running",
    done: "Done",
    failed: "Failed",
    quarantined: "Failed",
    skipped: "Skipped",
    cancelled: "Cancelled",
  };
  const runStates = {
    running: "Running",
    paused: "Paused",
    done: "Done",
    partial: "Finished with failures",
    failed: "Failed",
    cancelled: "Cancelled",
  };

  const thumbnail = (sha256) => place(`pictures/${sha256}-s.webp`);
  const preview = (sha256) => place(`pictures/${sha256}-m.webp`);

  return { take, load, place, outside, el, fill, say, states, runStates, thumbnail, preview, arrived, start: null };
})();
