"""``python -m alignkit``, and ``accelerate launch -m alignkit`` on several processes."""

from alignkit.cli import main

if __name__ == "__main__":
    main()
