"""`qvlm publish DIR REPO`."""

import argparse

from qvlm_hf.cli.loading import silence
from qvlm_hf.hf.publishing import publish_folder
from qvlm_hf.hub.upload import Published

__all__ = ["add_arguments", "describe", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add("directory", metavar="DIR", help="a saved quantized model; its README.md is written anew")
    add("repo_id", metavar="REPO", help="where to: owner/name, made where it is missing")
    add("--private", action="store_true", help="make a private repository")
    revision = "branch, made where it is missing, or refs/pr/N (default: main)"
    add("--revision", metavar="R", help=revision)
    add("--create-pr", action="store_true", help="open a pull request instead of writing to main")
    add("--message", dest="commit_message", metavar="M", help="of the commit")
    base = "Hub id of the full-precision model (default: what quantizing recorded)"
    add("--base-model", metavar="ID", help=base)
    license_ = "identifier of a licence (default: that of the base model)"
    add("--license", metavar="L", help=license_)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    silence()
    published = publish_folder(
        options.directory,
        options.repo_id,
        private=options.private or None,
        revision=options.revision,
        create_pr=options.create_pr,
        commit_message=options.commit_message,
        base_model=options.base_model,
        license=options.license,
    )
    for line in describe(published):
        print(line)
    return 0


def describe(published: Published) -> list[str]:
    """What is on the Hub now."""
    url = published.pull_request_url or published.commit_url
    lines = [f"published {len(published.files)} files to {published.repo_id}: {url}"]
    return lines + ([f"not sent: {', '.join(published.left_out)}"] if published.left_out else [])
