"""The command line: one file per verb, found by its name. Verb modules import nothing heavy until they run."""
