"""The command `jepa-audio`, also as `python -m jepa_audio`."""


def main() -> None:
    """Run a command; see `jepa_audio.cli.main.main`."""
    # Not at the top: a reading process runs the script that started the run again, and needs
    # nothing of this.
    from jepa_audio.cli.main import main as run  # noqa: PLC0415

    run()


if __name__ == "__main__":
    main()
