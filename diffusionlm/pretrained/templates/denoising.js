"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const [play, slider, shown, speed] = ["play", "step", "shown", "speed"].map((id) => document.getElementById(id));
const last = Math.max(...data.sections.map((section) => section.steps.length));
const SECONDS = 6;  // that the whole takes at speed 1

// Returns a function of the step that changes only what differs from what is on the page.
function view(section, element) {
  const text = element.querySelector(".text"), status = element.querySelector("small");
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

  function draw(position, step) {
    const states = history[position], span = spans[position];
    const at = states.findLastIndex(([since]) => since <= step);
    const [since, id, confidence] = at < 0 ? [0, -1, null] : states[at];
    const joined = whole.has(position) && step >= whole.get(position)[0];
    const now = since === step && step > 0;
    if (drawn[position] === `${at} ${joined} ${now}`) return;
    drawn[position] = `${at} ${joined} ${now}`;
    const masked = id < 0, given = since === 0 && !masked;
    const token = data.texts[masked ? states[at + 1][1] : id];
    const visible = joined ? whole.get(position)[1] : token;
    span.textContent = given ? visible : visible.replaceAll("\n", "\u21b5\n");
    const names = [];
    if (masked) names.push("mask", now ? "back" : "");
    else if (!given) names.push(confidence === null ? "unknown" : "on", now ? "fresh" : "");
    if (!given && !visible && !joined) names.push("empty");
    span.className = names.join(" ").trim();
    span.style.setProperty("--c", confidence ?? 0);
    if (masked) span.setAttribute("aria-hidden", "true"); else span.removeAttribute("aria-hidden");
    const sure = confidence === null ? "" : `, confidence ${confidence.toFixed(3)}`;
    if (masked) span.title = since ? `masked again in step ${since}` : "masked";
    else span.title = `${JSON.stringify(token)} (id ${id}), ` + (given ? "given" : `revealed in step ${since}${sure}`);
  }

  return (step) => {
    spans.forEach((_, position) => draw(position, step));
    const masked = spans.filter((span) => span.classList.contains("mask")).length;
    const steps = section.steps.length;  // other texts may take longer
    status.textContent =
      `step ${Math.min(step, steps)} of ${steps}, ${masked} masked; ` +
      `${section.nfe} forward passes, its batch took ${section.seconds} s`;
  };
}

const elements = document.querySelectorAll("section");
const views = data.sections.map((section, i) => view(section, elements[i]));
let step = 0, timer = null;

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

play.addEventListener("click", toggle);
slider.addEventListener("input", () => { pause(); show(Number(slider.value)); });
document.addEventListener("keydown", (event) => {
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

slider.max = last;
if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
  show(last);
} else {
  show(0);
  toggle();
}
