"""The command line: `tubelet VERB`."""
