"""``python -m lowbit.cli``: the command where its script is not on the path."""

from lowbit.cli import main

if __name__ == "__main__":  # worker processes import this module under another name
    main()
