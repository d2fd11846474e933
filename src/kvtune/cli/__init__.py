"""The command line: one thin file per verb, wired by `kvtune.cli.main`."""
