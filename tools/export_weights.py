"""Writes a model's weights for other programs.

python tools/export_weights.py --model_path runs/13m --format safetensors --out 13m.safetensors
python tools/export_weights.py --model_path runs/gpt2 --format gpt2 --out gpt2/                # for transformers
python tools/export_weights.py --model_path runs/13m --format classic --out 13m.pt     # for train-llm-from-scratch
"""

import sys

from engine.checkpoint import CheckpointError
from engine.command_line import CommandLine, positive
from engine.config import ConfigError
from engine.device import DTYPES
from engine.formats import R50K_PADDED, R50K_TOKENS, WeightsError, resize_vocab
from engine.tokenizer import DEFAULT_TOKENIZER, load_encoding
from engine.weights import (
    check_target,
    find_weights,
    read_weights,
    recorded_tokenizer,
    write_classic,
    write_gpt2,
    write_weights,
)


def main(arguments: list[str] | None = None) -> int:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, metavar="PATH", help="run, checkpoint, .safetensors, GPT-2 folder, .pt")
    add("--out", required=True, metavar="PATH", help="a folder; a .pt for classic; a .safetensors")
    add("--format", required=True, choices=["classic", "gpt2", "safetensors"])
    add("--dtype", choices=list(DTYPES), help="of the numbers written; as they are stored without it")
    add(
        "--vocab_size", type=positive, metavar="N",
        help=f"rows of the embedding to keep; without it all, and for gpt2 {R50K_TOKENS} of {R50K_PADDED}",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace weights that are there; never those read, nor a run's")
    options = parser.parse_args(arguments)
    try:
        path = find_weights(options.model_path)
        is_folder = (
            options.format == "gpt2" or options.format == "safetensors" and not options.out.endswith(".safetensors")
        )
        check_target(options.out, path, is_folder=is_folder, overwrite=options.overwrite)
        config, state = read_weights(path)
        if options.vocab_size:
            _keep_words(options.vocab_size, config.vocab_size, recorded_tokenizer(path) or DEFAULT_TOKENIZER)
        if options.dtype:
            state = {name: tensor.to(DTYPES[options.dtype]) for name, tensor in state.items()}
        if options.format == "gpt2":
            out = write_gpt2(options.out, config, state, options.vocab_size)
        else:
            if options.vocab_size:
                config, state = resize_vocab(config, state, options.vocab_size)
            if options.format == "classic":
                out = write_classic(options.out, config, state)
            else:
                out = write_weights(options.out, config, state, recorded_tokenizer(path))
    except (CheckpointError, ConfigError, WeightsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path} -> {out}")
    return 0


def _keep_words(rows: int, there: int, tokenizer: str) -> None:
    """WeightsError where `rows` of the `there` are too few for the tokenizer's words; a model of fewer has its own."""
    if rows < there and rows < (words := load_encoding(tokenizer).n_vocab) <= there:
        raise WeightsError(f"--vocab_size {rows} would cut off words of {tokenizer}, which has {words}: keep those")


if __name__ == "__main__":
    sys.exit(main())
