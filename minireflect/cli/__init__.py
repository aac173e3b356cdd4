"""The console command `minireflect`: the list of commands, and nothing that takes long to import.

minireflect sample "a tall red candle in still air"
minireflect train srrl --rounds 0
minireflect inspect checkpoint.safetensors
"""

import difflib
import sys

COMMANDS = {
    "sample": "sample pictures of prompts, and say what the inspector reads in them",
    "train": "train a model; `minireflect train --help` lists what can be trained",
    "inspect": "say what is in a file: a checkpoint, a LoRA, or a picture of the synthetic world",
}
TRAINED = {  # command: (what it trains, minutes of the preset cpu on two cores)
    "srrl": ("reinforce the diffusion model: SRRL, DDPO or GRPO; with --base a LoRA on Stable Diffusion", 9),
    "all": ("autoencoder, diffusion, reward and srrl from nothing; with --scenes graphs all of RL-RIG", 85),
    "autoencoder": ("pictures to latents and back", 13),
    "diffusion": ("the base: latents from noise and a prompt", 25),
    "reward": ("the learned reward: does the prompt hold for the picture?", 35),
    "rlrig": ("reinforce the Actor, then the editor, of RL-RIG", 13),
    "checker": ("RL-RIG's Checker, and the judge that measures from outside", 25),
    "actor": ("RL-RIG's Actor: which edit does the picture need?", 13),
    "reason-grpo": ("reinforce ReasonGen-R1 on rationale and picture", 17),
    "reason-sft": ("ReasonGen-R1 on true rationales", 45),
    "vq": ("the codebook of image tokens", 11),
    "captioner": ("the reader of rationales: does the picture keep what was written?", 11),
}


def main(words: list[str] | None = None) -> int:
    """Run a command.  -> the exit status: 0, 1 when a check fails, 2 on bad input, 130 when stopped"""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help"):
        print(
            listing(
                "minireflect COMMAND", COMMANDS, "`minireflect COMMAND --help` lists a command's options."
            )
        )
        return 0 if words else 2
    command, rest = words[0], words[1:]
    try:
        if command not in COMMANDS:
            raise ValueError(unknown(command, COMMANDS))
        if command == "train" and rest and not rest[0].startswith("-") and rest[0] not in TRAINED:
            raise ValueError(unknown(rest[0], TRAINED))
        if command == "train" and rest[:1] in (["-h"], ["--help"]):
            commands = {name: f"{what} ({minutes} min)" for name, (what, minutes) in TRAINED.items()}
            last = (
                "Minutes are about those of the preset cpu on two cores. `minireflect train COMMAND --help` lists its\n"
                "options; `minireflect train` alone is `minireflect train srrl`, from the shipped weights."
            )
            print(listing("minireflect train [COMMAND] [OPTIONS]", commands, last))
            return 0
        if command == "train":
            from .train import main as run
        elif command == "sample":
            from .sample import main as run
        else:
            from .inspect import main as run
        return run(rest)
    except KeyboardInterrupt:
        print(f"minireflect {command}: stopped; what a run has saved can be resumed", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"minireflect {command}: {error}", file=sys.stderr)
        return 2


def unknown(name: str, names: dict[str, object]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    meant = f", did you mean {near[0]}?" if near else ";"
    return f"there is no command {name!r}{meant} it is one of {', '.join(names)}"


def listing(usage: str, commands: dict[str, str], last: str) -> str:
    """The help of a command that has commands: one line each."""
    width = max(map(len, commands))
    return "\n".join(
        [f"usage: {usage}", "", *(f"  {n:{width}}  {what}" for n, what in commands.items()), "", last]
    )
