from pathlib import Path

import pytest

from services import spool
from services.contract import EventBatch, JobEvent, StepMetrics
from services.spool import DamagedSegment

BATCH = EventBatch(
    events=[
        JobEvent(seq=seq, created_at=1.5, report=StepMetrics(step=seq, total_steps=9, metrics={"loss": 0.5}))
        for seq in range(4, 6)
    ]
)


@pytest.fixture
def segment(tmp_path: Path) -> Path:
    uri = spool.segment_uri(str(tmp_path), 2, 4)
    spool.write(uri, BATCH.model_dump_json().encode())
    return Path(uri)


def test_what_is_written_is_listed_and_read_again(segment: Path, tmp_path: Path) -> None:
    assert spool.segments(str(tmp_path), 2) == [(4, str(segment))]
    assert spool.segments(str(tmp_path), 1) == []
    assert spool.read(str(segment)) == BATCH
    assert spool.read_body(str(segment)) == BATCH.model_dump_json().encode()


def test_whichever_bit_flips_it_is_noticed(segment: Path) -> None:
    whole = segment.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        segment.write_bytes(flipped)
        with pytest.raises(DamagedSegment, match=r"2/00000004\.json"):
            spool.read(str(segment))


def test_however_short_a_segment_was_cut_it_is_noticed(segment: Path) -> None:
    whole = segment.read_bytes()
    for length in range(len(whole)):
        segment.write_bytes(whole[:length])
        with pytest.raises(DamagedSegment):
            spool.read(str(segment))
