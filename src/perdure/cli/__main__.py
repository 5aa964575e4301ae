"""``python -m perdure.cli``, as earlier scripts say it."""

from perdure.cli import main

if __name__ == "__main__":
    main()
