"""`flora report`."""

from pathlib import Path

import click

from flora.cli.options import json_option


@click.command("report")
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="File to write the page to.",
)
@json_option
def command(bundles: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Write the report of one bundle, or a page that compares several of BUNDLES.

    The page is one file that needs no network. Each bundle must be as it was exported. Bundles of other models or from
    other devices are shown side by side; latencies are compared only where they can be, and the page says so.
    """
    from export.report.comparison import comparison_page
    from export.report.page import report_page, sound_bundle
    from flora.artifact import new_file
    from flora.cli.output import print_json
    from flora.errors import InputError

    if len({path.resolve() for path in bundles}) < len(bundles):
        raise InputError("A bundle is named twice; name each one once.")
    if out.is_dir():
        raise InputError(f"{out} is a folder; give the name of a file to write, such as {out / 'report.html'}.")
    if inside := [path for path in bundles if out.resolve().is_relative_to(path.resolve())]:
        raise InputError(f"{out} lies in the bundle {inside[0]}, which stays as it was exported; give another place.")
    sound = [sound_bundle(path) for path in bundles]
    text = report_page(sound[0]) if len(sound) == 1 else comparison_page(sound)
    with new_file(out) as partial:
        partial.write_text(text, encoding="utf-8")
    if as_json:
        print_json({"report": str(out), "bundles": [str(path) for path in bundles], "size_bytes": out.stat().st_size})
    else:
        print(f"Wrote {out}")
