"""`flora doctor`."""

import click

from flora.cli.options import json_option


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Say what is installed, which providers and engine builders really work here, and what to install.

    Every line was tried, not only looked up. Exit code 4 when nothing here can run an exported model.
    """
    from dataclasses import asdict

    from flora.cli.output import print_json, print_table
    from flora.errors import BackendMissingError
    from flora.pipeline.doctor import diagnose
    from flora.provenance import device_facts

    findings = diagnose()
    if as_json:
        print_json({"device": device_facts(), "findings": [asdict(finding) for finding in findings]})
    else:
        print_table(
            ["", "works", "found", "what to do"],
            [[f.name, "yes" if f.works else "no", f.found, f.advice] for f in findings],
            title=", ".join(device_facts().values()),
        )
    if not any(finding.works for finding in findings if finding.name.startswith("ONNX Runtime")):
        raise BackendMissingError("No ONNX Runtime works here, so nothing exported can be verified; see the table.")
