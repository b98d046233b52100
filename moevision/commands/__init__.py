"""The verbs that work on saved models: one module each, with `main(arguments)`."""
