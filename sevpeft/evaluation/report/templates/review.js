"use strict";
(() => {
  const pairs = Array.from(document.querySelectorAll("article"));
  const inputs = Array.from(document.querySelectorAll("article input"));
  const names = [...new Set(inputs.map((one) => one.name.split("/")[1]))];
  // Stores the ratings in the browser if it allows that, and no text of patients.
  const place = "sevpeft-review-" + pairs.map((one) => one.dataset.code).join("").slice(0, 40);
  const kept = (what) => { try { return what(window.localStorage); } catch { return null; } };
  const rated = () => {
    const ratings = {};
    for (const one of inputs) {
      if (one.type === "radio" ? one.checked : one.value.trim()) ratings[one.name] = one.value.trim();
    }
    return ratings;
  };
  const show = () => {
    const ratings = rated();
    const done = pairs.filter((pair) => names.every((name) => name === "comment" || `${pair.dataset.code}/${name}` in ratings));
    document.getElementById("count").textContent = `${done.length} of ${pairs.length} pairs rated`;
    kept((store) => store.setItem(place, JSON.stringify(ratings)));
  };
  const before = JSON.parse(kept((store) => store.getItem(place)) || "{}");
  for (const one of inputs) {
    if (!(one.name in before)) continue;
    if (one.type === "radio") one.checked = one.value === before[one.name];
    else one.value = before[one.name];
  }
  // Without the quote, a comment that begins like a formula would be one in a spreadsheet.
  const cell = (text) => `"${text.replace(/^[=+\-@\t\r]/, "'$&").replace(/"/g, '""')}"`;
  document.addEventListener("input", show);
  document.getElementById("clear").addEventListener("click", () => {
    if (!window.confirm("Clear all ratings?")) return;
    for (const one of inputs) { if (one.type === "radio") one.checked = false; else one.value = ""; }
    show();
  });
  document.getElementById("save").addEventListener("click", () => {
    const ratings = rated();
    const lines = [["code", ...names], ...pairs.map((pair) => [pair.dataset.code,
      ...names.map((name) => ratings[`${pair.dataset.code}/${name}`] || "")])];
    const text = "\ufeff" + lines.map((line) => line.map(cell).join(",")).join("\r\n") + "\r\n";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = "review.csv";
    link.click();
  });
  show();
})();
