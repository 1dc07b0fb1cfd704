"""Every subcommand of ``zokernel``, one per file."""
