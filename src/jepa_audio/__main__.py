"""The command `jepa-audio`, also as `python -m jepa_audio`."""

from jepa_audio.cli.main import main

if __name__ == "__main__":
    main()
