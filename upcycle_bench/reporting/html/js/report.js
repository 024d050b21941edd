/* The page: each board's table comes alive, with its figures and the drawer. */

{
  const { boards, shared } = JSON.parse(document.getElementById("data").textContent);
  const open = makeDrawer(shared);
  document.querySelectorAll("section.board").forEach((section, place) => {
    const board = boards[place];
    const show = makeFigures(section, board, shared);
    liveTable(section, (row, opener) => open(board, board.rows[row], opener), show);
  });
  document.documentElement.classList.add("live");
}
