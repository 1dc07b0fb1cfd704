"""The journal: everything a zeroth-order run did to the weights, in a few numbers per step.

Needs neither transformers nor the model: ``format`` is the bytes, ``reader`` and ``writer`` are the file, ``replay``
turns base weights and a journal back into the weights of any step, ``ask_tell`` keeps losses that come from elsewhere.
"""

from zokernel.journal.ask_tell import ToldJournal
from zokernel.journal.format import Event, Step
from zokernel.journal.hashes import weights_sha256
from zokernel.journal.reader import Journal
from zokernel.journal.replay import make_header, make_optimizer, record_of, replay_
from zokernel.journal.writer import JournalWriter

__all__ = [
    "Event",
    "Journal",
    "JournalWriter",
    "Step",
    "ToldJournal",
    "make_header",
    "make_optimizer",
    "record_of",
    "replay_",
    "weights_sha256",
]
