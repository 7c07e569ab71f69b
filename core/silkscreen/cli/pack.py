"""`silkscreen pack`: makes a wheel of a trained template."""

from __future__ import annotations

from pathlib import Path

import click

from silkscreen.cli.offline_option import offline_option


@click.command("pack")
@click.argument("template")
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--base", help="Id of the base it was trained on.  [default: the template's only one, or flux2-tiny]")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of the weights in the wheel.",
)
@click.option("--name", help="Name of the template.  [default: the folder's]")
@click.option(
    "--project",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the project of a bare template folder is made.  [default: silkscreen-NAME beside it]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the wheel goes.  [default: dist in the project]",
)
@click.option("--overwrite", is_flag=True, help="Replace weights, project files and a picture that exist.")
@click.option(
    "--isolation/--no-isolation",
    default=True,
    show_default=True,
    help="Build in an environment of its own, with the build backend downloaded, or with what is installed.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Install the wheel into a fresh environment and draw with it.",
)
@click.option("--input", "inputs", multiple=True, metavar="INPUT=VALUE", help="A template input to draw with.")
@click.option(
    "--proof",
    "picture",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the picture drawn with the installed wheel is kept.",
)
@click.option("--trust-code", is_flag=True, help="Let the code of a template named by a folder run.")
@offline_option
def command(
    template: str,
    checkpoint: Path,
    base: str | None,
    dtype: str,
    name: str | None,
    project: Path | None,
    out: Path | None,
    overwrite: bool,
    isolation: bool,
    verify: bool,
    inputs: tuple[str, ...],
    picture: Path | None,
    trust_code: bool,
) -> None:
    """Pack TEMPLATE with the trained tensors of CHECKPOINT into a wheel, and prove that the wheel works.

    TEMPLATE is an installed template whose project folder is at hand, a project folder, or a folder with a model.py,
    of which a project is made. CHECKPOINT is what `silkscreen train` wrote. What was not trained keeps the weights that
    the template has, or is as its model's constructor makes it. The file that TEMPLATE_MODEL_PATH names is written, and
    the wheel is built with it.

    \b
    Examples:
      silkscreen pack brightness run/epoch-4.safetensors --overwrite --proof proof.png
      silkscreen pack my-template run/epoch-4.safetensors --trust-code --input scale=0.8
      pip install silkscreen-my-template/dist/*.whl

    The proof: the wheel is installed into a fresh environment, which sees the packages installed here but not the
    project, and draws there, when the base is on this disk.

    Building needs the package build: pip install "silkscreen[authoring]"
    """
    if not verify and (picture or inputs):
        raise click.UsageError("--proof and --input are for the picture that --no-verify leaves out")

    import torch

    from silkscreen.authoring.pack import pack

    packed = pack(
        template,
        checkpoint,
        base=base,
        dtype=getattr(torch, dtype),
        name=name,
        project=project,
        out=out,
        overwrite=overwrite,
        isolation=isolation,
        verify=verify,
        inputs=inputs,
        picture=picture,
        trust_code=trust_code,
        progress=click.echo,
    )
    click.echo(f"packed: {packed.wheel}")
    if packed.picture:
        click.echo(f"proof:  {packed.picture}")
