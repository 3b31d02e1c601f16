"""`python -m gemma_mtp` is the command `gemma-mtp`."""

from gemma_mtp.cli import main

if __name__ == "__main__":
    main()
