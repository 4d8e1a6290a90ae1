"use strict";
(() => {
  // Opens all folded parts for printing.
  const folded = () => Array.from(document.querySelectorAll("details:not([open])"));
  let opened = [];
  window.addEventListener("beforeprint", () => { opened = folded(); opened.forEach((one) => { one.open = true; }); });
  window.addEventListener("afterprint", () => { opened.forEach((one) => { one.open = false; }); });
  const form = document.getElementById("filter");
  if (!form) return;
  const stratum = document.getElementById("stratum");
  const hit = document.getElementById("hit");
  const search = document.getElementById("search");
  const differ = document.getElementById("differ");
  const count = document.getElementById("count");
  const nothing = document.getElementById("nothing");
  // Arabic search ignores spelling variants: no vowel marks, and one form each of alef, yeh and heh.
  const fold = (text) => text.normalize("NFKC").toLowerCase()
    .replace(/[\u064b-\u065f\u0670\u0640]/g, "").replace(/[أإآٱ]/g, "ا").replace(/ى/g, "ي").replace(/ة/g, "ه")
    .replace(/\s+/g, " ").trim();
  // Lexicon matches of the trained arms; the base model is left out, because it nearly always differs.
  const disagree = (element) => {
    const all = Array.from(element.querySelectorAll(".answer.arm"));
    const trained = all.filter((answer) => answer.dataset.arm !== "base");
    const kinds = (trained.length > 1 ? trained : all).map((answer) => ["referral", "reassurance", "medicine", "dose"]
      .filter((kind) => answer.querySelector(`.hits .${kind}`)).join());
    return new Set(kinds).size > 1;
  };
  const cases = Array.from(document.querySelectorAll(".case"), (element) => ({
    element,
    stratum: element.dataset.stratum,
    text: fold(Array.from(element.querySelectorAll(".text, .id"), (part) => part.textContent).join(" ")),
    differ: disagree(element),
    has: (kind) => element.querySelector(kind === "cut" ? ".arm .cut" : `.arm .hits .${kind}`) !== null,
  }));
  for (const option of Array.from(stratum.options)) {
    if (option.value && !cases.some((one) => one.stratum === option.value)) option.remove();
  }
  const show = () => {
    const wanted = fold(search.value);
    let shown = 0;
    for (const one of cases) {
      const matches = (!stratum.value || one.stratum === stratum.value) && one.text.includes(wanted)
        && (!hit.value || one.has(hit.value)) && (!differ.checked || one.differ);
      one.element.hidden = !matches;
      shown += matches ? 1 : 0;
    }
    count.textContent = `${shown} of ${cases.length} questions`;
    nothing.hidden = shown > 0;
  };
  form.addEventListener("input", show);
  form.addEventListener("change", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  show();
})();
