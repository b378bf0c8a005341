"""`python -m jepa_audio` is the command `jepa-audio`."""

from jepa_audio.cli import main

if __name__ == "__main__":
    main()
