"use strict";
// A click on a heading sorts the rows of each body of its table by that column, numbers by value, and turns round on the next.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const cell = row.cells[column];
    const said = cell.dataset.v ?? cell.textContent.trim();
    const number = Number(said === "" ? NaN : said);
    return Number.isNaN(number) ? said : number;
  };
  const order = (a, b) => {
    if ((a === "") !== (b === "")) return a === "" ? 1 : -1; // what is not known comes last, whichever way round
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  };
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const turned = heading.getAttribute("aria-sort") === "ascending";
    for (const other of headings) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", turned ? "descending" : "ascending");
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((row) => !row.classList.contains("group"));
      rows.sort((a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        const known = x !== "" && y !== "";
        return turned && known ? -order(x, y) : order(x, y);
      });
      body.append(...rows);
    }
  }));
}
