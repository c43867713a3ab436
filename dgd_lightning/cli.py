"""The entry point of `dgd`, also as `python -m dgd_lightning.cli`; the subcommands are in `commands/`."""

import sys

from dgd_lightning.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
