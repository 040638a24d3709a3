"""Runs the driver, the main program of a job, so that a test decides when the last rows are encoded.

Each row is a piece of its own. The last pieces are encoded only when a file named `gate` exists beside the training
file.
"""

import sys
import time
from pathlib import Path

from services import storage
from services.contract import Recipe
from services.training import driver, preparation
from services.training.data import encoding, row_order
from services.training.data.encoding import Encoded, Piece, encode_piece

NUM_ROWS = 24
*_, (_, LATE) = row_order.windows([1] * NUM_ROWS, seed=0, epoch=0)


def encode_behind_the_gate(recipe: Recipe, folder_uri: str | None, piece: Piece) -> Encoded:
    gate = Path(storage.fetch(recipe.training_uri)).with_name("gate")
    while piece.number in LATE and not gate.exists():
        time.sleep(0.05)
    return encode_piece(recipe, folder_uri, piece)


if __name__ == "__main__":
    encoding.ROWS_PER_PIECE = 1
    preparation.encode_piece = encode_behind_the_gate
    driver.run_and_end(sys.argv[1])
