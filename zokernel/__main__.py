"""``python -m zokernel`` is the ``zokernel`` command."""

import sys

from zokernel.cli import main

sys.exit(main())
