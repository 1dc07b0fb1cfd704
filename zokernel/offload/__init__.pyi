from .blocks import Blocks as Blocks
from .blocks import streamed_blocks as streamed_blocks
from .lockstep import Lockstep as Lockstep
from .replayed import Replayed as Replayed
from .staged import Staged as Staged
from .store import Memory as Memory
from .streamed_forward import StreamedForward as StreamedForward
from .working_copy import WorkingCopy as WorkingCopy
