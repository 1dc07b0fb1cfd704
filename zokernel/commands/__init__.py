"""Every subcommand of ``zokernel``, one module for each; :mod:`zokernel.commands.parser` says what it provides."""
