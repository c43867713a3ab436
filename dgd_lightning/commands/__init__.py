"""The `dgd` command: what each subcommand takes and prints."""
