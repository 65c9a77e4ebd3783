"""Draw docs/guide/attention_layouts.svg: which thread holds which element of P as an accumulator and as a left operand.

    python docs/draw_attention_layouts.py

Every cell is computed from the layouts of the PTX ISA (9.7.15, D and A of wgmma);
testing/kernels/attention/test_probabilities.py compares the two for P of 16 bits and of 8.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tilelang_ext.kernels.attention.probabilities import key_of  # noqa: E402

DOCUMENT = ROOT / "docs" / "guide" / "attention_layouts.svg"
CELL, TOP, LEFT = 30, 46, 64
COLOURS = ("#c6dbef", "#fdd0a2", "#c7e9c0", "#dadaeb")  # of t = lane % 4
FONT = 'font-family="sans-serif"'


def accumulator(row: int, column: int) -> tuple[int, int]:
    """Return lane and register of an element of a float32 accumulator, of the 16 rows of a warp."""
    return row % 8 * 4 + column % 8 // 2, column // 8 * 4 + row // 8 * 2 + column % 2


def operand_16(row: int, k: int) -> tuple[int, int]:
    """Return lane and element of a left operand of 16 bits, 16 columns."""
    return row % 8 * 4 + k % 8 // 2, k // 8 * 4 + row // 8 * 2 + k % 2


def operand_8(row: int, k: int) -> tuple[int, int]:
    """Return lane and byte of a left operand of 8 bits, 32 columns."""
    return row % 8 * 4 + k % 16 // 4, k // 16 * 8 + row // 8 * 4 + k % 4


def _cell(x: int, y: int, colour: str, text: str) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{colour}" stroke="#666" stroke-width="0.6"/>'
        f'<text x="{x + CELL / 2}" y="{y + 19}" font-size="10" text-anchor="middle" {FONT}>{text}</text>'
    )


def _grid(x: int, y: int, title: str, rows, columns, colour_and_text, heading=str) -> list[str]:
    """Draw a table of cells; `heading` names a column."""
    parts = [f'<text x="{x}" y="{y - 22}" font-size="13" font-weight="bold" {FONT}>{title}</text>']
    for i, row in enumerate(rows):
        parts.append(f'<text x="{x - 6}" y="{y + i * CELL + 19}" font-size="10" text-anchor="end" {FONT}>row {row}</text>')
        for j, column in enumerate(columns):
            parts.append(_cell(x + j * CELL, y + i * CELL, *colour_and_text(row, column)))
    for j, column in enumerate(columns):
        parts.append(
            f'<text x="{x + j * CELL + CELL / 2}" y="{y - 6}" font-size="9" fill="#555" text-anchor="middle" {FONT}>'
            f"{heading(column)}</text>"
        )
    return parts


def draw() -> str:
    """Return the picture."""
    rows = (0, 1, 8, 9)  # g = 0, 1 and 8 below
    height = len(rows) * CELL

    def of(layout, prefix):
        def colour_and_text(row, column):
            lane, register = layout(row, column)
            return COLOURS[lane % 4], f"{lane}:{prefix}{register}"

        return colour_and_text

    def of_codes(row, k):
        lane, byte = operand_8(row, k)
        assert accumulator(row, key_of(k))[0] == lane
        return COLOURS[lane % 4], f"{lane}:b{byte}"

    def of_piece(row, piece):
        return COLOURS[(piece ^ row % 8) // 2], str(piece ^ row % 8)

    y, parts = TOP, []
    parts += _grid(LEFT, y, "16 bits: the accumulator, thread : register", rows, range(16), of(accumulator, "c"))
    x = LEFT + 17 * CELL + LEFT
    parts += _grid(x, y, "and the left operand, thread : element - the same", rows, range(16), of(operand_16, "a"))
    y += height + 2 * TOP
    title = "8 bits: two blocks of 16 columns of the accumulator"
    parts += _grid(LEFT, y, title, rows, range(32), of(accumulator, "c"))
    y += height + 2 * TOP
    title = "and the left operand, thread : byte; above each column the key whose value is multiplied there, by key_of"
    parts += _grid(LEFT, y, title, rows, range(32), of_codes, lambda k: str(key_of(k)))
    y += height + 2 * TOP
    title = "16 bits through shared memory: which 16-byte part of P lies at which place of a row of 128 bytes"
    parts += _grid(LEFT, y, title, range(8), range(8), of_piece, lambda place: f"at {place}")
    width, height = x + 16 * CELL + 20, y + 8 * CELL + 20
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    DOCUMENT.write_text(draw())
