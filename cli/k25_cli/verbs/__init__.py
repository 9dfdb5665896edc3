"""One verb a file. A verb imports its stage inside its function, so that `--help` stays light."""
