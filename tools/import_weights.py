"""Brings another program's weights in, as a folder that the engine reads without translating.

python tools/import_weights.py --model_path gpt2/ --out weights/gpt2          # a folder that transformers saved
python tools/import_weights.py --model_path 13m.pt --out weights/13m          # train-llm-from-scratch's
"""

import sys

from engine.checkpoint import CheckpointError
from engine.command_line import CommandLine, ends_on_ctrl_c, positive
from engine.config import ConfigError
from engine.formats import WeightsError, resize_vocab
from engine.weights import check_target, find_weights, read_weights, recorded_tokenizer, write_weights


@ends_on_ctrl_c()
def main(arguments: list[str] | None = None) -> int:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, metavar="PATH", help="GPT-2 or GPT-NeoX folder, classic .pt, .safetensors, run")
    add("--out", required=True, metavar="PATH", help="folder, or .safetensors file, to write")
    add(
        "--vocab_multiple", type=positive, default=64, metavar="N",
        help="add rows to the embedding up to a multiple of N, which GPUs multiply faster; 1: none [%(default)s]",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace weights that are there; never those read, nor a run's")
    options = parser.parse_args(arguments)
    try:
        path = find_weights(options.model_path)
        is_folder = not options.out.endswith(".safetensors")
        check_target(options.out, path, is_folder=is_folder, overwrite=options.overwrite)
        config, state = read_weights(path)
        padded = -(-config.vocab_size // options.vocab_multiple) * options.vocab_multiple
        if padded != config.vocab_size:
            print(f"embedding: {config.vocab_size} rows padded to {padded}")
            config, state = resize_vocab(config, state, padded)
        out = write_weights(options.out, config, state, recorded_tokenizer(path))
    except (CheckpointError, ConfigError, WeightsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path} -> {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
