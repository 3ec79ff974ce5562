"""`python -m gnomon`, as torchrun starts it: the same as the command `gnomon`."""

from gnomon.interfaces.cli import main

if __name__ == "__main__":
    main()
