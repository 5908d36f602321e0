// The page is whole without this: it sorts tables, shows an arm in the figures, opens what a link names.
for (const table of document.querySelectorAll("table.brief")) {
  const body = table.tBodies[0];
  const sort = (column, button) => {
    const up = button.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    button.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => {
      const value = row.cells[column].dataset.value;
      return column === 0 ? Number(row.dataset.position) : value === undefined ? Infinity : Number(value);
    };
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === y) return 0;
      return x === Infinity ? 1 : y === Infinity ? -1 : up ? x - y : y - x;
    });
    body.append(...rows);
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(column, head));
  });
  for (const row of body.rows) {
    const marks = () => document.querySelectorAll(`[id$="-arm${row.dataset.position}"], [id*="-arm${row.dataset.position}-"]`);
    row.addEventListener("pointerenter", () => marks().forEach(mark => mark.classList.add("hot")));
    row.addEventListener("pointerleave", () => marks().forEach(mark => mark.classList.remove("hot")));
  }
}
const unfold = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const fold = target && target.querySelector("details");
  if (fold) fold.open = true;
};
addEventListener("hashchange", unfold);
unfold();
