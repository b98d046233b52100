"""The verbs that are more than one call, a module each; `moevision.cli` has the table of all verbs."""
