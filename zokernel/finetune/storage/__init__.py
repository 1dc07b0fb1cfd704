"""Everything a run writes and reads back: checkpoints, journal, run folder, lock."""
