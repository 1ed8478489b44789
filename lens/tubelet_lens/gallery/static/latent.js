// Plays the clips of a latent's page in step with their heat-maps. All its data is in the page.
"use strict";
(() => {
  const { grid: [steps, height, width], cards } = JSON.parse(document.getElementById("data").textContent);
  // Seconds per frame: the video's own time, within what an eye can follow.
  const FASTEST = 0.06, SLOWEST = 0.4, UNKNOWN = 0.12;
  const STOPS = [[120, 50, 225], [210, 50, 110], [250, 140, 40], [252, 240, 130]];
  const COLORS = Array.from({ length: 256 }, (_, level) => {
    const at = (level / 255) * (STOPS.length - 1), low = Math.min(Math.floor(at), STOPS.length - 2), part = at - low;
    return [...STOPS[low].map((from, i) => from + (STOPS[low + 1][i] - from) * part), level ? 110 + 100 * (level / 255) : 0];
  });

  // Pairs of bytes (gap, level): `gap` zeros, then `level`.
  function unpacked(text, length) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)), levels = new Uint8Array(length);
    for (let i = 0, at = 0; i < bytes.length; i += 2) { at += bytes[i]; levels[at++] = bytes[i + 1]; }
    return levels;
  }

  function shown(value) { return Number(value.toPrecision(3)).toString(); }

  class Card {
    constructor(node, data) {
      Object.assign(this, data);
      this.node = node;
      this.sheet = node.querySelector(".sheet");
      this.canvas = node.querySelector(".map");
      this.slider = node.querySelector("input");
      this.places = data.patches || Array.from({ length: height * width }, (_, i) => i);
      this.levels = unpacked(data.heat, steps * this.places.length);
      this.canvas.width = width; this.canvas.height = height;
      this.context = this.canvas.getContext("2d");
      this.frame_s = Math.min(SLOWEST, Math.max(FASTEST, data.seconds || UNKNOWN));
      this.visible = true; this.held = false; this.began = null; this.step = -1;
      const bars = node.querySelector(".bars");
      this.peaks = Array.from({ length: steps }, (_, t) => {
        let most = 0;
        for (let s = 0; s < this.places.length; s++) most = Math.max(most, this.levels[t * this.places.length + s]);
        const bar = bars.appendChild(document.createElement("i"));
        bar.style.height = `${(most / 255) * 100}%`;
        return most / 255;
      });
      this.bars = [...bars.children];
      this.slider.addEventListener("input", () => { this.held = true; this.show(Number(this.slider.value)); });
      this.slider.addEventListener("blur", () => { this.held = false; });
      this.show(data.peak);
    }
    show(frame) {
      this.frame = frame;
      this.slider.value = frame;
      const step = Math.min(steps - 1, Math.floor((frame * steps) / this.frames));
      if (this.sheet) {
        this.sheet.style.setProperty("--column", frame % this.columns);
        this.sheet.style.setProperty("--row", Math.floor(frame / this.columns));
      }
      if (document.activeElement === this.slider || this.step < 0) {
        const value = shown(this.peaks[step] * this.scale);
        this.slider.setAttribute("aria-valuetext", `frame ${frame + 1} of ${this.frames}, activation up to ${value}`);
      }
      if (step === this.step) return;
      if (this.step >= 0) this.bars[this.step].classList.remove("now");
      this.bars[step].classList.add("now");
      this.step = step;
      this.draw();
    }
    draw() {
      const image = this.context.createImageData(width, height), pixels = image.data;
      // What the store does not hold is veiled.
      if (this.patches) for (let i = 0; i < pixels.length; i += 4) pixels.set([30, 32, 38, 185], i);
      this.places.forEach((place, s) => pixels.set(COLORS[this.levels[this.step * this.places.length + s]], place * 4));
      this.context.putImageData(image, 0, 0);
    }
    tick(now, speed) {
      if (!this.visible || this.held) { this.began = null; return; }
      if (this.began === null) { this.began = now - (this.frame * this.frame_s) / speed; }
      const frame = Math.floor(((now - this.began) * speed) / this.frame_s) % this.frames;
      if (frame !== this.frame) this.show(frame);
    }
  }

  const nodes = [...document.querySelectorAll(".card")];
  const all = nodes.map((node) => new Card(node, cards[Number(node.dataset.card)]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) all[nodes.indexOf(entry.target)].visible = entry.isIntersecting;
  });
  nodes.forEach((node) => seen.observe(node));

  const play = document.getElementById("play"), heat = document.getElementById("heat"), speed = document.getElementById("speed");
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  document.querySelector(".tools").hidden = false;
  function loop(now) {
    if (!playing) return;
    for (const card of all) card.tick(now / 1000, Number(speed.value));
    requestAnimationFrame(loop);
  }
  function setPlaying(on) {
    playing = on;
    play.firstChild.data = on ? "Pause " : "Play ";
    play.setAttribute("aria-pressed", String(on));
    for (const card of all) { card.began = null; card.held = false; }
    if (on) requestAnimationFrame(loop);
  }
  function setHeat(on) {
    heat.setAttribute("aria-pressed", String(on));
    for (const card of all) card.canvas.hidden = !on;
  }
  play.addEventListener("click", () => setPlaying(!playing));
  heat.addEventListener("click", () => setHeat(heat.getAttribute("aria-pressed") !== "true"));
  speed.addEventListener("change", () => { for (const card of all) card.began = null; });
  document.addEventListener("keydown", (event) => {
    const on = event.target.tagName;
    if (event.ctrlKey || event.metaKey || event.altKey || on === "SELECT") return;
    // Space already means something on these.
    if (event.key === " " && !["BUTTON", "SUMMARY", "A"].includes(on)) { event.preventDefault(); setPlaying(!playing); }
    else if (event.key === "h") setHeat(heat.getAttribute("aria-pressed") !== "true");
    else {
      const link = document.getElementById({ n: "next", p: "previous", o: "up" }[event.key]);
      if (link) link.click();
    }
  });
  setPlaying(playing);
})();
