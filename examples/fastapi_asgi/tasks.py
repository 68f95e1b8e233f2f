"""The dirty app: a sudoku solver, plain search in plain Python."""

from collections.abc import Iterator

from gunicorn.dirty import DirtyApp

REPORT = 200  # guesses between two chunks of progress


class Sudoku(DirtyApp):
    def init(self) -> None:
        """For each of the 81 cells, the others of its row, column and box."""
        self.peers = [
            {
                other
                for other in range(81)
                if other != cell
                and (
                    other // 9 == cell // 9
                    or other % 9 == cell % 9
                    or (other // 27, other % 9 // 3) == (cell // 27, cell % 9 // 3)
                )
            }
            for cell in range(81)
        ]

    def solve(self, puzzle: str) -> str | None:
        """The solution, or None: there is none."""
        *_, last = self.steps(puzzle)
        return last["solution"]

    def steps(self, puzzle: str) -> Iterator[dict]:
        """A stream: the board as it stands now and then, and at the end the solution."""
        board = ["" if cell in ".0" else cell for cell in puzzle]
        yield {"guesses": 0, "board": _text(board)}
        guesses = 0
        if all(board[cell] not in self._around(board, cell) for cell in range(81) if board[cell]):
            for solved in self._search(board):
                if solved:
                    break
                guesses += 1
                if guesses % REPORT == 0:
                    yield {"guesses": guesses, "board": _text(board)}
        yield {"guesses": guesses, "solution": _text(board) if all(board) else None}

    def _search(self, board: list[str]) -> Iterator[bool]:
        """False after each guess, True when the board is full; the board is changed in place."""
        empty = [cell for cell in range(81) if not board[cell]]
        if not empty:
            yield True
            return
        free = {cell: set("123456789") - self._around(board, cell) for cell in empty}
        cell = min(empty, key=lambda cell: len(free[cell]))  # the one with the fewest possibilities
        for digit in sorted(free[cell]):
            board[cell] = digit
            yield False
            for solved in self._search(board):
                yield solved
                if solved:
                    return
        board[cell] = ""

    def _around(self, board: list[str], cell: int) -> set[str]:
        return {board[peer] for peer in self.peers[cell]}


def _text(board: list[str]) -> str:
    return "".join(cell or "." for cell in board)
