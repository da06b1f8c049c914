"""The command `fastnce push`."""

from __future__ import annotations

from ..export import DTYPES
from ..hub import push
from ..translate.chosen import chosen_model
from ..translate.named import model_path
from .parsing import EPOCH_HELP, GENERATOR_HELP, MODEL_HELP, TRUST_HELP, command_parser

DTYPE_HELP = "of the uploaded weights: float32, float16 or bfloat16; default: float32, or as an export has them"


def main(arguments: list[str]) -> int:
    """Upload a generator to the Hugging Face Hub: model.safetensors, config.json and a model card."""
    parser = command_parser("push", main)
    parser.add_argument("run", type=model_path, metavar="RUN|DIR|FILE.pth", help=MODEL_HELP)
    parser.add_argument("name", metavar="USER/NAME", help="of the model on the hub; it is created if there is none")
    parser.add_argument("--private", action="store_true", help="a new model is private; default: public")
    parser.add_argument("--generator", default="", help=GENERATOR_HELP)
    parser.add_argument("--epoch", default="", metavar="N|best|last", help=EPOCH_HELP)
    parser.add_argument("--branch", help="of the model's repository (default main)")
    parser.add_argument("--dtype", default="", choices=tuple(DTYPES), help=DTYPE_HELP)
    parser.add_argument("--trust-code", action="store_true", help=TRUST_HELP)
    args = parser.parse_args(arguments)
    path, generator = chosen_model(args.run, args.epoch, args.generator)
    address = push(
        path,
        args.name,
        generator=generator,
        private=True if args.private else None,
        branch=args.branch,
        dtype=args.dtype,
        trust_code=args.trust_code,
    )
    print(address)
    return 0
