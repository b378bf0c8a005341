"""The command `jepa-audio`, also as `python -m jepa_audio`."""


def main() -> None:
    """Run a command; see `jepa_audio.cli.main.main`."""
    # Not at the top: a loader process imports this file again and does not need the command.
    from jepa_audio.cli.main import main as run_command  # noqa: PLC0415

    run_command()


if __name__ == "__main__":
    main()
