"""A few of the mutated files; `python tests/attacks/fuzz.py` reads 100,000 of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import fuzz

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(
        not Path("/proc/self/statm").exists(), reason="memory is bounded by means of Linux"
    ),
]


@pytest.mark.parametrize("kind", ["models", "data"])
def test_mutated_files_are_refused_or_used(kind):
    outcome = fuzz(kind, 1500, seed=20261126)
    assert outcome.faults == []
    assert outcome.refused + outcome.used == 1500
    assert outcome.refused > 500
    assert outcome.used > 50, "mutations so small that some files stay good"
    assert outcome.longest < 2
    assert outcome.peak < 512 * 2**20


def test_what_no_file_may_do_is_seen():
    outcome = fuzz("traps", 7, seed=0, batch=4)
    expected = [
        "traps 1 (trap): Traceback",
        "traps 2 (trap): message 'of ours, of two\\nlines'",
        "traps 3 (trap): Traceback",
        "traps 4: exit -6",
        "traps 5: over 2.0 s",
    ]
    assert len(outcome.faults) == len(expected), outcome.faults
    for fault, start in zip(outcome.faults, expected, strict=True):
        assert fault.startswith(start)
    assert "ValueError: not ours" in outcome.faults[0]
    assert "MemoryError" in outcome.faults[2]
    assert outcome.refused == 3  # 0, 2 and 6
