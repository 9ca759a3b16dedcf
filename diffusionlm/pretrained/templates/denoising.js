"use strict";
const SECONDS = 6;  // that the whole takes at speed 1
const END = "\u27e8eos\u27e9";

// Returns a function of the step that changes only what differs from what is on the page.
function denoisingView(data, section, element) {
  const text = element.querySelector(".text"), status = element.querySelector("small");
  const ends = new Set(data.ends);
  const history = section.given.map((id) => (id < 0 ? [] : [[0, id, null]]));  // [step, id, confidence]; -1: masked
  section.steps.forEach((events, i) =>
    events.forEach(([position, id = -1, confidence = null]) => history[position].push([i + 1, id, confidence])));
  const whole = new Map();  // position -> [the step from which a character of several tokens is whole, its part]
  for (const [first, count, character] of section.characters) {
    const from = Math.max(...history.slice(first, first + count).map((states) => states.at(-1)[0]));
    for (let i = 0; i < count; i++) whole.set(first + i, [from, i ? "" : character]);
  }
  const prompt = document.createElement("span");
  prompt.className = "prompt";
  prompt.textContent = section.prompt;
  const spans = history.map(() => document.createElement("span"));
  const drawn = history.map(() => "");
  text.replaceChildren(prompt, ...spans);

  // Returns the index of the state at a step in the history of a position; -1: it is still a mask.
  function stateAt(position, step) {
    return history[position].findLastIndex(([since]) => since <= step);
  }

  function draw(position, step, behind) {
    const states = history[position], span = spans[position];
    const at = stateAt(position, step);
    const [since, id, confidence] = at < 0 ? [0, -1, null] : states[at];
    const joined = whole.has(position) && step >= whole.get(position)[0];
    const now = since === step && step > 0;
    const key = `${at} ${joined} ${now} ${behind}`;
    if (drawn[position] === key) return;
    drawn[position] = key;
    const masked = id < 0, given = since === 0 && !masked, end = !given && ends.has(id);
    const next = masked ? states[at + 1]?.[1] : id;  // not known while the text is being denoised
    const token = next === undefined ? "" : data.texts[next];
    const visible = joined ? whole.get(position)[1] : end && !behind ? END : token;
    span.textContent = given ? visible : visible.replaceAll("\n", "\u21b5\n");
    const names = [];
    if (masked) names.push("mask", now ? "back" : "");
    else if (end && !behind) names.push("end", now ? "fresh" : "");
    else if (!given) names.push(confidence === null || behind ? "unknown" : "on", now ? "fresh" : "");
    if (behind) names.push("behind");
    if (!given && !visible && !joined) names.push(next === undefined ? "waiting" : "empty");
    span.className = names.join(" ").trim();
    span.style.setProperty("--c", confidence ?? 0);
    if (masked) span.setAttribute("aria-hidden", "true"); else span.removeAttribute("aria-hidden");
    const sure = confidence === null ? "" : `, confidence ${confidence.toFixed(3)}`;
    const place = behind ? ", behind the end of the text" : "";
    if (masked) span.title = since ? `masked again in step ${since}` : "masked";
    else span.title = `${JSON.stringify(token)} (id ${id}), ` + (given ? "given" : `revealed in step ${since}${sure}${place}`);
  }

  return (step) => {
    let ended = false, masked = 0;  // a text with gaps goes on at its next given token, and a given token ends nothing
    history.forEach((states, position) => {
      const [since, id] = states[stateAt(position, step)] ?? [0, -1];
      const given = since === 0 && id >= 0;
      ended &&= !given;
      draw(position, step, ended);
      ended ||= !given && ends.has(id);
      masked += id < 0;
    });
    const steps = section.steps.length;  // other texts may take longer
    status.textContent = `step ${Math.min(step, steps)} of ${steps}, ${masked} masked; ${section.note}`;
  };
}

// Plays traces inside an element that has the controls and a place for the sections.
function denoisingPlayer(root) {
  const [play, slider, shown, speed] = ["play", "step", "shown", "speed"].map((id) => root.querySelector(`#${id}`));
  const place = root.querySelector(".sections");
  let views = [], last = 0, step = 0, timer = null;

  function show(to) {
    step = Math.max(0, Math.min(last, to));
    views.forEach((showStep) => showStep(step));
    slider.value = step;
    shown.textContent = `${step} of ${last}`;
    slider.setAttribute("aria-valuetext", `step ${shown.textContent}`);
  }

  function pause() {
    clearTimeout(timer);
    timer = null;
    play.textContent = "Play";
  }

  function tick() {
    if (step >= last) return pause();
    timer = setTimeout(() => { show(step + 1); tick(); }, (SECONDS * 1000) / last / Number(speed.value));
  }

  function toggle() {
    if (timer !== null) return pause();
    if (step >= last) show(0);
    play.textContent = "Pause";
    tick();
  }

  function sectionElement(section) {
    const [element, title, text] = ["section", "h2", "p"].map((name) => document.createElement(name));
    element.setAttribute("aria-label", section.title);
    title.append(`${section.title} `, document.createElement("small"));
    text.className = "text";
    element.append(title, text);
    return element;
  }

  play.addEventListener("click", toggle);
  slider.addEventListener("input", () => { pause(); show(Number(slider.value)); });
  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target === speed) return;
    const to = { ArrowLeft: step - 1, ArrowRight: step + 1, Home: 0, End: last }[event.key];
    if (to !== undefined) {
      pause();
      show(to);
    } else if (event.key === " " && event.target !== play) {  // the button toggles by itself
      toggle();
    } else {
      return;
    }
    event.preventDefault();
  });

  return {
    // Shows traces, at their last step.
    load(data) {
      pause();
      last = Math.max(0, ...data.sections.map((section) => section.steps.length));
      slider.max = last;
      place.classList.toggle("beside", data.beside);
      place.replaceChildren(...data.sections.map(sectionElement));
      views = data.sections.map((section, i) => denoisingView(data, section, place.children[i]));
      show(last);
    },
    // Starts from the first step, and moves unless motion is not wanted.
    begin() {
      if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
      show(0);
      toggle();
    },
  };
}
