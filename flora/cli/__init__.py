"""The command line. Commands are named here and loaded when they run, so that help needs no torch."""

import importlib
import signal
import sys

import click

from flora.errors import FloraError, near_matches

COMMANDS = {
    "doctor": "Say what is installed, what really works here, and what to install.",
    "build": "Factorize a trained model into a supernet.",
    "import": "Turn files that FLORA's authors released into supernets, models and ranks.",
    "filter": "Keep the candidates of each block that cost the model least.",
    "train": "Train a supernet, or fine-tune a compact model.",
    "search": "Find the best ranks within a budget.",
    "compress": "Lead a trained model to a verified bundle within a budget, in one command.",
    "latency-table": "Measure what a model's layers cost in milliseconds here, by rank.",
    "materialize": "Turn a supernet and ranks into a compact model.",
    "export": "Turn a compact model into verified ONNX files and engines.",
    "calibrate": "Quantize an ONNX file, the way that costs least.",
    "sensitivity": "Measure how far each layer alone in INT8 moves the logits.",
    "verify": "Check a bundle: files, golden outputs and, given images, accuracy.",
    "bench": "Time the artefacts of a bundle together: latency, throughput, memory.",
    "report": "Write the report of a bundle, or compare several on one page.",
    "eval": "Measure the accuracy of a model on labelled images.",
}
# Where a name is none of a module: a keyword of Python, or with a hyphen in it.
MODULES = {"import": "import_released", "latency-table": "latency_table"}


class LazyGroup(click.Group):
    """A group whose commands are imported from `flora.cli.NAME` when they are asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"flora.cli.{MODULES.get(name, name)}").command

    def resolve_command(self, context: click.Context, args: list[str]):
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            context.fail(f"No such command '{args[0]}'.{near_matches(args[0], COMMANDS)} See flora --help.")
        return super().resolve_command(context, args)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    epilog="Exit codes: 0 pass, 1 error, 2 usage, 3 a gate failed (files kept and labelled), 4 a backend is missing.",
)
@click.version_option(package_name="flora-vit", prog_name="flora")
def flora() -> None:
    """Make a trained Vision Transformer small and fast, and ship it with proof.

    flora build, flora materialize and flora export lead from a timm model to a verified bundle; each prints what it
    wrote and the next command to type.
    """


def main() -> None:
    """The entry point `flora`: runs a command and turns flora's errors into a message and an exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        flora.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except FloraError as error:
        click.echo(f"flora: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        click.echo(f"flora: {error}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        click.echo("flora: interrupted; what was not finished was not written.", err=True)
        sys.exit(130)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
