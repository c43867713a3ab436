"""`dgd fit|validate|test|predict`: checks that need no model, then Lightning; its complaints as one-line errors."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise

from jsonargparse import ArgumentError, ArgumentParser

from dgd_lightning.commands.arms import check_arms_form, with_arm
from dgd_lightning.commands.bootstrap import bootstrap
from dgd_lightning.commands.errors import as_written, bad_file, from_parser_message, mistake_behind
from dgd_lightning.commands.main import ended_by_sigterm
from dgd_lightning.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Run a LightningCLI subcommand. Importing Lightning takes seconds, so it happens here, not at the top."""
    check_config_files(argv)
    check_arms_form(argv)
    with bootstrap():
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        from dgd_lightning.commands.lightning import ProjectCLI, import_plugins

        import_plugins()
    try:
        with ended_by_sigterm() if argv[0] in ("predict", "test") else nullcontext():
            ProjectCLI(args=list(argv))
    except ArgumentError as error:
        raise with_arm(from_parser_message(str(error)), argv) from error
    except MisconfigurationException as error:
        device = "gpu" in str(error).lower() or "accelerator" in str(error).lower()
        raise InputError(
            "trainer.accelerator" if device else "configuration",
            expected="a device that this machine has" if device else "a combination that Lightning accepts",
            received=error,
            hint="add --trainer.accelerator cpu, or auto" if device else "change the named argument",
        ) from error
    except Exception as error:
        if (mistake := mistake_behind(error)) is None:
            raise
        raise with_arm(as_written(mistake), argv) from error
    return 0


def check_config_files(argv: Sequence[str]) -> None:
    """Meets a config file that is missing or no YAML in the way that the whole parser would, seconds earlier."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    for before, argument in pairwise(argv):
        given = argument if before in ("-c", "--config") else argument.partition("--config=")[2]
        if not given or given == "-" or (os.path.exists(given) and not os.path.isfile(given)):  # a pipe is read once
            continue
        try:
            parser.parse_args(["--config", given])
        except ArgumentError as error:  # most files: this parser knows none of their keys
            if (mistake := bad_file(str(error))) is not None:
                raise mistake from error
