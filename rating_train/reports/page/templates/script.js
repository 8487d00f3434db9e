document.addEventListener("click", function (event) {
  var button = event.target.closest("th button");
  if (!button) return;
  var head = button.parentNode, table = head.closest("table"), body = table.tBodies[0];
  var place = Array.prototype.indexOf.call(head.parentNode.children, head);
  var down = head.getAttribute("aria-sort") === "descending" ? false : head.getAttribute("aria-sort") === "ascending" || place > 0 && !head.hasAttribute("aria-sort");
  function key(row) { return row.children[place].getAttribute("data-key"); }
  var rows = Array.prototype.slice.call(body.rows);
  rows.sort(function (a, b) {
    var x = key(a), y = key(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    var m = Number(x), n = Number(y), order = isNaN(m) || isNaN(n) ? (x < y ? -1 : x > y ? 1 : 0) : m - n;
    return down ? -order : order;
  });
  rows.forEach(function (row) { body.appendChild(row); });
  Array.prototype.forEach.call(head.parentNode.children, function (other) { other.removeAttribute("aria-sort"); });
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
});
