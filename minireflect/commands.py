"""What `minireflect train` can train: the one list of its commands, read by help, config and stages."""

from typing import NamedTuple


class Trained(NamedTuple):
    minutes: int  # of the preset cpu on two cores
    records: str  # the records of `Config` that it reads; the options of the first carry no prefix
    about: str


# fmt: off
TRAINED = {
    "srrl": Trained(9, "srrl mix sampler evaluation", "a diffusion model by SRRL, DDPO, GRPO; LoRA: --base"),
    "all": Trained(85, "", "autoencoder, diffusion, reward and srrl; with --scenes graphs all of RL-RIG"),
    "autoencoder": Trained(13, "autoencoder", "pictures to latents and back"),
    "diffusion": Trained(25, "diffusion", "the base: latents from noise and a prompt"),
    "reward": Trained(35, "reward", "the learned reward: does the prompt hold for the picture?"),
    "rlrig": Trained(13, "rlrig evaluation", "RL-RIG by reinforcement: the Actor, then the editor"),
    "checker": Trained(25, "checker", "RL-RIG's Checker, and the judge that measures from outside"),
    "actor": Trained(13, "actor", "RL-RIG's Actor: which edit does the picture need?"),
    "reason-grpo": Trained(17, "grpo mix evaluation", "ReasonGen-R1 by reinforcement: rationale and picture"),
    "reason-sft": Trained(45, "sft evaluation", "ReasonGen-R1 on true rationales"),
    "vq": Trained(11, "vq evaluation", "the codebook of image tokens"),
    "captioner": Trained(11, "captioner", "the reader of rationales: does the picture keep its words?"),
}
# fmt: on
RIG = ("checker", "actor", "rlrig")
REASON = ("vq", "captioner", "reason-sft", "reason-grpo")
CHECKPOINT = "srrl finetune sampler"  # the records of srrl with --base


def stages_of(command: str, scenes: str, base: str | None = None) -> tuple[str, ...]:
    """The stages of a command, in order; `base` is the published checkpoint that a LoRA is trained on."""
    if command == "all" and scenes == "graphs":
        return "autoencoder", "diffusion", "checker", "judge", "actor", "rlrig"
    several = {"all": ("autoencoder", "diffusion", "reward", "srrl"), "checker": ("checker", "judge")}
    return ("lora",) if base is not None else several.get(command, (command,))


def records_of(command: str, scenes: str, base: str | None = None) -> tuple[str, ...]:
    """The records of all its stages."""
    rows = [TRAINED[stage].records for stage in stages_of(command, scenes, base) if stage in TRAINED]
    return tuple(dict.fromkeys((CHECKPOINT if base is not None else " ".join(rows)).split()))
