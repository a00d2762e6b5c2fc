"""The verbs of `alexnet-flax`, a module each: HELP, DESCRIPTION, `add_arguments` and `run`.

A verb imports what it needs only when it runs, so that `--help` and mistakes are answered at once.
"""
