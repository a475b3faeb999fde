"""`numprune convert`: checkpoints of other projects in transformers' form."""

from pathlib import Path
from typing import Annotated

import typer

from numprune.checkpoint import check_output, check_space
from numprune.llamagen_conversion import SIZES, convert_llamagen
from numprune.vq_conversion import convert_vq

app = typer.Typer(help="Converts checkpoints of other projects into folders that `from_pretrained` loads.")

Checkpoint = Annotated[Path, typer.Argument(help="The official file: .pt, or .safetensors.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it must not hold anything yet.")]
_SIDE = "Tokens a side of an image: its pixels by 16, or by 8."
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def llamagen(
    checkpoint: Checkpoint,
    output: Output,
    size: Annotated[str | None, typer.Option(help=f"One of {', '.join(SIZES)}.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads, instead of --size.")] = None,
    grid_size: Annotated[int | None, typer.Option(min=1, help=_SIDE)] = None,
    average: Annotated[
        bool, typer.Option("--average", help="Take the running average of the weights where the file has both.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Converts an official LlamaGen, conditioned on classes or on captions.

    Example:
        numprune convert llamagen c2i_XXL_384.pt --size XXL -o models/llamagen-xxl
    """
    check_output(output)
    check_space(output, 2 * (checkpoint.stat().st_size if checkpoint.is_file() else 0))
    config = convert_llamagen(checkpoint, output, size=size, heads=heads, grid_size=grid_size, average=average)
    kind = f"{config.num_classes} classes" if config.num_classes else f"captions of {config.condition_tokens} tokens"
    typer.echo(
        f"{output}: {config.num_hidden_layers} blocks of width {config.hidden_size}, {config.num_attention_heads} "
        f"heads, {config.grid_size} x {config.grid_size} of {config.codebook_size} tokens, conditioned on {kind}."
    )


@app.command("llamagen-vq")
def llamagen_vq(
    checkpoint: Checkpoint,
    output: Output,
    grid_size: Annotated[int, typer.Option(min=1, help=_SIDE)] = 24,
    debug: Debug = False,
) -> None:
    """Converts LlamaGen's image tokenizer; in the folder `decoder` of a model it decodes that model's images.

    Example:
        numprune convert llamagen-vq vq_ds16_c2i.pt -o models/llamagen-xxl/decoder
    """
    check_output(output)
    check_space(output, 2 * (checkpoint.stat().st_size if checkpoint.is_file() else 0))
    config = convert_vq(checkpoint, output, grid_size=grid_size)
    typer.echo(f"{output}: {config.num_embeddings} entries of {config.embed_dim}, {grid_size} x {grid_size} tokens.")
